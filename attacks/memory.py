"""Memory that one evaluation gives back is what the next one takes.

glibc returns large blocks to the operating system at once, which hands each page out again zeroed: up to a quarter of the time that
one gradient of a gradient takes on ResNet-18, for one image (`benchmarks/searches.py twice`).
"""

import ctypes
import functools
import platform

TRIM, MAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
KEPT = 2**30  # bytes that may lie idle
LARGEST = 2**25  # bytes of a block that is not mapped by itself; glibc takes no more


@functools.cache
def keep_freed() -> None:
    """Lets this process keep up to 1 GiB of what it has freed, in place of asking for it again; of no effect without glibc."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(TRIM, KEPT)
        libc.mallopt(MAP, LARGEST)
