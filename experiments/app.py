"""fedsim as a Flower app: what a SuperLink and its SuperNodes run of it.

The bundle that `flwr run` sends holds no code (`fab-include` in pyproject.toml): every machine runs the fedsim it has installed.
Server and clients make the same configuration of the run configuration, whose keys are:

    overrides  settings as for `fedsim run`, in one string
    config     a whole configuration as JSON, in place of overrides
    resume     go on with the run in the folder that the configuration names

and a SuperNode's own, in its node configuration:

    partition-id  which client it is, from 0
    data-root     where its data is, in place of $FEDSIM_DATA; a server's data.root is never read here
    memory        where it keeps what must outlive a round, below a folder named after the run; ~/.fedsim unless said otherwise
"""

import dataclasses
import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from experiments.config import Config, ConfigError, build_checked, compose
from experiments.replay import replay
from fedsim.client import client_app, client_of
from fedsim.engines.deployment import Deployment
from fedsim.files import is_name, write_bytes
from fedsim.secure_rounds import STEPS
from fedsim.setup import check_targets

RUN_CONFIG: dict[str, bool | str] = {"overrides": "", "config": "", "resume": False}
ENGINE = "engine=deployment"


def config_of(context: Context) -> Config:
    """The configuration of a run: the same on every machine. A run without a name is called after Flower's number of it."""
    told: Any = context.run_config
    config = json.loads(told["config"]) if told["config"] else compose([ENGINE, *shlex.split(told["overrides"])])
    if config["name"] is None:
        config["name"] = f"run-{context.run_id}"
    return config


# The server.

server = ServerApp()


@server.main()
def _serve(grid: Grid, context: Context) -> None:
    from experiments import runner
    from fedsim.quiet import quiet
    from fedsim.run import RunError, RunFolder

    quiet()
    told, config = context.run_config, config_of(context)
    engine = build_checked("engine", config["engine"])
    if not isinstance(engine, Deployment):
        raise ConfigError(f"engine={config['choices']['engine']} is no engine of SuperNodes: leave it out")
    engine = dataclasses.replace(engine, grid=grid, context=context)
    runner.check_config(config)
    path = Path(config["out"]) / config["name"]
    if not told["resume"]:
        typed = shlex.join(["flwr", "run", ".", "--run-config", f"overrides={json.dumps(told['overrides'])}"])
        # What `fedsim deploy` sends is a configuration in full, which nobody typed.
        runner.start(config, path, (replay(config) or "fedsim deploy") if told["config"] else typed, engine)
        return
    folder = RunFolder.open(path)
    if folder.config | {key: config[key] for key in ("out", "name")} != config:  # the folder may have been moved
        raise RunError(f"{path} was run with other settings: resume it with those in its config.json")
    runner.resume(folder, engine)


# The client.


def client_config(context: Context) -> Config:
    """The configuration with the SuperNode's own data in it. Raises ConfigError where a server expects data and none is named, and
    ValueError where it would have something built that is not the project's own."""
    config, name = config_of(context), "data-root"
    check_targets(config)
    own = context.node_config.get(name) or (os.environ.get("FEDSIM_DATA") if config["data"]["name"] != "text" else None)
    if config["data"].get("root") is not None and not own:
        raise ConfigError(f"the server reads data.root, and this SuperNode has no data: start it with --node-config '{name}=\"…\"'")
    return config | {"data": config["data"] | {"root": own}}


def is_folder(name: str) -> bool:
    """Whether a run may be called so wherever a SuperNode runs: it names a folder, and no place elsewhere."""
    return is_name(name) and not any(sign in name for sign in "\\\0:")


def memory_of(context: Context, run: str) -> Path:
    """The folder of this SuperNode's memories of a run. Raises ConfigError for a name that is no name of a folder.

    The server chooses the name, and must not choose where a SuperNode writes.
    """
    if not is_folder(run):
        raise ConfigError(f"the server calls the run {run!r}, which is no name of a folder: change name=")
    base = context.node_config.get("memory") or Path.home() / ".fedsim"
    return Path(str(base)).expanduser() / run / "clients"


def begin(folder: Path, context: Context) -> None:
    """Makes the folder of a client's memories, without those of an earlier run of this name; a run that goes on keeps its own."""
    mark, number = folder / "run", str(context.run_id)
    if mark.is_file() and mark.read_text() == number:
        return
    if not context.run_config["resume"] and folder.exists():
        shutil.rmtree(folder)
    write_bytes(mark, number.encode())


client = ClientApp()


def _answer(message: Message, context: Context) -> Message:
    from fedsim.quiet import quiet

    quiet()
    config = client_config(context)
    memory = memory_of(context, config["name"])
    begin(memory / f"client_{client_of(context):05d}", context)
    return client_app(config, str(memory))(message, context)


client.train()(_answer)
client.evaluate()(_answer)
for step in ("default", *STEPS):
    client.query(step)(_answer)
