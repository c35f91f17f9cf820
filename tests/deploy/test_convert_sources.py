"""Sources as published: every tensor counts, ids are read as their writer counted them, older releases are upgraded."""

import json
from pathlib import Path

import pytest
import torch
from deploy_toys import (
    DRAFT_VOCAB,
    HIDDEN,
    LAYERS,
    VERIFIER,
    VOCAB,
    WIDTH,
    as_older_release,
    edit_config,
    edit_tensors,
    layer,
    save,
)
from naive_eagle1 import NaiveEagle
from naive_eagle3 import NaiveEagle3
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from speculators import SpeculatorModel, SpeculatorModelConfig
from speculators.convert import convert_checkpoint, convert_model
from speculators.deploy.check import check_checkpoint
from speculators.deploy.export import export_checkpoint
from speculators.interfaces import VerifierStates
from speculators.utils.loading import load_model_layers

IDS = "eagle_aux_hidden_state_layer_ids"
NUM_TOKENS = 6
VERIFIERS = load_model_layers(["embed_tokens.weight", "model.norm.weight"], VERIFIER)


def converted(source: Path, tmp_path: Path, **options):
    path = convert_checkpoint(source, tmp_path / "out", verifier=VERIFIER, **options).path
    return SpeculatorModel.from_pretrained(str(path), verifier=VERIFIER, dtype=torch.float32).eval()


def first_logits(drafter, states: VerifierStates) -> torch.Tensor:
    with torch.no_grad():
        return drafter.draft_logits(states, 1)[0]


def biases(prefix: str, parts: str = "qkv", scale: float = 1.0) -> dict[str, torch.Tensor]:
    sizes = {"q": LAYERS["num_attention_heads"] * WIDTH, "k": 2 * WIDTH, "v": 2 * WIDTH}
    return {f"{prefix}self_attn.{part}_proj.bias": scale * torch.randn(sizes[part]) for part in parts}


def llama_layers(rope_theta: float):
    rope = {"rope_type": "default", "rope_theta": rope_theta}
    return AutoConfig.for_model("llama", **LAYERS, rope_parameters=rope)


def scaled(tensors: dict[str, torch.Tensor]) -> None:
    """Weights of a trained layer's size: scores that a bias moves, and no overflow."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.ndim == 2:
            tensors[name] = tensor / tensor.shape[1] ** 0.5


@pytest.mark.parametrize("what", ["qkv", "qkv and mlp", "model_type mixtral"])
def test_an_eagle3_head_drafts_as_its_own_formulas_say(what, eagle3_head, tmp_path):
    edit_tensors(eagle3_head, scaled)
    extra = {} if "model_type" in what else biases("midlayer.")
    if "mlp" in what:
        extra["midlayer.mlp.down_proj.bias"] = torch.randn(HIDDEN)
    edit_tensors(eagle3_head, lambda tensors: tensors.update(extra))
    if "model_type" in what:
        edit_config(eagle3_head, lambda values: values.update(model_type="mixtral", num_local_experts=8))
    drafter = converted(eagle3_head, tmp_path)
    tokens, aux = torch.arange(5, 5 + NUM_TOKENS + 1), torch.randn(NUM_TOKENS - 1, 3 * HIDDEN)
    states = VerifierStates(tokens, torch.cat([aux, torch.zeros(2, 3 * HIDDEN)]), torch.zeros(NUM_TOKENS + 1, HIDDEN))
    ours_V = first_logits(drafter, states)

    source = load_file(eagle3_head / "model.safetensors")
    weights = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in source.items()} | VERIFIERS
    nested = AutoConfig.for_model(
        **{**LAYERS, "model_type": "llama"}, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    flags = dict.fromkeys(("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"), False)
    batch = {
        "input_ids": tokens[None, 1:-1],
        "document_ids": torch.zeros(1, NUM_TOKENS - 1, dtype=torch.long),
        "position_ids": torch.arange(NUM_TOKENS - 1)[None],
        "hidden_states": aux[None],
    }
    naive = NaiveEagle3(weights, nested, **flags)
    normed = naive.unroll(batch, 1)[0][-1]
    theirs_V = naive.w["lm_head.weight"] @ normed
    kept = source["d2t"] + torch.arange(DRAFT_VOCAB)
    torch.testing.assert_close(ours_V[kept].double(), theirs_V.detach(), atol=1e-5, rtol=1e-5)
    report = check_checkpoint(tmp_path / "out")
    assert {found.code for found in report.findings} <= {"dtype-differs"}


@pytest.fixture
def eagle1_head(tmp_path):
    """As EAGLE's first repository writes it, with the biases of its `qkv_bias`."""
    torch.manual_seed(0)
    tensors = layer("layers.0.", HIDDEN) | {"fc.weight": torch.randn(HIDDEN, 2 * HIDDEN)} | biases("layers.0.")
    tensors.pop("layers.0.input_layernorm.weight")
    scaled(tensors)
    tensors["embed_tokens.weight"] = VERIFIERS["embed_tokens.weight"].clone()
    values = {
        **LAYERS,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "qkv_bias": True,
    }
    return save(tmp_path / "eagle1", values | {"bias": False}, tensors)


def test_an_eagle1_head_drafts_as_its_own_formulas_say(eagle1_head, tmp_path):
    drafter = converted(eagle1_head, tmp_path)
    tokens, last = torch.arange(5, 5 + NUM_TOKENS + 1), torch.randn(NUM_TOKENS - 1, HIDDEN)
    ours_V = first_logits(drafter, VerifierStates(tokens, None, torch.cat([last, torch.zeros(2, HIDDEN)])))

    renamed = {"fc": "fusion_fc", "layers.0": "transformer"}
    weights = {}
    for name, tensor in load_file(eagle1_head / "model.safetensors").items():
        old = next((old for old in renamed if name.startswith(f"{old}.")), None)
        if old is not None:
            weights[renamed[old] + name.removeprefix(old)] = tensor
    verifier = AutoConfig.from_pretrained(VERIFIER)
    nested = AutoConfig.for_model(
        **{**LAYERS, "model_type": "llama"}, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    )
    embedding, norm = (VERIFIERS[f"{name}.weight"].float() for name in ("embed_tokens", "model.norm"))
    naive = NaiveEagle(weights, nested, embedding, embedding, norm)  # the head is tied
    naive.feature = lambda y: y.double() / torch.sqrt((y.double() ** 2).mean() + verifier.rms_norm_eps) * norm.double()
    predicted = naive.hass(tokens[1:-1], last, 1)[0, NUM_TOKENS - 2]
    torch.testing.assert_close(ours_V.double(), naive.logits(predicted).detach(), atol=1e-5, rtol=1e-5)


def test_embeddings_and_heads_of_the_source_are_copies_or_kept_or_refused(eagle1_head, eagle3_head, tmp_path):
    written = convert_checkpoint(eagle1_head, tmp_path / "one", verifier=VERIFIER)
    assert any("embed_tokens.weight" in note and "verifier's own" in note for note in written.notes)
    edit_tensors(eagle1_head, lambda tensors: tensors["embed_tokens.weight"][3].mul_(1.5))
    with pytest.raises(ValueError, match=r"embed_tokens\.weight.*has no place for"):
        convert_checkpoint(eagle1_head, tmp_path / "two", verifier=VERIFIER)
    assert not (tmp_path / "two").exists()
    for factor, said, is_trained in ((1.0, "is a copy of", False), (1.5, "differs from", True)):
        own = VERIFIERS["embed_tokens.weight"].half() * factor
        edit_tensors(eagle3_head, lambda tensors, own=own: tensors.update({"embed_tokens.weight": own}))
        written = convert_checkpoint(eagle3_head, tmp_path / said, verifier=VERIFIER)
        assert any(said in note for note in written.notes)
        assert SpeculatorModelConfig.from_pretrained(written.path).embed_requires_grad is is_trained
        assert torch.equal(load_file(written.path / "model.safetensors")["embed_tokens.weight"], own)
        assert check_checkpoint(written.path).ok


@pytest.mark.parametrize(
    ("where", "ids", "are", "expected"),
    [
        ("eagle_config", [1, 5, 8], None, [2, 6, 9]),  # SpecForge's default, outputs of layers
        ("eagle_config", [2, 6, 9], None, [2, 6, 9]),  # the default of engines
        ("eagle_config", [1, 4, 7], "outputs", [2, 5, 8]),
        ("eagle_config", [1, 4, 7], "entering", [1, 4, 7]),
        ("eagle_config", [1, 4, 7], None, "say --layer-ids-are entering or outputs"),
        ("eagle_config", [1, 4, 7], "output", "Did you mean 'outputs'"),
        ("top", [1, 5, 8], None, [1, 5, 8]),  # where vLLM reads them as ours
    ],
)
def test_layer_ids_are_read_as_their_writer_counted_them(where, ids, are, expected, eagle3_head, tmp_path):
    edit_config(
        eagle3_head, lambda values: values.update({IDS: ids} if where == "top" else {"eagle_config": {IDS: ids}})
    )
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            convert_checkpoint(eagle3_head, tmp_path / "out", verifier=VERIFIER, layer_ids_are=are)
        return
    path = convert_checkpoint(eagle3_head, tmp_path / "out", verifier=VERIFIER, layer_ids_are=are).path
    assert SpeculatorModelConfig.from_pretrained(path).eagle_aux_hidden_state_layer_ids == expected


@pytest.mark.parametrize(("said", "expected"), [("entering", [1, 4, 7]), ("outputs", [2, 5, 8]), ("output", None)])
@pytest.mark.parametrize("flags", [{}, {"norm_before_fc": False, "norm_before_residual": True}], ids=["plain", "flags"])
def test_a_config_that_says_how_it_counts_is_of_some_format(said, expected, flags, eagle3_head, tmp_path):
    values = {"eagle_config": {IDS: [1, 4, 7]}, "layer_ids_are": said, **flags}
    edit_config(eagle3_head, lambda config: config.update(values))
    if expected is None:
        with pytest.raises(ValueError, match="Did you mean 'outputs'"):
            convert_checkpoint(eagle3_head, tmp_path / "out", verifier=VERIFIER)
        return
    path = convert_checkpoint(eagle3_head, tmp_path / "out", verifier=VERIFIER).path
    assert SpeculatorModelConfig.from_pretrained(path).eagle_aux_hidden_state_layer_ids == expected


@pytest.mark.parametrize(("case", "key"), [("eagle3", IDS), ("dflash", "sliding_window_non_causal")])
def test_a_directory_of_an_older_release_is_upgraded_and_exported(case, key, tmp_path):
    old = as_older_release(case, tmp_path / "old")
    assert not check_checkpoint(old).ok
    written = convert_checkpoint(old, tmp_path / "new", verifier=VERIFIER)
    assert any("release 0.2.0" in note and key in note for note in written.notes)
    assert json.loads((written.path / "config.json").read_text())[key] is not None
    before, after = (load_file(path / "model.safetensors") for path in (old, written.path))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not check_checkpoint(written.path).findings
    assert export_checkpoint(written.path, tmp_path / "served").serving is not None
    with pytest.raises(ValueError, match="is a speculator already"):
        convert_checkpoint(written.path, tmp_path / "again", verifier=VERIFIER)
    with pytest.raises(ValueError, match="an older speculator has no option 'norm_before'"):
        convert_checkpoint(old, tmp_path / "again", verifier=VERIFIER, norm_before=True)


def test_options_of_a_format_are_its_own(eagle3_head, tmp_path):
    with pytest.raises(ValueError, match=r"no option 'norm_befor_fc'.*Did you mean 'norm_before_fc'\?"):
        convert_model(str(eagle3_head), VERIFIER, "auto", tmp_path / "out", norm_befor_fc=True)
    edit_tensors(eagle3_head, lambda tensors: tensors.update(mask_hidden=torch.randn(1, 1, 3 * HIDDEN)))
    with pytest.raises(ValueError, match=r"""--algorithm-kwargs '{"mask_token_id": N}'"""):
        convert_model(str(eagle3_head), VERIFIER, "auto", tmp_path / "out")
    convert_model(str(eagle3_head), VERIFIER, "peagle", tmp_path / "out", mask_token_id=7)
    assert SpeculatorModelConfig.from_pretrained(tmp_path / "out").mask_token_id == 7


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"final_logit_softcapping": 30.0}, "do not compute with"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.5}, "rotate all of a head"),
        ({"num_hidden_layers": 2}, "lacks"),
    ],
)
def test_options_that_change_the_function_are_refused(option, message, eagle3_head, tmp_path):
    edit_config(eagle3_head, lambda values: values.update(option))
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(eagle3_head, tmp_path / "out", verifier=VERIFIER)
    assert not (tmp_path / "out").exists()


def test_the_window_of_specforges_block_drafters_is_kept(zlab_drafter, tmp_path):
    edit_config(zlab_drafter, lambda values: values["dflash_config"].update(use_swa=True, swa_window_size=48))
    path = convert_checkpoint(zlab_drafter, tmp_path / "out", verifier=VERIFIER).path
    nested = SpeculatorModelConfig.from_pretrained(path).transformer_layer_config
    assert nested.layer_types == ["sliding_attention"] * 2 and nested.sliding_window == 48
    edit_config(zlab_drafter, lambda values: values["dflash_config"].update(swa_window_size=0))
    with pytest.raises(ValueError, match="swa_window_size=0: it must be at least 1"):
        convert_checkpoint(zlab_drafter, tmp_path / "two", verifier=VERIFIER)


@pytest.mark.parametrize("file", ["medusa_lm_head.pt", "medusa_lm_head.safetensors"])
def test_medusa_heads_convert_as_published(file, tmp_path):
    torch.manual_seed(0)
    shapes = {"weight": (HIDDEN, HIDDEN), "bias": (HIDDEN,)}
    tensors = {f"{i}.0.linear.{kind}": torch.randn(shape) for i in range(2) for kind, shape in shapes.items()}
    tensors |= {f"{i}.1.weight": torch.randn(VOCAB, HIDDEN) for i in range(2)}
    source = tmp_path / "medusa"
    source.mkdir()
    (torch.save if file.endswith(".pt") else save_file)(tensors, source / file)
    values = {"medusa_num_heads": 2, "medusa_num_layers": 1, "base_model_name_or_path": "lmsys/vicuna-7b-v1.3"}
    (source / "config.json").write_text(json.dumps(values))
    path = convert_model(str(source), VERIFIER, "auto", tmp_path / "out").path
    ours = load_file(path / "model.safetensors")
    assert torch.equal(ours["blocks.1.layers.0.bias"], tensors["1.0.linear.bias"])
    assert torch.equal(ours["lm_heads.0.weight"], tensors["0.1.weight"])
