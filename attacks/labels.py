"""Labels read off an update, without optimising anything.

The gradient of the mean cross-entropy with respect to the last bias is mean(p - y): the predicted probabilities minus the one-hot
labels. An entry is negative only where a label is, so the batch's labels stand in it almost in the clear (Zhao et al. 2020).
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def class_signal(update: Mapping[str, Tensor], num_classes: int) -> Tensor:
    """(K,) what the update says about each class, lower where labels are: the gradient of the head's bias.

    The head's bias is the last tensor of shape (K,). A head without one is read off its weight (K, D), the last such matrix: its
    rows are (p - y) times a feature vector; their sum has the sign of (p - y) where features are positive (ReLU, sigmoid).
    """
    biases = [t for t in update.values() if t.shape == (num_classes,)]
    weights = [t for t in update.values() if t.dim() == 2 and len(t) == num_classes]
    if biases:
        return biases[-1]
    if weights:
        return weights[-1].sum(1)
    shapes = [tuple(t.shape) for t in update.values()]
    raise ValueError(f"no tensor of the update belongs to a head of {num_classes} classes: shapes are {shapes}")


def analytic_labels(update: Mapping[str, Tensor], num_classes: int, batch_size: int = 1) -> Tensor:
    """(B,) int64, the most plausible labels of a batch, in ascending order.

    One image: its label is the only negative entry (Zhao et al. 2020); exact for cross-entropy and any model with a bias in its
    head. A batch of B: every negative entry is a label for certain. The rest is filled one label at a time, each time with the
    class whose entry is lowest once the labels found so far are taken out; with an untrained model's near-uniform predictions
    each label contributes -1/B, so this counts repetitions (in the spirit of Geng et al. 2021). A factor in front of the update
    is estimated from the update itself: all negative mass belongs to labels.
    """
    signal = class_signal(update, num_classes).double()
    if batch_size == 1:
        return signal.argmin().reshape(1)
    # Per label, (mean p - 1) / B is expected where p is the mean prediction, about 1 / K: so negative entries sum to about
    # -(1 - 1 / K) when every label differs; where labels repeat, too. `weight` is one label's share of that.
    negative = signal.clamp(max=0)
    weight = float(-negative.sum()) / batch_size * (1 + 1 / num_classes)
    found = torch.nonzero(negative < 0).squeeze(1)
    found = found[signal[found].argsort()][:batch_size].tolist()
    rest = signal.clone()
    rest[found] += weight
    while len(found) < batch_size:
        label = int(rest.argmin())
        found.append(label)
        rest[label] += weight
    return torch.tensor(sorted(found), device=signal.device)
