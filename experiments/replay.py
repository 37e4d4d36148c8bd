"""The command that makes a run again, from its configuration."""

import functools
import json
import re
import shlex
from typing import Any

from experiments.config import GROUPS, Config, ConfigError, compose

_CHOSEN = tuple(group for group in GROUPS if group not in ("setting", "model/init", "model/bottleneck"))


def replay(config: Config) -> str | None:
    """The command that makes this run again, or None where today's choices have no such name or setting.

    What a setting or a choice says already is left out. Settings that were added since then are as they are by default.
    """
    try:
        overrides = _overrides(config)
    except ConfigError:  # a choice that has gone since
        return None
    if any(override.startswith("+") for override in overrides):
        return None
    return shlex.join(["fedsim", "run", *overrides, f"seed={config['seed']}"])


def _overrides(config: Config) -> list[str]:
    chosen = config["choices"]
    setting = [f"setting={chosen['setting']}"] if chosen.get("setting") not in (None, "none") else []
    found = tuple(setting)
    for groups in (_CHOSEN, ("model/bottleneck",)):  # a defense may choose the bottleneck
        now = _composed(found)["choices"]
        found += tuple(f"{group}={chosen[group]}" for group in groups if chosen.get(group) not in (None, now.get(group)))
    return [*found, *_differing(config, _composed(found), "")]


@functools.lru_cache(maxsize=256)
def _composed(overrides: tuple[str, ...]) -> Config:
    return compose(overrides)


def _differing(config: Config, composed: Config, path: str) -> list[str]:
    """Overrides for what `config` has otherwise, without `seed`, `name`, `out` and the names of choices."""
    found = []
    for key, value in config.items():
        if not path and key in ("seed", "name", "out", "choices"):
            continue
        if isinstance(value, dict) and isinstance(composed.get(key), dict):
            found += _differing(value, composed[key], f"{path}{key}.")
        elif key not in composed or composed[key] != value:
            found.append(f"{'' if key in composed else '+'}{path}{key}={_override(value)}")
    return found


def _override(value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, str):
        return value if re.fullmatch(r"[\w./-]+", value) else "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_override(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_override, value)) + "]"
    return json.dumps(value)
