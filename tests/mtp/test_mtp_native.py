"""Every family whose verifiers ship an MTP layer: training starts from it, and stitching writes it back."""

import pytest
import torch
from drafter_toys import VOCAB
from mtp_toys import NATIVE, packed_batch, save_native_verifier
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from speculators.decoding import Engine, SamplingParams
from speculators.models.mtp import MTPDraftModel
from speculators.models.mtp.decoder_modules import GroupRouter
from speculators.models.mtp.families import LAYER
from speculators.train.config import TrainConfig
from speculators.train.draft_shape import build_model

COPIES = ("embed_tokens.weight", "shared_head.head.weight")


@pytest.fixture(scope="module", params=NATIVE)
def native(request, tmp_path_factory):
    """(model_type, directory, names of the MTP layer's tensors)"""
    path = tmp_path_factory.mktemp(request.param) / "verifier"
    return request.param, path, save_native_verifier(request.param, path)


def drafter_of(path):
    config = AutoConfig.from_pretrained(path)
    return MTPDraftModel.from_training_args(config, verifier_name_or_path=str(path), num_speculative_steps=3)


def own_tensors(model):
    return {key: tensor for key, tensor in model.state_dict().items() if key.startswith(LAYER)}


def test_training_starts_from_the_verifiers_own_layer(native):
    arch, path, names = native
    on_disk, own = load_file(path / "model.safetensors"), own_tensors(drafter_of(path))
    _, prefix, decoder, (embedding_norm, hidden_norm, final_norm, projection) = NATIVE[arch]
    assert torch.equal(own[LAYER + "token_layernorm.weight"], on_disk[prefix + embedding_norm])
    assert torch.equal(own[LAYER + "hidden_layernorm.weight"], on_disk[prefix + hidden_norm])
    assert torch.equal(own[LAYER + "final_layernorm.weight"], on_disk[prefix + final_norm])
    assert torch.equal(own[LAYER + "input_proj.weight"], on_disk[prefix + projection])
    plain = {name for name in names if ".experts." not in name and not name.endswith(COPIES)}
    shared = {name.removeprefix(prefix).removeprefix(decoder) for name in plain} & {
        key.removeprefix(LAYER) for key in own
    }
    assert len(shared) == len(plain) - 4 and all(
        torch.equal(own[LAYER + name], on_disk[prefix + decoder + name]) for name in shared
    )
    if any(".experts." in name for name in names):
        start = prefix + decoder + "mlp.experts."
        if start + "gate_up_proj" in names:
            assert torch.equal(own[LAYER + "mlp.experts.gate_up_proj"], on_disk[start + "gate_up_proj"])
        else:
            both = torch.cat((on_disk[start + "1.gate_proj.weight"], on_disk[start + "1.up_proj.weight"]))
            assert torch.equal(own[LAYER + "mlp.experts.gate_up_proj"][1], both)
            down = on_disk[start + "3.down_proj.weight"]
            assert torch.equal(own[LAYER + "mlp.experts.down_proj"][3], down)


def test_a_run_is_told_where_it_starts_and_nothing_of_layers_it_does_not_shape(native, caplog, recwarn):
    """Its layer is the verifier's: there is no width to choose, though the verifier has experts."""
    arch, path, _ = native
    flags = {"speculator_type": "mtp", "verifier_name_or_path": str(path), "data_path": "", "save_path": ""}
    model = build_model(TrainConfig.from_flat(flags), AutoConfig.from_pretrained(path))
    assert model.config.transformer_layer_config.model_type == arch
    assert f"training starts from the MTP layer of {path}" in caplog.text
    assert not [warning for warning in recwarn if "MLP" in str(warning.message)]


def test_training_starts_from_scratch_where_the_verifier_ships_no_layer(native, tmp_path):
    _, path, names = native
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = {key: w for key, w in load_file(path / "model.safetensors").items() if key not in names}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = drafter_of(tmp_path)
    assert own_tensors(model).keys() == type(model).expected_tensors(model.config).keys()
    assert all(bool(torch.isfinite(w).all()) for w in own_tensors(model).values())


def test_a_trained_layer_is_stitched_back_and_nothing_else_changes(native, tmp_path):
    _, path, names = native
    model = drafter_of(path)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    batch = packed_batch([40, 30], supervised=2.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch, return_logits=False)[1].backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "trained")
    stitched = MTPDraftModel.stitch(tmp_path / "trained", path, tmp_path / "stitched").path
    before, after = (load_file(directory / "model.safetensors") for directory in (path, stitched))
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    never = {name for name in names if name.endswith((*COPIES, "e_score_correction_bias"))}
    assert changed == names - never
    assert (stitched / "config.json").read_bytes() == (path / "config.json").read_bytes()
    again = own_tensors(drafter_of(stitched))
    assert all(torch.equal(tensor, again[key]) for key, tensor in own_tensors(model).items())


@pytest.mark.parametrize("arch", ["glm4_moe", "deepseek_v3"])
def test_it_drafts_beside_its_verifier(arch, tmp_path):
    save_native_verifier(arch, tmp_path)
    verifier = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    proposer = drafter_of(tmp_path).make_proposer(verifier, max_batch_size=2, max_length=64)
    prompts = [[3, 5, 8], [VOCAB - 1, 7]]
    sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    plain = Engine(verifier, max_batch_size=2).generate(prompts, sampling)
    engine = Engine(verifier, proposer, num_speculative_tokens=3, max_batch_size=2)
    drafted = engine.generate(prompts, sampling)
    assert [output.token_ids for output in drafted] == [output.token_ids for output in plain]


def test_the_routers_bias_stays_in_fp32_when_the_layer_is_cast(tmp_path):
    save_native_verifier("glm4_moe", tmp_path)
    model = drafter_of(tmp_path)
    (router,) = [module for module in model.modules() if isinstance(module, GroupRouter)]
    bias_E = torch.full_like(router.e_score_correction_bias, 1.001)
    router.e_score_correction_bias.copy_(bias_E)
    model.to(dtype=torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16 and torch.equal(router.e_score_correction_bias, bias_E)
