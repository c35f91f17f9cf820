"""What importing loads, which names the packages offer, and the small helpers of `speculators.models`."""

import importlib
import pkgutil
import subprocess
import sys

import pytest
import torch
from speculators.models.base_components import ModelComponents, model_classes, override_components
from speculators.models.utils import (
    conditional_torch_compile,
    flatten_rope_parameters,
    get_verifier_config,
    resolve_draft_intermediate_size,
    resolve_target_layer_ids,
    resolve_verifier_norm_class,
)
from torch.nn.attention.flex_attention import create_block_mask
from toyalgo import decoder_config

import speculators
from speculators import models, provenance
from speculators.models.attention import ALL_ATTENTION_FUNCTIONS, block_mask_to_dense_attention_mask, create_float_mask
from speculators.nn.norms import RMSNorm, RMSNormPlusOne
from speculators.utils import util


def modules_after(*steps: str) -> list[set[str]]:
    """Runs the lines one after the other in a process of their own; returns which modules were loaded after each."""
    script = "\n".join(["import sys", *(f"{step}\nprint(*sys.modules)" for step in steps)])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return [set(line.split()) for line in done.stdout.splitlines()]


def algorithms_in(modules: set[str]) -> set[str]:
    folders = {name.split(".")[2] for name in modules if name.startswith("speculators.models.")}
    return folders & set(speculators.SpeculatorModelConfig.available_names())


def test_what_is_asked_for_is_imported_and_nothing_heavier():
    package, config, found, training, *_ = modules_after(
        "import speculators",
        "from speculators import SpeculatorModelConfig, SpeculatorModel, reload_schemas",
        "SpeculatorModelConfig.find('eagle3')",
        "from speculators.train.config import TrainConfig; TrainConfig.resolve("
        "['--speculator-type', 'mlp', '--verifier-name-or-path', 'm', '--n-predict', '2'])",
        "import speculators.convert, speculators.verifier, speculators.train, speculators.evaluation as rooms",
        "from speculators import check, evaluate, load_verifier\n"
        "assert speculators.verifier.load_verifier is load_verifier and speculators.evaluate is evaluate\n"
        "assert rooms is speculators.evaluation and callable(check)",
    )
    assert not {"torch", "transformers", "pydantic", "numpy"} & package
    assert "torch" in config and not {name for name in config if name.startswith("speculators.models.")}
    assert not {name for name in config if name.startswith("transformers.models.") and ".modeling_" in name}
    assert "torch._inductor.compile_fx" not in config  # a second of every command
    assert algorithms_in(found) == {"eagle3"}
    assert algorithms_in(training) == {"eagle3", "mlp"}


def test_the_top_level_offers_its_names():
    for name in speculators.__all__:
        assert getattr(speculators, name)
    assert speculators.Eagle3DraftModel is speculators.SpeculatorModel.get_class("eagle3")
    assert speculators.__version__
    for name in ("NoSuchDraftModel", "no_such_name"):
        with pytest.raises(AttributeError, match=name):
            getattr(speculators, name)


def test_models_offers_the_classes_of_the_folders_that_exist():
    assert {"Eagle3DraftModel", "Eagle3SpeculatorConfig"} <= set(models.__all__)
    for name in models.__all__:
        assert getattr(models, name).__name__ == name
    with pytest.raises(AttributeError):
        models.NoSuchDraftModel  # noqa: B018


def test_the_command_line_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "speculators", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "train" in done.stdout


# -- masks ------------------------------------------------------------------------------------------------------------


def windowed(batch, head, query, key):
    return (key <= query) & (query - key < 3 + head)


def test_a_block_mask_written_out_is_the_rule_at_every_place():
    block_mask = create_block_mask(windowed, 1, 2, 5, 7, device="cpu")
    dense = block_mask_to_dense_attention_mask(block_mask)
    assert dense.shape == (1, 2, 5, 7)
    for head in range(2):
        for query in range(5):
            for key in range(7):
                assert dense[0, head, query, key] == (key <= query and query - key < 3 + head)
    added = block_mask_to_dense_attention_mask(block_mask, dtype=torch.float32)
    assert torch.equal(added == 0, dense)


def test_a_float_mask_is_zero_or_the_lowest_number():
    mask = create_float_mask(torch.tensor([[True, False]]), torch.bfloat16)
    assert mask.tolist() == [[0.0, torch.finfo(torch.bfloat16).min]]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # as who calls it uncompiled sees it
@pytest.mark.parametrize("kind", ["none", "block", "dense"])
def test_simple_flex_attention_equals_plain_attention(kind):
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    block_mask = create_block_mask(lambda b, h, q, k: k <= q, 1, None, 5, 5, device="cpu")
    mask = {"none": None, "block": block_mask, "dense": causal[None, None]}[kind]
    out, weights = ALL_ATTENTION_FUNCTIONS["simple_flex_attention"](None, query, key, value, mask, scaling=0.5)
    scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 0.5
    if kind != "none":
        scores = scores.masked_fill(~causal, float("-inf"))
    expected = scores.softmax(-1) @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    assert weights is None


# -- base components --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_base_components_compute_what_transformers_computes(model_type):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 16,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "head_dim": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = AutoConfig.for_model(model_type, **sizes)
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(config).model
    components = model_classes[model_type]
    layer = components.decoder_layer_class(config, 0)
    layer.load_state_dict(reference.layers[0].state_dict())
    hidden, position_ids = torch.randn(1, 6, 8), torch.arange(6)[None]
    position_embeddings = components.rotary_emb_class(config)(hidden, position_ids)
    expected = reference.layers[0](hidden, position_embeddings=reference.rotary_emb(hidden, position_ids))
    expected = expected[0] if isinstance(expected, tuple) else expected
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    for mask in (None, causal, create_float_mask(causal)):
        torch.testing.assert_close(layer(hidden, mask, position_embeddings=position_embeddings), expected)


def test_components_can_be_replaced_by_name():
    assert ModelComponents._fields == ("first_layer_class", "decoder_layer_class", "norm_class", "rotary_emb_class")
    changed = override_components("qwen3", norm_class=torch.nn.LayerNorm)
    assert changed.norm_class is torch.nn.LayerNorm and model_classes["qwen3"].norm_class is RMSNorm
    with pytest.raises(ValueError, match=r"model_type='lama'.*Did you mean 'llama'"):
        override_components("lama")
    with pytest.raises(ValueError, match="no_class"):
        override_components("llama", no_class=int)


# -- questions about verifiers ----------------------------------------------------------------------------------------


def test_default_layer_ids_are_early_middle_and_late(caplog):
    assert resolve_target_layer_ids(None, decoder_config(num_hidden_layers=12)) == [2, 6, 9]
    assert "[2, 6, 9]" in caplog.text
    assert resolve_target_layer_ids(None, decoder_config(num_hidden_layers=6)) == [1, 3, 5]
    assert "using [1, 3, 5] for a verifier of 6 layers" in caplog.text


def test_given_layer_ids_are_checked_and_sorted():
    config = decoder_config(num_hidden_layers=6)
    assert resolve_target_layer_ids([6, 0, 3], config) == [0, 3, 6]
    for wrong in ([], [1, 1], [-1, 2], [7]):
        with pytest.raises(ValueError, match=r"verifier has 6 layers; ids count finished layers"):
            resolve_target_layer_ids(wrong, config)


def test_the_verifiers_config_is_read_from_its_directory(tmp_path):
    decoder_config(num_hidden_layers=8).save_pretrained(tmp_path)
    assert get_verifier_config(str(tmp_path)).num_hidden_layers == 8
    assert resolve_target_layer_ids(None, str(tmp_path)) == [2, 4, 5]
    assert resolve_verifier_norm_class(str(tmp_path)) is RMSNorm
    (tmp_path / "config.json").write_text('{"model_type": "x", "text_config": {"model_type": "qwen3_next"}}')
    assert resolve_verifier_norm_class(str(tmp_path)) is RMSNormPlusOne


def test_the_draft_mlp_is_as_wide_as_a_dense_verifiers():
    assert resolve_draft_intermediate_size(decoder_config(intermediate_size=11)) == 11
    assert resolve_draft_intermediate_size(decoder_config(num_experts=4)) == 3 * decoder_config().hidden_size


def test_rope_parameters_of_layer_types_become_one_set():
    flat = {"rope_type": "default", "rope_theta": 1e4}
    assert flatten_rope_parameters(flat) is flat and flatten_rope_parameters(None) is None
    nested = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": flat}
    assert flatten_rope_parameters(nested) is flat


def test_conditional_compile_is_the_function_itself_on_a_cpu():
    if torch.cuda.is_available():
        pytest.skip("compiles here")
    assert conditional_torch_compile(len) is len
    assert conditional_torch_compile(dynamic=True)(len) is len


def test_the_device_helpers_answer_without_an_accelerator():
    assert isinstance(util.get_current_device(), torch.device)
    assert isinstance(util.get_device_name(), str)
    assert len(util.mem_get_info()) == 2
    assert util.empty_cache() is None and util.is_npu_available() in (True, False)


# -- provenance -------------------------------------------------------------------------------------------------------


def test_provenance_of_a_repository(tmp_path):
    def git(*args):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *args], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("old\n")
    git("add", "file")
    git("commit", "-m", "x")
    (tmp_path / "file").write_text("new\n")
    (tmp_path / "deep").mkdir()
    assert provenance.find_repo_root(tmp_path / "deep") == tmp_path
    assert len(provenance.git_sha(tmp_path)) == 40
    assert "+new" in provenance.git_diff(tmp_path)


def test_provenance_of_what_is_not_there(tmp_path):
    assert provenance.run_git("no-such-command", cwd=tmp_path) is None
    assert provenance.git_sha(None) is None
    assert provenance.pkg_version("no-such-package") is None
    assert provenance.find_package_repo("no_such_package") is None
    assert set(provenance.package_versions()) == set(provenance.TRACKED_PACKAGES)
    assert provenance.package_versions()["torch"] == torch.__version__.split("+")[0] or torch.__version__


def test_every_name_that_a_package_exports_can_be_had():
    packages = [
        "speculators",
        *(m.name for m in pkgutil.walk_packages(speculators.__path__, "speculators.") if m.ispkg),
    ]
    missing = [
        f"{package}.{name}"
        for package in packages
        for name in getattr(importlib.import_module(package), "__all__", [])
        if not hasattr(importlib.import_module(package), name)
    ]
    assert not missing
