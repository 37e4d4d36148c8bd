"""The `fedsim` command. Nothing heavy is imported before it is needed: `fedsim --help` must not wait for torch."""

import argparse
import contextlib
import itertools
import math
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.errors import FederationError

if TYPE_CHECKING:
    from experiments.config import Config
    from fedsim.run import RunFolder

EXAMPLES = """\
examples:
  fedsim run data=cifar10 federation=fedsgd defense=topk defense.ratio=0.1 attack=dlg rounds=20 tap.every=5
  fedsim run -m defense=none,uniform,topk,gaussian seed=0,1,2     all of them, compared in figures
  fedsim run --resume runs/NAME                                   go on where it stopped
  fedsim deploy --nodes 4 defense=topk rounds=3                   the same on Flower's SuperLink and SuperNodes, a process each
  fedsim attack runs/NAME attack=idlg                             attack again what was captured
  fedsim plot runs/NAME runs/OTHER -o figures
  fedsim table runs/NAME --format latex                           the summary table, for a paper
  fedsim report runs/NAME -o report.html                          one page with everything there is to see
  fedsim leaderboard runs/STUDY -o LEADERBOARD.md                 defenses ranked by their strongest attacker, at equal accuracy
  fedsim invert --image me.jpg attack=dlg                         your own picture, taken back from its gradient
  fedsim study defenses-vs-dlg --workers 2                        a published question, as a grid of runs
  fedsim verify dlg-noise                                         what was published of it, and what that study measured
  fedsim list defenses
"""

DEPLOY = """\
Starts a SuperLink and N SuperNodes on loopback, under TLS and with a key for each SuperNode; runs, and takes them down. Each
SuperNode is a client with its own shard: federation.clients is N unless said otherwise. For several machines see
docs/running-at-scale.md.

examples:
  fedsim deploy --nodes 4 defense=topk rounds=3
  fedsim deploy --nodes 3 aggregation=secure rounds=2 engine.timeout=60
  fedsim deploy --resume runs/NAME
"""

INVERT = """\
A client computes one update from one picture, a defense does what it does to it, and the attack takes the picture back; no
federation is run. The folder then holds the original, what was stolen, how it came about (panels, layers, animation), the gradients
as tensors, and metrics.json with the configuration and versions.

examples:
  fedsim invert --image me.jpg                                    DLG on a LeNet, the picture cropped and shrunk to 32x32
  fedsim invert --image me.jpg defense=topk defense.ratio=0.1 -o out
  fedsim invert --image me.jpg defense=uniform attacker=adaptive  by somebody who knows the defense
  fedsim invert --index 25 data=cifar10 model=lenet_silu attack=cosine_lbfgs seed=3
  fedsim invert --image me.jpg --label 7 data=mnist --mp4         in grey, 28x28, as a seven
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 1 for a run that failed, 2 for bad input, 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    many = next((name for name in ("overrides", "studies") if hasattr(arguments, name)), None)
    if rest and (many is None or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest and many:  # argparse stops at an option; settings may stand on both sides of it
        setattr(arguments, many, [*getattr(arguments, many), *rest])
    arguments.command_line = shlex.join(["fedsim", *argv])
    try:
        return arguments.do(arguments)
    except KeyboardInterrupt:
        ways = {_run: "`fedsim run --resume FOLDER`", _deploy: "`fedsim deploy --resume FOLDER`", _study: "the same command"}
        on = ways.get(arguments.do)
        print("\nstopped" + (f"; the folder is readable as it is, and {on} goes on" if on else ""), file=sys.stderr)
        return 130
    except (ValueError, FileNotFoundError) as error:  # what the user can mend; anything else is a defect and shows its traceback
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of `fedsim list | head` has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (FederationError, OSError) as error:
        again = {_run: "run", _deploy: "deploy"}.get(arguments.do)
        hint = f"; what was finished is kept, and `fedsim {again} --resume FOLDER` goes on from there" if again else ""
        print(f"stopped: {' '.join(str(error).split())}{hint}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "fedsim",
        description="A privacy laboratory for federated learning: run a federation under an eavesdropper's eyes, "
        "see what it steals, and what each defense really buys.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = _command(commands, "run", _run, "run a federation, attack it, draw what leaked")
    run.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings, such as defense=topk rounds=50; see `fedsim list`"
    )
    run.add_argument("-m", "--multirun", action="store_true", help="KEY=A,B runs each value, every combination, and compares")
    run.add_argument("--resume", type=Path, metavar="RUN", help="go on with an interrupted run, or the rest of a multirun")
    run.add_argument("--show-config", action="store_true", help="print the resolved configuration and stop")

    deploy = _command(commands, "deploy", _deploy, "run a federation on a Flower SuperLink and SuperNodes, on this machine")
    deploy.formatter_class, deploy.epilog = argparse.RawDescriptionHelpFormatter, DEPLOY
    deploy.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as for `fedsim run`")
    deploy.add_argument("--nodes", type=int, metavar="N", help="SuperNodes, a process each (default: 4)")
    deploy.add_argument("--resume", type=Path, metavar="RUN", help="go on with an interrupted run of a deployment")

    attack = _command(commands, "attack", _attack, "attack again what a run captured")
    attack.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or a folder of runs")
    attack.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="attack=NAME (default: the run's own) and its settings, such as attack.restarts=3; attacker=NAME",
    )

    plot = _command(commands, "plot", _plot, "draw the figures of one run, or compare several")
    plot.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    plot.add_argument("-o", "--out", type=Path, help="folder of the figures (default: RUN/figures)")
    plot.add_argument("--format", default="png,svg", metavar="FORMAT", help="png, svg, pdf or several (default: png,svg)")

    table = _command(commands, "table", _table, "write the summary table of runs as Markdown, LaTeX or CSV")
    table.add_argument("runs", type=Path, nargs="+", metavar="RUN_OR_STUDY", help="folders of runs")
    table.add_argument(
        "--format", default="markdown", metavar="FORMAT", help="markdown, latex, or csv with numbers alone (default: markdown)"
    )

    report = _command(commands, "report", _report, "write one HTML file with everything there is to see of runs")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN_OR_STUDY", help="folders of runs")
    report.add_argument("-o", "--out", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html")
    report.add_argument("--blur", action="store_true", help="put no original into the file, only what is left of it in 4x4 pixels")

    board = _command(commands, "leaderboard", _leaderboard, "rank defenses by their strongest attacker, at equal accuracy")
    board.add_argument("runs", type=Path, nargs="+", metavar="RUN_OR_STUDY", help="folders of runs")
    board.add_argument("-o", "--out", type=Path, default=Path("LEADERBOARD.md"), metavar="FILE", help="default: LEADERBOARD.md")

    invert = _command(commands, "invert", _invert, "steal one picture, your own if you like, and draw how")
    invert.formatter_class, invert.epilog = argparse.RawDescriptionHelpFormatter, INVERT
    victim = invert.add_mutually_exclusive_group(required=True)
    victim.add_argument("--image", type=Path, metavar="FILE", help="a picture; its centre is resized to what the model takes")
    victim.add_argument("--index", type=int, metavar="N", help="the training image N = 0, 1, … of data=NAME")
    invert.add_argument(
        "--label", type=int, metavar="K", help="class of the image (default: 0 for a picture, its own for an index)"
    )
    invert.add_argument("-o", "--out", type=Path, metavar="FOLDER", help="a new folder (default: below runs/)")
    invert.add_argument("--mp4", action="store_true", help="the animation as MP4 too; needs pip install -e '.[video]'")
    invert.add_argument("--linear", action="store_true", help="draw the loss on a linear axis, not a logarithmic one")
    invert.add_argument(
        "--normalise", action="store_true", help="stretch each image of the theft to its darkest and brightest pixel"
    )
    invert.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, such as model=lenet attack=idlg seed=3")

    study = _command(commands, "study", _study, "run a grid that answers a published question; started again, it goes on")
    study.add_argument("name", nargs="?", metavar="STUDY", help="its name; all of them are listed if not given")
    study.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of all cells, such as data=synthetic seed=0,1")
    study.add_argument("--full", action="store_true", help="the full size, of hours rather than minutes")
    study.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N-1 (default: those of the study's size)")
    study.add_argument("--dry-run", action="store_true", help="name the cells, say about how long they take, and stop")
    study.add_argument("--workers", type=int, default=1, metavar="N", help="cells at a time, a process each (default: 1)")
    study.add_argument("--max-cells", type=int, metavar="N", help="run so many cells at most, and stop")
    study.add_argument(
        "--budget",
        type=_seconds,
        metavar="TIME",
        help="begin no further cells after 90s, 30m or 8h",
    )
    study.add_argument("--discard", action="store_true", help="keep the results of finished cells, not what was captured")
    study.add_argument("-o", "--out", type=Path, metavar="FOLDER", help="where its runs go (default: runs/study-NAME-SIZE)")

    verify = _command(commands, "verify", _verify, "hold what studies measured against what was published")
    verify.add_argument("studies", nargs="*", metavar="STUDY[=FOLDER]", help="all of them, and what tests answer, if not given")
    verify.add_argument("--full", action="store_true", help="of studies of the full size")
    verify.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="where the studies are (default: runs)")
    verify.add_argument("--format", default="text", metavar="FORMAT", help="text, markdown, latex or csv (default: text)")

    listing = _command(commands, "list", _list, "explain the choices of a kind")
    listing.add_argument("kind", nargs="?", help="defenses, attacks, models, datasets, … ; all of them if not given")

    _command(commands, "doctor", _doctor, "check the installation, and say what cures what is wrong")
    return parser


def _seconds(text: str) -> float:
    """A time such as 90s, 30m or 8h."""
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    try:
        seconds = float(text[:-1]) * (unit or 0)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"a time is a number above 0 and s, m or h, such as 30m, not {text!r}")
    return seconds


def _command(commands: Any, name: str, do: Any, what: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    parser.set_defaults(do=do)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from experiments.config import compose, sweep
    from experiments.naming import cell_names

    if arguments.resume:
        if arguments.overrides or arguments.multirun:
            raise ValueError(
                f"--resume takes its settings from {arguments.resume}; leave out {' '.join(arguments.overrides) or '-m'}"
            )
        return _resume(arguments.resume)
    cells = sweep(arguments.overrides) if arguments.multirun else [arguments.overrides]
    configs = [compose(cell) for cell in cells]
    if arguments.show_config:
        from omegaconf import OmegaConf

        print("---\n".join(OmegaConf.to_yaml(OmegaConf.create(config)) for config in configs), end="")
        return 0
    _quiet()
    from experiments import runner
    from fedsim.files import write_json
    from fedsim.run import RunError

    for config in configs:
        runner.check_config(config)
    with _place(configs[0], "compare" if arguments.multirun else _defense_and_attack(configs[0])) as base:
        if arguments.multirun:
            if configs[0]["name"] and base.exists():
                raise RunError(f"{base} exists already: choose another name=, or resume it with --resume {base}")
            names = cell_names(configs)
            plan = {"command": arguments.command_line, "cells": dict(zip(names, configs, strict=True))}
            write_json(base / "multirun.json", plan)
        else:
            folder = runner.start(configs[0], base, arguments.command_line)
    return _multirun(base) if arguments.multirun else _finish([folder], base / "figures")


def _resume(path: Path) -> int:
    _quiet()
    from experiments import runner
    from fedsim.run import RunFolder

    if (path / "multirun.json").is_file():
        return _multirun(path)
    folder = RunFolder.open(path)
    if runner.finished(folder):
        print(f"{path} is finished: all {folder.config['rounds']} rounds are there")
    else:
        runner.check_config(folder.config)
        runner.resume(folder)
    return _finish([folder], path / "figures")


def _deploy(arguments: argparse.Namespace) -> int:
    _quiet()
    from experiments import runner
    from experiments.deploy import check_nodes, configured, deploy
    from fedsim.run import RunFolder

    if path := arguments.resume:
        if arguments.overrides:
            raise ValueError(f"--resume takes its settings from {path}; leave out {' '.join(arguments.overrides)}")
        folder = RunFolder.open(path)
        config = folder.config
        if (engine := config["choices"]["engine"]) != "deployment":
            raise ValueError(f"{path} ran with engine={engine}: resume it with `fedsim run --resume {path}`")
        nodes = config["federation"]["clients"] if arguments.nodes is None else arguments.nodes
        check_nodes(config, nodes)
        if runner.finished(folder):
            print(f"{path} is finished: all {config['rounds']} rounds are there")
            return _finish([folder], path / "figures")
        runner.check_config(config)
    else:
        nodes = 4 if arguments.nodes is None else arguments.nodes
        config = configured(arguments.overrides, nodes)
        runner.check_config(config)
    with contextlib.nullcontext(path) if path else _place(config, _defense_and_attack(config)) as place:
        deploy(config, place, nodes, resume=path is not None)
    return _finish([RunFolder.open(place)], place / "figures")


def _multirun(base: Path) -> int:
    from experiments import runner
    from experiments.progress import console
    from fedsim.errors import FederationError
    from fedsim.files import is_name, read_json
    from fedsim.run import RunError, RunFolder, check_no_links
    from fedsim.setup import check_targets

    check_no_links(base)
    plan = read_json(base / "multirun.json")
    check_targets(plan["cells"])
    if odd := [name for name in plan["cells"] if not is_name(name)]:
        raise RunError(f"{base / 'multirun.json'}: {odd[0]!r} is not the name of a folder in {base}")
    folders, failures = [], {}
    for number, (name, config) in enumerate(plan["cells"].items(), 1):
        console.rule(f"{number}/{len(plan['cells'])}  {name}", align="left")
        path = base / name
        try:
            if not (path / "config.json").exists():
                folder = runner.start(config, path, plan["command"])
            else:
                folder = RunFolder.open(path)
                if not runner.finished(folder):
                    runner.resume(folder)
            folders.append(folder)
        except (ValueError, FederationError) as error:  # that run's own, and none of the others'
            failures[name] = " ".join(str(error).split())
    if folders:
        _finish(folders, base / "figures")
    for name, why in failures.items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    return 1 if failures else 0


def _finish(folders: "list[RunFolder]", figures: Path, formats: Sequence[str] = ("png", "svg")) -> int:
    from experiments.plots import draw
    from experiments.progress import console
    from experiments.summary import summarised
    from experiments.table import drawn

    console.print(drawn(summarised(folders)))
    for path in draw(folders, figures, formats):
        console.print(f"  {path}", markup=False)
    return 0


def _attack(arguments: argparse.Namespace) -> int:
    from experiments.config import compose, key_of, usual
    from fedsim.checks import one_of

    overrides = arguments.overrides
    for override in overrides:
        if override.split("=", 1)[0].split(".", 1)[0] not in ("attack", "attacker"):
            raise ValueError(
                f"{override!r} is not a setting of an attack; the rest is as the run was made: "
                "attack=NAME attack.KEY=VALUE attacker=WHO"
            )
    another = any(key_of(override) == "attack" for override in overrides)
    known = compose([override for override in overrides if another or key_of(override) == "attacker"])
    if not known["attack"]:
        raise ValueError("attack=none attacks nothing; see `fedsim list attacks`")
    _quiet()
    from experiments import runner
    from experiments.naming import named
    from experiments.replay import attack_overrides
    from fedsim.run import iterate

    one_of("attacker", known["attacker"], runner.ATTACKERS)
    if another:
        runner.attack_of(known)
    folders, asked = iterate([arguments.run]), []
    for folder in folders:  # what cannot be is refused before the first is attacked
        if len(folders) > 1 and (lacking := runner.nothing_to_attack(folder)):
            print(f"left out: {lacking}", file=sys.stderr)
            continue
        said = overrides if another else [*attack_overrides(folder.config), *overrides]
        config = compose(said)
        asked.append((folder, said, config, runner.attack_of(config)))
    if not asked:
        raise ValueError(f"{arguments.run}: no run in it has captured anything to attack")
    for folder, said, config, attack in asked:
        name = config["choices"]["attack"]
        own = folder.config["attack"] if folder.config["choices"]["attack"] == name else usual("attack", name)
        runner.attack_again(folder, attack, named(name, config["attack"], own), config["attacker"], (config["attack"], said))
    return _finish(folders, arguments.run / "figures")


def _plot(arguments: argparse.Namespace) -> int:
    from experiments.canvas import FORMATS
    from experiments.study import distinct
    from fedsim.checks import one_of
    from fedsim.run import iterate

    formats = [one_of("--format", form, FORMATS) for form in arguments.format.split(",")]
    figures = arguments.runs[0] / "figures" if arguments.out is None else arguments.out
    return _finish(distinct(iterate(arguments.runs)), figures, formats)


def _table(arguments: argparse.Namespace) -> int:
    from experiments.study import distinct
    from experiments.summary import numbers, summarised
    from experiments.table import FORMATS, written
    from fedsim.checks import one_of
    from fedsim.run import iterate

    one_of("--format", arguments.format, FORMATS)
    runs = distinct(iterate(arguments.runs))
    told = numbers(runs).to_csv(index=False) if arguments.format == "csv" else written(summarised(runs), arguments.format)
    print(told, end="")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    _quiet()
    from experiments.progress import size
    from experiments.report import write
    from fedsim.run import iterate

    print(f"  {arguments.out}  {size(write(iterate(arguments.runs), arguments.out, arguments.command_line, blur=arguments.blur))}")
    return 0


def _leaderboard(arguments: argparse.Namespace) -> int:
    _quiet()
    from experiments.leaderboard import write
    from fedsim.run import iterate

    count = write(iterate(arguments.runs), arguments.out, arguments.command_line)
    print(f"  {arguments.out}  {count} {'defense' if count == 1 else 'defenses'}")
    return 0


def _study(arguments: argparse.Namespace) -> int:
    from experiments import study
    from fedsim.checks import whole

    if arguments.name is None:
        if given := [word for word in arguments.command_line.split()[2:] if word.startswith("-")]:
            raise ValueError(f"{given[0]} is of which study? choices: {', '.join(study.names())}")
        for name in study.names():
            one = study.load(name)
            rows = f" [{', '.join(one.answers)}]" if one.answers else ""
            print(f"{name:18s} {one.about}{rows}")
        return 0
    whole("--workers", arguments.workers)
    if arguments.max_cells is not None:
        whole("--max-cells", arguments.max_cells)
    chosen, size = study.load(arguments.name), "full" if arguments.full else "quick"
    overrides = list(arguments.overrides)
    keys = [word.partition("=")[0].lstrip("+") for word in overrides]
    for key in ("out", "name"):
        if key in keys:
            raise ValueError(f"{key}= is of one run: a study takes -o FOLDER, and names its cells itself")
    if arguments.seeds is not None:
        whole("--seeds", arguments.seeds)
        if "seed" in keys:
            raise ValueError("seed= and --seeds both say which seeds: leave one out")
        overrides.append("seed=" + ",".join(map(str, range(arguments.seeds))))
    cells = chosen.cells(size, overrides)
    _quiet()
    from experiments import runner

    distinct = {}
    for config in cells.values():
        whole("seed", config["seed"], 0)
        distinct[study.digest(config | {"seed": 0})] = config  # what else may be wrong is so for any seed
    for config in distinct.values():
        runner.check_config(config, files=not arguments.dry_run)
    if arguments.dry_run:
        from experiments import progress
        from experiments.estimate import room, seconds

        print("\n".join(cells))
        other = "" if arguments.full else f"; --full: {len(chosen.grid('full', overrides))} cells"
        long, large = progress.span(seconds(cells.values())), progress.size(room(cells.values()))
        print(f"{len(cells)} cells, about {long} on one core, up to {large} on disk{other}")
        return 0
    from experiments.progress import console
    from fedsim.files import write_json
    from fedsim.run import RunFolder

    base = arguments.out or Path("runs") / f"study-{chosen.name}-{size}"
    study.check_own(chosen.name, base)
    base.mkdir(parents=True, exist_ok=True)
    write_json(base / study.ABOUT, {"study": chosen.name, "size": size, "overrides": overrides, "command": arguments.command_line})
    console.print(f"{chosen.about}\n{len(cells)} cells in {base}", markup=False)
    limits = arguments.max_cells, arguments.budget, arguments.discard
    paths, failures = study.run(cells, base, arguments.command_line, arguments.workers, *limits)
    if paths:
        _finish([RunFolder.open(path) for path in paths], base / "figures")
    for name, why in failures.items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    if left := len(cells) - len(paths) - len(failures):
        console.print(f"{left} cells are left: the same command goes on")
    return 1 if failures else 0


def _verify(arguments: argparse.Namespace) -> int:
    from experiments import claims, study
    from experiments.progress import console
    from experiments.table import FORMATS, drawn, written
    from fedsim.checks import one_of
    from fedsim.run import iterate

    one_of("--format", arguments.format, ("text", *FORMATS))
    said = claims.load()
    answered = list(dict.fromkeys(claim.study for claim in said))
    asked = dict(one.partition("=")[::2] for one in arguments.studies) or dict.fromkeys(answered, "")
    for name in asked:
        if name in study.names() and name not in answered:
            raise ValueError(f"{name} answers no claim: fedsim table, report or leaderboard shows what it found")
        one_of("study", name, answered)
    _quiet()
    folders, wanted, lacking = {}, {}, []
    for name, where in asked.items():
        base = Path(where) if where else arguments.runs / f"study-{name}-{'full' if arguments.full else 'quick'}"
        if where or (name != claims.UNIT and next(base.glob("*/config.json"), None)):
            study.check_own(name, base)
            folders[name], wanted[name], told = claims.measured(base, iterate([base]))
            lacking += told
    verdicts = claims.verify([claim for claim in said if claim.study in asked], folders, wanted)
    table = claims.summary(verdicts, lacking, full=arguments.full)
    if arguments.format == "text":
        console.print(drawn(table))
    else:
        print(written(table, arguments.format), end="")
    return 0


def _invert(arguments: argparse.Namespace) -> int:
    from experiments.config import compose

    config = compose(arguments.overrides)
    _quiet()
    from experiments import invert
    from experiments.progress import console

    place = _place({**config, "name": None}, f"invert-{config['choices']['attack']}")
    with contextlib.nullcontext(arguments.out) if arguments.out else place as folder:
        theft, files = invert.invert(
            config,
            folder,
            arguments.command_line,
            path=arguments.image,
            index=arguments.index,
            label=arguments.label,
            log=not arguments.linear,
            normalise=arguments.normalise,
            mp4=arguments.mp4,
        )
    console.print(invert.summary(theft), markup=False)
    if theft.made.trace is None:
        console.print(f"  {config['choices']['attack']} recorded no trace: no panels, no layers and no animation are drawn")
    for path in files:
        console.print(f"  {path}", markup=False)
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from experiments.config import GROUPS, choices
    from fedsim.checks import one_of

    kinds = {
        "datasets": "data",
        "partitions": "partition",
        "models": "model",
        "initializations": "model/init",
        "bottlenecks": "model/bottleneck",
    }
    kinds |= {
        "protocols": "federation",
        "strategies": "strategy",
        "servers": "server",
        "defenses": "defense",
        "inspections": "inspect",
        "aggregations": "aggregation",
        "attacks": "attack",
        "engines": "engine",
        "trackers": "tracker",
        "settings": "setting",
    }
    assert set(kinds.values()) == set(GROUPS)
    if arguments.kind is not None:
        one_of("kind", arguments.kind, kinds)
    for kind in [arguments.kind] if arguments.kind else kinds:
        print(f"{kind}  ({kinds[kind]}=NAME)")
        for name, what in choices(kinds[kind]).items():
            print(f"  {name:20s} {what}")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from experiments.doctor import examine

    return examine()


def _quiet() -> None:
    from fedsim.quiet import quiet

    quiet()


def _defense_and_attack(config: "Config") -> str:
    return f"{config['choices']['defense']}-{config['choices']['attack']}"


@contextlib.contextmanager
def _place(config: "Config", what: str) -> Iterator[Path]:
    """The folder of a run, of several, or of a theft, by its name or by the time and `what` it is. One that has no name is made
    here, so that of two that begin at once each has its own; where a run is refused inside, no empty folder is left."""
    import time

    from fedsim.run import RunError

    out = Path(config["out"])
    if config["name"]:
        yield out / config["name"]
        return
    first = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{what}"
    names = itertools.chain([first], (f"{first}_again{i}" for i in itertools.count(2)))
    missing = [path for path in (out, *out.parents) if not path.exists()]
    for name in names:
        base = out / name
        try:
            base.mkdir(parents=True)
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise RunError(f"cannot write to {out}: {error.strerror}; choose another folder with out=") from None
    try:
        yield base
    except BaseException:
        with contextlib.suppress(OSError):  # something is in it
            for path in (base, *missing):
                path.rmdir()
        raise


if __name__ == "__main__":
    sys.exit(main())
