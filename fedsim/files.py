"""Files that are whole or absent, and tell when they were changed.

They are written beside their place, flushed and renamed, so a process that is killed leaves the old file or the new one. What is
read again is sealed: somewhere in it stands the SHA-256 of all its bytes (with zeros in the place of the digest), in the metadata
of a safetensors or parquet file, under the first key of a JSON object. A seal inside the file cannot be parted from it by a crash
between two writes. It tells a damaged file, not a forged one. Files of earlier versions bear none and are taken as they are.
"""

import hashlib
import json
import math
import mmap
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

_SEAL, _DIGITS = b"fedsim-sha256:", 64
_OPEN = _SEAL.decode() + _DIGITS * "0"
_KEY = "checksum"


class Damaged(ValueError):
    """A file that is not as it was written; the message is one line that names it."""


def write_with(path: Path, write: Callable[[str], object], before: Path | None = None) -> None:
    """Calls `write` with the name of a temporary file and moves what it wrote to `path`; a failure leaves `path` as it was.

    With `before`, the file that stood at `path` is moved there first. Raises OSError, which names `path`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        try:
            write(name)
            with open(name, "rb") as file:
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            if before is not None and path.exists():
                before.parent.mkdir(exist_ok=True)
                os.replace(path, before)
                _flush(before.parent)
            os.replace(name, path)
            _flush(path.parent)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


_BEGUN = re.compile(r"\..+(\.\w+)\.[a-z0-9_]{8}\1")


def is_name(text: str) -> bool:
    """Whether a file or folder can be called so, and stay in the folder it is made in."""
    return Path(text).name == text and text not in ("", "..")


def is_begun(path: Path) -> bool:
    """Whether a file is one that `write_with` began and was killed before it moved it to its place."""
    return bool(_BEGUN.fullmatch(path.name)) and path.is_file()


def write_bytes(path: Path, data: bytes, before: Path | None = None) -> None:
    """Writes `data` to `path`, whole or not at all."""
    write_with(path, lambda name: Path(name).write_bytes(data), before)


def _flush(folder: Path) -> None:
    """Makes a rename in `folder` last through a power failure, where folders can be opened."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# Sealed files, by their kind.


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str], before: Path | None = None) -> None:
    """Writes a sealed safetensors file; `about` is its metadata."""
    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_bytes(path, _sealed(save(whole, {**about, _KEY: _OPEN})), before)


def read_tensors(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors that are `wanted`, and the metadata. Raises Damaged, also for a file that is not there."""
    try:
        check(path)
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if wanted(name)]  # noqa: SIM118
            about = file.metadata() or {}
            return {name: file.get_tensor(name) for name in names}, {name: of for name, of in about.items() if name != _KEY}
    except (SafetensorError, OSError) as error:
        raise Damaged(f"{path} is damaged or missing ({' '.join(str(error).split())})") from None


def write_table(path: Path, table: "pd.DataFrame", before: Path | None = None) -> None:
    """Writes a sealed parquet file, without the table's index."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pa.Table.from_pandas(table, preserve_index=False)
    made = BytesIO()
    pq.write_table(rows.replace_schema_metadata({**(rows.schema.metadata or {}), _KEY: _OPEN}), made)
    write_bytes(path, _sealed(made.getvalue()), before)


def read_table(path: Path) -> "pd.DataFrame":
    """The table in a parquet file. Raises Damaged, also for a file that is not there."""
    import pandas as pd
    import pyarrow as pa

    try:
        check(path)
        return pd.read_parquet(path)
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:  # what pyarrow makes of an unsealed file that is damaged
        raise error if isinstance(error, Damaged) else Damaged(f"{path} is damaged ({' '.join(str(error).split())})") from None


def write_json(path: Path, value: Mapping[str, Any], before: Path | None = None) -> None:
    """Writes a sealed JSON object."""
    write_bytes(path, _sealed((json.dumps({_KEY: _OPEN, **value}, indent=2) + "\n").encode()), before)


def read_json(path: Path) -> Any:
    """The value in a JSON file, without its seal. Raises Damaged, also for a file that is not there."""
    try:
        check(path)
        value = json.loads(path.read_bytes())
    except Damaged as error:
        raise Damaged(f'{error}; if it was changed on purpose, delete its line "{_KEY}"') from None
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{path} is damaged or missing ({' '.join(str(error).split())})") from None
    return {key: of for key, of in value.items() if key != _KEY} if isinstance(value, dict) else value


def finite(value: Any) -> float | None:
    """A number as JSON can hold it, which has no infinity and no "not a number"."""
    return float(value) if value is not None and math.isfinite(value) else None


def check(path: Path) -> None:
    """Raises Damaged for a file that is empty, or whose bytes are not those that were sealed; OSError for one that is not there."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise Damaged(f"{path} is damaged (it is empty)")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            at = data.find(_SEAL)
            if at >= 0 and data[at + len(_SEAL) : at + len(_SEAL) + _DIGITS] != _digest(data, at + len(_SEAL)):
                raise Damaged(f"{path} is damaged (its checksum is not that of its bytes)")


def _sealed(data: bytes) -> bytes:
    at = data.index(_OPEN.encode()) + len(_SEAL)
    return b"".join((data[:at], _digest(data, at), data[at + _DIGITS :]))


def _digest(data: bytes | mmap.mmap, at: int) -> bytes:
    """SHA-256 of `data` with zeros in the place of the digest, which begins `at`; in hexadecimal digits."""
    with memoryview(data) as view:
        digest = hashlib.sha256(view[:at])
        digest.update(_DIGITS * b"0")
        digest.update(view[at + _DIGITS :])
    return digest.hexdigest().encode()
