"""How many cores a process may use: threads beyond them only take turns."""

import contextlib
import os
from collections.abc import Iterator

import torch

from fedsim.checks import whole

SHARE = "FEDSIM_CORES"  # a process that starts others tells them their share by it


def cores() -> int:
    """As many as $FEDSIM_CORES says, or as the operating system lets this process have. ValueError for what is no number."""
    if told := os.environ.get(SHARE):
        share = int(told) if told.isdecimal() else told
        whole(SHARE, share)
        return int(share)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_thread() -> None:
    """Makes this thread compute on one core: parallelism is across clients, and numbers must not depend on the number of cores."""
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@contextlib.contextmanager
def on_one_thread() -> Iterator[None]:
    """Inside, `one_thread`; afterwards as many as before, also where workers started inside set what is of the whole process."""
    before = torch.get_num_threads()
    one_thread()
    try:
        yield
    finally:
        torch.set_num_threads(before)
