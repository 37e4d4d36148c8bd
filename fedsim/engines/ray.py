"""Flower's simulation runtime on Ray: clients run in worker processes, on this machine or on a Ray cluster."""

import importlib.util
import re
from dataclasses import dataclass
from typing import Any

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedsim.checks import number


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
            raise ValueError("engine=ray needs Ray, which is not installed: pip install 'fedsim[ray]', or take engine=inline")

        if self.address is not None and not re.fullmatch(r"[^\s:]+:\d+", str(self.address)):
            raise ValueError(f"engine.address must be HOST:PORT of a Ray cluster, got {self.address!r}")

    def run(self, server: ServerApp, client: ClientApp, clients: int, device: str) -> None:
        """Runs the apps to their end. ConnectionError where no cluster answers at `address`."""
        from flwr.simulation import run_simulation

        resources: Any = {"num_cpus": self.cpus, "num_gpus": self.gpus}
        where: Any = {} if self.address is None else {"init_args": {"address": self.address}}
        run_simulation(server, client, clients, backend_config={"client_resources": resources, **where})
