"""Flower's simulation runtime on Ray: clients run in worker processes, on this machine or on a Ray cluster."""

import importlib.util
import os
import re
import socket
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedsim.checks import number
from fedsim.errors import FederationError
from fedsim.records import RESTARTED

_told = False  # in a worker: whether the server knows that it is not the first of its place


def _restarted() -> bool:
    """Whether this worker took the place of one that was killed; true once."""
    import ray

    global _told
    before, _told = _told, True
    return not before and ray.get_runtime_context().was_current_actor_reconstructed


@dataclass(frozen=True)
class _Telling:
    """A client app that adds to its first reply after a restart that there was one."""

    app: ClientApp

    def __call__(self, message: Message, context: Context) -> Message:
        reply = self.app(message, context)
        if _restarted() and reply.has_content():
            reply.content[RESTARTED] = ConfigRecord({"restarted": True})
        return reply


@dataclass(frozen=True)
class Ray:
    """Flower's Ray backend; `cpus` and `gpus` are what one client takes of the machine, so gpus=0.25 puts four on a GPU.

    address  HOST:PORT of a Ray cluster that runs already; None starts one on this machine for the time of the run
    """

    cpus: float = 1
    gpus: float = 0.0
    address: str | None = None

    def __post_init__(self) -> None:
        number("engine.cpus", self.cpus, 0, above=True)
        number("engine.gpus", self.gpus, 0)
        if importlib.util.find_spec("ray") is None:
            way_out = "pip install -e '.[ray]' in fedsim's clone, or take engine=inline"
            raise ValueError(f"engine=ray needs Ray, which is not installed: {way_out}")

        if self.address is None:
            for what, wanted, there in (("cpus", self.cpus, os.cpu_count() or 1), ("gpus", self.gpus, torch.cuda.device_count())):
                if wanted > there:
                    raise ValueError(f"engine.{what}={wanted:g} is what one client takes, and this machine has {there}: take fewer")
        if self.address is not None and not re.fullmatch(r"[^\s:]+:\d+", str(self.address)):
            raise ValueError(f"engine.address must be HOST:PORT of a Ray cluster, got {self.address!r}")

    def run(self, server: ServerApp, client: ClientApp, clients: int, device: str) -> None:
        """Runs the apps to their end. Raises FederationError where nobody answers at `address`."""
        if self.address is not None:  # Ray itself would go on trying for minutes
            host, port = self.address.split(":")
            try:
                socket.create_connection((host, int(port)), timeout=5).close()
            except OSError as error:
                began = f"ray start --head --port={port}"
                raise FederationError(
                    f"no Ray cluster at engine.address={self.address} ({error}): start one with `{began}`"
                ) from None
        from flwr.simulation import run_simulation

        # A worker that is killed is started again, and does again what it was at: Flower would hand work to the dead one on and on.
        resources: Any = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_restarts": -1, "max_task_retries": 1}
        telling: Any = _Telling(client)
        # Not told where, Ray would join any cluster that was started here, or wait for one that is gone.
        where: Any = {"address": self.address or "local"}
        run_simulation(server, telling, clients, backend_config={"client_resources": resources, "init_args": where})
