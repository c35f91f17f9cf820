"""Reads what a run's algorithm declares of its keys. Other algorithms are imported only where their keys matter: one of
them that cannot be imported must not stop the training of this one.

They matter when something was given that is neither a generic key nor the algorithm's own, and to a class that declares
no keys, which was written to receive all flags.
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

import speculators
from speculators.train.events import ConfigError
from speculators.train.flags import FLAG_NAMES, build_parser, flag_of, parse
from speculators.train.keys import EQUAL, GROUPS, IDLE, REFUSED, RETIRED_KEYS, RULES, RunKeys, group_of
from speculators.training_keys import reading_of
from speculators.utils.names import did_you_mean
from speculators.utils.readable import rule_of, shown

FOLDER = Path(speculators.__file__).parent / "models"
ALGORITHMS = tuple(sorted(module.name for module in pkgutil.iter_modules([str(FOLDER)]) if module.ispkg))
"""Built-in ones, one folder each."""


def name_in(given: Mapping[str, Any]) -> str:
    return str(given.get("speculator_type", RunKeys.model_fields["speculator_type"].default))


def names_in(given: Mapping[str, Any]) -> list[str]:
    """The drafters that a run trains side by side: of "eagle3,dflash" two. Raises `ConfigError` for one named twice."""
    told = given.get("speculator_type")
    names = [name.strip() for name in (",".join(told) if isinstance(told, list) else name_in(given)).split(",")]
    if len(set(names)) < len(names) or not all(names):
        raise ConfigError(f"--speculator-type {','.join(names)}: name each drafter once, with commas between them")
    return names


class UnreadKeysError(ConfigError):
    """Keys were given that the algorithm does not read."""

    def __init__(self, because: Mapping[str, str]) -> None:
        """`because`: key -> why it is not read."""
        self.because = dict(because)
        flags: dict[str, list[str]] = {}
        for key, why in because.items():
            flags.setdefault(why, []).append(flag_of(key))
        super().__init__("; ".join(f"{why}: leave out {', '.join(names)}" for why, names in flags.items()))


def is_light(given: Mapping[str, Any]) -> bool:
    """Says whether the algorithm that `given` names says its keys without loading torch."""
    name = name_in(given)
    return name in ALGORITHMS and (FOLDER / name / "keys.py").is_file()


def declared_keys(given: Mapping[str, Any]) -> tuple[str, type[BaseModel], Mapping[str, Any]]:
    """Returns the name, own keys and other defaults of the algorithm that `given` names."""
    name = name_in(given)
    if is_light(given):
        declared = importlib.import_module(f"speculators.models.{name}.keys")
        return name, declared.TRAINING_ARGS, declared.TRAINING_DEFAULTS
    algorithm = Algorithm.find(given)
    return name, algorithm.keys, algorithm.defaults


class Algorithm:
    """A registered class, by name."""

    def __init__(self, name: str) -> None:
        cls = speculators.SpeculatorModel.get_class(name)
        self.name = name
        self.keys: type[BaseModel] = cls.training_args
        self.defaults: dict[str, Any] = dict(cls.training_defaults)
        self.model = cls
        self.broken: dict[str, Exception] = {}
        """Algorithms whose keys are not known because importing them failed."""

    @classmethod
    def find(cls, given: Mapping[str, Any]) -> Algorithm:
        plugins = given.get("plugins") or []
        for module in [plugins] if isinstance(plugins, str) else plugins:
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                raise ConfigError(f"plugins: cannot import '{module}' ({error}); is it on PYTHONPATH?") from error
        try:
            return cls(given.get("speculator_type", RunKeys.model_fields["speculator_type"].default))
        except ValueError as error:
            raise ConfigError(str(error)) from error

    # -- its own keys, and those of the others -----------------------------------------------------------------------

    @property
    def own_groups(self) -> dict[str, type[BaseModel]]:
        """The algorithm's own keys come first: where it redefines a generic key, its definition counts."""
        return {self.name: self.keys, "": RunKeys, **GROUPS}

    @cached_property
    def others(self) -> dict[str, type[BaseModel]]:
        """Keys of every other algorithm that can be imported."""
        classes, self.broken = speculators.SpeculatorModel.find_all()
        return {name: model.training_args for name, model in classes.items() if name != self.name}

    @property
    def groups(self) -> dict[str, type[BaseModel]]:
        return {**self.own_groups, **self.others}

    @cached_property
    def unset(self) -> dict[str, Any]:
        """Defaults of other algorithms' keys, for a class that declares none."""
        if self.keys.model_fields:
            return {}
        fields = {key: field for keys in self.others.values() for key, field in keys.model_fields.items()}
        if self.broken:
            warnings.warn(f"'{self.name}' receives the keys of every algorithm,{self.unread()}", stacklevel=4)
        return {
            key: field.get_default(call_default_factory=True)
            for key, field in fields.items()
            if not field.is_required() and key not in group_of()
        }

    def unread(self) -> str:
        """The end of a sentence about keys, when some could not be read."""
        reasons = [f"'{name}' ({type(error).__name__}: {error})" for name, error in self.broken.items()]
        return f" but those of {', '.join(reasons)} are unknown: it cannot be imported" if reasons else ""

    # -- what becomes of a key ---------------------------------------------------------------------------------------

    def reading(self, key: str, values: Mapping[str, Any]) -> tuple[str, str]:
        """Returns what becomes of a key (`keys.USED`, ...), and why. `values`: all keys, resolved."""
        if key in self.model.unread_keys:
            return REFUSED, f"'{self.name}' has no use for it"
        is_own = key in self.keys.model_fields and key not in group_of()
        if is_own and values["from_pretrained"]:
            is_recorded = self.model.recorded_keys.get(key, key) in self.model.config_class.model_fields
            if is_recorded and key not in self.model.keys_of_forward():
                return EQUAL, "--from-pretrained keeps its own"
        own_rules = getattr(self.keys, "rules", ())  # a class of others may declare its keys on a plain BaseModel
        return reading_of(key, values, own_rules if is_own else (*own_rules, *RULES))

    def check_read(self, given: Collection[str], values: Mapping[str, Any]) -> dict[str, str]:
        """Returns the given keys that have no effect, and why. Raises `UnreadKeysError` for those that would be
        dropped."""
        readings = {key: self.reading(key, values) for key in given}
        refused = {key: because for key, (outcome, because) in readings.items() if outcome == REFUSED}
        if refused:
            raise UnreadKeysError(refused)
        return {key: because for key, (outcome, because) in readings.items() if outcome == IDLE}

    # -- reading what was given --------------------------------------------------------------------------------------

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        parser = build_parser(self.own_groups, self.defaults)
        _, unknown = parser.parse_known_args(list(argv))
        if unknown:
            parser = build_parser(self.groups, self.defaults)
        try:
            return parse(parser, argv)
        except ConfigError as error:
            raise ConfigError(f"{error}{self.unread()}") from error

    def check_keys(self, given: Iterable[str]) -> None:
        self._check_known("key", given, lambda groups: {key for keys in groups.values() for key in keys.model_fields})

    def check_headings(self, headings: Iterable[str]) -> None:
        self._check_known("heading", headings, set)

    def _check_known(self, kind: str, given: Iterable[str], names_of: Any) -> None:
        unknown = [name for name in given if name not in names_of(self.own_groups)]
        for name in unknown:
            if name in RETIRED_KEYS:
                raise ConfigError(f"{name} is no {kind} any more: {RETIRED_KEYS[name]}")
            known = names_of(self.groups)
            if name not in known:
                hint = did_you_mean(name, known)
                raise ConfigError(f"unknown {kind} '{name}'.{hint} `train --help` lists all keys{self.unread()}")

    def read_foreign(self, values: dict[str, Any]) -> dict[str, Any]:
        """Validate keys that only other algorithms have; warn unless this one was written to receive them."""
        if not values:
            return {}
        if self.keys.model_fields:
            warnings.warn(
                f"{', '.join(sorted(values))}: keys of other algorithms, '{self.name}' has none of them; "
                "they are passed on, and ignored unless the model asks for them",
                stacklevel=3,
            )
        owner = {key: keys for keys in self.others.values() for key in keys.model_fields}
        return {key: dict(validate(owner[key], {key: value}))[key] for key, value in values.items()}


def validate(model: type[Any], values: Any) -> Any:
    """pydantic's verdict as one sentence a user can act on."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(map(sentence, error.errors()))) from error


def sentence(error: Any) -> str:
    key = next((str(part) for part in reversed(error["loc"]) if isinstance(part, str)), "")
    for part in error["loc"]:
        if part in group_of():
            key = str(part)
    if error["type"] == "missing":
        old = f" (in earlier releases --{key.replace('_', '-')})" if key in FLAG_NAMES else ""
        return f"{flag_of(key)} is required{old}"
    if error["type"] == "value_error":  # a rule of our own, which speaks for itself
        return f"{flag_of(key)} {error['input']}: {rule_of(error)}"
    return f"{flag_of(key)}: {rule_of(error)}, not {shown(error['input'])}"
