"""`diagnose` names each seeded fault first, and finds nothing on a healthy drafter."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from diagnosis_toys import (
    LAYERS,
    VERIFIER,
    Toys,
    copy_of,
    make_holes,
    make_toys,
    narrow_window,
    perturbed_verifier,
    questions,
    roll_fc,
    set_rope_theta,
    shift_map,
    train,
    with_masks,
)
from engine_server import EngineServer, running
from quantised_toys import WRITERS, write_dequantised, write_directory
from transformers import AutoTokenizer

import speculators as sp
from speculators import assets
from speculators.cli.app import main
from speculators.data_generation.prepared import PreparedData
from speculators.evaluation.diagnosis import Diagnosis
from speculators.model import SpeculatorModel


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Toys:
    return make_toys(tmp_path_factory.mktemp("toys"))


def test_nothing_is_found_on_the_healthy_drafter(toys):
    found = toys.diagnose(toys.healthy)
    assert found.healthy and found.sentence() == "nothing found"
    assert found.measured["acceptance length"] > 2


SEEDED_FILES = {
    "aux-layers": {"config": lambda values: values.update({LAYERS: [i + 1 for i in values[LAYERS]]})},
    "rope": {"config": set_rope_theta},
    "context": {"config": narrow_window},
    "norms": {"tensors": lambda w: w["layers.0.hidden_norm.weight"].sub_(1)},
    "aux-order": {"tensors": roll_fc},
    "options": {"config": lambda values: values.update(norm_before_residual=not values["norm_before_residual"])},
    "vocabulary-map": {"tensors": shift_map},
    "embedding": {"tensors": lambda w: w.update({"embed_tokens.weight": w["embed_tokens.weight"].flip(0)})},
}


@pytest.mark.parametrize("cause", SEEDED_FILES)
def test_a_fault_of_the_files_is_found_without_their_record(toys, tmp_path, cause):
    found = toys.diagnose(copy_of(toys, tmp_path / "copy", **SEEDED_FILES[cause]))
    assert found.first == cause


def one_late(mask: list[int]) -> list[int]:
    return [0, *mask[:-1]]


SEEDED_CONDITIONS = {
    "mask": lambda toys, tmp_path: {"data": [toys.prompts, with_masks(toys, tmp_path / "data", one_late)]},
    "temperature": lambda toys, tmp_path: {"temperature": 1.0},
    "inactive": lambda toys, tmp_path: {"num_speculative_tokens": 0},
    "inactive method": lambda toys, tmp_path: {"engine_config": {"method": "ngram", "num_speculative_tokens": 3}},
    "verifier": lambda toys, tmp_path: {"verifier": perturbed_verifier(tmp_path / "verifier")},
}


@pytest.mark.parametrize("cause", SEEDED_CONDITIONS)
def test_a_fault_of_the_conditions_is_found(toys, tmp_path, cause):
    found = toys.diagnose(toys.healthy, **SEEDED_CONDITIONS[cause](toys, tmp_path))
    assert found.first == cause.split()[0]


def test_the_verifier_of_training_at_another_precision_is_named(toys, tmp_path):
    tensors, values = WRITERS["INT4"]()
    found = toys.diagnose(toys.healthy, verifier=str(write_directory(tmp_path / "int4", tensors, **values)))
    assert found.first == "quantised-target"


def test_a_verifier_rounded_to_4_bits_is_named_though_its_files_do_not_say_so(toys, tmp_path):
    found = toys.diagnose(toys.healthy, verifier=str(write_dequantised(tmp_path / "rounded", "INT4")))
    assert found.first == "quantised-target"


def test_prompts_unlike_the_training_text_are_found(toys):
    found = toys.diagnose(toys.healthy, data=[assets.prompts_path("heldout"), toys.data])
    assert found.first == "other-domain"
    share = next(cause for cause in found.causes if cause.name == "other-domain").evidence
    assert share["first draft right, validation"] > share["first draft right, new answers"] + 0.25


def damage(weights: dict[str, torch.Tensor]) -> None:
    """No setting brings this back."""
    weights["layers.0.self_attn.v_proj.weight"].copy_(weights["layers.0.self_attn.v_proj.weight"].flip(0))


def test_weights_that_were_damaged_since_are_told_by_what_validation_recorded(toys, tmp_path):
    found = toys.diagnose(copy_of(toys, tmp_path / "copy", tensors=damage))
    assert found.first == "changed-since-training"


def test_holes_of_the_draft_vocabulary_are_found(toys, tmp_path):
    counts = PreparedData.open(toys.data).token_freq()
    tokens = sorted(counts, key=lambda token: -counts[token])[8:40]
    found = toys.diagnose(copy_of(toys, tmp_path / "copy", tensors=lambda w: make_holes(w, tokens)))
    assert found.first == "vocabulary-holes"


def test_too_little_data_is_found(toys, tmp_path):
    few = sp.prepare_data(VERIFIER, toys.folder / "a.jsonl", output=tmp_path / "few", max_samples=4, num_workers=1)
    run = train(tmp_path / "run", toys.verifier, few.path, epochs=20)
    found = toys.diagnose(run, data=[toys.prompts])
    assert found.first == "too-little-data"
    assert found.causes[0].evidence["training rows"] == 4


def test_a_run_that_went_on_too_long_is_sent_back_to_its_better_epoch(toys, tmp_path, capsys):
    """The healthy drafter learns four rows by heart: validation, on its own domain, falls from epoch to epoch."""
    classes = ("queue.Queue", "zipfile.ZipFile", "ssl.SSLContext", "asyncio.Future")
    others = [{"messages": [{"role": "user", "content": f"Explain the class `{name}`."}]} for name in classes]
    sp.regenerate(toys.verifier, others, output=tmp_path / "others.jsonl", max_tokens=40, batch_size=4)
    own = (toys.folder / "a.jsonl").read_text().splitlines(keepends=True)[:8]
    (tmp_path / "rows.jsonl").write_text((tmp_path / "others.jsonl").read_text() + "".join(own))
    data = sp.prepare_data(VERIFIER, tmp_path / "rows.jsonl", output=tmp_path / "data", num_workers=1)
    settings = {"draft_vocab_size": None, "train_data_ratio": 0.34, "scheduler_type": "none", "lr": 2e-3}
    run = tmp_path / "run"
    train(run, toys.verifier, data.path, from_pretrained=toys.healthy, epochs=17, checkpoint_freq=8.0, **settings)
    small = ["--data", str(toys.prompts), "--limit", "5", "--max-tokens", "24", "--json"]
    capsys.readouterr()
    assert main(["diagnose", str(run / "16"), *small]) == 1
    cause = json.loads(capsys.readouterr().out)["causes"][0]
    assert cause["name"] == "overfitted" and str(run / "0") in cause["fix"]


def test_text_of_somebody_else_is_found(toys, tmp_path):
    given = tmp_path / "given.jsonl"
    answer = "Sure! You would usually call {} once, when the work is done, and ignore whatever it gives back to you."
    with given.open("w") as file:
        for row in questions()[:24]:
            [question] = row["messages"]
            messages = [question, {"role": "assistant", "content": answer.format(question["content"].split("`")[1])}]
            file.write(json.dumps({"messages": messages}) + "\n")
    data = sp.prepare_data(VERIFIER, given, output=tmp_path / "data", num_workers=1)
    run = train(tmp_path / "run", toys.verifier, data.path, epochs=1)
    found = toys.diagnose(run, data=[toys.prompts])
    assert found.first == "off-policy"


# -- running servers: our engine behind vLLM's interface


def serving(toys: Toys, drafter: Path | None, num_drafts: int = 3, **faults) -> AbstractContextManager[str]:
    model = None if drafter is None else SpeculatorModel.from_pretrained(drafter, verifier=VERIFIER, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(VERIFIER)
    return running(EngineServer(toys.verifier, tokenizer, model, num_drafts, **{"root": VERIFIER, **faults}))


def of_server(toys: Toys, url: str, **given) -> Diagnosis:
    return toys.diagnose(toys.healthy, server=url, data=[toys.prompts], num_samples=16, **given)


def test_nothing_is_found_on_a_healthy_server(toys):
    with serving(toys, toys.healthy) as url, serving(toys, None) as plain:
        found = of_server(toys, url, plain_url=plain)
    assert found.healthy, found
    assert found.measured["accepted by position, server"] == pytest.approx(
        found.measured["accepted by position, our engine"], abs=0.05
    )


def greedy_when_sampling(token_ids: list[int], request: dict) -> list[int]:
    """A sampler that takes a token too often."""
    return token_ids if request["temperature"] == 0 else [token_ids[0], *[token_ids[0]] * (len(token_ids) - 1)]


SEEDED_SERVERS = {
    "aux-layers": {"copy": {"config": lambda values: values.update({LAYERS: [i + 1 for i in values[LAYERS]]})}},
    "vocabulary-map": {"copy": {"tensors": shift_map}},
    "aux-order": {"copy": {"tensors": roll_fc}},
    "other-drafter": {"copy": {"tensors": lambda w: w["fc.weight"].normal_(0.0, 0.05)}},
    "draft-tokens": {"num_drafts": 2},
    "text-not-lossless": {"spoil": lambda ids, request: [*ids[:4], *[7] * (len(ids) - 4)]},
    "sampling-not-lossless": {"spoil": greedy_when_sampling},
    "later-positions": {"count": lambda positions: [positions[0], *[n // 8 for n in positions[1:]]]},
    "verifier": {"root": "some-org/Other-8B"},
}


@pytest.mark.parametrize("cause", SEEDED_SERVERS)
def test_a_fault_of_a_server_is_found(toys, tmp_path, cause):
    faults = dict(SEEDED_SERVERS[cause])
    copy = faults.pop("copy", None)
    drafter = toys.healthy if copy is None else copy_of(toys, tmp_path / "copy", **copy)
    with serving(toys, drafter, **faults) as url:
        found = of_server(toys, url)
    assert found.first == cause


def test_a_fault_of_the_checkpoint_that_is_served_is_found(toys, tmp_path):
    """Server and our engine accept the same drafts then: few."""
    copy = copy_of(toys, tmp_path / "copy", tensors=shift_map)
    with serving(toys, copy) as url:
        found = toys.diagnose(copy, server=url, data=[toys.prompts], num_samples=16)
    assert found.first == "vocabulary-map"


def test_a_server_that_drafts_nothing_is_inactive(toys):
    with serving(toys, None) as url:
        assert of_server(toys, url).first == "inactive"


def test_the_command_prints_the_report_and_its_exit_code_is_for_ci(toys, capsys, tmp_path):
    words = ["diagnose", str(toys.healthy), "--data", str(toys.prompts), "--data", str(toys.data), "--json"]
    assert main([*words, "-k", "0"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["causes"][0]["name"] == "inactive" and not report["healthy"]
    small = ["--limit", "4", "--max-tokens", "24", "--output", str(tmp_path / "report.json")]
    assert main([*words, *small]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] and report["causes"] == [] and (tmp_path / "report.json").is_file()
