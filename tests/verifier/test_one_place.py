"""The language model's part of a config is unwrapped in one place, and raw JSON of a verifier is read in one place."""

import ast
from pathlib import Path

import pytest

import speculators

SOURCE = Path(speculators.__file__).parent
HOME = SOURCE / "verifier" / "config.py"
WRAPPERS = {"text_config", "thinker_config", "get_text_config"}
# vLLM's own table of MTP families names the keys it looks up, as paths of its configs.
PATHS_OF_VLLM = {"decoding/config/mtp_families.py"}


def unwrapped(code: str) -> list[int]:
    """Lines that reach for a config's text part: as an attribute, by `getattr`, or as a key."""
    lines = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and node.attr in WRAPPERS:
            lines.append(node.lineno)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.split(".")[0] in WRAPPERS:
            lines.append(node.lineno)
    return sorted(lines)


@pytest.mark.parametrize(
    "code",
    [
        "size = config.text_config.vocab_size",
        "text = getattr(config, 'text_config', None) or config",
        "text = values.get('text_config') or values",
        "text = values['text_config']",
        "text = config.get_text_config(decoder=True)",
        "text = lookup(config, 'thinker_config.text_config')",
    ],
)
def test_every_way_to_unwrap_is_seen(code):
    assert unwrapped(code) == [1]


def test_calling_the_one_function_is_not_unwrapping():
    assert unwrapped("from speculators.verifier.config import text_config\nsize = text_config(config).vocab_size") == []


def test_text_config_is_unwrapped_in_one_function():
    found = {
        str(file.relative_to(SOURCE)): lines
        for file in SOURCE.rglob("*.py")
        if file != HOME and (lines := unwrapped(file.read_text()))
    }
    reexport = found.pop("verifier/__init__.py")  # its name in __all__
    assert len(reexport) == 1
    assert found.keys() <= PATHS_OF_VLLM, found
    tree = ast.parse(HOME.read_text())
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and unwrapped(ast.unparse(node))]
    assert functions == ["text_config", "plain_config"]  # the second one builds a record, of what the first one finds
