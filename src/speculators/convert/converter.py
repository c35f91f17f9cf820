"""The base of the converter classes of earlier releases: one algorithm, one `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from speculators.convert.conversion import ConvertedCheckpoint, convert_checkpoint


class Converter:
    algorithm: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}
    """Names of the further arguments, and their defaults (None: as the source says)."""

    def convert(
        self,
        input_path: str | Path,
        output_path: str | Path,
        base_model: str,
        validate: bool = True,
        *,
        cache_dir: str | Path | None = None,
        **kwargs: Any,
    ) -> ConvertedCheckpoint:
        """Convert `input_path` for the verifier `base_model`. What is written is always checked."""
        unknown = sorted(kwargs.keys() - self.options.keys())
        if unknown:
            raise TypeError(
                f"{type(self).__name__}.convert has no argument {unknown[0]!r}; it has {list(self.options)}"
            )
        return convert_checkpoint(
            input_path,
            output_path,
            verifier=base_model,
            algorithm=self.algorithm,
            overwrite=True,
            cache_dir=cache_dir,
            **{**self.options, **kwargs},
        )
