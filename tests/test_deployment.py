"""Deployment: real processes on loopback, TLS and keys. One federation of three SuperNodes is shared by all tests that look at one.

It is killed as a whole in its second round, and resumed. In its third round the third SuperNode is killed. Meanwhile strangers
knock, and what the first SuperNode sent is sent again. A second one, with secure aggregation, is killed where slow tests are run.
"""

import contextlib
import copy
import dataclasses
import io
import json
import logging
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import types
import zipfile
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import httpx
import pandas as pd
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Context, Error, Message, RecordDict
from flwr.app.message import make_message
from flwr.cli.build import build_fab_from_disk
from flwr.common.constant import TIMESTAMP_HEADER, ErrorCode
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import sign_message
from flwr.supercore.task_identity import TaskIdentity
from safetensors import safe_open
from test_run import tensors
from worlds import FEDSGD, assert_same, config, federate

from experiments import app, cli, deploy, guard, runner
from experiments.config import ConfigError, compose
from fedsim.client import client_app
from fedsim.data import IID, load
from fedsim.engines.deployment import Deployment
from fedsim.engines.inline import InlineGrid
from fedsim.files import read_json
from fedsim.run import RunError, RunFolder

ROOT = Path(__file__).parent.parent
SETTINGS = ["data.train_size=31", "data.test_size=7", "device=cpu", "rounds=2", "evaluate.every=2", "federation.lr=0.3"]
SETTINGS += ["defense=topk_ef", "attack=none", "tap.every=null", "tap.rounds=[1,2]", "tap.clients=all"]
THREE_ROUNDS = [*SETTINGS, "strategy=fedadam", "rounds=3", "tap.rounds=[1,2,3]"]

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
    """What was seen of a deployment.

    As it was killed: its processes, the temporary files it left, the rounds it had finished. As it was resumed: its exit code, what
    it printed, logs by process, answers to what was sent again, its processes, and its temporary folder with its mode.
    """

    path: Path
    killed: set[tuple[int, str]] = dataclasses.field(default_factory=set)
    left: list[Path] = dataclasses.field(default_factory=list)
    finished: list[int] = dataclasses.field(default_factory=list)
    code: int = -1
    printed: str = ""
    logs: dict[str, str] = dataclasses.field(default_factory=dict)
    answers: dict[str, httpx.Response] = dataclasses.field(default_factory=dict)
    family: set[tuple[int, str]] = dataclasses.field(default_factory=set)
    folder: Path = Path()
    mode: int = 0
    errors: list[BaseException] = dataclasses.field(default_factory=list)


def wait_for(what: Any, seconds: float = 600.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.1)


def again(request: tuple[str, dict[str, str], bytes], up: deploy.Loopback, **headers: str) -> httpx.Response:
    """The SuperLink's answer to a request that a SuperNode sent before."""
    url, sent, content = request
    trusted = ssl.create_default_context(cafile=str(up.folder / "ca.crt"))
    kept = {name: value for name, value in sent.items() if name not in ("content-length", "host")}
    return httpx.post(url, headers=kept | headers, content=content, verify=trusted)


def recorded(folder: Path, pid: int) -> list[tuple[str, dict[str, str], bytes]]:
    with (folder / str(pid)).open("rb") as file:
        requests = []
        while True:
            try:
                requests.append(pickle.load(file))
            except EOFError:
                return requests


def node_id(node: deploy.Started) -> int:
    return int(re.findall(r"SuperNode ID: (\d+)", node.log.read_text())[0])


def kill(settings: Sequence[str], nodes: int, path: Path, files: Path) -> Deployed:
    """Starts a deployment, kills it as a client has trained in the second round: by then its memory is ahead of the checkpoint."""
    command = [sys.executable, "-m", "experiments.cli", "deploy", "--nodes", str(nodes)]
    command += [*settings, f"out={path.parent}", f"name={path.name}"]
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"TMPDIR": str(files)})
    try:
        wait_for(lambda: driver.poll() is not None or list(path.glob("clients/*/round_000002.*")), 1000)
        everybody = guard.family({driver.pid})
    finally:
        driver.kill()
    assert driver.wait() == -signal.SIGKILL, "it had ended before"
    wait_for(lambda: not everybody & guard.processes())
    return Deployed(path, everybody, list(files.glob("fedsim-deploy-*")), list(RunFolder(path).rounds()["round"]))


def meddle(up: deploy.Loopback, seen: Deployed, records: Path) -> None:
    """Kills the third SuperNode when it has taken its second message to train; meanwhile knocks at the SuperLink's door."""
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
        up.node(
            "a key without TLS",
            up.folder / "node-2",
            place,
            "--insecure",
            "--auth-supernode-private-key",
            str(up.folder / "node-2"),
        ),
        up.node("no TLS", up.folder / "node-2", place, "--insecure", "--max-retries=1"),
        up.node(
            "another authority",
            up.folder / "node-2",
            place,
            "--auth-supernode-private-key",
            str(up.folder / "node-2"),
            "--max-retries=1",
        ),
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
    heartbeat = SendNodeHeartbeatRequest(node=Node(node_id=node_id(up.nodes[0])), heartbeat_interval=30).SerializeToString()
    url = f"https://{up.address}/v1"
    seen.answers["other words, the same signature"] = again((f"{url}/fleet/send-node-heartbeat", trained[1], heartbeat), up)
    protobuf = {name: trained[1][name] for name in ("content-type", "accept")}
    seen.answers["a task for anybody"] = again((f"{url}/runtime/acquire-task", protobuf, b""), up)
    seen.answers["a fleet for nobody"] = again((f"{url}/fleet/send-node-heartbeat", protobuf, heartbeat), up)
    for stranger in strangers:
        wait_for(lambda stranger=stranger: stranger.process.poll() is not None)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory) -> Deployed:
    out, records, early, files = (tmp_path_factory.mktemp(name) for name in ("runs", "records", "early", "files"))
    (early / "sitecustomize.py").write_text(EARLY)
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
            seen.family = up.family()
            seen.logs = {one.name: deploy.plain(one.log.read_text()) for one in up._all}

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECORDS", str(records))
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(early), os.environ.get("PYTHONPATH")])))
        seen = kill(THREE_ROUNDS, 3, out / "deployed", files)
        patch.setattr(deploy.Loopback, "run", disturbed)
        seen.code = cli.main(["deploy", "--resume", str(seen.path)])
    assert not seen.errors, "\n".join([repr(seen.errors), *(f"--- {name}\n{log[-3000:]}" for name, log in seen.logs.items())])
    return seen


@pytest.fixture(scope="module")
def inline(tmp_path_factory) -> Path:
    """The folder of the same run in one process, never stopped."""
    out = tmp_path_factory.mktemp("inline")
    same = ["federation.clients=3", "federation.per_round=3", "engine.workers=1", f"out={out}", "name=inline"]
    assert cli.main(["run", *THREE_ROUNDS, *same]) == 0
    return out / "inline"


def bytes_in(path: Path) -> dict[str, object]:
    """The bytes of each tensor of a file, and what else it says: its own bytes, and so its seal, have the latter in any order."""
    with safe_open(path, "pt") as file:
        about = {key: value for key, value in file.metadata().items() if key != "checksum"}
        return {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()} | {"": about}  # noqa: SIM118


def test_captures_are_the_same_bytes_as_in_simulation(deployed, inline):
    lost = {Path("observations/round_00003/client_00002.safetensors"), Path("clients/client_00002/round_000003.safetensors")}
    for kind, count in (("observations", 12), ("clients", 9)):
        files = {path.relative_to(inline) for path in (inline / kind).rglob("*.safetensors")}
        assert len(files) == count
        assert {path.relative_to(deployed.path) for path in (deployed.path / kind).rglob("*.safetensors")} == files - lost
        for file in sorted(files - lost):
            assert bytes_in(deployed.path / file) == bytes_in(inline / file), file


def assert_nothing_is_left(seen: Deployed, nodes: int) -> None:
    assert len(seen.killed) >= 3 + 2 * nodes  # itself, the guard, SuperLink, the SuperNodes, a helper of each
    assert seen.left == []
    assert seen.finished == [0, 1]


def test_a_deployment_that_is_killed_leaves_nothing_and_is_resumed_as_one_never_stopped(deployed, inline):
    """Its third round begins with weights and memories of one that was not killed: its captures are the same, see above."""
    assert_nothing_is_left(deployed, 3)
    assert deployed.code == 0
    assert read_json(deployed.path / "environment.json")["command"].startswith("fedsim deploy --nodes 3 ")
    mine, theirs = (RunFolder(path).rounds().drop(columns="seconds")[:3] for path in (deployed.path, inline))
    pd.testing.assert_frame_equal(mine, theirs, check_exact=True)
    mine, theirs = (bytes_in(path / "before" / "checkpoint.safetensors") for path in (deployed.path, inline))
    assert cast(dict[str, str], mine[""])["round"] == "2"
    assert mine == theirs


@pytest.mark.parametrize(
    ("who", "says"),
    [
        ("wrong key", "Failed to activate SuperNode"),
        ("no key", "All SuperNodes must be registered"),
        ("no TLS", "Server disconnected without sending a response"),
        ("a key without TLS", "SuperNode authentication requires a"),
        ("another authority", "certificate verify failed"),
    ],
)
def test_a_stranger_is_refused(deployed, who, says):
    assert says in deployed.logs[who]
    assert "Receiving" in deployed.logs["node-0"]
    assert "Receiving" not in deployed.logs[who]


WEAK = ("other words, the same signature", "a task for anybody")


def test_flower_still_has_the_weak_points_that_the_threat_model_names(deployed):
    assert {deployed.answers[name].status_code for name in WEAK} == {200}


def test_what_was_sent_before_is_of_no_use_to_send_again(deployed):
    codes = {name: deployed.answers[name].status_code for name in deployed.answers if name not in WEAK}
    assert codes.pop("at once") == 200  # Flower takes it for the same reply: it is not counted twice, see the captures and this:
    assert list(RunFolder(deployed.path).rounds()["clients"]) == [0, 3, 3, 2]
    assert codes.pop("when the run is over") >= 400
    assert set(codes) == {"after five minutes", "in another's name", "with another time", "a fleet for nobody"}
    assert set(codes.values()) == {401}


def test_a_round_in_which_a_node_is_killed_ends_with_the_others_and_says_so(deployed):
    assert deployed.code == 0
    rounds = RunFolder(deployed.path).rounds()
    assert list(rounds["failures"]) == [0, 0, 0, 1]
    assert "round 3: a client failed and is left out: client 2: " in (deployed.path / "log.txt").read_text()
    assert "SuperNode 2 has ended: signal 9" in deployed.printed
    assert "round    3/3" in deployed.printed


def test_nothing_is_left_of_a_deployment(deployed):
    assert len(deployed.family) >= 6  # SuperLink, two SuperNodes, a helper of each
    assert not deployed.family & guard.processes()
    assert deployed.mode == 0o700
    assert not deployed.folder.exists()


def test_a_deployed_runs_folder_is_an_ordinary_one(deployed, capsys):
    assert cli.main(["attack", str(deployed.path), "attack=dlg", "attack.evaluations=3", "attacker=naive"]) == 0
    assert len(RunFolder(deployed.path).leaks()) == 8
    assert cli.main(["deploy", "--resume", str(deployed.path)]) == 0
    assert "is finished: all 3 rounds are there" in capsys.readouterr().out
    assert cli.main(["deploy", "--resume", str(deployed.path), "rounds=4"]) == 2
    assert "leave out rounds=4" in capsys.readouterr().err


# Killed outright ------------------------------------------------------------------------------------------------------------------


# Starts a guard, and in its group a process that starts another in a session of its own, as a SuperLink does.
STARTER = """
import subprocess, sys
watch = f"from experiments import guard; guard._table = guard.{sys.argv[1]}; guard.main()"
guard = subprocess.Popen([sys.executable, "-c", watch, sys.argv[2]], stdin=subprocess.PIPE, process_group=0)
start = "import subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True).wait()"
subprocess.Popen([sys.executable, "-c", start], process_group=guard.pid).wait()
"""
TABLES = {"_from_proc": Path("/proc/self/stat").exists(), "_from_ps": shutil.which("ps") is not None}


@pytest.mark.parametrize("table", TABLES)
def test_a_guard_ends_all_processes_and_removes_the_files_of_one_that_is_killed(table, tmp_path):
    if not TABLES[table]:
        pytest.skip("this system lists its processes in another way")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "server.key").touch()
    starter = subprocess.Popen([sys.executable, "-c", STARTER, table, str(tmp_path / "files")], cwd=ROOT)
    try:
        wait_for(lambda: len(guard.family({starter.pid})) == 4)
        everybody = guard.family({starter.pid})
    finally:
        starter.kill()
    starter.wait()
    wait_for(lambda: not everybody & guard.processes())
    assert not (tmp_path / "files").exists()


# Secure aggregation sends each client four messages a round, and Flower starts a process for each: eight minutes on two cores.
@pytest.mark.slow
def test_a_secure_deployment_that_is_killed_leaves_nothing_and_goes_on_to_the_end_of_one_never_stopped(tmp_path):
    settings = [*SETTINGS, "strategy=fedadam", "aggregation=secure", "aggregation.seeded=true"]
    seen = kill(settings, 3, tmp_path / "deployed", tmp_path)
    assert_nothing_is_left(seen, 3)
    assert cli.main(["deploy", "--resume", str(seen.path)]) == 0
    same = ["federation.clients=3", "federation.per_round=3", "engine.workers=1", f"out={tmp_path}", "name=inline"]
    assert cli.main(["run", *settings, *same]) == 0
    mine, theirs = (RunFolder(path).rounds().drop(columns="seconds") for path in (seen.path, tmp_path / "inline"))
    pd.testing.assert_frame_equal(mine, theirs, check_exact=True)
    mine, theirs = tensors(seen.path), tensors(tmp_path / "inline")
    assert {"observations/round_00002/sum.safetensors", "checkpoint.safetensors"} < set(theirs)
    assert list(mine) == list(theirs)
    for name, saved in theirs.items():
        assert_same(mine[name], saved)


# The app, in this process ---------------------------------------------------------------------------------------------------------


def on_this_process(run_config: Mapping[str, Any], nodes: int, own: Mapping[str, Any], run_id: int = 7) -> None:
    """Runs server and clients of the app as a SuperLink would, without one."""
    told = {**app.RUN_CONFIG, **run_config}

    class Nodes(InlineGrid):
        def _context(self, node: int) -> Context:
            return Context(run_id, node, {"partition-id": node - 2, **own}, RecordDict(), told)

    grid = Nodes(app.client, nodes)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, 1, 1
    try:
        app.server(grid, Context(run_id, 1, {}, RecordDict(), told))
    finally:
        grid.close()


def told(settings: Sequence[str]) -> dict[str, str]:
    return {"overrides": shlex.join(["federation.clients=3", "federation.per_round=3", *settings])}


def test_the_app_runs_what_its_overrides_say_and_goes_on_where_it_stopped(tmp_path):
    out = f"out={tmp_path / 'with spaces'}"
    on_this_process(told([*SETTINGS, out]), 3, {"memory": str(tmp_path / "own")}, run_id=11)
    folder = RunFolder.open(tmp_path / "with spaces" / "run-11")  # a run without a name bears Flower's number
    assert list(folder.rounds()["round"]) == [0, 1, 2]
    kept = sorted(str(path.relative_to(tmp_path / "own")) for path in (tmp_path / "own").rglob("*.safetensors"))
    assert kept == [f"run-11/clients/client_0000{i}/round_00000{round}.safetensors" for i in range(3) for round in (1, 2)]
    # Stopped after round 1: what came after is dropped, done again, and the same.
    before = folder.checkpoint()
    half = [*SETTINGS, out, "rounds=1", "name=half"]
    on_this_process(told(half), 3, {"memory": str(tmp_path / "own")})
    config = RunFolder.open(tmp_path / "with spaces" / "half").config
    with pytest.raises(RunError, match="was run with other settings"):
        on_this_process(told([*half[:-2], "name=half"]) | {"resume": True}, 3, {"memory": str(tmp_path / "own")})
    config["rounds"] = 2
    (tmp_path / "with spaces" / "half" / "config.json").write_text(json.dumps(config))
    on_this_process({"config": json.dumps(config), "resume": True}, 3, {"memory": str(tmp_path / "own")})
    after = RunFolder(tmp_path / "with spaces" / "half").checkpoint()
    assert before is not None
    assert after is not None
    assert_same(after.tensors, before.tensors)


def test_a_new_run_of_an_old_name_begins_without_its_memories(tmp_path):
    folder = tmp_path / "client_00000"

    def context(run_id: int, resume: bool) -> Context:
        return Context(run_id, 2, {"partition-id": 0}, RecordDict(), {**app.RUN_CONFIG, "resume": resume})

    app.begin(folder, context(7, False))
    memory = folder / "round_000001.safetensors"
    memory.touch()
    for again in (context(7, False), context(8, True), context(8, False)):
        app.begin(folder, again)
        assert memory.exists()
    app.begin(folder, context(9, False))
    assert [path.name for path in folder.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["../up", "/etc", "a/b", "..", ".", "", "a\\b", "C:x", "a\0b"])
def test_a_servers_name_for_a_run_leads_nowhere_but_below_the_clients_own_folder(name, tmp_path):
    config = compose([app.ENGINE]) | {"name": name}
    run_config = {**app.RUN_CONFIG, "config": json.dumps(config)}
    context = Context(7, 2, {"partition-id": 0, "memory": str(tmp_path / "own")}, RecordDict(), run_config)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 1
    with pytest.raises(ConfigError, match="is no name of a folder"):
        app.client(Message(RecordDict(), dst_node_id=2, message_type="query"), context)
    assert list(tmp_path.iterdir()) == []


def test_a_client_reads_its_own_data_whatever_the_servers_path(monkeypatch):
    monkeypatch.delenv("FEDSIM_DATA", raising=False)
    config = compose([app.ENGINE, "data=cifar10", "data.root=/etc"])

    def root(config: dict[str, Any], **own: str) -> object:
        return app.client_config(Context(7, 2, {**own}, RecordDict(), {**app.RUN_CONFIG, "config": json.dumps(config)}))["data"][
            "root"
        ]

    with pytest.raises(ConfigError, match="this SuperNode has no data"):
        root(config)
    assert root(config, **{"data-root": "/mine"}) == "/mine"
    monkeypatch.setenv("FEDSIM_DATA", "/mine/too")
    assert root(config) == "/mine/too"
    with pytest.raises(ConfigError, match="this SuperNode has no data"):  # sentences would be drawn in place of the file's
        root(compose([app.ENGINE, "setting=text", "data.root=/etc/passwd"]))
    assert root(compose([app.ENGINE])) == "/mine/too"


# What Flower starts for each message.
BEGIN = """
import json, sys
from experiments import app
from fedsim.setup import setup_of
setup_of(json.loads(sys.argv[1]))
print(*sorted({"datasets", "flwr_datasets", "matplotlib", "pandas", "scipy", "torchvision", "torch._dynamo"} & set(sys.modules)))
"""


def test_a_client_begins_without_what_takes_seconds_to_import(tmp_path, monkeypatch):
    asked = config()
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    labels = load(**asked["data"], seed=asked["seed"]).train.labels
    IID()(labels, asked["federation"]["clients"], asked["seed"])  # from a message before
    command = [sys.executable, "-c", BEGIN, json.dumps(asked)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "\n"


def test_a_client_builds_the_project_s_own_classes_only(tmp_path):
    config = compose([app.ENGINE]) | {"defense": {"_target_": "os.mkdir", "path": str(tmp_path / "made")}}
    context = Context(
        7, 2, {"partition-id": 0, "memory": str(tmp_path)}, RecordDict(), {**app.RUN_CONFIG, "config": json.dumps(config)}
    )
    with pytest.raises(ValueError, match=r"_target_ 'os.mkdir' is of none of"):
        app._answer(Message(RecordDict(), dst_node_id=2, message_type="train"), context)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "root"), [(["data=cifar10"], "/data"), (["setting=text"], None), (["setting=text", "data.root=me.txt"], "me.txt")]
)
def test_a_deployment_hands_its_data_to_nodes_and_no_folder_of_data_sets_for_text(words, root, monkeypatch, tmp_path):
    class Told(Exception):
        pass

    def told(nodes: int, node_config: dict[str, str]) -> None:
        raise Told(node_config.get("data-root"))

    monkeypatch.setattr(deploy.Loopback, "of", told)
    monkeypatch.setenv("FEDSIM_DATA", "/data")
    with pytest.raises(Told) as raised:
        deploy.deploy(compose([app.ENGINE, *words]), tmp_path / "run", 4)
    assert raised.value.args[0] == (None if root is None else str(Path(root).absolute()))


def test_what_cannot_be_deployed_is_told_before_anything_is_started():
    config = compose([app.ENGINE, "federation.clients=3", "federation.per_round=3"])
    for nodes, says in (
        (1, "federation.clients=3 takes 3 SuperNodes, and there are 1"),
        (0, "--nodes must be a whole number >= 1"),
    ):
        with pytest.raises(ValueError, match=says):
            deploy.check_nodes(config, nodes)
    with pytest.raises(ValueError, match="name=a:b is no name of a folder on every SuperNode"):
        deploy.check_nodes(config | {"name": "a:b"}, 3)


def test_no_proxy_stands_between_the_processes_of_a_deployment(monkeypatch, tmp_path):
    up = deploy.Loopback(tmp_path)
    try:
        monkeypatch.setenv("NO_PROXY", "example.org")
        assert up.environment("user")["no_proxy"] == up.environment("user")["NO_PROXY"] == "example.org,127.0.0.1"
    finally:
        up.stop()


def test_what_a_process_starts_as_it_ends_is_ended_too(tmp_path):
    late = "import signal, subprocess, sys, time\n"
    late += "def end(*_):\n    subprocess.Popen(['sleep', '300'])\n    time.sleep(1)\n    sys.exit()\n"
    late += "signal.signal(signal.SIGTERM, end)\nprint('ready', flush=True)\ntime.sleep(300)\n"
    up = deploy.Loopback(tmp_path)
    up._commands["late"] = sys.executable
    started = up.start("late", "late", "-c", late)
    wait_for(lambda: "ready" in started.log.read_text())
    leaders = {up._guard.pid}
    up.stop()
    assert not guard.family(leaders)


class Deaf:
    """A grid on which client 2 answers nothing in round 1, and is reported lost by the SuperLink in round 2."""

    def __init__(self, grid: InlineGrid) -> None:
        self.grid, self.timeouts, self.lost, self.asked = grid, [], grid.get_node_ids()[2], 0

    def send_and_receive(self, messages: list[Message], *, timeout: float | None = None) -> list[Message]:
        self.timeouts.append(timeout)
        replies = list(self.grid.send_and_receive(messages, timeout=timeout))
        for reply in [one for one in replies if one.metadata.message_type == "train" and one.metadata.src_node_id == self.lost]:
            replies.remove(reply)
            self.asked += 1
            if self.asked == 2:
                about = copy.copy(reply.metadata)
                about.__dict__.update(_src_node_id=1, _dst_node_id=1)
                replies.append(make_message(about, error=Error(ErrorCode.NODE_UNAVAILABLE, "the node is gone")))
        return replies

    def __getattr__(self, name: str) -> Any:
        return getattr(self.grid, name)


def test_who_does_not_answer_in_time_is_left_out_and_named(caplog):
    made = config(federation=FEDSGD | {"per_round": 4})
    grid = Deaf(InlineGrid(client_app(made), 4))
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 1
    engine = Deployment(timeout=5, grid=cast(Any, grid), context=Context(7, 1, {}, RecordDict(), {}))
    with caplog.at_level(logging.WARNING, "fedsim"):
        left = federate(made, engine)
    assert [(report.clients, report.failures) for report in left.reports] == [(0, 0), (3, 1), (3, 1)]
    warned = [record.getMessage() for record in caplog.records if record.name == "fedsim.server"]
    assert warned == [
        "round 1: a client failed and is left out: client 2: no reply within 5 s",
        "round 2: a client failed and is left out: client 2: the node is gone",
    ]
    assert set(grid.timeouts) == {5}


# The bundle and the command -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's
def test_the_bundle_names_the_app_and_holds_no_code():
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(ROOT))) as bundle:
        assert set(bundle.namelist()) == {"pyproject.toml", "README.md", ".info/CONTENT"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    deployed = deploy.app_project()["tool"]["flwr"]["app"]
    assert {key: project[key] for key in deployed} == deployed


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (
            ["deploy", "--nodes", "3", "federation.clients=4"],
            2,
            "federation.clients=4 takes 4 SuperNodes, and there are 3: --nodes 4",
        ),
        (["deploy", "--nodes", "0"], 2, "--nodes must be a whole number >= 1, got 0"),
        (["deploy", "defense=topq"], 2, "unknown defense 'topq'"),
        (["deploy", "engine=inline"], 2, "engine=inline runs in this process"),
        (["run", "engine=deployment"], 2, "engine=deployment needs a SuperLink and SuperNodes: `fedsim deploy`"),
        (["deploy", "--resume", "nowhere"], 2, "nowhere is not a run's folder"),
        (["deploy", "engine.timeout=0"], 2, "engine.timeout must be a number > 0, got 0"),
    ],
)
def test_what_cannot_be_deployed_is_said_in_one_line(words, code, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == code
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_by_default_all_nodes_are_clients_of_every_round():
    for words, clients, chosen in [
        ([], 4, 4),
        (["setting=quickstart"], 4, 4),
        (["federation.per_round=2"], 4, 2),
        (["federation.clients=3"], 3, 3),
        ([], 20, 20),
    ]:
        federation = deploy.configured(words, max(4, clients))["federation"]
        assert (federation["clients"], federation["per_round"]) == (clients, chosen), words


def test_a_traceback_is_told_in_one_line_and_what_the_run_prints_is_shown():
    shown = ["none on synthetic", "  attacker  honest", "  round 1/2"]
    told = ["Traceback (most recent call last):", '  File "server.py"', "    raise", "fedsim.errors.FederationError: no reply: why"]
    lines = ["INFO :      Start", *shown[:2], *told, "", shown[2], "An unhandled exception occurred in the ServerApp."]
    assert [lines[i] for i in range(len(lines)) if deploy.is_ours(lines[: i + 1])] == shown
    assert deploy.reason(lines) == "no reply: why"


def test_a_server_that_ends_with_its_rounds_done_and_its_attack_not_made_is_no_success(monkeypatch, capsys, tmp_path):
    words = [*SETTINGS, "attack=idlg", "attack.evaluations=3", "federation.clients=2", f"out={tmp_path}", "name=full"]
    asked = deploy.configured(words, 2)
    runner.start(asked | {"engine": compose(["engine.workers=1"])["engine"]}, tmp_path / "full", "a test", attack=False)
    up = types.SimpleNamespace(run=lambda told: ["Traceback (most recent call last):", "  raise", "OSError: no space left"])
    monkeypatch.setattr(deploy.Loopback, "of", lambda *_: contextlib.nullcontext(up))
    assert cli.main(["deploy", "--resume", str(tmp_path / "full")]) == 1
    assert "stopped: no space left; what was finished is kept, and `fedsim deploy --resume" in capsys.readouterr().err


def test_a_missing_command_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["deploy", *SETTINGS, f"out={tmp_path}"]) == 1
    assert f"flower-superlink is not beside {tmp_path / 'python'}, nor on the path" in capsys.readouterr().err


def test_a_busy_port_is_named_and_nothing_is_left(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(deploy, "_free_port", lambda: taken.getsockname()[1])
        assert cli.main(["deploy", *SETTINGS, f"out={tmp_path / 'runs'}"]) == 1
    error = capsys.readouterr().err
    assert "superlink ended before it was ready: " in error
    assert "address already in use" in error
    assert not list(tmp_path.glob("fedsim-deploy-*"))
