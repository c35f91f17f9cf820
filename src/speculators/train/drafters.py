"""Several drafters of one run, `--speculator-type eagle3,dflash`: resolves a command line to a `TrainConfig` each.

    --lr 1e-3 --dflash.num-layers 2              without a prefix: of every drafter that reads it; with one: of that one
    lr: 1e-3, dflash: {num_layers: 2}            the same in YAML; a flag wins over it

What decides the rows and the verifier's states is the same for all. Each has the directory `OUTPUT/<name>`, in which
`train --speculator-type <name>` alone would continue it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from speculators.train.algorithm import Algorithm, UnreadKeysError, names_in
from speculators.train.config import ConfigError, TrainConfig, read_yaml
from speculators.train.flags import Parser, as_flags, build_parser, flag_of, parse
from speculators.train.keys import GROUPS, DataKeys, LoggingKeys, RunKeys, TrainerKeys, VerifierKeys
from speculators.training_keys import AnchorKeys, default_of
from speculators.utils.names import did_you_mean

Given = Mapping[str, Any]
SHARED_KEYS = (
    {"save_path", "rank_timeout", *VerifierKeys.model_fields, *LoggingKeys.model_fields, *RunKeys.model_fields}
    | DataKeys.model_fields.keys()
) - AnchorKeys.model_fields.keys()
"""One value for all drafters."""


def resolve_all(argv: Sequence[str]) -> list[TrainConfig]:
    """Reads a command line of one or several drafters. `--help` and `--dump-config` print and end it.

    Raises `ConfigError` for a flag that is unknown, or that none of the drafters reads.
    """
    given = TrainConfig.first_look(argv)
    names = names_in(given)
    plain, own = split_prefixed(argv, names)
    if len(names) == 1:
        return [TrainConfig.resolve([*plain, *own[names[0]]])]
    if given.get("help"):
        print(help_parser_of(argv).format_help())
        raise SystemExit(0)
    algorithms = {name: Algorithm.find({**given, "speculator_type": name}) for name in names}
    parser = parser_of(algorithms.values())
    if parser.parse_known_args(plain)[1]:  # of other algorithms, or of none
        parser = build_parser(algorithms[names[0]].groups, {})
    flags = parse(parser, plain)
    dump, path = flags.pop("dump_config", False), flags.pop("config", None)
    for name, words in own.items():
        try:
            flags |= {f"{name}.{key}": value for key, value in algorithms[name].parse(words).items()}
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
    from_yaml, headings = read_yaml(path, flags) if path is not None else ({}, [])
    unknown = next((heading for heading in headings if heading not in {*names, *GROUPS}), None)
    if unknown is not None:
        raise ConfigError(f"unknown heading '{unknown}'.{did_you_mean(unknown, [*names, *GROUPS])}")
    configs = configs_of(algorithms, flags, from_yaml, argv)
    if dump:
        print(dump_all(configs), end="")
        raise SystemExit(0)
    return configs


def resolve_given(algorithm: str | Sequence[str], given: Given) -> list[TrainConfig]:
    """Reads keys and values of one drafter or, where `algorithm` is a list, of those: as their command line is read.
    What stands under a name, `{"dflash": {"num_layers": 2}}`, is of that one.

    Raises `ConfigError` as `resolve_all` does.
    """
    if "speculator_type" in given:
        raise ConfigError("speculator_type is the first argument here: give it once")
    given = {key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in given.items()}
    if isinstance(algorithm, str):
        if "," in algorithm:
            raise ConfigError(f"{algorithm!r}: name several drafters as a list, {algorithm.split(',')}")
        given = {"speculator_type": algorithm, **given}
        return [TrainConfig.from_sources(cli=given, argv=as_flags(given))]
    words = as_flags({"speculator_type": ",".join(algorithm), **{k: v for k, v in given.items() if k not in algorithm}})
    for name in algorithm:
        own = as_flags(given.get(name, {}))
        words += [f"--{name}.{word.removeprefix('--')}" if word.startswith("--") else word for word in own]
    return resolve_all(words)


def split_prefixed(argv: Sequence[str], names: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Splits the words into those of all drafters and, without its prefix, those of each."""
    plain: list[str] = []
    own: dict[str, list[str]] = {name: [] for name in names}
    target = plain
    for word in argv:
        if word.startswith("--"):
            target = plain
            prefix, dot, flag = word.removeprefix("--").partition(".")
            if dot and "=" not in prefix:
                if prefix not in own:
                    hint = did_you_mean(prefix, names)
                    raise ConfigError(f"{word}: this run trains {', '.join(names)}, not '{prefix}'.{hint}")
                target, word = own[prefix], f"--{flag}"
        target.append(word)
    return plain, own


def help_parser_of(argv: Sequence[str]) -> Parser:
    """Returns the parser whose help answers `--help`."""
    given = TrainConfig.first_look(argv)
    names = names_in(given)
    if len(names) == 1:
        return TrainConfig.help_parser(argv)
    return parser_of(Algorithm.find({**given, "speculator_type": name}) for name in names)


def parser_of(algorithms: Iterable[Algorithm]) -> Parser:
    own = {algorithm.name: algorithm.keys for algorithm in algorithms}
    parser = build_parser({"": RunKeys, **GROUPS, **own}, {})
    parser.description = f"Train {', '.join(own)} side by side on the same states of a verifier."
    parser.epilog = (
        "--NAME.FLAG gives a flag to one of them (in YAML: keys under its name); without a prefix it goes to all that "
        "read it. --speculator-type NAME --help shows the defaults of one. Each is trained in OUTPUT/NAME."
    )
    return parser


def configs_of(
    algorithms: Mapping[str, Algorithm], flags: Given, from_yaml: Given, argv: Sequence[str] = ()
) -> list[TrainConfig]:
    """The configuration of each drafter. Keys of one are called `<name>.<key>`."""
    refuse_own(SHARED_KEYS, algorithms, {**from_yaml, **flags})
    unread: dict[str, dict[str, str]] = {}
    configs = []
    output = {**from_yaml, **flags}.get("save_path", default_of(TrainerKeys, "save_path"))
    for name, algorithm in algorithms.items():
        fixed = {"speculator_type": name, "save_path": str(Path(output) / name)}
        config, because = config_of(algorithm, {**flags, **fixed}, from_yaml, argv)
        config.idle.update(because)
        configs.append(config)
        for key, why in because.items():
            unread.setdefault(key, {})[name] = why
    for key, reasons in unread.items():
        if len(reasons) == len(configs):
            raise ConfigError(f"{'; '.join(dict.fromkeys(reasons.values()))}: leave out {flag_of(key)}")
    refuse_different(configs)
    if len(configs) > 1 and any(config.trainer.max_memory for config in configs):
        raise ConfigError("--max-memory measures one drafter: leave it out beside several, or train them apart")
    return configs


def config_of(
    algorithm: Algorithm, flags: Given, from_yaml: Given, argv: Sequence[str]
) -> tuple[TrainConfig, dict[str, str]]:
    """Returns the configuration of one drafter, and which keys given to all it does not read, and why."""
    known = {key for keys in algorithm.own_groups.values() for key in keys.model_fields}
    fixed = getattr(algorithm.keys, "command_line_only", ())
    because = {
        key: f"'{algorithm.name}' has no use for it"
        for key in {**from_yaml, **flags}
        if "." not in key and (key not in known or key in fixed)
    }
    while True:
        mine = (of_one(given, algorithm.name, because) for given in (flags, from_yaml))
        try:
            return TrainConfig.merged(next(mine), next(mine), argv), because
        except UnreadKeysError as error:
            if any(f"{algorithm.name}.{key}" in given for key in error.because for given in (flags, from_yaml)):
                raise ConfigError(f"{algorithm.name}: {error}") from error
            because |= error.because
        except ConfigError as error:
            raise ConfigError(f"{algorithm.name}: {error}") from error


def of_one(given: Given, name: str, left_out: Collection[str]) -> dict[str, Any]:
    """The keys of all drafters and, over them, those of this one."""
    of_all = {key: value for key, value in given.items() if "." not in key and key not in left_out}
    return of_all | {key.removeprefix(f"{name}."): v for key, v in given.items() if key.startswith(f"{name}.")}


def refuse_own(keys: Collection[str], names: Collection[str], given: Given) -> None:
    """Raises `ConfigError` for a key of all drafters that was given to one."""
    for key in given:
        name, _, shared = key.partition(".")
        if name in names and shared in keys:
            raise ConfigError(
                f"--{name}.{flag_of(shared).removeprefix('--')}: the drafters of a run share the verifier and the "
                f"rows: give {flag_of(shared)} without a prefix, or train {name} in a run of its own"
            )


def refuse_different(configs: Sequence[TrainConfig]) -> None:
    """Raises `ConfigError` where algorithms have different defaults for a key of all drafters."""
    flats = {config.speculator_type: config.flatten() for config in configs}
    for key in SHARED_KEYS - {"speculator_type", "save_path"}:
        values = {name: flat[key] for name, flat in flats.items()}
        if any(value != configs[0].flatten()[key] for value in values.values()):
            told = ", ".join(f"{value} for {name}" for name, value in values.items())
            raise ConfigError(f"{flag_of(key)} is {told} by default, and the drafters of a run share it: give one")


def dump_all(configs: Sequence[TrainConfig]) -> str:
    """YAML that resolves to these configurations."""
    trees = {config.speculator_type: config.said() for config in configs}
    first = next(iter(trees.values()))
    shared = {k for k, value in first.items() if all(k in tree and tree[k] == value for tree in trees.values())}
    own = {name: {key: value for key, value in tree.items() if key not in shared} for name, tree in trees.items()}
    output = Path(configs[0].trainer.save_path).parent
    top = {"speculator_type": ",".join(trees), **{key: first[key] for key in first if key in shared}}
    for tree in own.values():
        del tree["speculator_type"], tree["save_path"]
    return yaml.safe_dump({**top, "save_path": str(output), **own}, sort_keys=False, allow_unicode=True)
