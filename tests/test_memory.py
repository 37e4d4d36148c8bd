"""What is freed is taken again, not asked of the operating system anew."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from attacks.memory import keep_freed
if sys.argv[1] == "kept":
    keep_freed()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    held = [torch.ones(5 * 2**20) for _ in range(30)]  # 20 MiB each
    del held
work()
before = faults()
work()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is what is told")
def test_pages_are_kept():
    made = [
        int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, check=True).stdout) for how in ("", "kept")
    ]
    assert made[1] < made[0] / 3
