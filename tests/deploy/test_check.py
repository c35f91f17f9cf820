"""The contract check: a clean checkpoint of every type gives no finding, and every seeded fault is caught by name."""

import importlib
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from deploy_toys import CASES, HIDDEN, VERIFIER, draft_map, edit_config, edit_tensors
from transformers import AutoConfig

from speculators.checkpoint.record import RECORD_FILE
from speculators.cli.app import main
from speculators.deploy.check import check_checkpoint
from speculators.deploy.export import export_checkpoint
from speculators.train.checkpointer import save_speculator


def config_fault(key: str, value=None, *, remove=False, layers=False):
    def change(values):
        place = values["transformer_layer_config"] if layers else values
        *parents, last = key.split(".")
        for parent in parents:
            place = place[parent]
        if remove:
            del place[last]
        else:
            place[last] = value

    return lambda path: edit_config(path, change)


def tensor_fault(change):
    return lambda path: edit_tensors(path, change)


def swap_chunks(tensors):
    first, second, third = tensors["fc.weight"].split(HIDDEN, dim=1)
    tensors["fc.weight"] = torch.cat((second, first, third), dim=1)


def other_map(tensors):
    tensors["t2d"], tensors["d2t"] = draft_map(seed=11)


def other_embedding(tensors):
    order = torch.randperm(len(tensors["embed_tokens.weight"]), generator=torch.Generator().manual_seed(1))
    tensors["embed_tokens.weight"] = tensors["embed_tokens.weight"][order]


def ids_for_offsets(tensors):
    tensors["d2t"] = tensors["d2t"] + torch.arange(len(tensors["d2t"]))


# case, fault, (code, where) that must be among the findings, words of its message
FAULTS = {
    "wrong rope theta": (
        "eagle3",
        config_fault("rope_parameters.rope_theta", 1e6, layers=True),
        ("config-changed", "transformer_layer_config.rope_parameters.rope_theta"),
        "it was 10000.0 in training",
    ),
    "partial rotary factor": (
        "eagle3",
        config_fault("rope_parameters.partial_rotary_factor", 0.5, layers=True),
        ("config-added", "transformer_layer_config.rope_parameters.partial_rotary_factor"),
        "not there in training",
    ),
    "aux id off by one": (
        "eagle3",
        config_fault("eagle_aux_hidden_state_layer_ids", [3, 7, 10]),
        ("config-changed", "eagle_aux_hidden_state_layer_ids"),
        "it was [2, 6, 9] in training",
    ),
    "missing d2t": (
        "eagle3",
        tensor_fault(lambda tensors: tensors.pop("d2t")),
        ("tensor-missing", "d2t"),
        "draft id i would stand for token i",
    ),
    "missing tensor": (
        "eagle3",
        tensor_fault(lambda tensors: tensors.pop("layers.0.hidden_norm.weight")),
        ("tensor-missing", "layers.0.hidden_norm.weight"),
        "loaders do not report it",
    ),
    "transposed fc chunks": (
        "eagle3",
        tensor_fault(swap_chunks),
        ("tensor-changed", "fc.weight"),
        "in the order [1, 0, 2]",
    ),
    "norm_before_residual unset": (
        "eagle3",
        config_fault("norm_before_residual", remove=True),
        ("key-missing", "norm_before_residual"),
        "takes it for true",
    ),
    "norm switch": (
        "eagle3",
        config_fault("norm_output", False),
        ("config-changed", "norm_output"),
        "it was True in training",
    ),
    "sliding_window_non_causal mismatch": (
        "dflash-sliding",
        config_fault("is_causal", False, layers=True),
        ("config-added", "transformer_layer_config.is_causal"),
        "engines read it",
    ),
    "sliding_window_non_causal flipped": (
        "dflash-sliding",
        config_fault("sliding_window_non_causal", True),
        ("config-changed", "sliding_window_non_causal"),
        "it was False in training",
    ),
    "sliding_window_non_causal missing": (
        "dflash-sliding",
        config_fault("sliding_window_non_causal", remove=True),
        ("key-missing", "sliding_window_non_causal"),
        "no layer is causal",
    ),
    "served with another mask": (
        "dflash",
        config_fault("is_causal", remove=True, layers=True),
        ("mask-differs", "sliding_window_non_causal"),
        "trained causal within a block: [False], served: [True]",
    ),
    "sample_from_anchor missing": (
        "dspark",
        config_fault("sample_from_anchor", remove=True),
        ("key-missing", "sample_from_anchor"),
        "one token late",
    ),
    "vocabulary map of another verifier": (
        "eagle3",
        tensor_fault(other_map),
        ("head-rows-differ", "lm_head.weight"),
        "of the same tokens",
    ),
    "vocabulary map changed after training": (
        "dspark",
        tensor_fault(other_map),
        ("tensor-changed", "d2t"),
        "another hash",
    ),
    "tokens in place of offsets": (
        "eagle3",
        tensor_fault(ids_for_offsets),
        ("map-out-of-range", "d2t"),
        "tokens outside 0..4095",
    ),
    "embeddings of another tokenizer": (
        "eagle3",
        tensor_fault(other_embedding),
        ("embedding-differs", "embed_tokens.weight"),
        "differ from the verifier's",
    ),
    "trained embedding left out": (
        "peagle",
        tensor_fault(lambda tensors: tensors.pop("embed_tokens.weight")),
        ("tensor-missing", "embed_tokens.weight"),
        "not in the checkpoint",
    ),
    "fc_norm that vLLM drops": (
        "peagle",
        config_fault("fc_norm", remove=True, layers=True),
        ("option-dropped", "fc_norm"),
        "does not pass it on",
    ),
    "no mask token": (
        "peagle",
        config_fault("mask_token_id", None),
        ("mask-token-missing", "mask_token_id"),
        "need a token",
    ),
    "aux ids where only one runner looks": (
        "eagle3",
        lambda path: edit_config(
            path,
            lambda v: v["transformer_layer_config"].update(
                eagle_config={"eagle_aux_hidden_state_layer_ids": v.pop("eagle_aux_hidden_state_layer_ids")}
            ),
        ),
        ("aux-ids-nested", "eagle_config.eagle_aux_hidden_state_layer_ids"),
        "top level only",
    ),
    "llama draft that does not say it reads two layers": (
        "eagle3-llama-two-aux",
        config_fault("num_aux_hidden_states", remove=True, layers=True),
        ("num-aux-missing", "transformer_layer_config.num_aux_hidden_states"),
        "size fc by this key alone",
    ),
    "layer past the verifier's end": (
        "eagle3",
        config_fault("eagle_aux_hidden_state_layer_ids", [2, 6, 13]),
        ("aux-ids-range", "aux layer ids"),
        "0..12 are valid",
    ),
    "layers out of order": (
        "dflash",
        config_fault("aux_hidden_state_layer_ids", [6, 2, 9]),
        ("aux-ids-order", "aux layer ids"),
        "sort them",
    ),
    "no verifier": (
        "eagle3",
        config_fault("speculators_config.verifier.name_or_path", "/no/such/model"),
        ("verifier-unreachable", "speculators_config.verifier.name_or_path"),
        "not a directory with a config.json",
    ),
    "NaN": (
        "eagle3",
        tensor_fault(lambda tensors: tensors["norm.weight"].fill_(float("nan"))),
        ("not-finite", "norm.weight"),
        "256 values",
    ),
    "one edited value": (
        "medusa",
        tensor_fault(lambda tensors: tensors["blocks.0.layers.0.weight"][0, 0].add_(0.01)),
        ("tensor-changed", "blocks.0.layers.0.weight"),
        "not exactly",
    ),
    "unknown tensor": (
        "dflash",
        tensor_fault(lambda tensors: tensors.update(mask_hidden=torch.ones(3))),
        ("tensor-unexpected", "mask_hidden"),
        "refuse names",
    ),
    "wrong width": (
        "eagle3",
        config_fault("hidden_size", 128, layers=True),
        ("verifier-hidden-size", "hidden_size"),
        "the verifier's is 256",
    ),
    "option that no layer can have": (
        "eagle3",
        lambda path: edit_config(path, lambda v: v.update(fc_norm=True)),
        ("config-invalid", "config.json"),
        "mutually exclusive",
    ),
    "layer key that has no default": (
        "dflash",
        config_fault("rms_norm_eps", remove=True, layers=True),
        ("key-missing", "transformer_layer_config.rms_norm_eps"),
        "no default",
    ),
    "head that vLLM does not load": (
        "dspark",
        config_fault("markov_rank", 0),
        ("not-servable", "markov_head_type"),
        "nothing else",
    ),
    "no tokens to draft": (
        "eagle3",
        lambda path: edit_config(
            path,
            lambda v: v["speculators_config"].update(
                proposal_methods=[{"proposal_type": "greedy", "speculative_tokens": None}]
            ),
        ),
        ("config-invalid", "speculators_config.proposal_methods"),
        "integer",
    ),
    "not JSON": (
        "eagle3",
        lambda path: (path / "config.json").write_text("{"),
        ("config-unreadable", "config.json"),
        "not JSON",
    ),
    "another weights file": (
        "dflash",
        lambda path: shutil.copy(path / "model.safetensors", path / "old.safetensors"),
        ("stray-weights", "old.safetensors"),
        "every *.safetensors",
    ),
    "cut file": (
        "eagle3",
        lambda path: (path / "model.safetensors").write_bytes(b"123"),
        ("weights-unreadable", "model.safetensors"),
        "incomplete or damaged",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_caught_by_name(fault, copy_of):
    case, seed, (code, where), words = FAULTS[fault]
    path = copy_of(case)
    seed(path)
    report = check_checkpoint(path)
    named = [found for found in report.findings if found.code == code and found.where.startswith(where)]
    assert named, [str(found) for found in report.findings]
    assert any(words in f"{found.found}; {found.rule}" for found in named), str(named[0])
    assert all(found.fix for found in report.findings)
    assert all(found.rule.count("vLLM") == found.rule.count(report.profile.title) for found in report.findings)
    assert not report.ok


@pytest.mark.parametrize("case", CASES)
def test_a_clean_checkpoint_has_no_findings(case, trained):
    start = time.perf_counter()
    report = check_checkpoint(trained(case))
    assert not report.findings, [str(found) for found in report.findings]
    assert not report.not_done and report.ok
    assert {"tensors", "as it was trained", "fits the verifier", "the verifier it learned from"} <= set(report.done)
    assert time.perf_counter() - start < 5.0


def test_rope_in_the_older_spelling_is_the_same_rope(copy_of):
    path = copy_of("eagle3")

    def older(values):
        layers = values["transformer_layer_config"]
        layers["rope_theta"] = layers.pop("rope_parameters")["rope_theta"]

    edit_config(path, older)
    assert not check_checkpoint(path).findings
    edit_config(path, lambda values: values["transformer_layer_config"].update(rope_theta=7.0))
    assert [found.code for found in check_checkpoint(path).findings] == ["config-changed"]


def test_stored_in_another_type_it_is_still_what_was_trained(trained, tmp_path):
    exported = export_checkpoint(trained("eagle3"), tmp_path / "half", dtype="float16")
    assert not check_checkpoint(exported.path).findings


def test_another_verifier_is_named(trained, tmp_path):
    other = Path(shutil.copytree(VERIFIER, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    found = check_checkpoint(trained("eagle3"), verifier=str(other)).findings
    assert [finding.code for finding in found] == ["verifier-tokenizer"]


def test_without_a_record_the_check_says_what_it_could_not_do(copy_of):
    path = copy_of("eagle3")
    (path / RECORD_FILE).unlink()
    report = check_checkpoint(path)
    assert report.ok and [found.code for found in report.findings] == ["record-missing"]
    assert list(report.not_done) == ["as it was trained"]
    assert report.verdict == "ready to serve, as far as can be told without its record"
    edit_tensors(path, other_map)  # seen by the rows of the head alone
    assert {found.code for found in check_checkpoint(path).findings} == {"head-rows-differ", "record-missing"}


def test_a_verifier_without_weights_or_tokenizer_is_checked_by_its_config(trained, tmp_path):
    bare = tmp_path / "verifier"
    bare.mkdir()
    shutil.copy(Path(VERIFIER) / "config.json", bare)
    report = check_checkpoint(trained("eagle3"), verifier=str(bare))
    assert report.ok and "fits the verifier" in report.done
    assert set(report.not_done) == {"the verifier's weights", "the verifier's tokenizer"}


def test_a_foreign_directory_without_a_verifier_is_checked_as_far_as_it_goes(trained, tmp_path):
    native = export_checkpoint(trained("eagle"), tmp_path / "eagle-native").path
    (native / RECORD_FILE).unlink()
    report = check_checkpoint(native)
    assert report.format == "eagle" and report.ok
    assert set(report.not_done) == {"as it was trained", "fits the verifier"}
    assert "fits the verifier" in check_checkpoint(native, verifier=VERIFIER).done
    edit_config(native, lambda values: values.update(layer_types=["full_attention"]))
    assert [found.code for found in check_checkpoint(native).findings] == ["layer-types-short"]


def test_biases_that_vllm_would_drop_are_named(trained, tmp_path):
    native = export_checkpoint(trained("medusa"), tmp_path / "medusa-native", engine="vllm-0.32").path
    edit_config(native, lambda values: values.pop("medusa_fc_bias"))
    report = check_checkpoint(native)
    assert [(found.code, found.where) for found in report.findings] == [("option-dropped", "medusa_fc_bias")]


def test_an_algorithm_of_others_is_checked_as_far_as_it_says(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "fixtures")
    algorithm = importlib.import_module("myalgo.core").MyAlgoDraftModel
    model = algorithm.from_training_args(
        AutoConfig.from_pretrained(VERIFIER),
        verifier_name_or_path=VERIFIER,
        draft_vocab_size=None,
        target_layer_ids=[1, 2],
    )
    (tmp_path / "0").mkdir()
    save_speculator(model, tmp_path / "0")
    report = check_checkpoint(tmp_path / "0")
    assert not report.findings and report.serving is None, [str(found) for found in report.findings]
    edit_tensors(tmp_path / "0", lambda tensors: tensors.pop("fc.bias"))
    assert [found.code for found in check_checkpoint(tmp_path / "0").findings] == ["tensor-missing"]


@pytest.mark.parametrize(
    ("case", "verdict", "served"),
    [
        ("eagle3", "ready to serve", f"vllm serve {VERIFIER} --speculative-config "),
        ("eagle", "no errors; vllm-0.32 serves what `speculators export` makes of it", "speculators export "),
        ("mlp", "no errors; vllm-0.32 serves no drafter of this type", "nothing: decode here"),
    ],
)
def test_only_what_vllm_serves_as_it_is_is_called_ready_to_serve(case, verdict, served, trained):
    report = check_checkpoint(trained(case), engine="vllm-0.32")
    assert report.ok and report.verdict == verdict
    assert served in report.served_by


def test_each_release_is_said_what_it_makes_of_a_checkpoint(trained, tmp_path, capsys):
    path = trained("eagle3")
    for name in ("vllm-0.32", "vllm-0.33"):
        assert main(["check", str(path), "--engine", name, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["profile"] == name and said["serve_with"].startswith(f"vllm serve {VERIFIER} --speculative-config ")
    newer, older, other = (check_checkpoint(path, engine=name) for name in ("vllm-0.33", "vllm-0.32", "sglang-0.5"))
    assert f"refuses `vllm serve {path}` alone" in "".join(newer.notes) and not older.notes
    assert other.serving is None and other.verdict.startswith("no errors; sglang-0.5 cannot serve it: the layout")
    assert other.served_by.endswith("decode here with `speculators generate`, or serve it by vllm-0.32 or vllm-0.33")
    with pytest.raises(ValueError, match=r"sglang-0\.5 cannot serve it: the layout"):
        export_checkpoint(path, tmp_path / "out", engine="sglang-0.5")


OF_VLLM_ALONE = {
    "eagle3": (["norm_before_residual", "transformer_layer_config.hidden_act"], "key-missing"),
    "dflash": (["aux_hidden_state_layer_ids", "sliding_window_non_causal"], "key-missing"),
    "dspark": (["markov_rank"], "key-missing"),
}
"""Case: keys without which vLLM drafts otherwise, and the code of their findings."""


@pytest.mark.parametrize("case", OF_VLLM_ALONE)
def test_findings_name_the_engine_that_was_asked_about(case, copy_of):
    path, (keys, code) = copy_of(case), OF_VLLM_ALONE[case]
    for key in keys:
        config_fault(key.split(".")[-1], remove=True, layers="." in key)(path)
    for name, title in (("vllm-0.32", "vLLM 0.32"), ("vllm-0.33", "vLLM 0.33")):
        report = check_checkpoint(path, engine=name)
        rules = {found.where: found.rule for found in report.findings if found.code == code}
        assert {key for key, rule in rules.items() if title in rule} == set(keys)
        assert f"what {title} makes of the options" in report.done
        assert not [row for row in map(str, report.tables()[-1].columns[0].cells) if "serve with" in row]
    other = check_checkpoint(path, engine="sglang-0.5")
    assert "what SGLang 0.5 makes of the options" in other.done
    assert not [found.rule for found in other.findings if "vLLM" in found.rule or "{" in found.rule]


def test_the_verdict_of_a_check_is_said_once(trained, capsys):
    assert main(["check", str(trained("dflash"))]) == 0
    assert capsys.readouterr().out.count("ready to serve") == 1
    assert str(check_checkpoint(trained("dflash"))).count("ready to serve") == 1


def test_a_verifier_named_from_here_is_served_from_anywhere(trained, monkeypatch):
    monkeypatch.chdir(Path(VERIFIER).parent)
    report = check_checkpoint(trained("eagle3"), verifier=Path(VERIFIER).name)
    assert not report.findings and f"vllm serve {VERIFIER} " in report.command


def test_the_next_command_serves_what_was_checked(trained, capsys):
    path = str(trained("dflash"))
    assert main(["check", path, "--engine", "vllm-0.32", "--verifier", VERIFIER]) == 0
    assert f"next: speculators serve {path} --verifier {VERIFIER} --engine vllm-0.32" in capsys.readouterr().out


def test_a_checkpoint_without_a_number_of_drafts_is_not_called_of_another_type(trained, tmp_path):
    path = Path(shutil.copytree(trained("eagle3"), tmp_path / "copy"))
    edit_config(path, lambda values: values.pop("speculators_config"))
    report = check_checkpoint(path, verifier=VERIFIER, engine="vllm-0.33")
    assert report.serving is None and report.served_by.endswith("and a number of draft tokens in config.json")
    assert "no drafter of this type" not in replace(report, findings=[]).verdict


def test_a_directory_of_no_format_is_a_finding_that_says_so(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    [found] = check_checkpoint(tmp_path).errors
    assert found.code == "format-unknown" and "has no weights" in found.found and found.fix
    with pytest.raises(FileNotFoundError, match="does not exist"):
        check_checkpoint(tmp_path / "none")


def test_the_command_ends_with_0_or_1_and_one_json_line(trained, copy_of, capsys):
    assert main(["check", str(trained("dflash"))]) == 0
    shown = capsys.readouterr().out
    assert "ready to serve" in shown and json.loads(shown.splitlines()[-1])["ok"] is True
    broken = copy_of("eagle3")
    edit_tensors(broken, lambda tensors: tensors.pop("d2t"))
    assert main(["check", str(broken), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["findings"][0]["code"] == "tensor-missing" and report["findings"][0]["fix"]
