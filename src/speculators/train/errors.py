"""What a user wrote that cannot be trained."""

from __future__ import annotations


class ConfigError(ValueError):
    """A flag, a YAML key or a combination of them is wrong. Command lines end with `exit_code`."""

    exit_code = 2
