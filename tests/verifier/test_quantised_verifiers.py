"""A quantised verifier has the states of its dequantised twin, and drafts change none of its text."""

import json

import pytest
import torch
from quantised_toys import WRITERS, plain_tensors, write_dequantised, write_directory, write_fp8, write_gguf

from speculators import Engine
from speculators.assets import tiny_verifier_path
from speculators.data_generation.preprocessing import load_tokenizer
from speculators.decoding import SamplingParams
from speculators.interfaces import CaptureSpec
from speculators.utils.loading import load_model_layers, load_rows
from speculators.utils.quantized import gguf_file_of, quantization_of, rescaled
from speculators.verifier import capture_states, load_verifier, open_verifier_config, read_verifier_weights

LAYERS = CaptureSpec(aux_layer_ids=(0, 4, 8, 12), last_hidden=True)
TOKENS = torch.arange(7, 4000, 113)[None]
PROMPTS = ["def add(a, b):\n    return", "The capital of France is", "apple, banana, apple, banana,"]


def needs(package: str) -> None:
    pytest.importorskip(package, reason=f"{package} is of the extra `quantized`, which is not installed")


def states_of(model) -> torch.Tensor:
    with torch.no_grad(), capture_states(model, LAYERS) as states:
        model(input_ids=TOKENS, use_cache=False)
    return states.aux[0]


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def gguf_q8(tmp_path_factory):
    needs("gguf")
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf", tokenizer=False)


@pytest.fixture(scope="module")
def plain():
    return load_verifier(tiny_verifier_path(), dtype=torch.float32)


# Measured: 0.013 and 0.205. The tiny verifier's matrices are narrow.
@pytest.mark.parametrize(("kind", "bound"), [("Q8_0", 0.02), ("Q4_0", 0.3)])
def test_states_of_a_gguf_verifier_are_the_plain_ones_within_quantisation_noise(kind, bound, plain, tmp_path):
    needs("gguf")
    model = load_verifier(write_gguf(tmp_path / "tiny.gguf", kind, tokenizer=False), dtype=torch.float32)
    assert relative_error(states_of(model), states_of(plain)) < bound


@pytest.mark.parametrize("kind", list(WRITERS))
def test_weights_of_a_compressed_verifier_are_those_of_its_formula(kind, tmp_path):
    needs("accelerate" if kind == "FP8 blocks" else "compressed_tensors")
    tensors, values = WRITERS[kind]()
    model = load_verifier(write_directory(tmp_path / "quantised", tensors, **values), dtype=torch.float32)
    twin = load_verifier(write_dequantised(tmp_path / "plain", kind), dtype=torch.float32)
    rounding = 1e-2 if kind == "NVFP4" else 1e-6  # compressed-tensors computes those weights in bfloat16
    assert relative_error(states_of(model), states_of(twin)) < rounding
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in twin.named_parameters()]


def test_tokenizer_of_a_gguf_file_is_the_verifiers(tmp_path):
    needs("gguf")
    ours, plain = load_tokenizer(str(write_gguf(tmp_path / "tiny.gguf"))), load_tokenizer(str(tiny_verifier_path()))
    assert ours(PROMPTS)["input_ids"] == plain(PROMPTS)["input_ids"]
    assert ours.chat_template == plain.chat_template


def test_weights_and_rows_of_a_gguf_file_are_those_of_the_loaded_model(gguf_q8):
    model, name = load_verifier(gguf_q8, dtype=torch.float32), "model.layers.3.mlp.down_proj.weight"
    found = load_model_layers(["embed_tokens.weight", name], gguf_q8)
    assert torch.equal(found["embed_tokens.weight"], model.get_input_embeddings().weight)
    assert torch.equal(found[name], model.get_parameter(name))
    rows = load_rows(name, gguf_q8, [2, 7])
    assert rows.shape == (256, 512) and torch.equal(rows.rows, model.get_parameter(name)[[2, 7]])
    weights = read_verifier_weights(str(gguf_q8.parent), vocab_size=4096, hidden_size=256)
    assert torch.equal(weights.head_VH, model.lm_head.weight) and torch.equal(weights.norm_H, model.model.norm.weight)


def test_norms_that_llama_cpp_stores_as_gains_are_read_as_transformers_stores_them(tmp_path):
    needs("gguf")
    file = write_gguf(tmp_path / "gemma.gguf", architecture="gemma2", tokenizer=False)
    weight = load_model_layers(["model.norm.weight"], file)["model.norm.weight"]
    torch.testing.assert_close(weight, plain_tensors()["model.norm.weight"] - 1)


@pytest.mark.parametrize("kind", ["gguf", "float8 weights, float8 activations"])
def test_drafts_change_no_token_of_a_quantised_verifier(kind, request, tmp_path):
    needs("gguf" if kind == "gguf" else "compressed_tensors")
    is_gguf = kind == "gguf"
    name = request.getfixturevalue("gguf_q8") if is_gguf else write_fp8(tmp_path / "fp8", activations=True)
    model = load_verifier(name, dtype=torch.float32)
    greedy = SamplingParams(max_tokens=24)
    config = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    tokenizer = load_tokenizer(str(tiny_verifier_path()))
    plainly = Engine(model, tokenizer=tokenizer, max_batch_size=1).generate(PROMPTS, greedy)
    drafting = Engine(model, config, tokenizer=tokenizer, max_batch_size=3)
    assert [o.token_ids for o in drafting.generate(PROMPTS, greedy)] == [o.token_ids for o in plainly]
    assert drafting.stats.num_drafted > 0


def test_fp8_heads_are_read_with_their_scale(tmp_path):
    weight = torch.tensor([[1.0, -2.0], [0.5, 4.0], [3.0, 1.0]])
    scale = torch.tensor([[2.0], [0.5], [1.0]])
    folder = write_directory(
        tmp_path / "head", {"lm_head.weight": weight.to(torch.float8_e4m3fn), "lm_head.weight_scale": scale}
    )
    expected = torch.tensor([[2.0, -4.0], [0.25, 2.0], [3.0, 1.0]])
    assert torch.equal(load_model_layers(["lm_head.weight"], folder)["lm_head.weight"], expected)
    assert torch.equal(load_rows("lm_head.weight", folder, [1]).rows, expected[1:2])


def test_packed_heads_are_refused_with_the_way_out(tmp_path):
    packed = {"lm_head.weight_packed": torch.zeros(4096, 32, dtype=torch.int32), **plain_tensors()}
    folder = write_directory(tmp_path / "packed", packed, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"head of verifier .* is packed, .* `ignore`"):
        read_verifier_weights(str(folder), vocab_size=4096, hidden_size=256)


def test_scales_of_blocks_and_of_a_whole_tensor():
    stored = torch.ones(130, 256).to(torch.float8_e4m3fn)
    found = rescaled(stored, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), stored.shape)
    assert found[127, 127] == 1 and found[127, 128] == 2 and found[128, 127] == 3 and found[129, 255] == 4
    assert torch.equal(
        rescaled(stored[128:], torch.tensor([[1.0, 2.0], [3.0, 4.0]]), (130, 256), [128, 129]), found[128:]
    )
    assert torch.equal(rescaled(stored, torch.tensor([0.5]), stored.shape), torch.full((130, 256), 0.5))


def test_quantisation_is_named(gguf_q8, tmp_path):
    fp8 = str(write_fp8(tmp_path / "fp8", activations=True))
    assert quantization_of(str(gguf_q8), None) == "gguf Q8_0"
    named = "compressed-tensors float8 weights, float8 activations"
    assert quantization_of(fp8, open_verifier_config(fp8)) == named
    assert quantization_of(str(tiny_verifier_path()), open_verifier_config(str(tiny_verifier_path()))) is None


def test_a_directory_of_several_gguf_files_asks_for_one(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"has 2 GGUF files; name one of them, such as .*a\.gguf"):
        gguf_file_of(tmp_path)


@pytest.mark.parametrize("package", ["gguf", "compressed_tensors"])
def test_without_its_packages_a_quantised_verifier_says_what_to_install(package, monkeypatch, tmp_path):
    found = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "speculators.utils.quantized.find_spec", lambda name: None if name == package else found(name) or "installed"
    )
    name = write_fp8(tmp_path / "fp8")
    if package == "gguf":
        name = tmp_path / "tiny.gguf"
        name.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"pip install 'speculators\[quantized\]'"):
        load_verifier(name)


def test_a_format_that_needs_another_device_says_so(tmp_path):
    folder = write_directory(tmp_path / "nvfp4", plain_tensors(), quantization_config={"quant_method": "nvfp4"})
    with pytest.raises(ValueError, match="nvfp4"):
        load_verifier(folder)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "nvfp4"
