"""A Flower deployment on this machine: a SuperLink and SuperNodes on loopback, started, used for one run, and taken down.

Connections are under TLS, and every SuperNode has a key that the SuperLink knows. Certificates, keys and Flower's own files are in
a temporary folder that goes with the deployment.
"""

import contextlib
import datetime
import ipaddress
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

import experiments
from experiments import guard
from experiments.config import Config, ConfigError, compose
from experiments.guard import family
from fedsim.checks import whole
from fedsim.errors import FederationError
from fedsim.quiet import SWITCHES

HOST = "127.0.0.1"
NAME = "fedsim"  # of the connection in Flower's configuration
PATIENCE = 120.0  # seconds for processes to start
COMMANDS = ("flower-superlink", "flower-supernode", "flwr")


def configured(overrides: Sequence[str], nodes: int) -> Config:
    """The configuration of a deployment: every node a client, and all of them in each round, unless `overrides` say otherwise.

    Raises ConfigError where they ask for more clients than there are nodes.
    """
    from experiments.app import ENGINE

    said = {override.split("=", 1)[0] for override in overrides}
    ours = [f"federation.clients={nodes}"] if "federation.clients" not in said else []
    config = compose([ENGINE, *ours, *overrides])
    if f"engine={config['choices']['engine']}" != ENGINE:
        raise ConfigError(f"engine={config['choices']['engine']} runs in this process, without SuperNodes: leave it out")
    check_nodes(config, nodes)
    if "federation.per_round" not in said and isinstance(config["federation"]["clients"], int):
        config = compose([ENGINE, *ours, f"federation.per_round={config['federation']['clients']}", *overrides])
    return config


def check_nodes(config: Config, nodes: int) -> None:
    """Raises ConfigError where a run has more clients than there are nodes, or a name that no SuperNode has a folder for."""
    from experiments.app import is_folder

    whole("--nodes", nodes)
    clients = config["federation"]["clients"]
    if isinstance(clients, int) and clients > nodes:
        wanted = f"federation.clients={clients} takes {clients} SuperNodes, and there are {nodes}"
        raise ConfigError(f"{wanted}: --nodes {clients}, or fewer clients")
    if isinstance(name := config["name"], str) and not is_folder(name):
        raise ConfigError(f"name={name} is no name of a folder on every SuperNode: change name=")


@dataclass(frozen=True)
class Started:
    """A process of the deployment, and the file that it writes its log to."""

    name: str
    process: subprocess.Popen[str]
    log: Path

    def last(self) -> str:
        """The last line of its log that tells of an error, or else that says anything, without colours and frames."""
        lines = [line.strip("│ ") for line in reversed(plain(self.log.read_text(errors="replace")).splitlines())]
        says = [line for line in lines if re.search(r"\w", line)]
        causes = (line for sign in (r"Errno|Error: ", r"\bERROR\b", "") for line in says if re.search(sign, line))
        return next(causes, "it left no log")


class Loopback:
    """A SuperLink and SuperNodes that are up: `with Loopback.of(...) as up: up.run(...)`.

    folder   certificates, keys, logs and Flower's own files; mode 0700
    address  of the SuperLink
    nodes    the SuperNodes in the order of their clients
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, f"{HOST}:{_free_port()}"
        self.nodes: list[Started] = []
        self._all: list[Started] = []
        self._commands = {name: _command(name) for name in COMMANDS}
        watch = [sys.executable, "-I", guard.__file__, str(folder)]
        self._guard = subprocess.Popen(watch, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, process_group=0)

    @classmethod
    @contextlib.contextmanager
    def of(cls, nodes: int, node_config: Mapping[str, str]) -> Iterator["Loopback"]:
        """Starts a deployment of `nodes` SuperNodes, each with `node_config` besides its number; takes it down at the end."""
        with tempfile.TemporaryDirectory(prefix="fedsim-deploy-") as name, _terminable():
            up = cls(Path(name))
            try:
                up._start(nodes, node_config)
                yield up
            finally:
                with _undisturbed():
                    up.stop()

    def _start(self, nodes: int, node_config: Mapping[str, str]) -> None:
        certificates(self.folder, HOST)
        tls = [f"--ssl-{kind}={self.folder / file}" for kind, file in TLS_FILES.items()]
        link = self.start("superlink", "flower-superlink", *tls, "--enable-supernode-auth", "--port", self.address.split(":")[1])
        connection = {"address": self.address, "root-certificates": str(self.folder / TLS_FILES["ca-certfile"])}
        home = self.home("user")
        (home / "config.toml").write_text(tomli_w.dumps({"superlink": {"default": NAME, NAME: connection}}))
        self._until(link, lambda: "Uvicorn running" in link.log.read_text(errors="replace"))
        self.register(*(key_pair(self.folder / f"node-{number}") for number in range(nodes)))
        for number in range(nodes):
            mine = {"partition-id": number, "num-partitions": nodes, **node_config}
            self.nodes.append(self.node(f"node-{number}", self.folder / f"node-{number}", mine))
        for node in self.nodes:
            self._until(node, lambda node=node: "SuperNode ID:" in node.log.read_text(errors="replace"))

    def register(self, *public_keys: Path) -> None:
        """Lets the SuperLink know the keys of SuperNodes."""
        with ThreadPoolExecutor() as pool:  # each command takes seconds to import what it needs
            list(pool.map(lambda key: self.flwr("supernode", "register", str(key), NAME), public_keys))

    def node(self, name: str, key: Path, node_config: Mapping[str, object], *instead: str) -> Started:
        """Starts a SuperNode with a private key; `instead` stands in place of its TLS options and its key."""
        told = " ".join(f"{key}={json.dumps(value)}" for key, value in node_config.items())
        secure = ["--root-certificates", str(self.folder / TLS_FILES["ca-certfile"]), "--auth-supernode-private-key", str(key)]
        where = ["--superlink", self.address, "--port", str(_free_port()), "--node-config", told]
        return self.start(name, "flower-supernode", *(instead or secure), *where)

    def start(self, name: str, command: str, *arguments: str) -> Started:
        """Starts one of Flower's commands in the guard's group, where Ctrl-C does not reach it."""
        log = self.folder / f"{name}.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                [self._commands[command], *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self.environment(name),
                process_group=self._guard.pid,
                text=True,
            )
        self._all.append(Started(name, process, log))
        return self._all[-1]

    def flwr(self, *arguments: str) -> str:
        """What a `flwr` command prints. Raises FederationError for one that fails."""
        try:
            done = subprocess.run(
                [self._commands["flwr"], *arguments],
                env=self.environment("user"),
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                process_group=self._guard.pid,
            )
        except subprocess.TimeoutExpired:
            raise FederationError(f"flwr {' '.join(arguments[:2])} did not end within {PATIENCE:.0f} s") from None
        if done.returncode:
            why = " ".join(plain(done.stdout + done.stderr).split())[-500:]
            raise FederationError(f"flwr {' '.join(arguments[:2])} failed: {why}")
        return done.stdout

    def home(self, name: str) -> Path:
        """Flower's folder of one of the processes; SuperNodes that share one would unpack the same app at once."""
        home = self.folder / "flower" / name
        home.mkdir(parents=True, exist_ok=True)
        return home

    def environment(self, name: str) -> dict[str, str]:
        """The environment of a process: offline, this fedsim to import, and Flower's commands to find, which start each other."""
        commands = os.pathsep.join([str(Path(self._commands[COMMANDS[0]]).parent), os.environ.get("PATH", os.defpath)])
        code = str(Path(experiments.__file__).parents[1])
        paths = os.pathsep.join([code, *filter(None, [os.environ.get("PYTHONPATH")])])
        ours = {"FLWR_HOME": str(self.home(name)), "PATH": commands, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
        direct = ",".join(filter(None, [os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), HOST]))  # past any proxy
        ours |= {"NO_PROXY": direct, "no_proxy": direct}
        return {**SWITCHES, "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2", **os.environ, **ours}

    def run(self, run_config: Mapping[str, object]) -> Iterator[str]:
        """Runs the app; yields the lines it prints, and one for a SuperNode that ends meanwhile.

        Raises FederationError when the SuperLink ends, or does not take the run.
        """
        app = self.folder / "app"
        app.mkdir()
        (app / "pyproject.toml").write_text(tomli_w.dumps(app_project()))
        told = self.folder / "run.toml"
        told.write_text(tomli_w.dumps(dict(run_config)))
        sender = self.start("user", "flwr", "run", str(app), NAME, "--run-config", str(told), "--stream")
        gone: set[str] = set()
        with sender.log.open(errors="replace") as printed:
            rest = ""
            while True:
                ended = sender.process.poll() is not None
                rest += printed.read()
                *lines, rest = rest.split("\n")
                yield from map(plain, [*lines, rest] if ended else lines)
                for number, node in enumerate(self.nodes):
                    if node.process.poll() is not None and node.name not in gone:
                        gone.add(node.name)
                        code = node.process.returncode
                        yield f"  SuperNode {number} has ended: {f'signal {-code}' if code < 0 else node.last()}"
                if ended:
                    break
                link = self._all[0]
                if link.process.poll() is not None:
                    raise FederationError(f"the SuperLink has ended ({link.process.returncode}): {link.last()}")
                time.sleep(0.2)
        if sender.process.returncode:
            raise FederationError(f"flwr run failed: {sender.last()}")

    def _until(self, started: Started, ready: Any) -> None:
        until = time.monotonic() + PATIENCE
        while not ready():
            if started.process.poll() is not None:
                raise FederationError(f"{started.name} ended before it was ready: {started.last()}")
            if time.monotonic() > until:
                raise FederationError(f"{started.name} was not ready within {PATIENCE:.0f} s: {started.last()}")
            time.sleep(0.1)

    def family(self) -> set[tuple[int, str]]:
        """All processes of the deployment, those included that Flower's commands started, and the guard."""
        return family({self._guard.pid})

    def stop(self) -> None:
        """Ends all processes, those they started included: asks first, and kills what is left. The guard is the last."""

        def left() -> set[int]:
            return {pid for pid, _ in self.family()} - {self._guard.pid}

        for one in reversed(self._all):
            if one.process.poll() is None:
                one.process.terminate()
        until = time.monotonic() + 10
        while time.monotonic() < until and (any(one.process.poll() is None for one in self._all) or left()):
            time.sleep(0.1)
        while some := left():  # they may start others as they end
            for pid in some:
                with contextlib.suppress(ProcessLookupError):  # it may end at this very moment
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        for one in self._all:
            one.process.wait()
        self._guard.kill()
        self._guard.communicate()


# One run.


def deploy(config: Config, path: Path, nodes: int, *, resume: bool = False) -> None:
    """Runs `config` into the folder at `path` on a deployment of its own, and prints how it goes."""
    from experiments.progress import console
    from experiments.runner import finished
    from fedsim.run import RunFolder

    path = path.absolute()
    config = config | {"out": str(path.parent), "name": path.name}
    if not resume:
        RunFolder(path).check_free()
    told = {"memory": str(path.parent)}
    own = os.environ.get("FEDSIM_DATA") if config["data"]["name"] != "text" else None  # which holds data sets, and no text
    if root := config["data"].get("root") or own:
        told["data-root"] = str(Path(root).expanduser().absolute())
    console.print(f"starting a SuperLink and {nodes} SuperNodes on {HOST}")
    with Loopback.of(nodes, told) as up:
        printed: list[str] = []
        for line in up.run({"config": json.dumps(config), "resume": resume}):
            printed.append(line)
            if is_ours(printed):
                console.print(line, markup=False)
        if not finished(RunFolder(path)):  # `flwr run` ends well however the run ended
            raise FederationError(reason(printed))


_TOLD = ("Using SuperLink", "Successfully installed", "Successfully started", "Traceback ", "An unhandled", "For more information")
_FLOWERS = re.compile("|".join([r"(INFO|WARNING|ERROR|DEBUG) ?:", *_TOLD, r"\s*$"]))
_RAISED = re.compile(r"([A-Za-z_]\w*\.)*\w*(Error|Exception|NotFound): ")


def is_ours(printed: Sequence[str]) -> bool:
    """Whether the last of the lines that a run printed is fedsim's: not Flower's, nor part of a traceback."""
    last, began = printed[-1], next((line for line in reversed(printed) if line[:1].strip()), "")
    return not (_FLOWERS.match(last) or _RAISED.match(last) or (last != began and began.startswith("Traceback ")))


def reason(printed: Sequence[str]) -> str:
    """What the last traceback that a run printed ends with, or else its last words."""
    raised = next((line[found.end() :] for line in reversed(printed) if (found := _RAISED.match(line))), "")
    return raised or next((line.strip() for line in reversed(printed) if line.strip()), "the run left nothing")


def app_project() -> dict[str, Any]:
    """The project that `flwr run` sends: it names the app, and holds no code."""
    from experiments.app import RUN_CONFIG

    try:
        number = version("fedsim")
    except PackageNotFoundError:  # run from its folder, not installed
        number = "0.0.0"
    components = {"serverapp": "experiments.app:server", "clientapp": "experiments.app:client"}
    app = {"publisher": "fedsim", "components": components, "config": dict(RUN_CONFIG)}
    return {"project": {"name": "fedsim", "version": number, "license": "", "description": ""}, "tool": {"flwr": {"app": app}}}


# Certificates and keys.

TLS_FILES = {"ca-certfile": "ca.crt", "certfile": "server.pem", "keyfile": "server.key"}
LIFETIME = datetime.timedelta(days=30)
USES = ["digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"]
USES += ["key_cert_sign", "crl_sign", "encipher_only", "decipher_only"]


def certificates(folder: Path, host: str) -> None:
    """Writes a new authority's certificate and, signed by it, the certificate and key of a SuperLink at the address `host`."""
    authority, own = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    issuer = _name("fedsim deploy")
    root = _certificate(issuer, issuer, authority.public_key())
    root = root.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    uses = dict.fromkeys(USES, False) | {"key_cert_sign": True, "crl_sign": True}
    root = root.add_extension(x509.KeyUsage(**uses), critical=True)
    identifier = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())
    root = root.add_extension(identifier, critical=False)
    server = _certificate(_name(host), issuer, own.public_key())
    server = server.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))]), critical=False)
    server = server.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    known = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
    server = server.add_extension(known, critical=False)
    for kind, made in (("ca-certfile", root), ("certfile", server)):
        (folder / TLS_FILES[kind]).write_bytes(made.sign(authority, hashes.SHA256()).public_bytes(Encoding.PEM))
    _write_secret(folder / TLS_FILES["keyfile"], own.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def key_pair(path: Path) -> Path:
    """Writes a new private key to `path`, and its public key to what it returns, as `ssh-keygen -t ecdsa -b 384` does."""
    key = ec.generate_private_key(ec.SECP384R1())
    _write_secret(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = path.with_name(f"{path.name}.pub")
    public.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return public


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _certificate(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number())
    return made.not_valid_before(now - datetime.timedelta(minutes=5)).not_valid_after(now + LIFETIME)


def _write_secret(path: Path, data: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


# Processes.


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP end this process as Ctrl-C does: not before its cleaning up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Inside, whoever presses Ctrl-C again does not stop the cleaning up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _command(name: str) -> str:
    """Where one of Flower's commands is: beside this Python, or on the path. Raises FederationError if nowhere."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise FederationError(f"{name} is not beside {sys.executable}, nor on the path: pip install 'flwr>=1.41,<1.42'")
    return found


def _free_port() -> int:
    with socket.socket() as one:
        one.bind((HOST, 0))
        return one.getsockname()[1]


def plain(text: str) -> str:
    """Text without a terminal's colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
