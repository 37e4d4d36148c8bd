"""Updates: parameters before minus after, float32, keyed by parameter name.

Before minus after makes an update of one step of SGD point along the gradient: it is `lr * gradient`. A server applies it by
subtracting.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

Update = dict[str, Tensor]


def difference(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Update:
    """`before - after`, tensor by tensor."""
    return {name: before[name] - after[name] for name in before}


def norm(update: Mapping[str, Tensor]) -> Tensor:
    """The l2 norm of all entries together, a scalar tensor; 0 for an empty update."""
    return torch.sqrt(sum((t.double().square().sum() for t in update.values()), torch.zeros((), dtype=torch.float64)))


def relative_error(seen: Mapping[str, Tensor], true: Mapping[str, Tensor]) -> float:
    """`|seen - true| / |true|` over all entries; 0 when both vanish, inf when only the true update does."""
    gap, size = float(norm(difference(true, seen))), float(norm(true))
    return gap / size if size else (0.0 if gap == 0 else float("inf"))
