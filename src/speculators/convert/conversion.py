"""`convert_checkpoint`: read a directory in the format of another project, write it as a speculator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from speculators.checkpoint.formats import SPECULATORS, OurCheckpoint
from speculators.checkpoint.io import local_directory, open_checkpoint, write_ours
from speculators.checkpoint.record import write_training_record
from speculators.utils.files import absolute_if_directory, atomic_directory, refuse_to_replace


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """What was written."""

    path: Path
    speculators_model_type: str
    source_format: str
    notes: tuple[str, ...] = ()


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    verifier: str,
    algorithm: str | None = None,
    overwrite: bool = False,
    cache_dir: str | Path | None = None,
    **options: Any,
) -> ConvertedCheckpoint:
    """`source`: directory or hub id. `algorithm` is needed only where several could have made it. `options` say what
    the source does not, such as the verifier layers an EAGLE-3 head reads; each format takes its own."""
    output = Path(output)
    refuse_to_replace(output, source, overwrite=overwrite)
    require_verifier(verifier)
    verifier = absolute_if_directory(verifier)
    opened = open_checkpoint(
        local_directory(source, cache_dir),
        verifier=verifier,
        algorithm=algorithm,
        **{key: value for key, value in options.items() if value is not None},
    )
    if opened.format == SPECULATORS:
        raise ValueError(f"{source} is a speculator already; `speculators export` writes it for an engine")
    config = opened.model_class.contract.completed(opened.config)
    ours = OurCheckpoint(config, opened.tensors, opened.path)
    with atomic_directory(output) as folder:
        write_ours(ours, opened.model_class, folder)
        write_training_record(folder, opened.model_class.contract.training_keys, origin="conversion")
    expected = opened.model_class.contract.expected_tensors(opened.model_class, config)
    unused = sorted(opened.tensors.keys() - expected.keys())
    left_out = (f"tensors that a drafter of this kind has no place for were left out: {unused}",) if unused else ()
    return ConvertedCheckpoint(output, config.speculators_model_type, opened.format, (*opened.notes, *left_out))


def require_verifier(verifier: str) -> None:
    """Its config must be readable: vocabulary, layers and class are written into ours."""
    try:
        PretrainedConfig.get_config_dict(verifier)
    except (OSError, ValueError) as problem:
        reason = str(problem).strip().splitlines()[0]
        raise RuntimeError(
            f"the config of verifier '{verifier}' cannot be read ({reason}); name its directory or hub id"
        ) from problem
