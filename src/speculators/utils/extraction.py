"""The note that an extraction server's starter leaves beside the states, so that a reader knows what they are.

<directory>/extraction.json    {"format": 1, "model": ..., "layer_ids": [2, 4, 5, 8], "num_layers": 8}

A file of states holds [T, slots, H] and does not say which layer a slot is; this does.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from speculators.utils.files import atomic_write

NOTE_NAME = "extraction.json"
FORMAT = 1


@dataclass(frozen=True)
class ExtractionNote:
    """What one server extracts."""

    model: str
    """Hub id, or absolute path of a directory."""
    layer_ids: tuple[int, ...]
    """Slot i holds the residual stream after `layer_ids[i]` layers; `num_layers` is the last, before the final norm."""
    num_layers: int

    def write(self, directory: Path) -> Path:
        with atomic_write(directory / NOTE_NAME) as file:
            json.dump({"format": FORMAT, **asdict(self)}, file, indent=2)
            file.write("\n")
        return directory / NOTE_NAME

    @classmethod
    def read(cls, directory: Path) -> ExtractionNote | None:
        """None when the server was started by other means and left none."""
        path = directory / NOTE_NAME
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({error}); start the extraction server again") from error
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise ValueError(f"{path} is not of format {FORMAT}; start the extraction server with this version")
        return cls(values["model"], tuple(values["layer_ids"]), values["num_layers"])
