"""Checkpoints that load, run and draft, and are not what was trained. Each must be an error of `check`; a warning only
where nothing in the directory and its verifier tells."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from deploy_toys import HIDDEN, IDS, VERIFIER, VOCAB, edit_config, edit_tensors, make_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from speculators import SpeculatorModel
from speculators.checkpoint.record import RECORD_FILE, write_training_record
from speculators.deploy.check import check_checkpoint
from speculators.deploy.report import CheckReport
from speculators.interfaces import VerifierStates

Spoil = Callable[[Path], object]
WEIGHTS = "model.safetensors"
SHORT = 0.001
"""Weights moved so little that a norm is one within any tolerance: a training of a few steps."""


def values(change: Callable[[dict[str, Any]], object]) -> Spoil:
    return lambda path: edit_config(path, change)


def layers(**changes: Any) -> Spoil:
    return lambda path: edit_config(path, lambda v: v["transformer_layer_config"].update(changes))


def top(**changes: Any) -> Spoil:
    return lambda path: edit_config(path, lambda v: v.update(changes))


def drafts(num_tokens: int) -> Spoil:
    def change(v: dict[str, Any]) -> None:
        v["speculators_config"]["proposal_methods"][0]["speculative_tokens"] = num_tokens

    return values(change)


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Spoil:
    return lambda path: edit_tensors(path, change)


def times(factor: float, *names: str) -> Spoil:
    def change(held: dict[str, Tensor]) -> None:
        for name in names or [name for name, tensor in held.items() if tensor.is_floating_point()]:
            held[name] = held[name] * factor

    return tensors(change)


def stored_as(dtype: torch.dtype) -> Spoil:
    def change(held: dict[str, Tensor]) -> None:
        held.update({name: t.to(dtype) for name, t in held.items() if t.is_floating_point()})

    def spoil(path: Path) -> None:
        edit_tensors(path, change)
        edit_config(path, lambda v: v.update(dtype=str(dtype).removeprefix("torch.")))

    return spoil


def swapped(one: str, other: str) -> Spoil:
    def change(held: dict[str, Tensor]) -> None:
        for name in list(held):
            if one in name:
                held[name], held[name.replace(one, other)] = held[name.replace(one, other)], held[name]

    return tensors(change)


def ones(part: str) -> Spoil:
    return tensors(lambda held: held.update({k: torch.ones_like(t) for k, t in held.items() if part in k}))


def random(name: str) -> Spoil:
    def change(held: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(5)
        held[name] = torch.randn(held[name].shape, generator=generator).to(held[name]) * held[name].std()

    return tensors(change)


def set_one(name: str, value: float | None = None) -> Spoil:
    """One value is replaced, or moved by the least that its type can hold."""

    def change(held: dict[str, Tensor]) -> None:
        flat = held[name].reshape(-1)
        flat[0] = torch.nextafter(flat[0], torch.tensor(9.0).to(flat)) if value is None else value

    return tensors(change)


def rolled(name: str) -> Spoil:
    return tensors(lambda held: held.update({name: held[name].roll(1, 0)}))


def other_verifier_tokens(held: dict[str, Tensor]) -> None:
    """A map that fits together, of other tokens: each one before (the first kept token is not token 0)."""
    held["d2t"], held["t2d"] = held["d2t"] - 1, held["t2d"].roll(-1)


def some_rows(held: dict[str, Tensor]) -> None:
    held["embed_tokens.weight"][::20] = held["embed_tokens.weight"][::20].flip(1)


def as_int8(held: dict[str, Tensor]) -> None:
    scale = held["fc.weight"].abs().max() / 127
    held["fc.weight"] = (held["fc.weight"] / scale).round() * scale


def without_record(path: Path) -> None:
    (path / RECORD_FILE).unlink()


def with_rope(**rope: Any) -> Spoil:
    """Trained with this rope: the record says it too."""

    def spoil(path: Path) -> None:
        layers(rope_parameters={"rope_theta": 10000.0, **rope})(path)
        write_training_record(path)

    return spoil


def of_another_run(path: Path) -> None:
    other = make_checkpoint("eagle3", path.parent / "other", noise=0.1)
    shutil.copy(other / "model.safetensors", path)


@dataclass(frozen=True)
class Spoiled:
    case: str
    spoil: tuple[Spoil, ...]
    code: str
    severity: str = "error"
    noise: float = 0.05
    where: str = ""


def spoiled(case: str, *spoil: Spoil, code: str, **more: Any) -> Spoiled:
    return Spoiled(case, spoil, code, **more)


def named(case: str, *spoil: Spoil, code: str = "tensor-changed", **more: Any) -> Spoiled:
    return Spoiled(case, spoil, code, **more)


HALF, BRAIN = stored_as(torch.float16), stored_as(torch.bfloat16)
CASES: dict[str, Spoiled] = {
    # what was found in the field
    "rope_scaling beside rope_parameters: transformers lets it win": spoiled(
        "eagle3", layers(rope_scaling={"rope_type": "linear", "factor": 4.0}), code="config-changed"
    ),
    "fc doubled": named("eagle3", times(2, "fc.weight")),
    "fc doubled, stored in float16": named("eagle3", times(2, "fc.weight"), HALF),
    "norms reset to ones after a short training": named("eagle3", ones("norm.weight"), noise=SHORT),
    "norms reset to ones, stored in bfloat16": named("dflash", ones("hidden_norm"), BRAIN, noise=0.02),
    "q_norm and k_norm swapped": named("dflash", swapped("q_norm", "k_norm"), noise=SHORT),
    "mask token outside the vocabulary, dflash": spoiled("dflash", top(mask_token_id=VOCAB), code="mask-token-range"),
    "mask token outside the vocabulary, dspark": spoiled(
        "dspark", without_record, top(mask_token_id=99999), code="mask-token-range"
    ),
    "mask token outside the vocabulary, peagle": spoiled(
        "peagle", without_record, top(mask_token_id=-1), code="mask-token-range"
    ),
    "11 drafts of blocks of 5": spoiled("dflash", drafts(11), code="drafts-too-many"),
    "head rows shifted by one, no record": spoiled(
        "eagle3", rolled("lm_head.weight"), without_record, code="head-rows-shifted"
    ),
    # figures out of place
    "one draft too many of a block that drafts at its anchor": spoiled("dspark", drafts(6), code="drafts-too-many"),
    "5 drafts of 3 heads": spoiled("medusa", drafts(5), without_record, code="drafts-too-many"),
    "9 drafts of 3 steps": spoiled("mlp", drafts(9), code="drafts-too-many"),
    "more drafts than depths that were trained": spoiled(
        "peagle", drafts(12), code="drafts-untrained", severity="warning"
    ),
    "no drafts at all": spoiled("eagle", drafts(0), code="config-invalid"),
    # weights
    "everything one per cent larger, in bfloat16": named("eagle3", times(1.01), BRAIN),
    "fc negated": named("eagle3", times(-1, "fc.weight")),
    "fc rounded to 8 bits": named("eagle3", tensors(as_int8)),
    "one norm moved by one bit": named("eagle3", set_one("norm.weight")),
    "one value edited, stored in bfloat16": named("dspark", set_one("fc.weight", 0.5), BRAIN),
    "inputs of the fusion exchanged": named(
        "eagle", tensors(lambda t: t.update({"fusion_fc.weight": t["fusion_fc.weight"].roll(HIDDEN, 1)}))
    ),
    "two heads exchanged": named("medusa", swapped("blocks.0", "blocks.1")),
    "a bias scaled": named("medusa", times(1.5, "blocks.1.layers.0.bias")),
    "a projection that was never loaded": named("mlp", random("proj.0.weight")),
    "norms of an MTP layer exchanged": named("mtp", swapped("hidden_layernorm", "token_layernorm")),
    "tables of the Markov head exchanged": spoiled("dspark", swapped("markov_w1", "markov_w2"), code="tensor-shape"),
    "a confidence head of another run": named("dspark", random("confidence_head.proj.weight")),
    "the masked state zeroed": named("peagle", times(0, "mask_hidden")),
    "weights of another run under this record": named("eagle3", of_another_run, noise=0.05),
    "attention output halved, in float16": named("mtp", times(0.5, "mtp_layers.0.self_attn.o_proj.weight"), HALF),
    "an infinite value": spoiled("eagle", set_one("fusion_fc.weight", float("inf")), code="not-finite"),
    # config.json
    "a theta beside the one in rope_parameters": spoiled("eagle3", layers(rope_theta=5e5), code="rope-twice"),
    "longest text, where rope depends on it": spoiled(
        "eagle3", with_rope(rope_type="dynamic", factor=2.0), layers(max_position_embeddings=4096), code="rope-changed"
    ),
    "longest text, where yarn depends on it": spoiled(
        "eagle3", with_rope(rope_type="yarn", factor=4.0), layers(max_position_embeddings=256), code="rope-changed"
    ),
    "another activation": spoiled("eagle3", layers(hidden_act="gelu"), code="config-changed"),
    "another epsilon of an MTP layer": spoiled("mtp", layers(rms_norm_eps=0.1), code="config-changed"),
    "another epsilon of the heads": spoiled("medusa", top(rms_norm_eps=0.1), code="config-changed"),
    "another input of the first step": spoiled("mlp", top(scale_input=True), code="config-changed"),
    "blocks of another size": spoiled("dflash", top(block_size=9), code="config-changed"),
    "another window": spoiled("dflash-sliding", layers(sliding_window=16), code="config-changed"),
    # the verifier's weights, and no record
    "embedding doubled, no record": spoiled(
        "eagle3", times(2, "embed_tokens.weight"), without_record, code="embedding-differs"
    ),
    "head halved, no record": spoiled("eagle3", times(0.5, "lm_head.weight"), without_record, code="head-rows-differ"),
    "one embedding row in twenty wrong, no record": spoiled(
        "eagle3", tensors(some_rows), without_record, code="embedding-differs"
    ),
    "a map of the tokens beside, no record": spoiled(
        "eagle3", tensors(other_verifier_tokens), without_record, code="head-rows-shifted"
    ),
    # nothing tells: no record, no copy of the verifier's
    "fc doubled, no record": spoiled(
        "eagle3", times(2, "fc.weight"), without_record, code="record-missing", severity="warning"
    ),
    "head of its own, no record": spoiled(
        "eagle3", random("lm_head.weight"), without_record, code="head-rows-differ", severity="warning"
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_spoiled_checkpoint_is_not_ready_to_serve(name, tmp_path):
    case = CASES[name]
    path = make_checkpoint(case.case, tmp_path / "drafter", noise=case.noise)
    for spoil in case.spoil:
        spoil(path)
    report = check_checkpoint(path)
    found = [finding.severity for finding in report.findings if finding.code == case.code]
    assert case.severity in found, [str(finding) for finding in report.findings]
    assert report.ok == (case.severity == "warning"), [str(finding) for finding in report.findings]
    assert report.verdict != "ready to serve" or case.code == "drafts-untrained"


@pytest.fixture(scope="module")
def other_verifier(tmp_path_factory):
    """A random one of the same shape, with the same tokenizer."""
    path = Path(shutil.copytree(VERIFIER, tmp_path_factory.mktemp("other") / "verifier"))
    generator = torch.Generator().manual_seed(9)
    held = {name: torch.randn(t.shape, generator=generator).to(t) for name, t in load_file(path / WEIGHTS).items()}
    save_file(held, path / WEIGHTS, metadata={"format": "pt"})
    return str(path)


def verifier_with(tmp_path: Path, change: Callable[[dict[str, Tensor]], object]) -> str:
    path = Path(shutil.copytree(VERIFIER, tmp_path / "verifier"))
    edit_tensors(path, change)
    return str(path)


def severities(report: CheckReport) -> dict[str, str]:
    return {found.code: found.severity for found in report.findings}


def test_another_verifier_of_equal_shape_is_an_error_where_a_copy_or_a_record_tells(tmp_path, other_verifier, copy_of):
    path = copy_of("eagle3")
    assert severities(check_checkpoint(path, verifier=other_verifier))["verifier-differs"] == "error"
    without_record(path)
    found = severities(check_checkpoint(path, verifier=other_verifier))
    assert found["embedding-differs"] == "error"  # which is always a copy
    edit_tensors(path, lambda held: held.pop("embed_tokens.weight"))
    found = severities(check_checkpoint(path, verifier=other_verifier))
    assert found == {"record-missing": "warning", "head-rows-differ": "warning"}  # a head may be its own


def test_a_verifier_that_was_trained_further_is_named(tmp_path, trained):
    tuned = verifier_with(tmp_path, lambda held: held.update({k: t * 1.005 for k, t in held.items() if "_proj" in k}))
    assert severities(check_checkpoint(trained("eagle"), verifier=tuned)) == {"verifier-edited": "warning"}


def test_rows_of_the_verifier_that_are_no_numbers_are_an_error(tmp_path, trained):
    damaged = verifier_with(tmp_path, lambda held: held["model.norm.weight"].fill_(float("nan")))
    assert severities(check_checkpoint(trained("mtp"), verifier=damaged))["weight-not-finite"] == "error"


@pytest.mark.parametrize("case", ["eagle3", "dspark", "mtp"])
def test_trained_values_in_any_type_are_the_trained_values(case, copy_of):
    path = copy_of(case)
    whole = load_file(path / WEIGHTS)
    for dtype in (torch.float16, torch.bfloat16):
        stored_as(dtype)(path)
        assert not check_checkpoint(path).findings
        stored_as(torch.float32)(path)  # and back
        assert not check_checkpoint(path).findings
        save_file(whole, path / WEIGHTS, metadata={"format": "pt"})


def as_an_earlier_release(path: Path) -> None:
    """Its records had no rope, no norms and no hashes of rounded tensors."""
    record = json.loads((path / RECORD_FILE).read_text())
    del record["rope"]
    for found in (*record["tensors"].values(), *filter(None, record["verifier"]["tensors"].values())):
        for key in ("norm", "rounded"):
            found.pop(key, None)
    (path / RECORD_FILE).write_text(json.dumps(record))


def test_a_record_of_an_earlier_release_guarantees_what_it_did_and_says_what_it_cannot(copy_of):
    path = copy_of("eagle3")
    as_an_earlier_release(path)
    report = check_checkpoint(path)
    assert not report.findings and not report.not_done
    times(2, "fc.weight")(path)
    assert severities(check_checkpoint(path)) == {"tensor-changed": "error"}  # the same type: its hash tells
    HALF(path)
    report = check_checkpoint(path)
    assert not report.findings and "a factor or a small edit is not seen" in " ".join(report.not_done.values())
    times(-1, "fc.weight")(path)
    assert severities(check_checkpoint(path)) == {"tensor-changed": "error"}


def test_tables_that_are_padded_otherwise_are_not_another_tokenizer(tmp_path, trained):
    def pad(held: dict[str, Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in held:
                held[name] = torch.cat([held[name], torch.zeros(64, HIDDEN, dtype=held[name].dtype)])

    padded = verifier_with(tmp_path, pad)
    edit_config(Path(padded), lambda v: v.update(vocab_size=VOCAB + 64))
    [found] = check_checkpoint(trained("eagle3"), verifier=padded).errors
    assert found.code == "verifier-vocab-size"
    assert "the tokenizer is the same, the tables are padded to different numbers of rows" in found.rule


@pytest.mark.parametrize("case", ["dflash", "dspark", "peagle"])
def test_a_mask_token_that_is_no_row_ends_in_words_where_it_is_drafted_with(case, copy_of):
    path = copy_of(case)
    top(mask_token_id=99999)(path)
    model = SpeculatorModel.from_pretrained(path)
    states = VerifierStates(torch.arange(8), torch.zeros(8, len(IDS) * HIDDEN), torch.zeros(8, HIDDEN))
    with pytest.raises(ValueError, match=r"mask_token_id=99999 is no row .* \(0\.\.4095\)"):
        model.draft_logits(states, 3)
