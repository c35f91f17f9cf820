"""The layer table: who may import whom. Imports are read from the source, so nothing has to run.

Imports for type checkers count too: a module whose types lie above it is in the wrong file. Everybody may import the
seams of `interfaces`, which itself imports rows 0 and 1 alone.
"""

import ast
from pathlib import Path

import pytest

import speculators

SOURCE = Path(speculators.__file__).parent
PACKAGE = "speculators"

# A module imports only from rows above its own; inside rows 0 to 3, also from its own row.
ROWS: tuple[set[str], ...] = (
    {"utils", "compat"},
    {"proposals", "config", "interfaces", "provenance", "training_keys"},
    {"nn", "losses", "verifier"},
    {"model", "model_loading", "model_training", "draft_vocab", "checkpoint"},
    {"models"},
    {"data_generation", "decoding", "convert", "deploy", "assets"},
    {"train", "evaluation", "local_server"},
    {"api", "diagnosis"},
    {"building"},
    {"cli"},
    {"__main__"},
)
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names}
MODELS_ROW, STAGES_ROW = ROW_OF["models"], ROW_OF["decoding"]
IS_A = {"dspark": "dflash", "peagle": "eagle3"}
"""An algorithm may import another only where it is one."""


def imports_of(source: str, folder: tuple[str, ...]) -> set[str]:
    """Absolute names of what a file of this folder imports from this package, anywhere in it."""
    package = (PACKAGE, *folder)
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == PACKAGE}


def unit_of(parts: tuple[str, ...]) -> str:
    """The row entry a module belongs to: its first part below the package."""
    return parts[0].removesuffix(".py")


def algorithm_of(parts: tuple[str, ...]) -> str | None:
    """The algorithm folder a module lies in; None for the helpers beside the folders."""
    is_folder = len(parts) > 1 and parts[0] == "models" and (SOURCE / "models" / parts[1]).is_dir()
    return parts[1] if is_folder else None


def wrong_imports(path: str, source: str) -> list[str]:
    parts = Path(path).parts
    here = unit_of(parts)
    wrong = []
    for name in sorted(imports_of(source, parts[:-1])):
        target = tuple(name.split(".")[1:])
        there = unit_of(target) if target else ""
        if there not in ROW_OF:
            continue  # a name of the top-level package itself
        if not may_import(here, there, algorithm_of(parts), algorithm_of(target)):
            wrong.append(f"{path} imports {name}")
    return wrong


def may_import(here: str, there: str, algorithm: str | None = None, other: str | None = None) -> bool:
    if there == "interfaces":
        return True
    if here == there == "models":
        return other is None or other == algorithm or (algorithm is not None and IS_A.get(algorithm) == other)
    if here == there:
        return True
    if ROW_OF[here] > MODELS_ROW and there == "models":
        return False  # always the registry
    if here == "train":
        return ROW_OF[there] < STAGES_ROW or there in ("data_generation", "deploy", "evaluation")
    if here == "convert":
        return ROW_OF[there] < STAGES_ROW or there == "deploy"  # what it writes is checked before it is written
    if here == "local_server":
        return ROW_OF[there] < STAGES_ROW or there == "decoding"
    if here == "evaluation":
        return ROW_OF[there] < STAGES_ROW or there in ("decoding", "data_generation", "assets")
    if ROW_OF[here] == ROW_OF[there]:
        return ROW_OF[here] < MODELS_ROW
    return ROW_OF[there] < ROW_OF[here]


def test_every_module_has_a_row():
    units = {unit_of(file.relative_to(SOURCE).parts) for file in SOURCE.rglob("*.py")} - {"__init__"}
    assert units <= ROW_OF.keys()


def test_modules_import_only_from_the_rows_above():
    files = [file for file in SOURCE.rglob("*.py") if file.parent != SOURCE or file.name != "__init__.py"]
    wrong = [line for file in sorted(files) for line in wrong_imports(str(file.relative_to(SOURCE)), file.read_text())]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("nn/packed_row.py", "from speculators.model import SpeculatorModel"),
        ("nn/packed_row.py", "def late():\n    import speculators.decoding.engine"),
        ("model.py", "if TYPE_CHECKING:\n    from speculators.train.config import TrainConfig"),
        ("decoding/engine.py", "from ..models.eagle3 import Eagle3DraftModel"),
        ("models/eagle3/core.py", "from speculators.models import peagle"),
        ("train/run.py", "from speculators import cli"),
    ],
)
def test_an_import_that_goes_up_is_seen(path, source):
    assert len(wrong_imports(path, source)) == 1


def test_imports_that_go_down_are_allowed():
    assert not wrong_imports("train/run.py", "import torch\nfrom speculators.model import SpeculatorModel")
    assert not wrong_imports("utils/loading.py", "if TYPE_CHECKING:\n    from speculators.interfaces import Proposer")


def test_the_table_itself():
    assert may_import("model", "nn") and not may_import("nn", "model")
    assert may_import("config", "proposals")
    assert may_import("models", "models", "peagle", "eagle3") and not may_import("models", "models", "eagle3", "peagle")
    assert may_import("models", "models", "eagle3", None) and not may_import("models", "models", None, "eagle3")
    assert not may_import("decoding", "models") and not may_import("decoding", "data_generation")
    assert not may_import("train", "decoding") and may_import("train", "data_generation")
    assert may_import("train", "deploy") and not may_import("deploy", "train")
    assert may_import("train", "evaluation") and not may_import("evaluation", "train")
    assert may_import("local_server", "decoding") and not may_import("local_server", "evaluation")
    assert may_import("evaluation", "decoding") and not may_import("evaluation", "convert")
    assert may_import("cli", "train") and not may_import("train", "cli") and not may_import("cli", "models")
