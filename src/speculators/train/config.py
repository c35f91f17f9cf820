"""`TrainConfig`: everything a training run was told, resolved from flags, a YAML file and defaults.

Precedence: flag > YAML > the algorithm's `training_defaults` > the default in `keys.py`. An unknown key is an error.
Importing this file imports neither torch nor transformers; resolving does, because the algorithm's class is asked
which keys it adds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, Field, PrivateAttr

from speculators.data_generation.configs import refuse_unprepared
from speculators.train.algorithm import ALGORITHMS, Algorithm, declared_keys, is_light, names_in, validate
from speculators.train.events import ConfigError
from speculators.train.flags import FLAG_NAMES, Parser, build_parser, flag_of
from speculators.train.keys import (
    EQUAL,
    GROUPS,
    REFUSED,
    USED,
    DataKeys,
    DraftKeys,
    LoggingKeys,
    LossKeys,
    OptimizerKeys,
    RunKeys,
    SchedulerKeys,
    TrainerKeys,
    VerifierKeys,
    group_of,
)
from speculators.utils.files import atomic_write
from speculators.utils.names import refuse_missing_checkpoint, refuse_missing_path, refuse_missing_verifier

__all__ = ["ConfigError", "TrainConfig"]


KEY_OF_FLAG = {flag.removeprefix("--"): key for key, flag in FLAG_NAMES.items()}


class TrainConfig(RunKeys):
    """One training run. Build it with `resolve` (a command line), `from_sources` or `from_flat`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    verifier: VerifierKeys
    draft: DraftKeys = Field(default_factory=DraftKeys.defaults)
    data: DataKeys = Field(default_factory=DataKeys.defaults)
    loss: LossKeys = Field(default_factory=LossKeys.defaults)
    optimizer: OptimizerKeys = Field(default_factory=OptimizerKeys.defaults)
    scheduler: SchedulerKeys = Field(default_factory=SchedulerKeys.defaults)
    trainer: TrainerKeys = Field(default_factory=TrainerKeys.defaults)
    logging: LoggingKeys = Field(default_factory=LoggingKeys.defaults)
    algorithm: dict[str, Any] = Field(default_factory=dict)
    """Keys the algorithm adds (`training_args`), validated."""
    foreign: dict[str, Any] = Field(default_factory=dict)
    """Keys of other algorithms that were given all the same; passed on, warned about."""

    _provenance: dict[str, str] = PrivateAttr(default_factory=dict)
    _argv: list[str] = PrivateAttr(default_factory=list)
    _unset: dict[str, Any] = PrivateAttr(default_factory=dict)
    _idle: dict[str, str] = PrivateAttr(default_factory=dict)
    _equal: list[str] = PrivateAttr(default_factory=list)

    @property
    def provenance(self) -> dict[str, str]:
        """Key -> where its value comes from: flag, yaml, algorithm or default."""
        return self._provenance

    @property
    def idle(self) -> dict[str, str]:
        """Given key that has no effect in this run -> why."""
        return self._idle

    @property
    def equal(self) -> list[str]:
        """Given keys that must say what the checkpoint of `from_pretrained` records."""
        return self._equal

    @property
    def argv(self) -> list[str]:
        return self._argv

    @classmethod
    def resolve(cls, argv: Sequence[str]) -> TrainConfig:
        """Read a command line. `--help` and `--dump-config` print and end it with `SystemExit(0)`, as argparse does."""
        given = cls.first_look(argv)
        if given.get("help"):
            print(cls.help_parser(argv).format_help())
            raise SystemExit(0)
        algorithm = Algorithm.find(given)
        cli = algorithm.parse(argv)
        dump, path = cli.pop("dump_config", False), cli.pop("config", None)
        config = cls.from_sources(cli=cli, config_path=path, argv=argv)
        if dump:
            print(config.dump_yaml(), end="")
            raise SystemExit(0)
        return config

    @classmethod
    def first_look(cls, argv: Sequence[str]) -> dict[str, Any]:
        """Reads the flags and YAML keys that every algorithm has: they name the algorithm."""
        first, _ = build_parser({"": RunKeys, **GROUPS}, {}).parse_known_args(list(argv))
        given = vars(first)
        yaml_values, _ = read_yaml(given["config"], given) if "config" in given else ({}, [])
        return {**yaml_values, **given}

    @classmethod
    def help_parser(cls, argv: Sequence[str]) -> Parser:
        """Returns the parser whose help answers `--help`: with the keys and defaults of the algorithm that is named."""
        name, keys, defaults = declared_keys(cls.first_look(argv))
        parser = build_parser({"": RunKeys, **GROUPS, name: keys}, defaults)
        parser.description = "Train a speculator for a verifier."
        parser.epilog = (
            f"With the keys and defaults of {name}; --speculator-type NAME --help shows those of another algorithm: "
            f"{', '.join(other for other in ALGORITHMS if other != name)}. "
            "Every key may also stand in a YAML file (--config). --debug shows the traceback of an error."
        )
        return parser

    @classmethod
    def from_sources(
        cls, cli: Mapping[str, Any] | None = None, config_path: str | Path | None = None, argv: Sequence[str] = ()
    ) -> TrainConfig:
        """Merge what was given (`cli`: key -> value) over a YAML file over the defaults, and validate the result."""
        from_yaml, headings = read_yaml(config_path) if config_path is not None else ({}, [])
        Algorithm.find({**from_yaml, **(cli or {})}).check_headings(headings)
        return cls.merged(cli or {}, from_yaml, argv)

    @classmethod
    def merged(cls, cli: Mapping[str, Any], from_yaml: Mapping[str, Any], argv: Sequence[str]) -> TrainConfig:
        given = {**from_yaml, **cli}
        algorithm = Algorithm.find(given)
        algorithm.check_keys(given)
        generic = group_of()
        values = {**algorithm.defaults, **given}
        own = dict(validate(algorithm.keys, {key: values[key] for key in algorithm.keys.model_fields if key in values}))
        foreign = algorithm.read_foreign({key: given[key] for key in given if key not in generic and key not in own})
        grouped: dict[str, Any] = {group: {} for group in GROUPS}
        for key, group in generic.items():
            if key in values and key not in own:
                (grouped[group] if group else grouped)[key] = values[key]
        config = validate(cls, {**grouped, "algorithm": own, "foreign": foreign})
        flat = config.flatten()
        said = [key for key, value in given.items() if value not in (None, "")]
        config._idle.update(algorithm.check_read(said, flat))
        config._equal.extend(key for key in said if algorithm.reading(key, flat)[0] == EQUAL)
        problem = check_together(flat)
        if problem:
            raise ConfigError(problem)
        sources = {
            **dict.fromkeys(algorithm.defaults, "algorithm"),
            **dict.fromkeys(from_yaml, "yaml"),
            **dict.fromkeys(cli, "flag"),
        }
        config._provenance.update({key: sources.get(key, "default") for key in config.flatten()})
        config._argv.extend(argv)
        config._unset.update({key: value for key, value in algorithm.unset.items() if key not in given})
        return config

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> TrainConfig:
        """From `key -> value`, as `flatten` gives them. None stands for "not given"; keys that the run does not read
        are in `idle`, not refused: programs keep one dict for all algorithms."""
        given = {key: value for key, value in values.items() if value is not None}
        algorithm, defaults = cls.with_defaults(given)
        unread = {}
        for key, value in given.items():
            outcome, because = algorithm.reading(key, {**defaults, **given})
            if outcome == REFUSED or (outcome != USED and value == defaults.get(key)):
                unread[key] = because
        config = cls.from_sources(cli={key: value for key, value in given.items() if key not in unread})
        config._idle.update({key: why for key, why in unread.items() if given[key] != defaults.get(key)})
        return config

    @classmethod
    def with_defaults(cls, values: Mapping[str, Any]) -> tuple[Algorithm, dict[str, Any]]:
        """Returns the algorithm that these values name, and every key as it is by default."""
        named = ("speculator_type", "plugins", "verifier_name_or_path")
        flat = cls.from_sources(cli={key: values[key] for key in named if key in values}).flatten()
        return Algorithm.find(flat), flat

    def flatten(self) -> dict[str, Any]:
        """Every key and its value: what `from_training_args` and `get_trainer_kwargs` receive as keywords."""
        groups = {group: getattr(self, group) for group in GROUPS}
        flat = {key: getattr(groups[group] if group else self, key) for key, group in group_of().items()}
        flat["muon_lr"] = flat["lr"] if flat["muon_lr"] is None else flat["muon_lr"]
        return {**self._unset, **flat, **self.foreign, **self.algorithm}

    def said(self) -> dict[str, Any]:
        """The keys of `flatten` that say this very configuration: those that the run reads, and what is not default."""
        flat = {key: value for key, value in self.flatten().items() if value is not None and key not in self._unset}
        algorithm, defaults = self.with_defaults(flat)
        read = {key for key in flat if algorithm.reading(key, {**defaults, **flat})[0] == USED}
        return {key: value for key, value in flat.items() if key in read or value != defaults.get(key)}

    def dump_yaml(self) -> str:
        """YAML that resolves to this very configuration."""
        flat = self.said()
        tree: dict[str, Any] = {}
        for key, group in {**dict.fromkeys(flat, self.speculator_type), **group_of()}.items():
            if key in flat:
                (tree.setdefault(group, {}) if group else tree)[key] = flat[key]
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)

    def save(self, path: str | Path) -> None:
        with atomic_write(path, "w") as file:
            file.write(self.dump_yaml())


def refuse_missing_paths(argv: Sequence[str]) -> None:
    """Raises `ValueError` for a verifier, data or file of a command line that does not exist. Imports no torch."""
    given = TrainConfig.first_look(argv)
    _, unknown = TrainConfig.help_parser(argv).parse_known_args(list(argv)) if is_light(given) else ([], [])
    if unknown or given.get("dump_config") or not isinstance(given.get("verifier_name_or_path"), str):
        return  # nothing is read, or flags are wrong
    refuse_missing_verifier(given["verifier_name_or_path"])
    if given.get("data_path"):
        refuse_unprepared(Path(given["data_path"]))
    if given.get("from_pretrained"):
        refuse_missing_checkpoint(given["from_pretrained"])
    for key in ("draft_config", "token_freq_path", "d2t_path", "t2d_path"):
        if given.get(key):
            refuse_missing_path(given[key], flag_of(key), "name a file that is there")


def read_yaml(path: str | Path, given: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], list[str]]:
    """A YAML file as `key -> value`, and its headings. Keys may stand under `train:` and under group headings. Where it
    or `given` names several drafters, what stands under one's name is `<name>.<key>`."""
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"cannot read --config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not YAML: {error}") from error
    tree = {} if tree is None else tree
    if isinstance(tree, dict) and set(tree) == {"train"}:
        tree = tree["train"] or {}
    if not isinstance(tree, dict):
        raise ConfigError(f"--config {path} must hold `key: value` lines, not a {type(tree).__name__}")
    flat: dict[str, Any] = {}
    headings: list[str] = []
    names = names_in({**tree, **(given or {})})
    for key, value in tree.items():
        prefix = f"{key}." if len(names) > 1 and key in names else ""
        is_heading = isinstance(value, dict) and (key in GROUPS or key not in group_of())
        headings += [key] if is_heading else []
        for name, item in value.items() if is_heading else [(key, value)]:
            name = str(name).replace("-", "_")
            name = prefix + KEY_OF_FLAG.get(name, name)
            if name in flat:
                raise ConfigError(f"--config {path} gives {name} twice")
            flat[name] = item
    return flat, headings


def check_together(values: dict[str, Any]) -> str | None:
    """Returns what is wrong between keys that are each valid alone, in one sentence; None where they agree."""
    freq = values["checkpoint_freq"]
    if freq > 1 and freq != int(freq):
        return f"checkpoint_freq={freq}: above 1 it counts whole epochs, so it must be an integer"
    if (values["d2t_path"] is None) != (values["t2d_path"] is None):
        return "d2t_path and t2d_path describe one mapping: give both, or neither"
    if values["save_best"] and values["train_data_ratio"] == 1.0:
        return "save_best needs validation rows, but train_data_ratio=1.0 leaves none; use e.g. 0.9"
    if values["verifier_device_map"] and values["verifier_device"]:
        return "verifier_device_map says where every layer is: leave out verifier_device"
    if values["verifier_device_map"] and values["eval_prompts"]:
        return "eval_prompts are decoded on one device: leave them out beside verifier_device_map"
    beside = ("verifier_device", "verifier_device_map", "cache_hidden_states", "eval_prompts", "prefetch_in_process")
    if values["verifier_tp"] and (others := [key for key in beside if values[key]]):
        return f"verifier_tp lets all ranks compute each row together, in the thread that trains: leave out {others[0]}"
    if values["eval_prompts"] and values["train_data_ratio"] == 1.0:
        return "eval_prompts are held-out rows, but train_data_ratio=1.0 leaves none; use e.g. 0.9"
    return None
