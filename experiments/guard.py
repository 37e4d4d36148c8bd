"""Ends a deployment whose `fedsim deploy` has ended without doing so: what it leaves when it is killed outright.

    python -I guard.py FOLDER

The deployment's processes are in this one's group, and its files in FOLDER. Whoever started it holds the other end of its standard
input, which closes when that process ends, in whatever way, on Linux and macOS alike.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path


def processes() -> set[tuple[int, str]]:
    """All processes that run: number and time of start, which together tell a process from a later one of the same number."""
    return {(pid, began) for pid, (_, _, began) in _table().items()}


def family(leaders: set[int]) -> set[tuple[int, str]]:
    """`leaders` of process groups, all in their groups, and what those started, and what that started, as `processes` tells them.

    A SuperNode's helper outlives a SuperNode that is killed, and is still in its group.
    """
    table = _table()
    found = {pid for pid, (_, group, _) in table.items() if pid in leaders or group in leaders}
    while more := {pid for pid, (parent, _, _) in table.items() if parent in found} - found:
        found |= more
    return {(pid, table[pid][2]) for pid in found}


def _table() -> dict[int, tuple[int, int, str]]:
    """Parent, group and time of start by process number."""
    return _from_proc() if Path("/proc/self/stat").exists() else _from_ps()


def _from_proc() -> dict[int, tuple[int, int, str]]:
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            state, parent, group, *rest = path.read_text().rsplit(")", 1)[1].split()  # the name before it may hold anything
            if state != "Z":
                found[int(path.parent.name)] = (int(parent), int(group), rest[16])
    return found


def _from_ps() -> dict[int, tuple[int, int, str]]:
    with subprocess.Popen(["ps", "-A", "-o", "pid=,ppid=,pgid=,stat=,lstart="], stdout=subprocess.PIPE, text=True) as ps:
        listed = [line.split(maxsplit=4) for line in ps.communicate()[0].splitlines()]
    if ps.returncode:
        raise OSError(f"ps failed with exit code {ps.returncode}, and there is no /proc")
    rows = [(int(pid), int(parent), int(group), began) for pid, parent, group, state, began in listed if "Z" not in state]
    return {pid: (parent, group, began) for pid, parent, group, began in rows if pid != ps.pid}


def main() -> None:
    """Waits for the end of whoever started it; then kills its group, and all that this started, and removes the folder."""
    sys.stdin.read()
    leaders = {os.getpid()}
    while others := {one for one in family(leaders) if one[0] != os.getpid()}:
        for pid, _ in others:
            leaders.add(pid)  # what it starts at this moment has another parent when it is gone, and is still in its group
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    with contextlib.suppress(FileNotFoundError):  # it was killed as it removed it
        shutil.rmtree(sys.argv[1])


if __name__ == "__main__":
    main()
