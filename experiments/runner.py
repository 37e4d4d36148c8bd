"""Runs: a configuration becomes a folder, round by round, and an interrupted folder goes on where it stopped."""

import contextlib
import dataclasses
import logging
import math
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attacks import Escalation, GradientMatching, Unsupported, adapted
from attacks.adaptive import rehearses
from attacks.hidden_noise import hidden_noises
from attacks.metrics import WINDOW
from experiments import scoring
from experiments.card import GUESS, card, defended, guarantee_of, images_behind, obstacles
from experiments.config import Config, ConfigError, build_checked
from experiments.naming import contender, label
from experiments.progress import Progress, console
from experiments.tracking import Tracking, tracked
from fedsim import federation
from fedsim.accounting import reconstruction_bound
from fedsim.cohort import cohort_of
from fedsim.cores import cores, one_thread
from fedsim.data import check, image_shape
from fedsim.defense import check_model
from fedsim.engines.deployment import Deployment
from fedsim.engines.inline import Inline
from fedsim.federation import Checkpoint, Engine, Round
from fedsim.files import is_name
from fedsim.observation import SUM, Observation, Reconstruction
from fedsim.run import RunError, RunFolder
from fedsim.secure_rounds import check_averages
from fedsim.seeding import generator
from fedsim.setup import Setup, check_targets, device_of, setup_of
from fedsim.tap import Tap

VIEWS = 16  # rounds of one client that are held together; each costs as much as the first
ATTACKERS = ("naive", "adaptive", "both")
# Of Flower's strategies, which take any number: the least, what they stay below, and whether they are above the least.
BOUNDS = {
    "eta": (0.0, math.inf, True),
    "tau": (0.0, math.inf, True),
    "beta_1": (0.0, 1.0, False),
    "beta_2": (0.0, 1.0, False),
    "proximal_mu": (0.0, math.inf, False),
    "server_learning_rate": (0.0, math.inf, True),
    "server_momentum": (0.0, 1.0, False),
}


def check_config(config: Config, *, files: bool = True) -> None:
    """Raises ConfigError or ValueError for anything in `config` that cannot be run, before anything slow is started.

    files  whether its data must be there
    """
    from fedsim.checks import one_of, whole

    whole("rounds", config["rounds"])
    whole("seed", config["seed"], 0)
    if config.get("name") is not None and not is_name(config["name"]):
        raise ConfigError(f"name={config['name']} is no name of a folder: say with out= where it goes")
    for key, folder in (("out", config.get("out", "runs")), ("data.root", config["data"].get("root", ""))):
        if not isinstance(folder, str) and not (key == "data.root" and folder is None):
            raise ConfigError(f"{key} must be a folder, got {folder!r}")
    cores()  # says what is wrong with $FEDSIM_CORES
    one_of("attacker", config.get("attacker", "naive"), ATTACKERS)
    device_of(config["device"])
    check_targets(config)
    for group in ("federation", "partition", "server", "defense", "inspect", "aggregation", "engine", "tap", "evaluate"):
        if group in config:  # folders of earlier versions have no server, no inspect and no aggregation
            build_checked(group, config[group])
    if config.get("tracker"):
        build_checked("tracker", config["tracker"])
    _check_tap(build_checked("tap", config["tap"]), config)
    attack = attack_of(config)
    if config["data"].get("side") is not None:
        whole("data.side", config["data"]["side"], 8, 512)
    check_reads(attack, config["choices"]["attack"], config)
    if attack is None and config["choices"]["attack"] != "none":
        raise ValueError(f"attack {config['choices']['attack']!r} names no _target_")
    needed, chosen = getattr(attack, "server", None), config["choices"].get("server", "honest")
    if needed not in (None, chosen):
        raise ConfigError(f"attack={config['choices']['attack']} reads what a malicious server plants: add server={needed}")
    strategy = build_checked("strategy", config["strategy"])
    if config["choices"].get("aggregation", "plain") != "plain":
        check_averages(strategy)
    _check_strategy(config)
    data, clients = config["data"], config["federation"]["clients"]
    for size in ("train_size", "test_size"):
        if data.get(size) is not None:
            whole(f"data.{size}", data[size])
    model = _network(config).train(config["federation"].get("train_mode", True))
    check_model(build_checked("defense", config["defense"]), model)
    _check_batch(model, config)
    _check_fits(attack, model, config)
    if data.get("train_size") is not None and data["train_size"] < clients:
        raise ValueError(
            f"data.train_size={data['train_size']} examples are too few for federation.clients={clients}: one each at least"
        )
    if files:
        check(data["name"], data["root"], download=data.get("download", False))


def _network(config: Config) -> nn.Module:
    """A network as the run's, of other weights and perhaps for other classes: what is known without its data."""
    classes = 400 if config["data"]["name"] == "text" else 10
    network: nn.Module = build_checked("model", config["model"], image_shape=_shape(config), num_classes=classes)
    return network


def _shape(config: Config) -> tuple[int, ...]:
    """The shape of an example."""
    data = config["data"]
    return (16,) if data["name"] == "text" else image_shape(data["name"], data.get("side"))


def _check_batch(model: nn.Module, config: Config) -> None:
    """Raises ConfigError where the network cannot train on two examples, or on one where batches are of one."""
    size, shape = min(2, config["federation"]["batch_size"]), _shape(config)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(torch.zeros(size, *shape, dtype=torch.int64 if config["data"]["name"] == "text" else torch.float32))
    except (RuntimeError, ValueError) as error:
        told = f"model={config['choices']['model']} fails on {size} of {shape}: {' '.join(str(error).split())}"
        ways = "take a larger data.side or federation.batch_size" + (", or federation.train_mode=false" if model.training else "")
        raise ConfigError(f"{told}; {ways}") from None


def _check_fits(attack: Any, model: nn.Module, config: Config) -> None:
    """Raises ConfigError for a network that the attack cannot work on, where it can tell beforehand."""
    if (check_model := getattr(attack, "check_model", None)) is None:
        return
    try:
        with torch.random.fork_rng(devices=[]):
            check_model(model, _shape(config))
    except Unsupported as error:
        raise ConfigError(
            f"attack={config['choices']['attack']} does not fit model={config['choices']['model']}: {error}"
        ) from None


def _check_strategy(config: Config) -> None:
    """Raises ConfigError for numbers of a robust strategy with which it aggregates nothing."""
    from fedsim.checks import number, whole

    strategy, chosen, per_round = config["strategy"], config["choices"]["strategy"], config["federation"]["per_round"]
    for key, least in (("num_malicious_nodes", 0), ("num_nodes_to_select", 1)):
        if key in strategy:
            whole(f"strategy.{key}", strategy[key], least)
    for key in strategy.keys() & BOUNDS.keys():
        low, below, more = BOUNDS[key]
        number(f"strategy.{key}", strategy[key], low, above=more)
        if strategy[key] >= below:
            raise ConfigError(f"strategy.{key} must be below {below:g}, got {strategy[key]:g}")
    if chosen == "bulyan" and per_round < (needed := 4 * strategy["num_malicious_nodes"] + 3):
        told = f"strategy.num_malicious_nodes={strategy['num_malicious_nodes']} takes {needed} clients a round (4 f + 3)"
        raise ConfigError(f"{told}, and federation.per_round={per_round}: no round would change the model")


def _check_tap(tap: Tap, config: Config) -> None:
    """Raises ConfigError for rounds or clients to listen to of which there are none."""
    heard = tap.clients if isinstance(tap.clients, Sequence) and not isinstance(tap.clients, str) else ()
    last, clients = config["rounds"], config["federation"]["clients"]
    if (tap.every or tap.rounds) and config["attack"] and not any(map(tap.listens, range(1, last + 1))):
        when = " and ".join(f"{name}={value}" for name, value in (("tap.every", tap.every), ("tap.rounds", tap.rounds)) if value)
        raise ConfigError(f"{when} come after the last round, rounds={last}: nobody is listened to; or take attack=none")
    if not isinstance(tap.clients, int) and not len(tap.clients):
        raise ConfigError("tap.clients=[] listens to nobody: name clients, or take tap.clients=all")
    if there := [client for client in heard if client >= clients]:
        raise ConfigError(f"tap.clients names client {there[0]}, and of federation.clients={clients} the last is {clients - 1}")


def check_reads(attack: Any, name: str, config: Config) -> None:
    """Raises ValueError for an attack on images in a run on text, or the other way round; an attack on text says `reads`. And
    ConfigError where images are too small for what an attack makes of them to be scored."""
    data = "text" if config["data"]["name"] == "text" else "images"
    if attack is not None and (reads := getattr(attack, "reads", "images")) != data:
        other = "tag or attack=dager, with model=bert_tiny" if data == "text" else "dlg"
        raise ValueError(f"attack={name} reconstructs {reads}, but data={config['data']['name']} is {data}: take attack={other}")
    if attack is not None and data == "images" and (side := config["data"].get("side")) is not None and side < WINDOW:
        raise ConfigError(f"data.side must be at least {WINDOW}, SSIM's window, for an attack to be scored, got {side}")


def attack_of(config: Config) -> Any:
    """The attack of a configuration, or None for attack=none."""
    return build_checked("attack", config["attack"]) if config["attack"] else None


@dataclasses.dataclass(frozen=True)
class Attacker:
    """Who attacks: the attack, and its name in tables.

    adaptive  whether it knows the defense
    told      whether it is told what the defense does to an update; who looks behind a model's noise may know no more than that
    """

    name: str
    attack: Any
    adaptive: bool = False
    told: bool = False


def attackers(setup: Setup, attack: Any, name: str, who: str) -> list[Attacker]:
    """The attackers of a run: `who` is naive, adaptive or both, which without a defense is naive.

    There is nothing to know then, but `adaptive` still rehearses, for a comparison of the same attacker with and without a defense.
    An attack that looks behind a model's noise knows of that, whoever asks; `who` says whether of the rest of the defense as well.
    """
    if isinstance(attack, GradientMatching) and attack.looks_behind_noise:
        return [Attacker(name, attack, adaptive=True, told=who != "naive")]
    naive = Attacker(name, attack)
    if (other := _knowing(attack, who, setup.config, setup.model, setup.defense)) is None:
        return [naive]
    if rehearses(other) and (images := images_behind(setup)) > len(setup.dataset.test):
        raise ValueError(
            f"an attacker who knows the defense rehearses on as many test images as are in an update, {images}, and there are "
            f"{len(setup.dataset.test)}: raise data.test_size, or take attacker=naive"
        )
    knowing = Attacker(name + scoring.ADAPTIVE, other, adaptive=True, told=True)
    return [knowing] if who == "adaptive" else [naive, knowing]


def _knowing(attack: Any, who: str, config: Config, model: Callable[[], nn.Module], defense: Any) -> Any:
    """What an attacker does who knows the defense, if `who` asks for one and there is something to know; else None."""
    if who == "naive" or (who == "both" and not defended(config["choices"], model)) or config["data"]["name"] == "text":
        return None
    return adapted(attack, model(), defense)


def who_attacks(config: Config) -> set[str]:
    """The attackers that a run's leaks are to name, known without its data."""
    attack, who = attack_of(config), config.get("attacker", "naive")
    if attack is None:
        return set()
    if isinstance(attack, GradientMatching) and attack.looks_behind_noise:
        return {"adaptive"}
    defense = build_checked("defense", config["defense"])
    if _knowing(attack, who, config, lambda: _network(config), defense) is None:
        return {"naive"}
    return {"adaptive"} if who == "adaptive" else {"naive", "adaptive"}


def _attackers(setup: Setup, config: Config) -> list[Attacker]:
    attack = attack_of(config)
    # Folders of earlier versions name no attacker.
    return [] if attack is None else attackers(setup, attack, config["choices"]["attack"], config.get("attacker", "naive"))


def start(config: Config, path: Path, command: str, engine: Engine | None = None, *, attack: bool = True) -> RunFolder:
    """Runs `config` in a new folder at `path`, on its own engine unless one is given that runs already.

    attack  whether its attacks are made as well; `resume` and `attack_together` make up for them
    """
    one_thread()
    engine = engine or _engine(config)
    RunFolder(path).check_free()
    setup = setup_of(config)
    show_card(setup, config)  # before there is a folder: a run that cannot be is refused here
    folder = RunFolder.create(path, config, environment(setup, command))
    with folder.held():
        folder.save_partition(setup.shards)
        _go(setup, folder, None, engine, attack=attack)
    return folder


def branch(source: RunFolder, config: Config, path: Path, command: str) -> RunFolder:
    """A new folder for `config`, which differs from a trained run's in its attack alone, with what that run learned and saw.

    The card is shown as for a run of its own, and its attacks are still to be made.
    """
    setup = setup_of(config)
    show_card(setup, config)
    return RunFolder.branch(source, path, config, environment(setup, command))


def resume(folder: RunFolder, engine: Engine | None = None, *, attack: bool = True) -> RunFolder:
    """Goes on with an interrupted run from its last finished round, if it is not finished. `attack` as of `start`."""
    one_thread()
    engine = engine or _engine(folder.config)
    setup = folder.setup()
    show_card(setup, folder.config)
    with folder.held():
        mended = folder.mend()
        checkpoint = folder.checkpoint()
        folder.rewind(-1 if checkpoint is None else checkpoint.round)
        if not (folder.path / "partition.safetensors").exists():
            folder.save_partition(setup.shards)  # it may have been stopped before it had one
        _go(setup, folder, checkpoint, engine, mended, attack=attack)
    return folder


def _engine(config: Config) -> Engine:
    engine: Engine = build_checked("engine", config["engine"])
    if isinstance(engine, Deployment):
        raise ConfigError("engine=deployment needs a SuperLink and SuperNodes: `fedsim deploy` starts some here, and also resumes")
    return engine


def finished(folder: RunFolder) -> bool:
    """Whether all rounds of a run are done, and all its attacks; not of a damaged folder, which `resume` mends."""
    try:
        checkpoint, rounds = folder.checkpoint(), folder.rounds()
        folder.leaks()
    except RunError:
        return False
    if not len(rounds) or rounds["round"].max() < folder.config["rounds"]:
        return False
    if folder.discarded:
        return True
    if checkpoint is None or checkpoint.round < folder.config["rounds"]:
        return False
    setup = folder.setup()
    return not any(_unattacked(folder, one) for one in _attackers(setup, folder.config))


def _unattacked(folder: RunFolder, attacker: Attacker) -> list[int]:
    """Observed rounds that one of the run's own attackers has not been to yet."""
    if folder.config["tap"]["when"] == "later":
        return []
    leaks = folder.leaks()
    done = set(leaks.loc[leaks["attack"] == attacker.name, "round"]) if len(leaks) else set()
    left = [round for round in folder.observed_rounds() if round not in done]
    masked = attacker.adaptive and folder.config["choices"].get("aggregation", "plain") != "plain"
    return [round for round in left if folder.saw(round, SUM)] if masked else left  # too few may have stayed for a sum


def _victims(attacker: Attacker, seen: Sequence[Observation]) -> list[Observation]:
    """Whom an attacker turns to: not to what is masked, if it knows that it is."""
    return [one for one in seen if not (attacker.adaptive and one.masked)]


def _go(
    setup: Setup,
    folder: RunFolder,
    checkpoint: Checkpoint | None,
    engine: Engine,
    mended: Sequence[str] = (),
    *,
    attack: bool = True,
) -> None:
    config = folder.config
    tap: Tap = build_checked("tap", config["tap"])
    mine = _attackers(setup, config) if attack else []
    done = 0 if checkpoint is None else checkpoint.round
    log = _logged(folder.path / "log.txt")
    with log, tracked(setup, folder) as track, Progress(config["rounds"], done) as progress:
        for line in mended:
            logging.getLogger("fedsim").warning(line)
            console.print(f"  {line}", style="yellow", markup=False)

        def listen(seen: list[Observation]) -> None:
            folder.save_observations(seen)
            for attacker in mine if tap.when == "live" else ():
                progress.leaks(_attack(setup, folder, attacker, seen, progress, track))

        def after(report: Round, state: Checkpoint) -> None:
            row = dataclasses.asdict(report) | spent(setup, report.round)
            folder.add("rounds", [row])
            folder.save_checkpoint(state)
            track.rounds([row])
            progress.round(report)

        if checkpoint is None or checkpoint.round < config["rounds"]:
            federation.run(
                setup,
                engine,
                rounds=config["rounds"],
                choose=lambda round, clients: tap.choose(setup.seed, round, clients),
                listen=listen,
                finished=after,
                start=checkpoint,
                evaluation=build_checked("evaluate", config["evaluate"]),
                memory=folder.path.absolute() / "clients",
            )
        for attacker in mine:
            left = _unattacked(folder, attacker)
            # Of rows that were lost, each round is attacked by itself, as it was when it was live.
            for rounds in ([round] for round in left) if tap.when == "live" else [left] if left else []:
                seen = [one for round in rounds for one in folder.observations(round)]
                progress.leaks(_attack(setup, folder, attacker, seen, progress, track))
    console.print(f"  {progress.leak() if attack else 'trained, not attacked yet'}; {folder.path}", markup=False)


def attack_together(folders: Sequence[RunFolder]) -> None:
    """Makes the attacks that are left of trained runs which differ in seed, defense or first weights alone.

    What an attacker does who does not know the defense is one program for all of them. It begins for each run where it would have
    begun for it alone. One who knows it does something else behind each defense.
    """
    one_thread()
    setups = [folder.setup() for folder in folders]
    naive: list[tuple[Setup, RunFolder, Attacker, list[Observation]]] = []
    with contextlib.ExitStack() as stack, Progress(1) as progress:
        for setup, folder in zip(setups, folders, strict=True):
            stack.enter_context(folder.held())
            for attacker in _attackers(setup, folder.config):
                seen = [one for round in _unattacked(folder, attacker) for one in folder.observations(round)]
                if attacker.adaptive or isinstance(attacker.attack, Escalation):  # whose members draw from streams of their own
                    with _logged(folder.path / "log.txt"), tracked(setup, folder) as track:
                        progress.leaks(_attack(setup, folder, attacker, seen, progress, track) if seen else [])
                elif seen:
                    naive.append((setup, folder, attacker, seen))
        if naive:
            stack.enter_context(_logged(naive[0][1].path / "log.txt"))
            began = time.perf_counter()
            found = scoring.attacked_together(
                [(setup, seen) for setup, _, _, seen in naive], naive[0][2].attack, progress.attacking
            )
            for (setup, folder, attacker, seen), made in zip(naive, found, strict=True):
                with tracked(setup, folder) as track:
                    progress.leaks(_keep(setup, folder, attacker, seen, made, track))
            victims = sum(len(seen) for *_, seen in naive)
            told = "%s on %d victims of %d runs: %.1f s"
            logging.getLogger("fedsim").info(told, naive[0][2].name, victims, len(naive), time.perf_counter() - began)
    console.print(f"  {progress.leak()}; {len(folders)} runs")


def nothing_to_attack(folder: RunFolder) -> str | None:
    """Why a run has captured nothing to attack again, and what to do about it; None if it has."""
    if folder.discarded:
        return f"{folder.path} was run with --discard, and has kept nothing to attack: run it again without"
    if not folder.observed_rounds():
        return f"{folder.path} has captured nothing to attack: run it with tap.every=5 or tap.rounds=[1]"
    return None


def attack_again(
    folder: RunFolder, attack: Any, name: str, who: str = "naive", asked: tuple[Config, Sequence[str]] | None = None
) -> None:
    """Attacks everything a run has captured, as one program, and adds what leaked to its table, in the place of what an attack of
    this name had found.

    asked  settings of the attack, and the overrides that asked for it, to be written down
    """
    check_reads(attack, name, folder.config)
    if lacking := nothing_to_attack(folder):
        raise ValueError(lacking)
    one_thread()
    setup = folder.setup()
    seen = [one for round in folder.observed_rounds() for one in folder.observations(round)]
    log = _logged(folder.path / "log.txt")
    with folder.held(), log, tracked(setup, folder) as track, Progress(folder.config["rounds"]) as progress:
        for attacker in attackers(setup, attack, name, who):
            progress.leaks(_attack(setup, folder, attacker, seen, progress, track))
            if asked is not None:
                folder.note_attack(attacker.name, *asked)
    console.print(f"  {name}: {progress.leak()}; {folder.path}", markup=False)


def _attack(
    setup: Setup, folder: RunFolder, attacker: Attacker, seen: Sequence[Observation], progress: Progress, track: Tracking
) -> list[str]:
    name, began, seen = attacker.name, time.perf_counter(), _victims(attacker, seen)
    if not seen:
        return []
    if attacker.adaptive:
        seen = with_history(setup, folder, seen)
    chance = generator(setup.seed, "attack")
    found = scoring.attacked(setup, attacker.attack, seen, chance, progress.attacking, told=attacker.told)
    verdicts = _keep(setup, folder, attacker, seen, found, track)
    logging.getLogger("fedsim").info("%s on %d victims: %.1f s", name, len(seen), time.perf_counter() - began)
    return verdicts


def _keep(
    setup: Setup,
    folder: RunFolder,
    attacker: Attacker,
    seen: Sequence[Observation],
    found: Sequence[Reconstruction],
    track: Tracking,
) -> list[str]:
    """Writes down what an attacker made of what was seen, and says how much of it was stolen."""
    rows = scoring.leaks(setup, attacker.name, seen, found, adaptive=attacker.adaptive)
    for round in sorted({one.round for one in seen}):
        pairs = [(one, made) for one, made in zip(seen, found, strict=True) if one.round == round]
        folder.save_reconstructions(attacker.name, [one for one, _ in pairs], [made for _, made in pairs])
    folder.add("leaks", rows)
    track.leaks(rows)
    return [row["verdict"] for row in rows]


def with_history(setup: Setup, folder: RunFolder, seen: Sequence[Observation]) -> list[Observation]:
    """What was seen, with what the same clients sent before, as far as that was listened to and says anything.

    It does so of a defense with a memory, if nothing was missed in between, and of clients that send of the same images each time,
    unless the model drew other noise for each.
    """
    tap: Tap = build_checked("tap", folder.config["tap"])
    remembered, draws = bool(setup.defense.init(seen[0].update)), bool(hidden_noises(setup.model()))
    observed, unheard, told = folder.observed_rounds(), _unheard(folder), []

    def follows(client: int, since: int, round: int) -> bool:
        """Whether nothing was missed of a client between two rounds: not even a reply that was left out, which it remembers."""
        return round == 1 or (tap.follows(client) and not any(since < one < round for one in unheard.get(client, ())))

    for one in seen:
        whole = not draws and scoring.knowledge(setup, one.num_examples, len(one.clients)).same_images
        most = VIEWS - 1 if whole else 1 if remembered and tap.follows(one.client) else 0
        rounds = [round for round in observed if round < one.round and folder.saw(round, one.client)]
        previous: Observation | None = None
        for i, round in enumerate(rounds[-most:] if most else []):
            (earlier,) = folder.observations(round, one.client)
            alone = i == 0 and len(rounds) > most
            since = 0 if previous is None else previous.round
            followed = follows(one.client, since, round) and (round == 1 or not alone)
            previous = dataclasses.replace(earlier, previous=previous, followed=followed)
        missed = len(rounds) > 0 and previous is None
        followed = follows(one.client, 0 if previous is None else previous.round, one.round) and (one.round == 1 or not missed)
        told.append(dataclasses.replace(one, previous=previous, followed=followed))
    return told


def _unheard(folder: RunFolder) -> dict[int, set[int]]:
    """By client, the finished rounds in which it was asked and its reply was left out; earlier versions did not tell."""
    rounds, found = folder.rounds(), defaultdict[int, set[int]](set)
    for round, clients in zip(rounds["round"], rounds["left_out"], strict=True) if "left_out" in rounds else ():
        for client in clients.split():
            found[int(client)].add(int(round))
    return found


def spent(setup: Setup, round: int) -> dict[str, float]:
    """What is proved of the most exposed client after `round` rounds; nothing for a defense without a proof."""
    if (proved := guarantee_of(setup, round)) is None:
        return {}
    bound = reconstruction_bound(GUESS, proved.noise_multiplier, proved.releases)
    return {"epsilon": proved.epsilon, "delta": proved.delta, "reconstruction_bound": bound}


def show_card(setup: Setup, config: Config) -> None:
    """Prints the threat-model card."""
    tap, attack = build_checked("tap", config["tap"]), attack_of(config)
    console.print(f"[bold]{contender(config)}[/] on {setup.dataset.name}, {config['choices']['model']}, seed {setup.seed}")
    told = [one.adaptive for one in _attackers(setup, config)]
    given = scoring.is_told_labels(attack)
    for what, known in card(setup, tap, config["choices"]["attack"], label(config), told, given=given):
        console.print(f"  {what:14s} {known}", style="dim")
    engine = build_checked("engine", config["engine"])
    if isinstance(engine, Inline):
        console.print(f"  {'clients train':14s} {cohort_of(setup, engine.vectorized)[1]}", style="dim")
    if config["data"]["name"] == "synthetic" and config["data"].get("root"):
        console.print(f"  {'data.root':14s} is not read: data=synthetic draws its images; add data=cifar10, say", style="yellow")
    if attack is not None:
        for grade, why in obstacles(setup, attack):
            console.print(f"  {grade + ' attack':16s} {why}", style="yellow")


def environment(setup: Setup, command: str) -> dict[str, Any]:
    """What a result depends on besides its configuration."""
    packages = {}
    for package in ("fedsim", "torch", "torchvision", "flwr", "flwr-datasets", "dp-accounting", "kornia", "numpy", "pandas", "ray"):
        with contextlib.suppress(PackageNotFoundError):
            packages[package] = version(package)
    device = str(setup.device)
    return {
        "command": command,
        "data": setup.dataset.fingerprint,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": sys.version.split()[0],
        "packages": packages,
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "device": device,
        "gpu": torch.cuda.get_device_name(setup.device) if setup.device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
    }


def _unlogged(record: logging.LogRecord) -> None:
    """A log that cannot be written stops the run as any file does, where Python would print a traceback for each line."""
    error = sys.exception()
    assert error is not None
    raise error


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Sends what Flower, attacks and fedsim log to the run's log; only errors reach the terminal."""
    handler = logging.FileHandler(path, delay=True)
    handler.handleError = _unlogged  # type: ignore[method-assign]
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger("flwr"), logging.getLogger("attacks"), logging.getLogger("fedsim")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        for console_handler in logger.handlers:
            console_handler.setLevel(logging.ERROR)
        logger.handlers = [*logger.handlers, handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        yield
    except Exception:
        with contextlib.suppress(OSError):  # of a full disk: what is raised says the same
            loggers[-1].exception("the run stopped")
        raise
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.level, logger.propagate = handlers, level, propagate
        handler.close()
