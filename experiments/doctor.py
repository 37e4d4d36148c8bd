"""`fedsim doctor`: is this installation sound, and if not, what cures it."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

PASS, WARN, FAIL = "ok", "note", "FAIL"

Finding = tuple[str, str, str]  # verdict, what was found, cure


def examine() -> int:
    """Prints one line for each check; returns 1 when something that fedsim needs is broken."""
    from fedsim.quiet import quiet

    quiet()
    worst = 0
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", _python),
        ("torch", _torch),
        ("torchvision", _torchvision),
        ("cuda", _cuda),
        ("kornia", _kornia),
        ("flower", _flower),
        ("ray", _ray),
        ("data", _data),
        ("disk", _disk),
        ("offline", _offline),
    ]
    for name, check in checks:
        try:
            verdict, found, cure = check()
        except Exception as error:  # whatever is broken, the other checks are still to be made
            verdict, found, cure = FAIL, f"{type(error).__name__}: {' '.join(str(error).split())}", ""
        print(f"{verdict:5s} {name:12s} {found}" + (f"\n      {'':12s} cure: {cure}" if cure else ""))
        worst |= verdict == FAIL
    return int(worst)


def _python() -> Finding:
    found = f"{sys.version.split()[0]}, {os.cpu_count()} cores"
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return PASS, found, ""
    return FAIL, found, "Hydra 1.3 runs on Python 3.11 to 3.13: make the virtual environment with one of these"


def _version(name: str) -> str:
    return str(getattr(importlib.import_module(name), "__version__", "?"))


def _torch() -> Finding:
    try:
        return PASS, _version("torch"), ""
    except (ImportError, OSError) as error:
        return FAIL, str(error).splitlines()[0], "pip install --force-reinstall torch torchvision"


def _torchvision() -> Finding:
    try:
        import torchvision

        torchvision.ops.nms  # noqa: B018
        return PASS, torchvision.__version__, ""
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        # "operator torchvision::nms does not exist" is what a CPU-only torch with an ordinary torchvision says.
        cure = (
            "torch and torchvision come from different builds: pip install --force-reinstall torch torchvision, both from one index"
        )
        return FAIL, str(error).splitlines()[0], cure


def _kornia() -> Finding:
    if importlib.util.find_spec("kornia") is None:  # as after an update of a clone
        return FAIL, "not installed: what an attack finds is not scored", "install fedsim again: pip install -e ."
    return PASS, version("kornia"), ""


def _cuda() -> Finding:
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return PASS, f"{torch.cuda.get_device_name()}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free", ""
    if shutil.which("nvidia-smi"):
        cure = f"torch {torch.__version__} does not see the driver: update the driver, or install a torch built for its CUDA"
        return WARN, "a GPU driver, but no usable GPU", cure
    return PASS, "no GPU: attacks and clients run on the CPU", ""


def _flower() -> Finding:
    try:
        from fedsim.engines.inline import InlineGrid  # noqa: F401

        return PASS, _version("flwr"), ""
    except ImportError as error:
        return FAIL, str(error).splitlines()[0], "pip install 'flwr>=1.41,<1.42': Flower's interfaces move between releases"


def _ray() -> Finding:
    if importlib.util.find_spec("ray") is None:
        return WARN, "not installed; engine=inline does not need it", "for engine=ray: pip install 'flwr[simulation]>=1.41,<1.42'"
    return PASS, _version("ray"), ""


def _data() -> Finding:
    from fedsim.data import DataNotFound, check

    try:
        check("cifar10", None)
        return PASS, "CIFAR-10 found", ""
    except DataNotFound as error:
        return WARN, "CIFAR-10 not found; data=synthetic needs none", str(error)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    found = f"{free:.0f} GB free here"
    if not os.access(Path.cwd(), os.W_OK):
        return WARN, f"{Path.cwd()} is read-only", "give run folders another place: out=FOLDER"
    return (
        (PASS, found, "")
        if free > 2
        else (WARN, found, "observations and checkpoints take room: choose another place with out=FOLDER")
    )


def _offline() -> Finding:
    from fedsim.quiet import SWITCHES

    changed = [f"{name}={os.environ[name]}" for name, value in SWITCHES.items() if os.environ[name] != value]
    if changed:
        return (
            WARN,
            f"changed by your environment: {' '.join(changed)}",
            f"to stay offline: unset {' '.join(c.split('=')[0] for c in changed)}",
        )
    return PASS, "telemetry and update checks of Flower, Ray and MLflow are off", ""
