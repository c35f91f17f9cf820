"""What the Python standard library says about itself: one record per documented object, read with `ast`.

Source is parsed, never imported; only modules compiled into the interpreter are imported, to read their docstrings.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import re
import sys
import sysconfig
import textwrap
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "lib2to3",
    "pydoc_data",
}
COMPILED_MODULES = ("array", "builtins", "cmath", "errno", "gc", "itertools", "math", "select", "time", "zlib")
HELDOUT_MODULUS = 20
"""One docstring in this many is held out, if its opening stands nowhere else."""
OPENING_CHARS = 100
MIN_HELDOUT_DOC_CHARS = 60
"""Shorter docstrings are formulas ("Return self.") that say nothing about what was learnt."""


@dataclass(frozen=True)
class Parameter:
    name: str
    default: str | None = None
    kind: str = "required"
    """required, optional, varargs, keywords; `keyword-only` is told by its default like the others."""


@dataclass(frozen=True)
class Entity:
    """A module, class, function or method, with what its source says about it."""

    kind: str
    module: str
    qualname: str
    definition: str = ""
    """The `def` or `class` line."""
    signature: str = ""
    """Dotted name with parameters: `os.path.join(a, *p)`."""
    doc: str = ""
    parameters: tuple[Parameter, ...] = ()
    raises: tuple[str, ...] = ()
    returns: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()
    body: str = ""
    """Source of the body without its docstring; empty for classes and modules."""
    lines: tuple[int, int] = (0, 0)
    heldout: bool = False

    @property
    def full_name(self) -> str:
        return f"{self.module}.{self.qualname}" if self.qualname else self.module

    @property
    def name(self) -> str:
        return self.full_name.rsplit(".", 1)[-1]

    @property
    def is_callable(self) -> bool:
        return self.kind in ("function", "method", "builtin")


def source_files() -> list[tuple[str, Path]]:
    """(module name, file) of the pure-Python standard library, sorted, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS & set(parts) or any("-" in part for part in parts):
            continue
        found.append((".".join(parts).removesuffix(".__init__"), path))
    return found


def read_entities(packages: tuple[str, ...] = ()) -> list[Entity]:
    """Every object worth talking about, with the held-out ones marked; of these top-level packages only, if named."""
    entities: list[Entity] = []
    for module, path in source_files():
        if not packages or module.partition(".")[0] in packages:
            entities.extend(module_entities(module, parse_source(path)))
    for module in COMPILED_MODULES:
        entities.extend(compiled_entities(module))
    return mark_heldout(entities)


def parse_source(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8", errors="replace"))


def module_entities(module: str, tree: ast.Module) -> list[Entity]:
    members = [n.name for n in tree.body if isinstance(n, DEFINITIONS) and not n.name.startswith("_")]
    found = [Entity("module", module, "", doc=tidy(ast.get_docstring(tree)), members=tuple(members))]
    for node in tree.body:
        found.extend(node_entities(module, node, owner=""))
    return found


DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def node_entities(module: str, node: ast.stmt, owner: str) -> list[Entity]:
    if isinstance(node, ast.ClassDef):
        qualname = f"{owner}{node.name}"
        bases = tuple(ast.unparse(base) for base in node.bases)
        members = tuple(n.name for n in node.body if isinstance(n, DEFINITIONS) and not n.name.startswith("_"))
        definition = f"class {node.name}({', '.join(bases)}):" if bases else f"class {node.name}:"
        found = [
            Entity(
                "class",
                module,
                qualname,
                definition,
                f"{module}.{qualname}",
                tidy(ast.get_docstring(node)),
                members=members,
                bases=bases,
                lines=line_range(node),
            )
        ]
        for child in node.body:
            found.extend(node_entities(module, child, owner=f"{qualname}."))
        return found
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return [function_entity(module, node, owner)]
    return []


def function_entity(module: str, node: ast.FunctionDef | ast.AsyncFunctionDef, owner: str) -> Entity:
    arguments = ast.unparse(node.args)
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    annotation = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    shown = re.sub(r"^(self|cls)(, |$)", "", arguments) if owner else arguments
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return Entity(
        kind="method" if owner else "function",
        module=module,
        qualname=f"{owner}{node.name}",
        definition=f"{keyword} {node.name}({arguments}){annotation}:",
        signature=f"{module}.{owner}{node.name}({shown})",
        doc=tidy(ast.get_docstring(node)),
        parameters=read_parameters(node.args, skip_first=bool(owner)),
        raises=raised_names(node),
        returns=returned_expressions(node),
        body="\n".join(ast.unparse(statement) for statement in body),
        lines=line_range(node),
    )


def line_range(node: ast.stmt) -> tuple[int, int]:
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return first, node.end_lineno or node.lineno


def read_parameters(arguments: ast.arguments, skip_first: bool) -> tuple[Parameter, ...]:
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + [ast.unparse(d) for d in arguments.defaults]
    found = [Parameter(a.arg, d, "optional" if d else "required") for a, d in zip(positional, defaults, strict=True)]
    if skip_first and found and found[0].name in ("self", "cls"):
        found = found[1:]
    if arguments.vararg:
        found.append(Parameter("*" + arguments.vararg.arg, kind="varargs"))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        text = ast.unparse(default) if default else None
        found.append(Parameter(argument.arg, text, "optional" if default else "required"))
    if arguments.kwarg:
        found.append(Parameter("**" + arguments.kwarg.arg, kind="keywords"))
    return tuple(found)


def raised_names(node: ast.AST) -> tuple[str, ...]:
    names: Counter[str] = Counter()
    for child in ast.walk(node):
        if isinstance(child, ast.Raise) and child.exc is not None:
            raised = child.exc.func if isinstance(child.exc, ast.Call) else child.exc
            text = ast.unparse(raised)
            if re.fullmatch(r"[A-Z]\w*|\w+(\.\w+)*\.[A-Z]\w*", text):
                names[text] += 1
    return tuple(sorted(names))


def returned_expressions(node: ast.AST) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for child in ast.walk(node):
        if isinstance(child, ast.Return) and child.value is not None:
            text = ast.unparse(child.value)
            if len(text) <= 60 and "\n" not in text:
                found[text] = None
    return tuple(found)[:3]


def compiled_entities(module: str) -> list[Entity]:
    """Functions, classes and methods of a module written in C, from the running interpreter."""
    loaded = importlib.import_module(module)
    members = tuple(name for name in dir(loaded) if not name.startswith("_"))
    found = [Entity("module", module, "", doc=tidy(loaded.__doc__), members=members)]
    for name, value in sorted(vars(loaded).items()):
        if name.startswith("_") or getattr(value, "__module__", module) not in (module, "builtins"):
            continue
        if inspect.isbuiltin(value) or inspect.isclass(value):
            found.append(compiled_entity(module, name, value))
        if inspect.isclass(value) and not issubclass(value, BaseException):
            for method, inner in sorted(vars(value).items()):
                if not method.startswith("_") and callable(inner):
                    found.append(compiled_entity(module, f"{name}.{method}", inner))
    return [entity for entity in found if entity.doc]


def compiled_entity(module: str, qualname: str, value: object) -> Entity:
    # A docstring written in C starts with its own signature where it has no machine-readable one: "range(stop) -> ...".
    text_signature = getattr(value, "__text_signature__", None) or "(...)"
    arguments = re.sub(r"\$(self|module|type)(, )?(/(, )?)?", "", text_signature)
    kind = "class" if inspect.isclass(value) else "builtin"
    name = qualname.rsplit(".", 1)[-1]
    definition = f"class {name}:" if kind == "class" else f"def {name}{arguments}:"
    shown = qualname if module == "builtins" else f"{module}.{qualname}"
    doc = tidy(inspect.getdoc(value))
    return Entity(kind, module, qualname, definition, shown if kind == "class" else shown + arguments, doc)


def tidy(doc: str | None) -> str:
    """A docstring as Markdown prose: paragraphs on one line each, `code` in single backticks, examples kept."""
    paragraphs = re.split(r"\n\s*\n", textwrap.dedent(doc or "").strip())
    return "\n\n".join(filter(None, map(tidy_paragraph, paragraphs)))


def tidy_paragraph(paragraph: str) -> str:
    paragraph = re.sub(r"``([^`\n]+)``", r"`\1`", paragraph.strip("\n"))
    paragraph = re.sub(r":(?:class|func|meth|exc|mod|attr|data|const):`[~!]?([^`]+)`", r"`\1`", paragraph)
    lines = paragraph.split("\n")
    # Only prose is re-flowed: line breaks at column 79 are noise, those of lists, tables and examples are not.
    is_prose = not any(re.match(r"\s|[-*+>|]|\d+[.)]|\w+\s*[:=]|[=~^-]{3,}|\S+\s{2,}\S", line) for line in lines)
    return " ".join(lines) if is_prose else "\n".join(line.rstrip() for line in lines)


def mark_heldout(entities: list[Entity]) -> list[Entity]:
    """Hold out a fixed share of callables and classes; a held-out class takes its methods with it."""
    all_docs = "|".join(normal(entity.doc) for entity in entities)
    heldout = {
        entity.full_name
        for entity in entities
        if entity.kind != "module"
        and len(entity.doc) >= MIN_HELDOUT_DOC_CHARS
        and name_hash(entity.full_name) % HELDOUT_MODULUS == 0
        # Text that also stands in another docstring would be seen in training; siblings often share the first lines.
        and all_docs.count(normal(entity.doc[:OPENING_CHARS])) == 1
    }
    names = Counter(entity.full_name for entity in entities)  # a name defined twice (if/else) stays in training
    heldout = {name for name in heldout if names[name] == 1}
    return [replace(e, heldout=any(p in heldout for p in prefixes(e.full_name))) for e in entities]


def prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def normal(text: str) -> str:
    return re.sub(r"\W+", " ", text).strip().lower()


def name_hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def heldout_lines(entities: list[Entity]) -> dict[str, set[int]]:
    """Line numbers of held-out objects by module, to be cut from source text shown in training."""
    hidden: dict[str, set[int]] = {}
    for entity in entities:
        if entity.heldout and entity.lines[0]:
            hidden.setdefault(entity.module, set()).update(range(entity.lines[0], entity.lines[1] + 1))
    return hidden


def python_version() -> str:
    return sys.version.split()[0]
