"""`check` tells the same model at another precision from another model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from deploy_toys import VERIFIER, make_checkpoint
from quantised_toys import (
    WRITERS,
    dequantised,
    fp8_directory,
    is_quantised,
    plain_tensors,
    write_dequantised,
    write_directory,
    write_fp8,
    write_gguf,
)

from speculators.checkpoint.record import RECORD_FILE
from speculators.deploy.check import check_checkpoint
from speculators.utils.quantized import is_on_grid

FP8 = "compressed-tensors float8 weights"


@pytest.fixture(scope="module")
def of_fp8(tmp_path_factory):
    """A drafter of an FP8 verifier, and its name."""
    folder = tmp_path_factory.mktemp("fp8")
    verifier = str(write_fp8(folder / "verifier"))
    return make_checkpoint("eagle3", folder / "drafter", verifier), verifier


def found(checkpoint, verifier) -> list[tuple[str, str, str]]:
    return [
        (f.severity, f.code, f"{f.found}; {f.rule}")
        for f in check_checkpoint(checkpoint, verifier=str(verifier)).findings
    ]


def edit_record(checkpoint, change) -> None:
    file = checkpoint / RECORD_FILE
    record = json.loads(file.read_text())
    change(record["verifier"])
    file.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("FP8 blocks", "fp8"),
        ("FP8", FP8),
        ("INT4", "compressed-tensors int4 weights"),
        ("NVFP4", "compressed-tensors float4 weights"),
    ],
)
def test_a_drafter_of_the_plain_verifier_is_warned_of_a_quantised_one(kind, name, trained, tmp_path):
    tensors, values = WRITERS[kind]()
    quantised = write_directory(tmp_path / "quantised", tensors, **values)
    [(severity, code, words)] = found(trained("eagle3"), quantised)
    assert (severity, code) == ("warning", "verifier-precision")
    assert f"its weights are: {name};" in words and "with weights: not quantised" in words
    assert found(trained("eagle3"), VERIFIER) == []


def test_a_drafter_of_the_plain_verifier_is_warned_of_a_gguf_file(trained, tmp_path):
    pytest.importorskip("gguf", reason="gguf is of the extra `quantized`, which is not installed")
    shutil.copy(Path(VERIFIER) / "tokenizer.json", tmp_path)  # it is read before the one in the file
    [(severity, code, words)] = found(trained("eagle3"), write_gguf(tmp_path / "tiny.gguf", "Q4_0", tokenizer=False))
    assert (severity, code) == ("warning", "verifier-precision") and "its weights are: gguf Q4_0" in words


@pytest.mark.parametrize("kind", ["INT4", "NVFP4"])
def test_four_bits_are_seen_in_files_that_do_not_state_them(kind, trained, tmp_path):
    [(severity, code, words)] = found(trained("eagle3"), write_dequantised(tmp_path / "rounded", kind))
    assert (severity, code) == ("warning", "verifier-precision")
    assert "rounded to 4 bits or fewer" in words and "with weights: not quantised" in words


def test_another_model_is_no_rounding_even_where_it_is_rounded_too(trained, tmp_path):
    tensors = {n: dequantised(w.flip(0), "INT4") if is_quantised(n) else w for n, w in plain_tensors().items()}
    codes = {code for _, code, _ in found(trained("eagle3"), write_directory(tmp_path / "other", tensors))}
    assert codes == {"verifier-differs"}


def test_a_grid_is_told_by_equal_neighbours():
    matrices = [weight for name, weight in plain_tensors().items() if is_quantised(name)]
    assert not any(map(is_on_grid, matrices))  # bfloat16
    assert [sum(is_on_grid(dequantised(w, kind)) for w in matrices) for kind in WRITERS] == [0, 0, *[len(matrices)] * 2]
    assert not is_on_grid(torch.zeros(4, 32))  # not trained, not rounded


def test_a_drafter_of_a_quantised_verifier_is_warned_of_the_plain_one(of_fp8):
    drafter, verifier = of_fp8
    assert found(drafter, verifier) == []
    [(severity, code, words)] = found(drafter, VERIFIER)
    assert (severity, code) == ("warning", "verifier-precision")
    assert "its weights are: not quantised" in words and f"with weights: {FP8}" in words


def test_records_of_earlier_releases_tell_it_by_the_types_of_the_matrices(copy_of, tmp_path):
    checkpoint = copy_of("eagle3")
    edit_record(checkpoint, lambda verifier: verifier.pop("quantization"))
    assert found(checkpoint, VERIFIER) == []
    assert [code for _, code, _ in found(checkpoint, write_fp8(tmp_path / "fp8"))] == ["verifier-precision"]


def test_fp8_rows_of_earlier_releases_are_not_compared(of_fp8, tmp_path):
    """They were recorded without their scales."""
    drafter, verifier = of_fp8

    def as_before(facts):
        facts.pop("quantization")
        for name, row in facts["tensors"].items():
            if row and "layers." in name:
                row |= {"dtype": "float8_e4m3fn", "sha256": "0", "sketch": [9.0] * 4}

    record = (drafter / RECORD_FILE).read_text()
    edit_record(drafter, as_before)
    try:
        assert found(drafter, verifier) == []
    finally:
        (drafter / RECORD_FILE).write_text(record)


def test_another_model_at_another_precision_is_another_model(trained, tmp_path):
    tensors, values = fp8_directory()
    torch.manual_seed(0)
    for name in tensors:
        if "layers" in name and name.endswith("proj.weight"):
            tensors[name] = tensors[name].float()[torch.randperm(len(tensors[name]))].to(torch.float8_e4m3fn)
    codes = {code for _, code, _ in found(trained("eagle3"), write_directory(tmp_path / "other", tensors, **values))}
    assert codes == {"verifier-differs"}
