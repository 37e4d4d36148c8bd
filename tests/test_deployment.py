"""Deployment: real processes on loopback, TLS and keys. One federation of three SuperNodes is shared by all tests that look at one.

In its second round the third SuperNode is killed. Meanwhile strangers knock, and what the first SuperNode sent is sent again.
"""

import dataclasses
import json
import os
import pickle
import signal
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import tomllib
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Context, RecordDict
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import sign_message

from experiments import app, cli, deploy
from experiments.config import ConfigError
from fedsim.run import RunFolder

ROOT = Path(__file__).parent.parent
SETTINGS = ["data.train_size=31", "data.test_size=7", "device=cpu", "rounds=2", "evaluate.every=2", "federation.lr=0.3"]
SETTINGS += ["defense=topk_ef", "attack=none", "tap.every=null", "tap.rounds=[1,2]", "tap.clients=all"]

# Python runs this first in every process. In a SuperNode it is an attacker who sees into its TLS connection; and heartbeats are as
# frequent as Flower allows, since a SuperLink takes a node for lost after two of them.
EARLY = """
import os, pickle, sys
if any("flower-supernode" in word for word in sys.orig_argv):
    import httpx
    from flwr.supercore import heartbeat
    from flwr.supernode import fleet_http_connection
    fleet_http_connection.HEARTBEAT_DEFAULT_INTERVAL = heartbeat.HEARTBEAT_DEFAULT_INTERVAL = 10
    send = httpx.Client.send
    def recording(self, request, *rest, **more):
        if request.url.path.endswith("/push-messages"):
            with open(os.path.join(os.environ["RECORDS"], str(os.getpid())), "ab") as file:
                pickle.dump((str(request.url), dict(request.headers), request.content), file)
        return send(self, request, *rest, **more)
    httpx.Client.send = recording
"""


@dataclasses.dataclass
class Deployed:
    """What was seen of a deployment: the run's folder, what the command printed, logs by process, answers to what was sent again."""

    path: Path
    code: int = -1
    printed: str = ""
    logs: dict[str, str] = dataclasses.field(default_factory=dict)
    answers: dict[str, httpx.Response] = dataclasses.field(default_factory=dict)
    family: set[tuple[int, str]] = dataclasses.field(default_factory=set)
    folder: Path = Path()
    mode: int = 0
    errors: list[BaseException] = dataclasses.field(default_factory=list)


def wait_for(what: Any, seconds: float = 200.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.1)


def again(request: tuple[str, dict[str, str], bytes], up: deploy.Loopback, **headers: str) -> httpx.Response:
    """The SuperLink's answer to a request that a SuperNode sent before."""
    import ssl

    url, sent, content = request
    trusted = ssl.create_default_context(cafile=str(up.folder / "ca.crt"))
    return httpx.post(url, headers=sent | headers, content=content, verify=trusted)


def recorded(folder: Path, pid: int) -> list[tuple[str, dict[str, str], bytes]]:
    with (folder / str(pid)).open("rb") as file:
        requests = []
        while True:
            try:
                requests.append(pickle.load(file))
            except EOFError:
                return requests


def meddle(up: deploy.Loopback, seen: Deployed, records: Path) -> None:
    """Kills the third SuperNode when it has taken the second round's message; meanwhile knocks at the SuperLink's door."""
    third = up.nodes[2]
    wait_for(lambda: third.log.read_text().count("Receiving: train message") == 2)
    os.kill(third.process.pid, signal.SIGKILL)
    seen.folder, seen.mode = up.folder, up.folder.stat().st_mode & 0o777
    deploy.key_pair(up.folder / "stranger")
    place = {"partition-id": 2}
    ca = ["--root-certificates", str(up.folder / "ca.crt")]
    strangers = [
        up.node("wrong key", up.folder / "stranger", place),
        up.node("no key", up.folder / "stranger", place, *ca),
        up.node("no TLS", up.folder / "node-2", place, "--insecure", "--max-retries=1"),
        up.node("another authority", up.folder / "node-2", place, "--auth-supernode-private-key", str(up.folder / "node-2"), "--max-retries=1"),
    ]
    trained = recorded(records, up.nodes[0].process.pid)[1]  # the first was its answer to who it is
    seen.answers["at once"] = again(trained, up)
    key = load_ssh_private_key((up.folder / "node-0").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    past = (now() - timedelta(seconds=310)).isoformat()
    old = {TIMESTAMP_HEADER: past, FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(key, past.encode())).decode()}
    seen.answers["after five minutes"] = again(trained, up, **old)
    other = recorded(records, up.nodes[1].process.pid)[1]
    seen.answers["in another's name"] = again((trained[0], other[1], trained[2]), up)
    seen.answers["with another time"] = again(trained, up, **{TIMESTAMP_HEADER: now().isoformat()})
    for stranger in strangers:
        wait_for(lambda stranger=stranger: stranger.process.poll() is not None)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory) -> Iterator[Deployed]:
    out, records, early = (tmp_path_factory.mktemp(name) for name in ("runs", "records", "early"))
    (early / "sitecustomize.py").write_text(EARLY)
    seen = Deployed(out / "deployed")
    run = deploy.Loopback.run

    def disturbed(up: deploy.Loopback, told: Mapping[str, object]) -> Iterator[str]:
        def disturb() -> None:
            try:
                meddle(up, seen, records)
            except BaseException as error:
                seen.errors.append(error)

        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            for line in run(up, told):
                seen.printed += line + "\n"
                yield line
            thread.join()
            trained = recorded(records, up.nodes[0].process.pid)[1]
            seen.answers["when the run is over"] = again(trained, up)
        finally:
            seen.family = deploy.descendants({one.process.pid for one in up._all})
            seen.logs = {one.name: deploy.plain(one.log.read_text()) for one in up._all}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deploy.Loopback, "run", disturbed)
        patch.setenv("RECORDS", str(records))
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(early), os.environ.get("PYTHONPATH")])))
        words = ["deploy", "--nodes", "3", *SETTINGS, f"out={out}", "name=deployed"]
        seen.code = cli.main(words)
    assert not seen.errors, "\n".join([repr(seen.errors), *(f"--- {name}\n{log[-3000:]}" for name, log in seen.logs.items())])
    yield seen


def test_explore(deployed):
    print(deployed.printed)
    for name, log in deployed.logs.items():
        print("=====", name)
        print(log[-2500:])
    for name, answer in deployed.answers.items():
        print(name, answer.status_code, answer.content)
    print(deployed.family, deployed.folder, oct(deployed.mode), deployed.code)
    print(RunFolder(deployed.path).rounds().to_string())
    print((deployed.path / "log.txt").read_text())
    print(sorted(str(p) for p in deployed.path.rglob("*")))
