"""Flags made from keys: `name` becomes `--name`, a yes/no key also gets `--no-name`, a list takes several values.

Nothing is converted here: values stay text and pydantic reads them, so that a flag and a YAML file fail alike.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from speculators.train.events import ConfigError
from speculators.train.keys import RETIRED_KEYS
from speculators.utils.names import did_you_mean

FLAG_NAMES = {"verifier_name_or_path": "--verifier", "data_path": "--data", "save_path": "--output"}
"""Keys whose flag is called as in every other command. The key's own name is accepted as a flag too, and this one as a
key of YAML."""


class Parser(argparse.ArgumentParser):
    """Raises instead of exiting, and knows the flags it was given."""

    flags: list[str]

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def build_parser(groups: Mapping[str, type[BaseModel]], defaults: Mapping[str, Any]) -> Parser:
    """A parser for these groups of keys; of keys named twice the first counts. `defaults` are shown, never applied."""
    parser = Parser(
        prog="train",
        usage="%(prog)s --verifier MODEL --data DIR [options]",
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("-h", "--help", action="store_true", help="Show this and exit.")
    parser.add_argument("--config", help="YAML file; a flag wins over it.")
    parser.add_argument("--dump-config", action="store_true", help="Print the resolved configuration as YAML and exit.")
    seen: set[str] = set()
    for title, keys in groups.items():
        section = parser.add_argument_group(title) if title else parser
        for name, field in keys.model_fields.items():
            if name not in seen:
                add_flag(section, name, field, defaults.get(name, field.default))
                seen.add(name)
    parser.flags = ["--config", "--dump-config", "--help", *map(flag_of, seen)]
    return parser


def flag_of(key: str) -> str:
    return FLAG_NAMES.get(key) or "--" + key.replace("_", "-")


def add_flag(section: Any, name: str, field: FieldInfo, default: Any) -> None:
    text = (field.description or "").replace("%", "%%")
    if not field.is_required():
        text += f" Default: {shown(default)}."
    flag = flag_of(name)
    if isinstance(default, bool) and default:
        text = text.removesuffix(".") + f"; --no-{flag.removeprefix('--')} turns it off."
    if get_origin(field.annotation) is Literal:
        text = f"One of {', '.join(map(str, get_args(field.annotation)))}. {text}"
    if is_kind(field.annotation, bool):
        section.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, help=text)
    elif is_kind(field.annotation, list):
        section.add_argument(flag, dest=name, nargs="+", metavar="N", help=text)
    else:
        section.add_argument(flag, dest=name, metavar=metavar(field.annotation), help=text)
    if name in FLAG_NAMES:
        section.add_argument("--" + name.replace("_", "-"), dest=name, help=argparse.SUPPRESS)


def parse(parser: Parser, argv: Sequence[str]) -> dict[str, Any]:
    """The flags that were given, by key. An unknown one is an error that names the nearest."""
    given, unknown = parser.parse_known_args(list(argv))
    flags = [word.split("=")[0] for word in unknown if word.startswith("-")]
    retired = flags[0].removeprefix("--").removeprefix("no-").replace("-", "_") if flags else ""
    if retired in RETIRED_KEYS:
        raise ConfigError(f"{flags[0]} is no flag any more: {RETIRED_KEYS[retired]}")
    if flags:
        raise ConfigError(f"unknown flag {flags[0]}.{did_you_mean(flags[0], parser.flags)} --help lists all flags")
    if unknown:
        raise ConfigError(f"unexpected argument '{unknown[0]}': every value follows the flag it belongs to")
    return vars(given)


def is_kind(annotation: Any, kind: type) -> bool:
    """Whether an annotation is `kind`, `kind[...]` or either of them `| None`."""
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return any((get_origin(option) or option) is kind for option in options)


def metavar(annotation: Any) -> str:
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    option = next(option for option in options if option is not NoneType)
    if get_origin(option) is Literal:
        return "|".join(str(value) for value in get_args(option))
    return getattr(get_origin(option) or option, "__name__", "value").upper()


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value in (None, "", []) else str(value)


def as_flags(given: Mapping[str, Any]) -> list[str]:
    """The command line that means the same, for the record of the run."""
    words = []
    for key, value in given.items():
        if isinstance(value, bool):
            words.append(flag_of(key) if value else f"--no-{key.replace('_', '-')}")
        elif isinstance(value, list | tuple):
            words += [flag_of(key), *map(str, value)]
        elif value is not None:
            words += [flag_of(key), json.dumps(value) if isinstance(value, Mapping) else str(value)]
    return words
