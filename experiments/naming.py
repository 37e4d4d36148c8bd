"""What runs are called in tables, figures and folders: by their defense, and by what else tells them apart."""

import functools
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from experiments.config import Config, key_of, usual

NO_MATTER = ("engine", "device", "evaluate", "tracker", "name", "out", "setting")  # what changes no result


def label(config: Config, group: str = "defense") -> str:
    """A short name of a choice with the settings that matter: `topk ratio=0.1`; of a defense, with what stands in the model."""
    chosen = config["choices"]
    name = _label(chosen[group], repr(config[group]))
    inside = config["model"].get("bottleneck") if group == "defense" else None
    if not inside:
        return name
    told = _label(chosen["model/bottleneck"], repr(inside))
    same = chosen["model/bottleneck"] == chosen["defense"]  # defense=precode chooses it
    return name + told.removeprefix(chosen["defense"]) if same else f"{name}, bottleneck={told}"


def contender(config: Config) -> str:
    """What a run is told apart by in tables and figures: its defense; its server and aggregation, and what is unusual of them,
    unless they are honest and plain."""
    told = label(config)
    for group, plainly, words in (("server", "honest", "server={}"), ("aggregation", "plain", "{} aggregation")):
        if (name := config["choices"].get(group, plainly)) != plainly:
            as_usual = usual(group, name)
            unusual = [f"{key}={value}" for key, value in config[group].items() if value != as_usual.get(key)]
            told = " ".join([f"{told}, {words.format(name)}", *unusual])
    return told


def contenders(configs: Sequence[Config]) -> list[str]:
    """What each of these runs is called among them: its `contender`, and the settings by which runs of one contender differ, as in
    `none, model=lenet side=16`; those of the attack, where runs of one attack do; and what they were trained under, where not all
    were under the same. Seeds, taps and attackers tell nobody apart, nor does what changes no result.
    """
    plain, found = [contender(config) for config in configs], [_settings(config) for config in configs]
    alike: dict[tuple[str, str | None], list[dict[str, str]]] = {}
    for name, config, settings in zip(plain, configs, found, strict=True):
        inside = {key: value for key, value in settings.items() if key.startswith("attack")}
        trained = {key: value for key, value in settings.items() if key not in inside}
        alike.setdefault((name, None), []).append(trained)
        alike.setdefault((name.removeprefix(label(config)), None), []).append(trained)  # of any defense
        alike.setdefault((name, config["choices"].get("attack")), []).append(inside)
    varied: dict[str, None] = {}
    for several in alike.values():
        keys = dict.fromkeys(itertools.chain(*several))
        varied |= {key: None for key in keys if len({one.get(key) for one in several}) > 1}
    # What was chosen tells of all that comes with it.
    varied = {key: None for key in varied if not _told_by(key, varied, alike.values())}
    names = []
    for name, settings in zip(plain, found, strict=True):
        more = [f"{key.rsplit('.', 1)[-1].rsplit('/', 1)[-1]}={settings[key]}" for key in varied if key in settings]
        names.append(f"{name}, {' '.join(more)}" if more else name)
    return names


def _settings(config: Config) -> dict[str, str]:
    """The values that tell contenders of one name apart, by their paths: the choices first."""
    left_out = ("defense", "server", "aggregation", *NO_MATTER, "choices", "seed", "attacker", "tap")
    chosen = {
        group: str(name) for group, name in config["choices"].items() if group not in (*left_out, "attack", "model/bottleneck")
    }
    found = {}
    for path, value in leaves([], {key: value for key, value in config.items() if key not in left_out}):
        if path.startswith("model.bottleneck") or path in ("data.root", "attack.record"):
            continue
        key, value = (path.removesuffix("._target_"), value.rsplit(".", 1)[-1]) if path.endswith("._target_") else (path, value)
        found[key] = str(value)
    return chosen | {key: value for key, value in found.items() if key not in chosen}


def _told_by(key: str, varied: Iterable[str], alike: Iterable[list[dict[str, str]]]) -> bool:
    """Whether a setting stands inside a choice that varies, and is the same for all of one choice, name and attack."""
    groups = [group for group in varied if key.startswith(f"{group}.")]
    return bool(groups) and not any(
        len({one.get(key) for one in several if one.get(group) == choice}) > 1
        for group in groups
        for several in alike
        for choice in {one.get(group) for one in several}
    )


def leaves(path: list[str], node: Any) -> list[tuple[str, Any]]:
    """The values in a configuration's node, by their paths."""
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if inside is None:
        return [(".".join(path), node)]
    return [leaf for key, value in inside for leaf in leaves([*path, str(key)], value)]


def named(attack: str, settings: Config, as_usual: Config) -> str:
    """What an attack is called in a run's tables and folders: with the settings in which it is not `as_usual`.

    What it records changes nothing that it finds.
    """
    known = dict(leaves([], as_usual)) | {"record": settings.get("record")}
    unusual = [f"{path.rsplit('.', 1)[-1]}={value}" for path, value in leaves([], settings) if known.get(path) != value]
    return "_".join([attack, *unusual]).translate({ord(c): "-" for c in " /"} | {ord(c): None for c in "[]\"'"})


def without_defense(config: Config) -> bool:
    """Whether nothing defends this run, neither what is sent nor the model."""
    return label(config) == "none"


def conditions(config: Config) -> str:
    """What a defense was tried under: the settings, without those that defend, attack or listen, without the seed, and without
    what changes no result.

    Runs with the same conditions and seed differ in what they learn by their defense alone.
    """
    # What was chosen, the settings say as well.
    left_out = ("defense", "attack", "attacker", "tap", "seed", "choices", *NO_MATTER)
    kept = {key: value for key, value in config.items() if key not in left_out}
    model, data = (
        {k: v for k, v in config[group].items() if k != but} for group, but in (("model", "bottleneck"), ("data", "root"))
    )
    return json.dumps(kept | {"model": model, "data": data}, sort_keys=True)


def cell_names(configs: Sequence[Config], overrides: Sequence[Sequence[str]] = ()) -> list[str]:
    """What the runs of a grid are called, and their folders: by defense, attack and seed, and where these do not tell by what else
    differs in the overrides they were composed of; last by their places."""
    names = []
    for config in configs:
        attack = config["choices"]["attack"] + "_adaptive" * (config["attacker"] == "adaptive")
        names.append(f"{contender(config)}_{attack}_seed={config['seed']}".replace(" ", "_").replace("/", "-"))
    told = [{key_of(one): one.split("=", 1)[1] for one in cell} for cell in overrides] or [{}] * len(configs)
    varied = [key for key in dict.fromkeys(itertools.chain(*told)) if len({one.get(key) for one in told}) > 1]
    spoken = [key for key in varied if key not in ("seed", "attack", "attacker") and key.split(".")[0] != "defense"]
    count = Counter(names)
    for i, (name, one) in enumerate(zip(names, told, strict=True)):
        if count[name] > 1:
            more = [f"{key.split('.')[-1].split('/')[-1]}={one[key]}" for key in spoken if key in one]
            names[i] = "_".join([name, *more]).translate({ord(c): "-" for c in " /"} | {ord(c): None for c in "[]\"'"})
    count = Counter(names)
    return [name if count[name] == 1 else f"{i:03d}_{name}" for i, name in enumerate(names)]


@functools.lru_cache
def _label(name: str, text: str) -> str:
    import ast

    def settings(node: Any) -> list[str]:
        if isinstance(node, list):
            return list(itertools.chain.from_iterable(settings(item) for item in node))
        found = []
        for key, value in node.items():
            if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
                found += settings(value)
            elif isinstance(value, list):
                found.append(f"{key}={'+'.join(map(str, value))}")
            elif key != "_target_" and value is not None:
                found.append(f"{key}={value}")
        return found

    node = ast.literal_eval(text)
    return " ".join([name, *settings(node)])
