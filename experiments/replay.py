"""The command that makes a run again, from its configuration."""

import functools
import json
import re
import shlex
from collections.abc import Sequence
from typing import Any

from experiments.config import GROUPS, Config, ConfigError, choices, compose, key_of

_CHOSEN = tuple(group for group in GROUPS if group not in ("setting", "model/init", "model/bottleneck"))


def replay(config: Config) -> str | None:
    """The command that makes this run again, or None where none composes to its configuration today.

    What a setting or a choice says already is left out. Settings that were added since then are as they are by default.
    """
    try:
        overrides = _overrides(config)
        deployed = config["choices"]["engine"] == "deployment"
        command, composed = _deployed(config, overrides) if deployed else (["run", *overrides], compose(overrides))
        others = [name for group, name in config["choices"].items() if name not in (None, composed["choices"].get(group))]
        if others or _differing(config, composed, ""):
            return None
    except ConfigError:  # a choice that has gone since, or what no choice is
        return None
    return shlex.join(["fedsim", *command])


def _deployed(config: Config, overrides: Sequence[str]) -> tuple[list[str], Config]:
    """The command of a run on a SuperLink and a SuperNode for each client, and what it composes to."""
    from experiments.deploy import configured

    nodes, said = config["federation"]["clients"], ("engine", "federation.clients", "federation.per_round")
    told = [override for override in overrides if key_of(override) not in said]
    if (per_round := config["federation"]["per_round"]) != nodes:
        told.append(f"federation.per_round={per_round}")
    return ["deploy", "--nodes", str(nodes), *told], configured(told, nodes)


def _overrides(config: Config) -> list[str]:
    chosen = config["choices"]
    setting = [f"setting={chosen['setting']}"] if chosen.get("setting") not in (None, "none") else []
    found = tuple(setting)
    for groups in (_CHOSEN, ("model/bottleneck",)):  # a defense may choose the bottleneck
        now = _composed(found)["choices"]
        others = {group: chosen[group] for group in groups if chosen.get(group) not in (None, now.get(group))}
        found += tuple(f"{group}={name}" for group, name in others.items() if name in choices(group))  # else a class in its place
    found += _initialization(config, _composed(found))
    return [*found, *_differing(config, _composed(found), ""), f"seed={config['seed']}"]


def attack_overrides(config: Config) -> list[str]:
    """The overrides by which a run's own attack and attackers compose. Raises ConfigError for a run without an attack."""
    if not config["attack"]:
        raise ConfigError("the run has no attack of its own (attack=none): say which, attack=NAME; see `fedsim list attacks`")
    name = config["choices"]["attack"]
    chosen = [f"attack={name}"] if name in choices("attack") else []  # else a class in its place
    unusual = _differing(config["attack"], _composed(tuple(chosen))["attack"], "attack.")
    return [*chosen, *unusual, f"attacker={config.get('attacker', 'naive')}"]  # folders of earlier versions name no attacker


def _initialization(config: Config, composed: Config) -> tuple[str, ...]:
    """The choice of the first weights, whose name is not written down: of its class, if the model's own is of another."""
    init, own = config["model"].get("init") or {}, composed["model"].get("init") or {}
    if init.get("_target_") == own.get("_target_"):
        return ()
    named = config["choices"].get("model/init")
    names = [named] if named else [name for name, of in _initializations().items() if of == init["_target_"]]
    return tuple(f"model/init={name}" for name in names[:1])


@functools.cache
def _initializations() -> dict[str, str]:
    """The class of each choice of first weights."""
    return {name: _composed((f"model/init={name}",))["model"]["init"]["_target_"] for name in choices("model/init")}


@functools.lru_cache(maxsize=256)
def _composed(overrides: tuple[str, ...]) -> Config:
    return compose(overrides)


def _differing(config: Config, composed: Config, path: str) -> list[str]:
    """Overrides for what `config` has otherwise, without `seed`, `name`, `out` and the names of choices.

    Raises ConfigError for what no override can say: a setting that is not there, or a class that lacks settings of the one there.
    """
    another = config.get("_target_") != composed.get("_target_")
    if another and composed.keys() - config.keys():
        raise ConfigError(f"no choice of {path} is {config.get('_target_')}")
    found = []
    for key, value in config.items():
        if not path and key in ("seed", "name", "out", "choices"):
            continue
        if isinstance(value, dict) and isinstance(composed.get(key), dict):
            found += _differing(value, composed[key], f"{path}{key}.")
        elif key not in composed and not another:
            raise ConfigError(f"{path}{key} is no setting")
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
