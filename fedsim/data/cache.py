"""Decoded datasets on disk, so that images are decoded once; and what else takes long to make of them.

One safetensors file for each source: never a pickle, so a cache cannot run code. The file is named by a key that its maker
derives from what it was made of; it carries a checksum, and one that does not read back whole is treated as absent.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsim.data.images import Dataset, Images
from fedsim.files import write_with


def folder() -> Path:
    """Where decoded datasets are kept: $FEDSIM_CACHE, or ~/.cache/fedsim."""
    return Path(os.environ.get("FEDSIM_CACHE") or Path.home() / ".cache" / "fedsim")


def path_of(name: str, key: str) -> Path:
    """The cache file of the dataset `name` made from what `key` stands for."""
    return folder() / f"{name}-{key[:16]}.safetensors"


def read(path: Path) -> Dataset | None:
    """The dataset in `path`; None when there is none or it is damaged."""
    kept = read_tensors(path)
    if kept is None:
        return None
    tensors, about = kept
    try:
        train, test = (Images(tensors[f"{split}.pixels"], tensors[f"{split}.labels"]) for split in ("train", "test"))
        return Dataset(about["name"], train, test, tuple(about["classes"]))
    except (KeyError, TypeError, ValueError):
        return None


def write(path: Path, dataset: Dataset) -> None:
    """Keeps `dataset` in `path`, whole or not at all. A cache that cannot be written is no error: the next run decodes again."""
    tensors = {
        f"{split}.{field}": getattr(images, field)
        for split, images in (("train", dataset.train), ("test", dataset.test))
        for field in ("pixels", "labels")
    }
    write_tensors(path, tensors, {"name": dataset.name, "classes": dataset.classes})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors by name, and what was written about them; None when there is no such file or it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["fedsim"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return (tensors, about) if about["checksum"] == _checksum(tensors) else None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Keeps tensors and what is to be said about them in `path`, as `write` does."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    whole = {name: t.contiguous() for name, t in tensors.items()}
    told = json.dumps({**about, "checksum": _checksum(whole)})
    with contextlib.suppress(OSError, SafetensorError):
        write_with(path, lambda name: save_file(whole, name, metadata={"fedsim": told}))


def prune(name: str, keep: int) -> None:
    """Removes all cache files of `name` but the `keep` newest. What another process removes meanwhile is no error."""
    with contextlib.suppress(OSError):
        files = sorted(folder().glob(f"{name}-*.safetensors"), key=lambda path: path.stat().st_mtime)
        for old in files[:-keep]:
            old.unlink()


def _checksum(tensors: dict[str, Tensor]) -> int:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].contiguous().view(torch.uint8).numpy().data, total)
    return total
