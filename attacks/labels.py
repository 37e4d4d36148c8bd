"""Labels read off an update, without optimising anything.

The gradient of the mean cross-entropy with respect to the last bias is mean(p - y): the predicted probabilities minus the one-hot
labels. An entry is negative only where a label is, so the batch's labels stand in it almost in the clear (Zhao et al. 2020).
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def analytic_labels(update: Mapping[str, Tensor], num_classes: int, batch_size: int = 1, predicted: Tensor | None = None) -> Tensor:
    """(B,) int64, the labels of a batch of B, in ascending order; `update` is its mean gradient.

    One image: the only negative entry (Zhao et al. 2020). Exact for cross-entropy and a head with a bias, whatever stands in
    front of the gradient and before the head.

    A batch: a class that occurs n times has the entry mean(p) - n / B, so n is about B (p - entry) with the prediction p that
    the model makes of any image, `predicted` (K,); 1/K each if None (in the spirit of Wainakh et al. 2022). Every negative entry
    counts at least once, for that is certain; the remaining places go one by one to the class that most exceeds its count.
    Good while predictions depend little on the image: for untrained models.
    """
    signal = _class_signal(update, num_classes).double()
    if batch_size == 1:
        return signal.argmin().reshape(1)
    if predicted is None:
        predicted = torch.full_like(signal, 1 / num_classes)
    expected = batch_size * (predicted.double() - signal)
    certain = (signal < 0).nonzero().squeeze(1)
    counts = torch.zeros_like(signal)
    counts[certain[signal[certain].argsort()][:batch_size]] = 1
    for _ in range(batch_size - int(counts.sum())):
        counts[(expected - counts).argmax()] += 1
    return torch.repeat_interleave(counts.long())


def _class_signal(update: Mapping[str, Tensor], num_classes: int) -> Tensor:
    """(K,) mean(p - y), from the head's bias: the last tensor of shape (K,).

    A head without one is read off its weight (K, D), the last such matrix: its rows are (p - y) times the features, so their
    sums have the sign of p - y where features are positive (ReLU, sigmoid), and a scale that makes their negative part sum to
    -(1 - 1/K), about what B labels leave of it.
    """
    biases = [t for t in update.values() if t.shape == (num_classes,)]
    if biases:
        return biases[-1]
    weights = [t for t in update.values() if t.dim() == 2 and len(t) == num_classes]
    if weights:
        rows = weights[-1].sum(1)
        negative = -rows.clamp(max=0).sum()
        return rows * (1 - 1 / num_classes) / negative if negative > 0 else rows
    shapes = [tuple(t.shape) for t in update.values()]
    raise ValueError(f"no tensor of the update belongs to a head of {num_classes} classes: their shapes are {shapes}")
