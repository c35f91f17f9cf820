"""A converted drafter computes what the formulas of its source say: logits of what `convert` wrote against a naive
forward in Python loops over the source's own tensors, in float64. All tensors are float32.

source                                        naive forward
EAGLE-1 (EAGLE repository)                    tests/eagle/naive_eagle1.py
HASS (norms and fc bias)                      tests/eagle/naive_eagle1.py
EAGLE-3 (EAGLE repository, SGLang, vLLM)      tests/eagle3/naive_eagle3.py
EAGLE-3 (SpecForge: norm before fc)           tests/eagle3/naive_eagle3.py
P-EAGLE (SpecForge)                           tests/peagle/naive_peagle.py
DFlash (z-lab)                                tests/dflash/dflash_naive.py
DSpark (SpecForge, dense)                     tests/dspark/dspark_naive.py
Medusa (as published)                         tests/medusa/medusa_toys.py
MLP speculator (fms)                          tests/mlp/mlp_toys.py
MTP inside MiMo                               tests/mtp/mtp_naive.py
MTP inside Qwen, GLM and DeepSeek             below: the decoder layer of transformers between norms and projection
"""

import importlib
import json
from types import SimpleNamespace

import last_state_toys
import mtp_toys
import pytest
import torch
from deploy_toys import DRAFT_VOCAB, HIDDEN, LAYERS, VERIFIER, VOCAB, WIDTH, draft_map, layer, save
from dflash_naive import NaiveDFlash
from dspark_naive import NaiveDSpark
from medusa_toys import NaiveMedusa
from mlp_toys import NaiveMLP
from mtp_naive import NaiveMTP
from naive_eagle1 import NaiveEagle
from naive_eagle3 import NaiveEagle3
from naive_peagle import NaivePEagle
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from speculators import SpeculatorModel
from speculators.convert import convert_checkpoint
from speculators.interfaces import VerifierStates
from speculators.utils.loading import load_model_layers

TOKENS = torch.tensor([17, 301, 5, 2044, 9, 77, 1033, 640, 12, 3000, 411])
ROPE = {"rope_type": "default", "rope_theta": 1e6}
MASK = 7
VERIFIERS_OWN = ("embed_tokens.weight", "lm_head.weight")
IDS = "eagle_aux_hidden_state_layer_ids"
DEFAULT_IDS = [2, 6, 9]
PLAIN = dict.fromkeys(("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"), False)
VERIFIER_NORM_EPS = AutoConfig.from_pretrained(VERIFIER).rms_norm_eps


@pytest.fixture(scope="module")
def verifiers():
    """Of the embedded verifier: its embedding (which is its head), its final norm, and its states of TOKENS."""
    model = AutoModelForCausalLM.from_pretrained(VERIFIER, dtype=torch.float32).eval()
    last = []
    model.model.norm.register_forward_pre_hook(lambda module, args: last.append(args[0][0]))
    with torch.no_grad():
        entering = model(TOKENS[None], output_hidden_states=True).hidden_states
    embedding = load_model_layers(["embed_tokens.weight"], VERIFIER)["embed_tokens.weight"].float()
    norm = load_model_layers(["model.norm.weight"], VERIFIER)["model.norm.weight"].float()
    return SimpleNamespace(embedding=embedding, norm=norm, entering=[state[0] for state in entering], last=last[0])


def decoder(arch="llama", **values):
    return AutoConfig.for_model(arch, **{**LAYERS, **values}, rope_parameters=ROPE)


def written(path, values, tensors, copies=()):
    """Matrices of a trained layer's size: values that every part moves, and no overflow."""
    drawn = [name for name, t in tensors.items() if t.ndim > 1 and name not in copies]
    tensors = tensors | {name: tensors[name] / tensors[name].shape[-1] ** 0.5 for name in drawn}
    return save(path, {"torch_dtype": "float32", "rope_theta": ROPE["rope_theta"], **values}, tensors)


def ours(source, tmp_path, verifiers, num_drafts, *, layer_ids=None, **options):
    """Logits [K, V] of the converted directory in the places of the last K tokens."""
    path = convert_checkpoint(source, tmp_path / "out", verifier=VERIFIER, **options).path
    drafter = SpeculatorModel.from_pretrained(str(path), verifier=VERIFIER, dtype=torch.float32).eval()
    known = len(TOKENS) - num_drafts - 1
    aux = None
    if layer_ids is not None:
        assert list(drafter.capture.aux_layer_ids) == layer_ids
        aux = known_states(torch.cat([verifiers.entering[i] for i in layer_ids], dim=1), known)
    with torch.no_grad():
        return drafter.draft_logits(VerifierStates(TOKENS, aux, known_states(verifiers.last, known)), num_drafts)


def known_states(states, known):
    """Zeros where nobody knows them."""
    return torch.cat([states[:known], torch.zeros_like(states[known:])])


def assert_equal(logits, expected):
    expected = torch.stack(list(expected)).detach()
    assert expected.std() > 0.1
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=1e-5)


def one_document(tokens, aux):
    return {
        "input_ids": tokens[None],
        "document_ids": torch.zeros(1, len(tokens), dtype=torch.long),
        "position_ids": torch.arange(len(tokens))[None],
        "loss_mask": torch.ones(1, len(tokens), dtype=torch.long),
        "hidden_states": aux[None],
        "verifier_last_hidden_states": torch.zeros(1, len(tokens), HIDDEN),
    }


# -- EAGLE-1 and HASS


@pytest.mark.parametrize("project", ["EAGLE repository", "HASS"])
def test_eagle1(project, verifiers, tmp_path):
    torch.manual_seed(0)
    tensors = layer("layers.0.", HIDDEN) | {"fc.weight": torch.randn(HIDDEN, 2 * HIDDEN)}
    tensors.pop("layers.0.input_layernorm.weight")
    values = {
        **LAYERS,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "bias": False,
    }
    if project == "HASS":
        norms = ("embed_layernorm", "lm_head_layernorm", "hidden_layernorm")
        tensors |= {f"{name}.weight": torch.randn(HIDDEN) for name in norms} | {"fc.bias": torch.randn(HIDDEN)}
    source = written(tmp_path / "source", {**values, "bias": project == "HASS"}, tensors)
    logits = ours(source, tmp_path, verifiers, 2)

    norms = {"embed_": "embedding_", "lm_head_": "pre_lm_head_", "hidden_": "transformer.input_"}
    weights = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        start, end = name.split("layernorm")[0], "layernorm.weight"
        renamed = norms[start] + end if start in norms else name.replace("layers.0.", "transformer.")
        weights[renamed.replace("fc.", "fusion_fc.")] = tensor
    naive = NaiveEagle(weights, decoder(), verifiers.embedding, verifiers.embedding, verifiers.norm)
    gain = verifiers.norm.double()
    naive.feature = lambda y: gain * y.double() / torch.sqrt((y.double() ** 2).mean() + VERIFIER_NORM_EPS)
    known = len(TOKENS) - 3
    states = known_states(verifiers.last, known)[: known + 1]
    predicted = naive.hass(TOKENS[1 : known + 2], states, 2)
    assert_equal(logits, [naive.logits(predicted[m, known - 1 + m]) for m in range(2)])


# -- EAGLE-3 and P-EAGLE


def eagle3_tensors():
    torch.manual_seed(1)
    t2d, d2t = draft_map()
    return layer("midlayer.", 2 * HIDDEN) | {
        "midlayer.hidden_norm.weight": torch.randn(HIDDEN),
        "fc.weight": torch.randn(HIDDEN, 3 * HIDDEN),
        "norm.weight": torch.randn(HIDDEN),
        "lm_head.weight": torch.randn(DRAFT_VOCAB, HIDDEN),
        "d2t": d2t,
        "t2d": t2d,
    }


EAGLE3_VALUES = {
    **LAYERS,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLMEagle3"],
    "vocab_size": VOCAB,
    "draft_vocab_size": DRAFT_VOCAB,
}
EAGLE3_SOURCES = {
    "EAGLE repository: no layers named": ({}, DEFAULT_IDS),
    "vLLM: layers at the top": ({IDS: [1, 5, 11]}, [1, 5, 11]),
    "SGLang: outputs of layers": ({"eagle_config": {IDS: [1, 5, 8]}}, DEFAULT_IDS),
    "SpecForge: norm_before_fc, norm_output": (
        {"eagle_config": {IDS: [0, 3, 10]}, "layer_ids_are": "outputs", "norm_before_fc": True, "norm_output": True},
        [1, 4, 11],
    ),
}


def eagle3_weights(source, verifiers):
    found = {name.replace("midlayer.", "layers.0."): t for name, t in load_file(source / "model.safetensors").items()}
    return {"embed_tokens.weight": verifiers.embedding, **found}


def in_draft_vocabulary(logits):
    """Columns that can be drafted; the others must be out of reach."""
    kept = draft_map()[0]
    assert bool((logits[:, ~kept] == float("-inf")).all())
    return logits[:, kept]


@pytest.mark.parametrize("project", EAGLE3_SOURCES)
def test_eagle3(project, verifiers, tmp_path):
    said, ids = EAGLE3_SOURCES[project]
    flags = {**PLAIN, **{flag: said[flag] for flag in PLAIN if flag in said}}
    tensors = eagle3_tensors()
    tensors |= {"input_norm.weight": torch.randn(3 * HIDDEN)} if flags["norm_before_fc"] else {}
    source = written(tmp_path / "source", {**EAGLE3_VALUES, **said}, tensors)
    logits = in_draft_vocabulary(ours(source, tmp_path, verifiers, 2, layer_ids=ids))

    naive = NaiveEagle3(eagle3_weights(source, verifiers), decoder(), **flags)
    aux = torch.cat([verifiers.entering[i] for i in ids], dim=1)
    known = len(TOKENS) - 3
    batch = one_document(TOKENS[1 : known + 2], known_states(aux, known)[: known + 1])
    steps = naive.unroll(batch, 2)
    assert_equal(logits, [naive.w["lm_head.weight"] @ step[known - 1] for step in steps])


def test_peagle(verifiers, tmp_path):
    tensors = eagle3_tensors() | {"mask_hidden": torch.randn(1, 1, 3 * HIDDEN) * (3 * HIDDEN) ** 0.5}
    source = written(tmp_path / "source", {**EAGLE3_VALUES, "mask_token_id": MASK}, tensors)
    logits = in_draft_vocabulary(ours(source, tmp_path, verifiers, 3, layer_ids=DEFAULT_IDS))

    config = SimpleNamespace(transformer_layer_config=decoder(), mask_token_id=MASK, **PLAIN)
    naive = NaivePEagle(eagle3_weights(source, verifiers), config)
    known = len(TOKENS) - 4
    aux = torch.cat([verifiers.entering[i] for i in DEFAULT_IDS], dim=1)
    last = known - 1
    found = naive.logits(one_document(TOKENS[1 : known + 1], aux[:known]), [(last, 1), (last, 2)])
    assert_equal(logits, [found[last, depth] for depth in range(3)])


# -- blocks


def block_source():
    torch.manual_seed(2)
    tensors = {name: tensor for i in range(2) for name, tensor in layer(f"layers.{i}.", HIDDEN).items()} | {
        f"layers.{i}.self_attn.{kind}_norm.weight": torch.randn(WIDTH) for i in range(2) for kind in "qk"
    }
    tensors |= {
        "fc.weight": torch.randn(HIDDEN, 2 * HIDDEN),
        "hidden_norm.weight": torch.randn(HIDDEN),
        "norm.weight": torch.randn(HIDDEN),
    }
    values = {
        **LAYERS,
        "num_hidden_layers": 2,
        "model_type": "qwen3",
        "architectures": ["DFlashDraftModel"],
        "vocab_size": VOCAB,
        "block_size": 4,
        "num_target_layers": 12,
        "dflash_config": {"target_layer_ids": [1, 8], "mask_token_id": MASK},
    }
    return values, tensors


def block_inputs(verifiers, num_drafts):
    aux = torch.cat([verifiers.entering[i] for i in (2, 9)], dim=1)
    anchor = len(TOKENS) - num_drafts - 1
    return one_document(TOKENS, known_states(aux, anchor)), anchor


def block_weights(source, verifiers):
    return {
        "embed_tokens.weight": verifiers.embedding,
        "lm_head.weight": verifiers.embedding,
        **{k.replace("logit_head.", "markov_head."): t for k, t in load_file(source / "model.safetensors").items()},
    }


def test_dflash(verifiers, tmp_path):
    source = written(tmp_path / "source", *block_source())
    logits = ours(source, tmp_path, verifiers, 3, layer_ids=[2, 9])
    nested = decoder("qwen3", num_hidden_layers=2)
    naive = NaiveDFlash(block_weights(source, verifiers), nested, block_size=4, mask_token=MASK)
    batch, anchor = block_inputs(verifiers, 3)
    hidden = naive.block(naive.context(batch), batch, anchor)
    assert_equal(logits, [naive.w["lm_head.weight"] @ state for state in hidden[1:]])


@pytest.mark.parametrize("project", ["SpecForge", "dense, at the anchor", "dense, after it"])
def test_dspark(project, verifiers, tmp_path):
    values, tensors = block_source()
    torch.manual_seed(3)
    heads = {name: torch.randn(VOCAB, 4) for name in ("markov_w1", "markov_w2")}
    from_anchor, size = project != "dense, after it", 4
    if project == "SpecForge":
        values |= {"architectures": ["DSparkDraftModel"]}
        values["dflash_config"] |= {"projector_type": "dspark", "markov_rank": 4, "markov_head_type": "vanilla"}
        tensors |= {f"logit_head.{name}.weight": tensor for name, tensor in heads.items()}
    else:
        values |= {"architectures": ["Qwen3DSparkModel"], "markov_rank": 4, "markov_head_type": "vanilla"}
        values |= {**values.pop("dflash_config"), "dspark_bonus_anchor": not from_anchor}
        tensors |= {f"markov_head.{name}.weight": tensor for name, tensor in heads.items()}
        tensors |= {name: verifiers.embedding.clone() for name in VERIFIERS_OWN}
    source = written(tmp_path / "source", values, tensors, copies=VERIFIERS_OWN)
    num_drafts = size if from_anchor else size - 1
    logits = ours(source, tmp_path, verifiers, num_drafts, layer_ids=[2, 9])
    naive = NaiveDSpark(
        block_weights(source, verifiers),
        decoder("qwen3", num_hidden_layers=2),
        kind="vanilla",
        block_size=size,
        mask_token=MASK,
        from_anchor=from_anchor,
    )
    batch, anchor = block_inputs(verifiers, num_drafts)
    hidden, expected = naive.block(naive.context(batch), batch, anchor), []
    for slot in range(0 if from_anchor else 1, size):
        before = TOKENS[anchor + slot] if from_anchor else TOKENS[anchor + slot - 1]
        phi, _ = naive.phi(None, naive.w["markov_head.markov_w1.weight"][before], hidden[slot])
        expected.append(naive.w["lm_head.weight"] @ hidden[slot] + naive.w["markov_head.markov_w2.weight"] @ phi)
    assert_equal(logits, expected)


# -- heads that read the last state alone


def of_source(naive_class, weights, verifiers, **config):
    """The naive heads, of tensors and settings in place of a model."""
    weights = {**weights, "verifier_norm.weight": verifiers.norm}
    return naive_class(SimpleNamespace(state_dict=lambda: weights, config=SimpleNamespace(**config)))


@pytest.mark.parametrize("num_layers", [1, 2])
def test_medusa(num_layers, verifiers, tmp_path, monkeypatch):
    monkeypatch.setattr(last_state_toys, "EPS", VERIFIER_NORM_EPS)
    torch.manual_seed(4)
    tensors = {f"{i}.{num_layers}.weight": torch.randn(VOCAB, HIDDEN) / HIDDEN**0.5 for i in range(3)}
    for i in range(3):
        for j in range(num_layers):
            tensors[f"{i}.{j}.linear.weight"] = torch.randn(HIDDEN, HIDDEN) / HIDDEN**0.5
            tensors[f"{i}.{j}.linear.bias"] = torch.randn(HIDDEN)
    source = tmp_path / "source"
    source.mkdir()
    save_file(tensors, source / "medusa_lm_head.safetensors")
    (source / "config.json").write_text(json.dumps({"medusa_num_heads": 3, "medusa_num_layers": num_layers}))
    logits = ours(source, tmp_path, verifiers, 3)

    weights = {}
    for i in range(3):
        weights[f"lm_heads.{i}.weight"] = tensors[f"{i}.{num_layers}.weight"]
        for j in range(num_layers):
            for part in ("weight", "bias"):
                weights[f"blocks.{i}.layers.{j}.{part}"] = tensors[f"{i}.{j}.linear.{part}"]
    naive = of_source(NaiveMedusa, weights, verifiers, num_heads=3, num_hidden_layers=num_layers)
    state = verifiers.last[len(TOKENS) - 5]
    assert_equal(logits, [naive.logits(head, state) for head in range(3)])


@pytest.mark.parametrize(("tied", "scale_input"), [(False, True), (True, False)])
def test_mlp_speculator(tied, scale_input, verifiers, tmp_path, monkeypatch):
    monkeypatch.setattr(last_state_toys, "EPS", VERIFIER_NORM_EPS)
    torch.manual_seed(5)
    inner, tensors = 64, {}
    for i in range(3):
        tensors |= {
            f"emb.{i}.weight": torch.randn(VOCAB, inner),
            f"proj.{i}.weight": torch.randn(inner, HIDDEN if i == 0 else inner) / HIDDEN**0.5,
            f"ln.{i}.weight": torch.randn(inner),
            f"ln.{i}.bias": torch.randn(inner),
            f"head.{i}.weight": torch.randn(VOCAB, inner) / inner**0.5,
        }
    if tied:
        once = [name for name in tensors if ".0." in name or name == "proj.1.weight"]
        tensors = {name: tensors[name] for name in once}
    values = {
        "model_type": "mlp_speculator",
        "architectures": ["MLPSpeculatorPreTrainedModel"],
        "vocab_size": VOCAB,
        "emb_dim": HIDDEN,
        "inner_dim": inner,
        "n_predict": 3,
        "tie_weights": tied,
        "scale_input": scale_input,
    }
    source = save(tmp_path / "source", values, {f"speculator.{name}": tensor for name, tensor in tensors.items()})
    logits = ours(source, tmp_path, verifiers, 3)
    config = {"num_layers": 3, "tie_weights": tied, "scale_input": scale_input, "intermediate_size": inner}
    naive = of_source(NaiveMLP, tensors, verifiers, **config)
    last = len(TOKENS) - 5
    expected = [naive.logits(head, verifiers.last[last], TOKENS[last + 1 :]) for head in range(3)]
    assert_equal(logits, expected)


# -- MTP layers


def test_mtp_inside_mimo(tmp_path):
    path = mtp_toys.save_verifier("qwen2", tmp_path / "mimo")
    stored = load_file(path / "model.safetensors")
    weights = {name.removeprefix("model."): t for name, t in stored.items() if name.startswith(mtp_toys.MIMO_LAYER)}
    of_state, of_token = weights["mtp_layers.0.input_proj.weight"].chunk(2, dim=1)  # MiMo reads [state ; embedding]
    weights["mtp_layers.0.input_proj.weight"] = torch.cat([of_token, of_state], dim=1)
    names = {"embed": "model.embed_tokens.weight", "head": "lm_head.weight", "norm": "model.norm.weight"}
    nested = AutoConfig.from_pretrained(path)
    parts = {part: stored[name] for part, name in names.items()}
    naive = NaiveMTP(weights, parts, nested, zero_first=True, raw_states=True)

    converted = convert_checkpoint(path, tmp_path / "out", verifier=str(path)).path
    drafter = SpeculatorModel.from_pretrained(str(converted), verifier=str(path), dtype=torch.float32).eval()
    tokens, states = TOKENS % mtp_toys.VOCAB, torch.randn(len(TOKENS), mtp_toys.HIDDEN)
    known = len(tokens) - 3
    with torch.no_grad():
        logits = drafter.draft_logits(VerifierStates(tokens, None, known_states(states, known)), 2)
    assert_equal(logits, naive.draft_logits(tokens.tolist()[:-2], states, tokens.tolist()[-2:]))


THEIR_LAYERS = {
    "qwen3_next": ("qwen3_next", "Qwen3NextDecoderLayer", "Qwen3NextRotaryEmbedding"),
    "qwen3_5_text": ("qwen3_5", "Qwen3_5DecoderLayer", "Qwen3_5TextRotaryEmbedding"),
    "qwen3_5_moe_text": ("qwen3_5_moe", "Qwen3_5MoeDecoderLayer", "Qwen3_5MoeTextRotaryEmbedding"),
    "glm4_moe": ("glm4_moe", "Glm4MoeDecoderLayer", "Glm4MoeRotaryEmbedding"),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3DecoderLayer", "DeepseekV3RotaryEmbedding"),
}
"""model_type -> its folder in transformers, the class of a layer and that of its rope."""


def fused(tensors):
    """As transformers 5 holds experts: all of a projection in one tensor, gate rows above up rows."""
    one_by_one = {name: tensors[name] for name in tensors if ".experts." in name and name.endswith(".weight")}
    if not one_by_one:
        return tensors
    num_experts = 1 + max(int(name.split(".experts.")[1].split(".")[0]) for name in one_by_one)
    start = next(iter(one_by_one)).split(".experts.")[0] + ".experts."
    gate, up, down = (
        torch.stack([tensors[f"{start}{e}.{kind}_proj.weight"] for e in range(num_experts)])
        for kind in ("gate", "up", "down")
    )
    rest = {name: tensor for name, tensor in tensors.items() if name not in one_by_one}
    return rest | {f"{start}gate_up_proj": torch.cat([gate, up], dim=1), f"{start}down_proj": down}


@pytest.mark.parametrize("family", THEIR_LAYERS)
@torch.no_grad()
def test_mtp_inside_other_families(family, tmp_path):
    """The first draft: final_norm(layer(projection [norm(embedding) ; norm(state)])), of normed states."""
    path = tmp_path / family
    mtp_toys.save_native_verifier(family, path)
    stored, config = load_file(path / "model.safetensors"), AutoConfig.from_pretrained(path)
    _, prefix, inside, (embed_norm, state_norm, final_norm, projection) = mtp_toys.NATIVE[family]
    is_qwen = family.startswith("qwen")

    def norm(name, x):
        gain = stored[name] + 1 if is_qwen else stored[name]
        return gain * x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.rms_norm_eps)

    converted = convert_checkpoint(path, tmp_path / "out", verifier=str(path)).path
    drafter = SpeculatorModel.from_pretrained(str(converted), verifier=str(path), dtype=torch.float32).eval()
    torch.manual_seed(6)
    tokens, states = TOKENS % mtp_toys.VOCAB, torch.randn(len(TOKENS), config.hidden_size)
    known = len(tokens) - 2
    logits = drafter.draft_logits(VerifierStates(tokens, None, known_states(states, known)), 1)

    embedded = stored["model.embed_tokens.weight"][tokens[1 : known + 1]]
    if not is_qwen:
        embedded[0] = 0.0
    entering = torch.cat(
        [norm(prefix + embed_norm, embedded), norm(prefix + state_norm, norm("model.norm.weight", states[:known]))], -1
    )
    hidden = entering @ stored[prefix + projection].T
    folder, layer_name, rope_name = THEIR_LAYERS[family]
    modeling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    config._attn_implementation = "eager"
    theirs = getattr(modeling, layer_name)(config, layer_idx=config.num_hidden_layers - 1).eval()
    start = prefix + inside
    own = fused({name.removeprefix(start): tensor for name, tensor in stored.items() if name.startswith(start)})
    theirs.load_state_dict({name: own[name] for name in theirs.state_dict()})
    positions = torch.arange(known)[None]
    mask = torch.full((known, known), float("-inf")).triu(1)[None, None]
    rope = getattr(modeling, rope_name)(config)(hidden[None], positions)
    found = theirs(hidden[None], position_embeddings=rope, attention_mask=mask, position_ids=positions)
    found = found[0] if isinstance(found, tuple) else found
    assert_equal(logits, norm(prefix + final_norm, found[0, -1:]).double() @ stored["lm_head.weight"].double().T)
