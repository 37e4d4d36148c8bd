"""How many cores a process may use: threads beyond them only take turns."""

import os

from fedsim.checks import whole

SHARE = "FEDSIM_CORES"  # a process that starts others tells them their share by it


def cores() -> int:
    """As many as $FEDSIM_CORES says, or as the operating system lets this process have. ValueError for what is no number."""
    if told := os.environ.get(SHARE):
        share = int(told) if told.isdecimal() else told
        whole(SHARE, share)
        return int(share)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
