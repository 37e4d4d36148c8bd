"""Configurations: composed by Hydra from `experiments/conf`, checked before any work starts.

A choice is a YAML file in a group's folder: its first line says what it is, the rest names a `_target_` and its settings.
A bad choice, setting or value is a `ConfigError`: one line that names it, the choices, and the nearest.
"""

import contextlib
import copy
import functools
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsim.checks import nearest

CONF = Path(__file__).parent / "conf"
GROUPS = (
    *("data", "partition", "model", "model/init", "model/bottleneck", "federation", "strategy", "server"),
    *("defense", "inspect", "aggregation", "attack", "engine", "tracker", "setting"),
)

Config = dict[str, Any]


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line."""


def choices(group: str) -> dict[str, str]:
    """Names of a group's choices, and the first line of each file (after Hydra's own): what it is."""
    found = {}
    for path in sorted((CONF / group).glob("*.yaml")):
        first = next(line for line in path.read_text().splitlines() if not line.startswith("# @package"))
        found[path.stem] = first.lstrip("# ").strip()
    return found


def compose(overrides: Sequence[str], config_name: str = "config") -> Config:
    """The resolved configuration of `key=value` overrides, as a plain dict, with the names chosen under `choices`.

    Where another class was put in a choice's place, by `defense._target_=mine.NoBias`, that is what was chosen.
    """
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    chosen = _check_choices(overrides)
    values = [one for one in overrides if key_of(one) not in GROUPS and not one.startswith(("+", "~"))]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            known, named = _choices_alone(config_name, tuple(one for one in overrides if one not in values))
            settings = OmegaConf.to_container(known)
            for override in values:
                _check_key(override, settings)
            composed = copy.deepcopy(known)
            for override in values:
                OmegaConf.update(composed, key_of(override), _value_of(override), merge=True)
                _check_kind(key_of(override), known, composed)
            config: Any = OmegaConf.to_container(composed, resolve=True)
        except (HydraException, OmegaConfBaseException) as error:
            if "Could not override 'model/bottleneck'" in str(error):
                way_out = "this one has no place for it: take model=lenet, or leave it out"
                asked = next(group for group in ("model/bottleneck", "defense", "setting") if group in chosen)
                raise ConfigError(f"{asked}={chosen[asked]} stands in the model, and {way_out}") from None
            raise ConfigError(" ".join(str(error).split())) from None
    for key in ("name", "out"):  # 2024 is a name as well
        if config.get(key) is not None:
            config[key] = str(config[key])
    config["choices"] = {group: named.get(group, chosen.get(group)) for group in GROUPS if group != "model/init"}
    for group in config["choices"]:
        before, after = (OmegaConf.select(one, f"{group.replace('/', '.')}._target_") for one in (known, composed))
        if after != before:
            config["choices"][group] = after
    return config


def usual(group: str, name: str) -> Config:
    """The settings of a choice as its file has them; of a class that was put in a choice's place, that it is this class."""
    return compose([f"{group}={name}"])[group] if name in choices(group) else {"_target_": name}


@functools.lru_cache(maxsize=64)
def _choices_alone(config_name: str, chosen: tuple[str, ...]) -> tuple[Any, dict[str, str]]:
    """The configuration of these choices, all other settings as their files have them, and the choices' names; to be read only.

    Hydra takes a tenth of a second for it, and the cells of a grid are alike in it.
    """
    from hydra import compose as hydra_compose
    from omegaconf import OmegaConf

    composed = hydra_compose(config_name, list(chosen), return_hydra_config=True)
    named: Any = OmegaConf.to_container(composed.hydra.runtime.choices)
    del composed.hydra
    return composed, named


@functools.lru_cache(maxsize=1024)
def _value_of(override: str) -> Any:
    """The value in a `key=value`, as Hydra reads it; to be read only."""
    parsed = _parsed(override)
    if parsed.is_sweep_override():
        key, value = override.split("=", 1)
        ways = f"write {key}=[{value}] for one list, {key}='{value}' for a text, or add -m to run them all and compare"
        raise ConfigError(f"{override!r} names several values: {ways}")
    return parsed.value()


FOLDERS = ("data.root", "out", "name")


def _parsed(override: str) -> Any:
    """An override as Hydra reads it. A folder is taken as it was typed where Hydra's grammar has no place for ~, (, or quotes."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, _, value = override.partition("=")
    typed = "'" + value.replace("'", r"\'") + "'"
    for one in (override, f"{key}={typed}") if key in FOLDERS else (override,):
        with contextlib.suppress(HydraException):
            return OverridesParser.create().parse_overrides([one])[0]
    raise ConfigError(f'{override!r} cannot be read as a setting: put its value in quotes of its own, as in "{key}={typed}"')


def sweep(overrides: Sequence[str]) -> list[list[str]]:
    """The product of all `key=a,b,c` overrides, one list of overrides for each run; `key=[a,b]` is one value, a list."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.errors import HydraException

    try:
        (runs,) = BasicSweeper.split_arguments([_parsed(one) for one in overrides], max_batch_size=None)
    except HydraException as error:
        raise ConfigError(" ".join(str(error).split())) from None
    return [list(run) for run in runs]


def key_of(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+~")


def _check_choices(overrides: Sequence[str]) -> dict[str, str]:
    chosen = {}
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"{override!r} is not a setting: settings are key=value, such as defense=topk or rounds=50")
        key, value = override.split("=", 1)
        if key_of(override) not in GROUPS:
            continue
        names = choices(key_of(override))
        if "," in value:
            raise ConfigError(f"{override!r} names several choices: add -m to run them all and compare")
        if value not in names:
            raise ConfigError(f"unknown {key} {value!r}: {nearest(value, names)}choices: {', '.join(names)}")
        chosen[key] = value
    return chosen


def _check_key(override: str, config: Any) -> None:
    key = key_of(override)
    node = config
    walked: list[str] = []
    for part in key.split("."):
        entries = {str(i): v for i, v in enumerate(node)} if isinstance(node, list) else node
        if not isinstance(entries, dict) or part not in entries:
            where = ".".join(walked) or "the configuration"
            keys = [k for k in entries if not k.startswith("_")] if isinstance(entries, dict) else []
            known = f"{nearest(part, keys)}{where} has {', '.join(keys)}" if keys else f"{where} has no settings"
            raise ConfigError(f"unknown setting {key!r}: {known}")
        walked.append(part)
        node = entries[part]


# Flower's strategies and the models take what they are given; the other groups' classes check their settings themselves.
_UNCHECKED = ("data", "partition", "model", "federation", "strategy", "attack", "server", "inspect", "aggregation")


def _check_kind(key: str, known: Any, composed: Any) -> None:
    """Raises ConfigError for a setting that is a number or a switch by default and was given something else."""
    from omegaconf import OmegaConf

    if key in GROUPS or key.split(".")[0] not in _UNCHECKED:
        return
    before, after = OmegaConf.select(known, key), OmegaConf.select(composed, key)
    if (group := key.replace(".", "/")) in GROUPS and isinstance(after, str):
        raise ConfigError(f"{key} holds settings, got {after!r}: choose with {group}={after}")
    if isinstance(before, bool):
        if not isinstance(after, bool):
            raise ConfigError(f"{key} must be true or false, got {after!r}")
    elif isinstance(before, int | float) and (isinstance(after, bool) or not isinstance(after, int | float)):
        raise ConfigError(f"{key} must be a number, got {after!r}")
    elif isinstance(before, int) and not isinstance(after, int) and key.startswith("model."):  # layers and units are counted
        raise ConfigError(f"{key} must be a whole number, got {after!r}")


def build_checked(group: str, node: Config, **more: Any) -> Any:
    """What `fedsim.setup.build` makes of a node and `more`, with errors told as a user of the command line would want them."""
    from hydra.errors import HydraException
    from hydra.utils import get_object

    from fedsim.setup import build

    try:
        return build(node, **more)
    except HydraException as error:
        cause = error.__cause__ or error
        message = str(cause)
    except (ValueError, TypeError) as error:
        message = str(error)
    if "unexpected keyword argument" in message:
        target = get_object(node["_target_"])  # a class or a function
        names = [name for name in inspect.signature(target).parameters if name != "self"]
        wrong = message.rsplit("'", 2)[1]
        message = f"unknown setting {wrong!r}: {nearest(wrong, names)}{node['_target_']} has {', '.join(names)}"
    raise ConfigError(f"{group}: {' '.join(message.split())}")
