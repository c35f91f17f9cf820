"""The shape of the source: the size of files, what an `__init__.py` holds, and who names an algorithm.

Each rule takes the text of one file and returns its violations; the tests below show each rule failing on a short text.
Who may import whom is in test_layers.py.
"""

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import speculators

SOURCE = Path(speculators.__file__).parent
MOST_LINES = 300
MOST_FILES = 250 + 51
"""What stood when the rooms were laid out, and files for what came since: the sharded store of states, engine profiles,
memory and plans of conversion, verifiers that are quantised or split over ranks, `build` as a function, sharded and
side-by-side training, estimates and memory of runs, static shapes of the engine and their graphs, suites of
measurements with `compare` and `plan`, `diagnose`, the report's page, the local server and its metrics, model FLOPs and
the peaks of cards. A file more needs a file less, or a new subject in this line."""

ALGORITHMS = tuple(sorted(file.parent.name for file in SOURCE.glob("models/*/core.py")))
PARENTS = {"dspark": ("dflash",), "peagle": ("eagle3",)}
"""An algorithm names another only where it is one: the same pairs as in test_layers.py."""

VLLM = "a method, JSON key or class of vLLM, in its spelling"
CONTRACT = "a public name of the contract"
FEED_FORWARD = "the feed-forward part of a decoder layer, as Hugging Face's modules call it"
ALLOWED: dict[str, tuple[str, str]] = {
    # file or folder -> (which names it may use, why)
    "cli/": ("stitch[_-]mtp|mtp|MTP_TYPE_NAMES|eagle|medusa", "the command `stitch-mtp`; in `serve`, methods of vLLM"),
    "compat.py": ("(models|convert)[.].*|.*Converter|MTP_.*_REMAP|dflash_loss_decay|shift_batch_mtp", CONTRACT),
    "convert/earlier.py": (
        "dflash|DFlashConverter|eagle3|Eagle3Converter|MTPConverter|MTP_(EXACT|PREFIX)_REMAP|mtp|mtp(_layers)?[.].*",
        CONTRACT,
    ),
    "decoding/config/": (".*", VLLM),
    "decoding/trees/": ("EAGLE_25|MEDUSA_63", "trees that were published under these names"),
    "decoding/verifiers/": ("mlp", FEED_FORWARD),
    "losses/": ("dflash_loss_decay", CONTRACT),
    "models/eagle/core.py": ("eagle3", "an error sends EAGLE-3 settings to their own algorithm"),
    "models/mtp/": ("mlp|MLP", FEED_FORWARD),
    "nn/": ("mlp|MLP", FEED_FORWARD),
    "train/keys.py": ("eagle3", "the default algorithm of `train`, written once"),
    "utils/loading.py": ("mtp[.]", "the prefix of tensors in verifiers' own files"),
}
KEYS_OF_VLLM = re.compile("eagle_aux_hidden_state_layer_ids|eagle_config[.]?")
"""Named by every file that writes or reads what vLLM serves."""

MEANS_THE_ALGORITHM = {"mlp": re.compile(r"mlp|mlp(speculator|draft|network|proposer|training)\w*")}
"""Where a name has another meaning too (`norm_mlp`, `mlp_bias`): the only names that count."""

Rule = Callable[[str, str], list[str]]


def test_no_file_is_too_long():
    assert not violations(too_long)


def test_the_formatter_formats_everything():
    assert not violations(formatter_exceptions, SOURCE, *repository_folders("tests", "benchmarks", "scripts"))


def test_an_init_only_names_what_its_folder_offers():
    assert not violations(logic_of_init)


def test_only_its_own_folder_names_an_algorithm():
    assert not violations(named_algorithms)


def test_every_exception_is_used():
    unused = set(ALLOWED)
    for file in SOURCE.rglob("*.py"):
        path = str(file.relative_to(SOURCE))
        if list(algorithm_words(path, file.read_text())):
            unused -= {place for place in ALLOWED if path.startswith(place)}
    assert not unused


def test_files_do_not_become_more():
    assert len(list(SOURCE.rglob("*.py"))) <= MOST_FILES


def violations(rule: Rule, *folders: Path) -> list[str]:
    found = []
    for folder in folders or (SOURCE,):
        for file in sorted(folder.rglob("*.py")):
            found += rule(str(file.relative_to(folder)), file.read_text())
    return found


def repository_folders(*names: str) -> list[Path]:
    root = Path(__file__).parent.parent
    return [root / name for name in names if (root / name).is_dir()]


def too_long(path: str, source: str) -> list[str]:
    lines = len(source.splitlines())
    return [f"{path} has {lines} lines, more than {MOST_LINES}"] if lines > MOST_LINES else []


def formatter_exceptions(path: str, source: str) -> list[str]:
    return [
        f"{path}:{token.start[0]} {token.string}"
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and re.search(r"#\s*fmt:", token.string)
    ]


def logic_of_init(path: str, source: str) -> list[str]:
    """An `__init__.py` imports and assigns names; a lazy one also defines `__getattr__` and `__dir__`."""
    if Path(path).name != "__init__.py":
        return []
    statements = [statement for statement in ast.parse(source).body if not is_declaration(statement)]
    return [f"{path}:{statement.lineno} {ast.unparse(statement).splitlines()[0]}" for statement in statements]


def is_declaration(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.FunctionDef):
        return statement.name in ("__getattr__", "__dir__")
    if isinstance(statement, ast.If):
        for_types = ast.unparse(statement.test) == "TYPE_CHECKING" and not statement.orelse
        return for_types and all(map(is_declaration, statement.body))
    return isinstance(statement, (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Expr))


def named_algorithms(path: str, source: str) -> list[str]:
    allowed = [KEYS_OF_VLLM, *(re.compile(names) for place, (names, _) in ALLOWED.items() if path.startswith(place))]
    return [
        f"{path}:{line} {word}"
        for line, word in algorithm_words(path, source)
        if not any(names.fullmatch(word) for names in allowed)
    ]


def algorithm_words(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and word of each identifier, and of each word in a string, that names an algorithm of another folder."""
    parts = Path(path).parts
    own = {parts[1], *PARENTS.get(parts[1], ())} if parts[0] == "models" and len(parts) > 2 else set()
    tree = ast.parse(source)
    words = [*identifiers(tree), *words_of_strings(tree)]
    return ((line, word) for line, word in words if algorithm_in(word) not in {None, *own})


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            name = getattr(node, field, None)
            if isinstance(name, str):
                yield node.lineno, name


def words_of_strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Docstrings are free, and a text may speak of EAGLE-3 as papers do; in lower case a word is a registered name."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            words = re.findall(r"[\w.-]+", node.value)
            yield from ((node.lineno, word) for word in words if len(words) == 1 or word.islower())


def algorithm_in(word: str) -> str | None:
    lower = word.lower()
    for name in sorted(ALGORITHMS, key=len, reverse=True):  # "peagle" before "eagle"
        if MEANS_THE_ALGORITHM[name].fullmatch(lower) if name in MEANS_THE_ALGORITHM else name in lower:
            return name
    return None


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (too_long, "nn/long.py", "x = 1\n" * (MOST_LINES + 1)),
        (formatter_exceptions, "nn/a.py", "x = [1,2]  # fmt: skip\n"),
        (formatter_exceptions, "nn/a.py", "# fmt: off\nx = 1\n"),
        (logic_of_init, "nn/__init__.py", "def helper(): ..."),
        (logic_of_init, "nn/__init__.py", "class Helper: ..."),
        (logic_of_init, "nn/__init__.py", "for name in (): ..."),
        (logic_of_init, "nn/__init__.py", "if TYPE_CHECKING:\n    def helper(): ..."),
        (logic_of_init, "nn/__init__.py", "try:\n    import torch\nexcept ImportError: ..."),
        (named_algorithms, "train/run.py", "if kind == 'eagle3': ..."),
        (named_algorithms, "train/run.py", "raise ValueError('leave it out with dflash')"),
        (named_algorithms, "train/run.py", "isinstance(model, Eagle3DraftModel)"),
        (named_algorithms, "train/run.py", "model.peagle_depth"),
        (named_algorithms, "train/run.py", "def dflash_blocks(): ..."),
        (named_algorithms, "train/run.py", "train(medusa=1)"),
        (named_algorithms, "train/run.py", "get_class('mlp')"),
        (named_algorithms, "train/run.py", "f'{folder}/mtp/config.json'"),
        (named_algorithms, "decoding/trees/a.py", "EAGLE_26 = ()"),
        (named_algorithms, "models/dflash/core.py", "from speculators.models.dspark import core"),
        (named_algorithms, "models/last_state_model.py", "kinds = {'medusa': 1}"),
    ],
)
def test_a_violation_is_seen(rule, path, source):
    assert len(rule(path, source)) == 1


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (too_long, "nn/long.py", "x = 1\n" * MOST_LINES),
        (formatter_exceptions, "nn/a.py", "x = '# fmt: skip'\n"),
        (logic_of_init, "nn/__init__.py", "from a import b\n__all__ = ['b']\ndef __getattr__(name): ...\nrebuild()"),
        (logic_of_init, "nn/__init__.py", "if TYPE_CHECKING:\n    from a import b"),
        (logic_of_init, "nn/packed_row.py", "def helper(): ..."),
        (named_algorithms, "train/run.py", "'''eagle3 is the default.'''\nx = 'trains EAGLE-3'  # not eagle3"),
        (named_algorithms, "models/eagle3/core.py", "class Eagle3DraftModel: ..."),
        (named_algorithms, "models/dspark/core.py", "from speculators.models.dflash import core"),
        (named_algorithms, "nn/decoder.py", "(layer.mlp_bias, norm_mlp)"),
        (named_algorithms, "decoding/trees/a.py", "EAGLE_25 = ()"),
    ],
)
def test_what_is_allowed_passes(rule, path, source):
    assert not rule(path, source)
