"""Engine profiles: what they say is what the engine's source says, and what the commands do with them.

The release that cannot run here is read as source: SPECULATORS_VLLM_SOURCE names the directory `vllm` of the sources of
vLLM 0.33 (vllm-0.33.0.tar.gz of the package index, unpacked). The one that runs is compared in
tests/speculative_config/test_against_vllm.py.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import LlamaConfig, PretrainedConfig

from speculators.checkpoint.engine_profile import (
    Serving,
    newest_profile,
    profile_named,
    profile_names,
    profile_of_version,
    profiles,
    releases,
)
from speculators.checkpoint.formats import SPECULATORS
from speculators.cli.app import run
from speculators.decoding.config import SpeculativeConfig, hf_config_override
from speculators.decoding.config.methods import METHODS, MTP_TYPE_NAMES, SPECULATORS_METHODS
from speculators.deploy.engine import choose_engine, drafter_findings, position_findings
from speculators.model import SpeculatorModel
from speculators.models.eagle.config import EagleSpeculatorConfig

ROOT = Path(__file__).parents[2]
NEW_IN_033 = {
    "xpress_topc",
    "fly_window_size",
    "fly_entropy_threshold",
    "fly_entropy_top_k",
    "draft_lm_head_quantization",
    "disable_lookahead_block_hashes",
}
NAMED_BY_THE_ENGINE = {"target_model_config", "target_parallel_config", "draft_parallel_config"}
SOURCE = os.environ.get("SPECULATORS_VLLM_SOURCE")
needs_source = pytest.mark.skipif(not SOURCE, reason="SPECULATORS_VLLM_SOURCE names no source of vLLM 0.33")


def test_the_profiles_are_named_in_order_and_the_nearest_name_is_offered():
    assert profile_names() == ["vllm-0.32", "vllm-0.33", "sglang-0.5"] and newest_profile().name == "vllm-0.33"
    with pytest.raises(ValueError, match=r"no engine 'vllm-0\.23' is described.*Did you mean"):
        profile_named("vllm-0.23")


@pytest.mark.parametrize(
    ("installed", "profile"),
    [("0.32.0+cpu", "0.32"), ("0.33.1", "0.33"), ("0.40.0rc1", "0.33"), ("0.9.1", "0.32"), ("dev", "0.32")],
)
def test_an_installed_version_has_its_profile_or_the_nearest_before_it(installed, profile):
    assert profile_of_version("vllm", installed).version == profile


def test_our_config_knows_the_union_of_all_releases():
    described = releases("vllm")
    assert {method for profile in described for method in profile.methods} <= set(METHODS)
    assert {name for profile in described for name in profile.old_method_names} == MTP_TYPE_NAMES
    assert {name for profile in described for name in profile.settings} <= set(SpeculativeConfig.model_fields)
    for profile in described:
        for model_type, drafter in profile.drafters.items():
            assert drafter.settings == SPECULATORS_METHODS[model_type]
            assert profile.takes_method(drafter.settings["method"])
            assert SpeculatorModel.get_class(model_type).contract.served_format == drafter.format


def test_an_environment_says_which_engine_it_has(fake_environment, monkeypatch):
    assert choose_engine("sglang-0.5").profile.engine == "sglang"
    found = choose_engine(python=str(fake_environment))
    assert found.profile.name == "vllm-0.32" and "vllm 0.32.0+cpu in" in str(found)
    monkeypatch.setenv("SPECULATORS_VLLM_PYTHON", str(fake_environment))
    assert choose_engine().profile.name == "vllm-0.32"
    metadata = next((fake_environment / "site").glob("vllm-*"))
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.10\n")
    metadata.rename(metadata.with_name("sglang-0.5.10.dist-info"))
    assert choose_engine().profile.name == "sglang-0.5"
    with pytest.raises(ValueError, match=r"`serve` starts vLLM; `speculators export CHECKPOINT --engine sglang-0\.5"):
        run(["serve", "org/model", "--method", "ngram", "-k", "2", "--dry-run"])


def test_a_variable_that_names_nothing_is_said_and_the_option_is_refused(monkeypatch):
    monkeypatch.setenv("SPECULATORS_VLLM_PYTHON", "/no/where")
    assert "the newest that is described: /no/where is not a Python" in str(choose_engine())
    with pytest.raises(ValueError, match="/no/where is not a Python"):
        choose_engine(python="/no/where")


NGRAM = {"method": "ngram", "num_speculative_tokens": 4}
NEW_SETTINGS = [
    {"rejection_sample_method": "fly"},
    {"rejection_sample_method": "fly", "fly_window_size": 2},
    {"method": "eagle3", "model": "org/draft", "draft_lm_head_quantization": "fp8"},
    {"disable_lookahead_block_hashes": True},
]


@pytest.mark.parametrize("new", NEW_SETTINGS, ids=json.dumps)
def test_a_setting_of_the_newer_release_is_refused_for_the_older_one_by_name(new):
    config = SpeculativeConfig(**{**NGRAM, **new})
    assert json.loads(config.to_vllm_json("0.33")) == {**NGRAM, **new}
    last = list(new)[-1]
    for version in ("0.32", "vllm-0.32", None):  # None: the release that the tests run
        assert "vLLM 0.33 takes it" in config.vllm_unsupported(version)[last]
        with pytest.raises(ValueError, match=last):
            config.to_vllm_json(version)
    assert last not in json.loads(config.to_vllm_json("0.32", drop_unsupported=True))


def test_methods_that_a_release_gave_up_or_never_served_are_refused_for_it(tmp_path):
    for method in ("medusa", "mlp_speculator"):
        values = {"model_type": method, "num_heads": 3, "hidden_size": 8, "n_predict": 3, "vocab_size": 9}
        (tmp_path / "config.json").write_text(json.dumps(values))
        config = SpeculativeConfig(method=method, model=str(tmp_path), num_speculative_tokens=3)
        older = config.vllm_unsupported("0.32")
        assert ("method" in older) is (method == "mlp_speculator")
        assert "vLLM 0.33 does not serve" in config.vllm_unsupported("0.33")["method"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rejection_sample_method": "fly", "num_speculative_tokens": 1}, "num_speculative_tokens to be at least 2"),
        ({"rejection_sample_method": "fly", "fly_window_size": 4}, "fly_window_size to be smaller than"),
        ({"draft_lm_head_quantization": "fp8"}, "draft_lm_head_quantization is not supported for method 'ngram'"),
        ({"draft_lm_head_quantization": "int4"}, "fp8"),
        ({"xpress_topc": 3}, "xpress_topc is only supported by XPress"),
    ],
)
def test_rules_of_the_new_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SpeculativeConfig(**{**NGRAM, **settings})


def test_a_lossy_rule_of_the_server_is_not_decoded_here():
    with pytest.raises(ValueError, match="'fly' is lossy"):
        SpeculativeConfig(**NGRAM, rejection_sample_method="fly").acceptance_rule()


def test_the_commands_name_verifier_and_drafter_both():
    serving = Serving("/v", {"method": "eagle3", "model": "/d", "num_speculative_tokens": 3})
    said = json.dumps(serving.speculative_config)
    for name in ("vllm-0.32", "vllm-0.33"):
        assert profile_named(name).command(serving) == f"vllm serve /v --speculative-config '{said}'"
    assert profile_named("sglang-0.5").command(serving.told({"method": "EAGLE3"})) == (
        "python -m sglang.launch_server --model-path /v --speculative-algorithm EAGLE3 --speculative-draft-model-path "
        "/d --speculative-num-steps 3 --speculative-eagle-topk 1 --speculative-num-draft-tokens 4"
    )


@pytest.mark.parametrize(
    ("method", "rope", "said"),
    [
        ("eagle3", "default", {}),
        ("dflash", "default", {"vllm-0.32": "raises it for eagle and eagle3 only"}),
        ("draft_model", "default", {"vllm-0.32": "only", "vllm-0.33": "only"}),
        ("dflash", "yarn", {"vllm-0.32": "only", "vllm-0.33": "shortens the server's max_model_len"}),
    ],
)
def test_a_drafter_of_few_positions_is_reported_where_the_release_does_not_raise_them(method, rope, said):
    layers = LlamaConfig(max_position_embeddings=64)
    layers.rope_parameters = {"rope_type": rope, "rope_theta": 1e4}
    config: Any = SimpleNamespace(transformer_layer_config=layers)
    serving, verifier = Serving("/v", {"method": method}), LlamaConfig(max_position_embeddings=128)
    for profile in releases("vllm"):
        rules = [found.rule for found in position_findings(profile, config, serving, verifier)]
        assert len(rules) == (profile.name in said) and all(said[profile.name] in rule for rule in rules)


def test_tensors_that_a_loader_needs_are_missed_by_name():
    config, contract = EagleSpeculatorConfig(), SpeculatorModel.get_class("eagle").contract
    names = ["fc.weight", "layers.0.self_attn.q_proj.weight", "layers.0.mlp.down_proj.weight"]
    assert not list(drafter_findings(profile_named("vllm-0.33"), contract, config, "eagle", names))
    (found,) = drafter_findings(profile_named("sglang-0.5"), contract, config, "sglang", names)
    assert (found.code, found.where) == ("tensor-missing", "fc.bias")


def test_the_tables_in_the_docs_are_written_from_the_profiles():
    spec = importlib.util.spec_from_file_location("engine_matrix", ROOT / "scripts" / "engine_matrix.py")
    assert spec is not None and spec.loader is not None
    matrix = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(matrix)
    assert "| medusa | `medusa` (export, format `medusa`) | - | - |" in matrix.drafters()
    text = matrix.DOCUMENT.read_text(encoding="utf-8")
    assert matrix.with_tables(text) == text, "python scripts/engine_matrix.py writes them anew"


def test_the_mtp_family_of_the_newer_release_is_recognised():
    config = PretrainedConfig(architectures=["Step5ForCausalLM"], num_nextn_predict_layers=3)
    draft = hf_config_override(config)
    assert (draft.model_type, draft.architectures, draft.n_predict) == ("step5_mtp", ["Step5MTP"], 3)


# -- the source of vLLM 0.33


def module(name: str) -> ast.Module:
    assert SOURCE
    return ast.parse((Path(SOURCE) / name).read_text(encoding="utf-8"))


def named(name: str, function: str, **known: Any) -> Any:
    """One function of a module of vLLM, which cannot be imported without its build; `known`: the names it uses."""
    tree = module(name)
    found = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function)
    found.decorator_list, found.returns = [], None
    for argument in (*found.args.args, *found.args.kwonlyargs):
        argument.annotation = None
    space = {"logger": SimpleNamespace(info=lambda *_: None, warning_once=lambda *_: None), **known}
    exec(compile(ast.Module([found], []), name, "exec"), space)
    return space[function]


@pytest.fixture(scope="module")
def literals() -> Mapping[str, Any]:
    space: dict[str, Any] = {"Literal": Literal, "frozenset": frozenset}
    for node in module("config/speculative.py").body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript | ast.Call):
            try:
                exec(compile(ast.Module([node], []), "literals", "exec"), space)
            except NameError:  # not a list of words
                continue
    return space


@needs_source
def test_methods_settings_and_words_are_those_of_the_source(literals):
    profile = profile_named("vllm-0.33")
    assert {*profile.methods, *profile.old_method_names} == set(get_args(literals["SpeculativeMethod"]))
    assert {*profile.old_method_names, "mtp"} == set(get_args(literals["MTPModelTypes"]))
    assert len(get_args(literals["MTPModelTypes"])) == 28
    for name, words in (
        ("RejectionSampleMethod", "rejection_sample_method"),
        ("DraftSampleMethod", "draft_sample_method"),
    ):
        assert get_args(literals[name]) == profile.choices[words]
    assert profile.lengthened_rope_types is not None
    assert set(profile.lengthened_rope_types) == literals["_CACHE_ONLY_ROPE_TYPES"]
    body = next(
        node for node in module("config/speculative.py").body if getattr(node, "name", "") == "SpeculativeConfig"
    )
    assert isinstance(body, ast.ClassDef)
    fields = {node.target.id: node for node in body.body if isinstance(node, ast.AnnAssign)}  # type: ignore[union-attr]
    assert set(profile.settings) == fields.keys() - NAMED_BY_THE_ENGINE
    assert set(profile.settings) - set(profile_named("vllm-0.32").settings) == NEW_IN_033
    for name in NEW_IN_033 - {"draft_lm_head_quantization"}:
        value = fields[name].value
        default = (
            next((k.value for k in value.keywords if k.arg == "default"), None)
            if isinstance(value, ast.Call)
            else value
        )
        assert SpeculativeConfig.model_fields[name].default == ast.literal_eval(default)
    for name, words in profile.choices.items():
        if name == "draft_lm_head_quantization":
            assert all(
                repr(word).replace("'", '"') in ast.unparse(fields[name].annotation).replace("'", '"') for word in words
            )


@needs_source
def test_the_types_it_reads_by_itself_and_the_models_it_gave_up():
    algos = (Path(SOURCE or "") / "transformers_utils/configs/speculators/algos.py").read_text()
    for name in profile_named("vllm-0.33").checkpoint_types:
        assert f'register_speculator("{name}")' in algos
    assert algos.count('register_speculator("') == len(profile_named("vllm-0.33").checkpoint_types)
    registry = (Path(SOURCE or "") / "model_executor/models/registry.py").read_text()
    assert "MedusaModel" not in registry and "MLPSpeculator" not in registry


@needs_source
def test_the_source_refuses_a_checkpoint_of_a_local_verifier_by_its_path(speculator, verifier, tmp_path, monkeypatch):
    values = json.loads((Path(speculator) / "config.json").read_text())
    hub = SimpleNamespace(constants=SimpleNamespace(HF_HUB_OFFLINE=True))
    config = SimpleNamespace(extract_vllm_speculative_config=lambda config_dict: {"method": "eagle3"})
    base = SimpleNamespace(SpeculatorsConfig=config)
    monkeypatch.setitem(sys.modules, "vllm.transformers_utils.configs.speculators.base", base)
    override = named(
        "transformers_utils/config.py",
        "maybe_override_with_speculators",
        os=os,
        Path=Path,
        huggingface_hub=hub,
        without_trust_remote_code=dict,
        validate_repo_id=validate_repo_id,
        HFValidationError=HFValidationError,
        PreTrainedConfig=SimpleNamespace(get_config_dict=lambda *_, **more: (values, {})),
    )
    with pytest.raises(ValueError, match="must name a remote model repository"):
        override(speculator, None, False)
    assert not profile_named("vllm-0.33").serves_local_verifiers_by_checkpoint
    monkeypatch.chdir(tmp_path)
    values["speculators_config"]["verifier"]["name_or_path"] = "org/model"
    assert override(speculator, None, False)[0] == "org/model"
    (tmp_path / "org" / "model").mkdir(parents=True)
    with pytest.raises(ValueError, match="must name a remote model repository"):
        override(speculator, None, False)
    values.pop("speculators_config")  # what the printed command names: the verifier, which has no such config
    assert override(verifier, None, False, None, {"model": speculator}) == (verifier, None, {"model": speculator})


@needs_source
def test_the_source_raises_positions_as_the_profile_says(literals):
    rope = SimpleNamespace
    sizes_cache = named(
        "config/speculative.py",
        "_rope_only_sizes_cache",
        _CACHE_ONLY_ROPE_TYPES=literals["_CACHE_ONLY_ROPE_TYPES"],
        iter_rope_parameters=lambda config: [config.rope_parameters],
    )
    raise_positions = named(
        "config/speculative.py", "_maybe_override_draft_max_position_embeddings", _rope_only_sizes_cache=sizes_cache
    )
    allowed = profile_named("vllm-0.33").lengthened_rope_types or ()
    for kind in ("default", "llama3", "linear", "yarn", "longrope", "dynamic"):
        draft = rope(max_position_embeddings=64, rope_parameters={"rope_type": kind})
        raise_positions(draft, 128)
        assert (draft.max_position_embeddings == 128) is (kind in allowed)
    shares = named("config/speculative.py", "draft_shares_target_positions", _rope_only_sizes_cache=sizes_cache)
    draft = SimpleNamespace(hf_config=rope(rope_parameters={}))
    raised = {m for m in METHODS if m in profile_named("vllm-0.33").methods and METHODS[m].has_network}
    assert {m for m in raised if shares(SimpleNamespace(method=m, draft_model_config=draft))} == set(
        profile_named("vllm-0.33").lengthens_drafts_of
    )


@needs_source
@pytest.mark.parametrize(
    "settings",
    [
        {"rejection_sample_method": "fly", "num_speculative_tokens": 1},
        {"rejection_sample_method": "fly", "fly_window_size": 4},
        {"draft_lm_head_quantization": "fp8"},
    ],
    ids=json.dumps,
)
def test_both_refuse_the_new_settings_in_the_same_words(settings):
    verify = named("config/speculative.py", "_verify_args")
    values = {name: field.default for name, field in SpeculativeConfig.model_fields.items()} | NGRAM | settings
    theirs = SimpleNamespace(
        **values,
        use_gemma4_mtp=lambda: False,
        uses_draft_model=lambda: False,
        uses_extract_hidden_states=lambda: False,
        verify_equal_vocab_size_if_draft_model=lambda: None,
    )
    with pytest.raises(ValueError) as refused:
        verify(theirs)
    with pytest.raises(ValueError) as ours:
        SpeculativeConfig(**{**NGRAM, **settings})
    assert str(refused.value) in str(ours.value) + "."


def test_every_profile_serves_something_and_names_its_directories():
    for profile in profiles():
        for model_type, drafter in profile.drafters.items():
            formats = [known.name for known in SpeculatorModel.get_class(model_type).contract.formats]
            assert drafter.format in (SPECULATORS, *formats)
