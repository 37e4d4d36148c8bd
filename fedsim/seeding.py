"""Named random streams: every use of chance has a name, and its own generator.

A stream depends on the run's seed and its own name only, so adding a draw in one place moves no number in another.
"""

import hashlib
import threading

import torch

# PyTorch's modules draw from one stream that all threads share, when they are made and in training mode: whoever seeds, forks or
# draws from it where other threads may be at work holds this.
global_stream = threading.RLock()


def seed_of(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream `names` of the run seeded with `seed`."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random stream `names` of the run seeded with `seed`, at its start."""
    return torch.Generator(device).manual_seed(seed_of(seed, *names))
