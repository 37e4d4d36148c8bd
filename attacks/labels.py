"""Labels read off an update, without optimising anything.

The gradient of the mean cross-entropy with respect to the last bias is mean(p - y): the predicted probabilities minus the one-hot
labels. An entry is negative only where a label is, so the batch's labels stand in it almost in the clear (Zhao et al. 2020).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from attacks.evidence import believed, completed, fed_to_linear, gradient_of
from fedsim.defense import Belief, Explained
from fedsim.observation import Knowledge, Observation

PUBLIC = 64  # images that stand for those of clients
LIKELY = 10  # labels of an image that are held against all that is known


def analytic_labels(update: Mapping[str, Tensor], num_classes: int, batch_size: int = 1, predicted: Tensor | None = None) -> Tensor:
    """(B,) int64, the labels of a batch of B, in ascending order; `update` is its mean gradient.

    One image: the only negative entry (Zhao et al. 2020). Exact for cross-entropy and a head with a bias, whatever stands in
    front of the gradient and before the head.

    A batch: a class that occurs n times has the entry mean(p) - n / B, so n is about B (p - entry) with the prediction p that
    the model makes of any image, `predicted` (K,); 1/K each if None (in the spirit of Wainakh et al. 2022). Every negative entry
    counts at least once, for that is certain; the remaining places go one by one to the class that most exceeds its count.
    Good while predictions depend little on the image: for untrained models.
    """
    return _counted(_class_signal(update, num_classes), batch_size, predicted)


def labels_behind(seen: Sequence[Observation], known: Knowledge, model: nn.Module, batch_size: int) -> Tensor:
    """(B,) int64, the labels of B images, in ascending order, given updates of them: as `analytic_labels` from the mean update and
    the mean of what each update's model predicts.

    Somebody who knows a defense that leaves the head's bias without bounds, by noise or by leaving it out, asks the whole head. Of
    one image it is the label under which some public image explains the head best, where the bias alone does not settle it. Of a
    batch, the head's gradient is about mean(p - y) times the features, which are about those of any image, and is solved for the
    former by least squares over all entries that tell of it. One number a class is then estimated from hundreds.
    """
    explained = isinstance(known.defense, Explained)
    if explained and batch_size == 1 and (label := _explaining_label(seen, known, model)) is not None:
        return label.reshape(1)
    noise = torch.rand((32, *known.image_shape), generator=torch.Generator().manual_seed(0))
    signals, predicted = [], []
    for view in seen:
        _, logits = fed_to_linear(model, view.params, view.buffers, noise.to(_device(view)))
        predicted.append(logits.softmax(-1).mean(0))
        pooled = _pooled_signal(view, known, model, batch_size) if explained else None
        signals.append(_class_signal(gradient_of(view, known), known.num_classes) if pooled is None else pooled)
    return _counted(torch.stack(signals).mean(0), batch_size, torch.stack(predicted).mean(0))


def _counted(signal: Tensor, batch_size: int, predicted: Tensor | None) -> Tensor:
    """(B,) labels that leave this mean(p - y), (K,)."""
    signal = signal.double()
    if batch_size == 1:
        return signal.argmin().reshape(1)
    if predicted is None:
        predicted = torch.full_like(signal, 1 / len(signal))
    expected = batch_size * (predicted.double() - signal)
    certain = (signal < 0).nonzero().squeeze(1)
    counts = torch.zeros_like(signal)
    counts[certain[signal[certain].argsort()][:batch_size]] = 1
    for _ in range(batch_size - int(counts.sum())):
        counts[(expected - counts).argmax()] += 1
    return torch.repeat_interleave(counts.long())


def soft_labels(gradient: Mapping[str, Tensor], head: str, features: Tensor, logits: Tensor) -> Tensor:
    """(B, K) label probabilities of the images that have these features and logits: one-hot, smoothed or mixed, as the client's.

    The head's gradient is sum_b (p_b - y_b) h_b / B, and its bias's sum_b (p_b - y_b) / B: linear in y, and solved for it. Exact
    where the images are, and B <= D + 1; where they are not, rows need not be distributions, which tells.

    head      name of the last linear layer, as in `gradient` without ".weight"
    features  (B, D) what it is fed
    logits    (B, K)
    """
    h, g = features.double(), gradient[f"{head}.weight"].double()
    if f"{head}.bias" in gradient:
        h = torch.cat([h, torch.ones_like(h[:, :1])], 1)
        g = torch.cat([g, gradient[f"{head}.bias"].double()[:, None]], 1)
    # Times h_b on the right: (B, B) equations, which do not grow with the features.
    errors = torch.linalg.pinv(h @ h.T, hermitian=True) @ (h @ g.T)
    return logits.double().softmax(-1) - len(h) * errors


def labels_at(seen: Observation, known: Knowledge, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) int64 and (B, K): the label of each of these images, given what was sent; which label is whose, and not only how many.

    A single label is read off the sign. Those of a batch, and what else a label's distribution holds, are solved for; where the
    solution is none, since the images are not the client's, the labels that `analytic_labels` counts are given to the images that
    want them most.
    """
    size, k = len(images), known.num_classes
    gradient = gradient_of(seen, known)
    fed, logits = fed_to_linear(model, seen.params, seen.buffers, images)
    counted = analytic_labels(gradient, k, size, logits.softmax(-1).mean(0))
    heads = [name for name, h in fed.items() if gradient.get(f"{name}.weight", h).shape == (k, h.shape[1])]
    wanted = soft_labels(gradient, heads[-1], fed[heads[-1]], logits) if heads else logits.double().softmax(-1)
    if heads and bool(((wanted > -0.01) & (wanted < 1.01)).all()):
        soft = wanted.clamp(0, 1) / wanted.clamp(0, 1).sum(1, keepdim=True)
        hard = counted if size == 1 else soft.argmax(1)
        sure = soft.amax(1, keepdim=True) > 0.99  # rounding, not smoothing
        return hard, torch.where(sure, one_hot(soft.argmax(1), k), soft).to(logits.dtype)
    from scipy.optimize import linear_sum_assignment

    rows, places = linear_sum_assignment(-wanted.nan_to_num(0)[:, counted].cpu().numpy())
    hard = torch.empty_like(counted)
    hard[torch.as_tensor(rows, device=hard.device)] = counted[torch.as_tensor(places, device=hard.device)]
    return hard, one_hot(hard, k).to(logits.dtype)


@dataclass(frozen=True)
class _Head:
    """What is known of the gradient of a network's last linear layer, its bias (if any) the last column, and of what it is fed.

    told    each part of it (K, D) or (K, D + 1)
    fed     (N, D) or (N, D + 1) what N images feed it, 1 for the bias
    logits  (N, K) what it makes of these
    biased  whether the last column is a bias
    sure    whether the bias was sent, and is known to a cell or to a side of it, value and all
    """

    told: Belief
    fed: Tensor
    logits: Tensor
    biased: bool = False
    sure: bool = False

    @classmethod
    def of(cls, seen: Observation, known: Knowledge, model: nn.Module) -> "_Head | None":
        """With public images, or noise where there are none; None if the model has no such head."""
        images = torch.rand((PUBLIC, *known.image_shape), generator=torch.Generator().manual_seed(0))
        if known.public is not None:
            images, _ = known.public.batch(torch.arange(min(PUBLIC, len(known.public))))
        fed, logits = fed_to_linear(model, seen.params, seen.buffers, images.to(_device(seen)))
        told = believed(seen, known)
        names = [n for n in fed if f"{n}.weight" in told and len(told[f"{n}.weight"].value) == known.num_classes]
        if not names:
            return None
        weight, bias, h = told[f"{names[-1]}.weight"], told.get(f"{names[-1]}.bias"), fed[names[-1]]
        if bias is None:
            return cls(weight, h, logits)
        parts = [torch.cat([getattr(weight, f.name), getattr(bias, f.name)[:, None]], 1) for f in fields(Belief)]
        bounded = seen.packets[f"{names[-1]}.bias"].sent() & (bias.low.isfinite() | bias.high.isfinite())
        return cls(
            told=Belief(*parts),
            fed=torch.cat([h, torch.ones_like(h[:, :1])], 1),
            logits=logits,
            biased=True,
            sure=bool(bounded.all() & weight.weight.any()),
        )

    @property
    def weight(self) -> Tensor:
        """What each value counts for; signs bound each entry, and their values are all there is."""
        return self.told.weight if self.told.weight.any() else torch.ones_like(self.told.weight)

    def least(self) -> Tensor | None:
        """The class whose bias is surely the smallest, a scalar; None if that is not sure."""
        low, high = self.told.low[:, -1], self.told.high[:, -1]
        least = self.told.value[:, -1].argmin()
        others = torch.arange(len(low), device=low.device) != least
        return least if self.biased and bool((high[least] <= low[others]).all()) else None

    def lengths(self) -> tuple[Tensor, Tensor]:
        """(N, K) the length at which an image, under a label, is nearest to the values that were told; and the share it leaves."""
        value, weight, p = self.told.value, self.weight, self.logits.softmax(-1)
        tiny = torch.finfo(p.dtype).tiny
        along, square = self.fed @ (weight * value).T, self.fed.square() @ weight.T
        products = (p * along).sum(1, keepdim=True) - along
        squares = (p.square() * square).sum(1, keepdim=True) + (1 - 2 * p) * square
        lengths = (products / squares.clamp(min=tiny)).clamp(min=tiny)
        return lengths, 1 - lengths * products / (weight * value.square()).sum().clamp(min=tiny)

    def unexplained(self, labels: Tensor) -> Tensor:
        """(N, L) the share of all that was told that each image leaves under these labels, bounds and all."""
        weight, (lengths, _) = self.weight, self.lengths()
        told = Belief(self.told.value, self.told.low, self.told.high, weight)
        errors = self.logits.softmax(-1)[:, None, :] - one_hot(labels, len(weight))
        far = []
        for error, fed, length in zip(errors, self.fed, lengths[:, labels], strict=True):
            g = (length[:, None] * error)[:, :, None] * fed
            far.append((g - completed({"": g}, {"": told})[""]).square().sum((1, 2)))
        return torch.stack(far) / (weight * told.value.square()).sum().clamp(min=torch.finfo(weight.dtype).tiny)


def _explaining_label(seen: Sequence[Observation], known: Knowledge, model: nn.Module) -> Tensor | None:
    """The label of one image, a scalar, given updates of it; None if the model has no head that can be asked."""
    heads = []
    for view in seen:
        head = _Head.of(view, known, model)
        if head is None:
            return None
        if (least := head.least()) is not None:
            return least
        heads.append(head)
    by_values = torch.stack([head.lengths()[1] for head in heads]).sum(0).amin(0)
    likely = by_values.argsort()[:LIKELY]
    return likely[torch.stack([head.unexplained(likely) for head in heads]).sum(0).amin(0).argmin()]


def _pooled_signal(seen: Observation, known: Knowledge, model: nn.Module, batch_size: int) -> Tensor | None:
    """(K,) mean(p - y) from all of the head that was sent; None where its bias says it, or the model has no such head."""
    head = _Head.of(seen, known, model)
    if head is None or not head.biased or head.sure:
        return None
    low, high, fed = head.told.low.double(), head.told.high.double(), head.fed.double()
    cell = (high - low).isfinite()
    values = torch.where(cell, (low + high) / 2, head.told.value.double())
    weight = torch.where(cell, 1.0, head.weight.double())
    rounding = torch.where(cell, high - low, 0.0).square() / 12
    # The gradient's columns add up to 0, so what whole ones add up to is error. Besides, features differ between images.
    error = ((weight * values).sum(0).square() - rounding.sum(0))[(weight > 0).all(0)]
    noise = error.mean().clamp(min=0) / len(values) if len(error) else 0.0
    # Before anything is seen, labels are taken for equally likely.
    expected = head.logits.double().softmax(-1).mean(0) - 1 / len(values)
    spread = (1 - 1 / len(values)) / len(values)
    differing = (spread + expected.square())[:, None] * fed.var(0, correction=0) / batch_size
    trust, mean = weight / (noise + rounding + differing).clamp(min=1e-12), fed.mean(0)
    prior = batch_size / spread
    return ((trust * values) @ mean + prior * expected) / (trust @ mean.square() + prior)


def _class_signal(update: Mapping[str, Tensor], num_classes: int) -> Tensor:
    """(K,) mean(p - y), from the head's bias: the last tensor of shape (K,), unless a matrix of the head follows.

    A head without one is read off its weight (K, D), the last such matrix: its rows are (p - y) times the features, so their
    sums have the sign of p - y where features are positive (ReLU, sigmoid), and a scale that makes their negative part sum to
    -(1 - 1/K), about what B labels leave of it.
    """
    heads = [t for t in update.values() if t.dim() in (1, 2) and len(t) == num_classes]
    if heads and heads[-1].dim() == 1:
        return heads[-1]
    if heads:
        rows = heads[-1].sum(1)
        negative = -rows.clamp(max=0).sum()
        return rows * (1 - 1 / num_classes) / negative if negative > 0 else rows
    shapes = [tuple(t.shape) for t in update.values()]
    raise ValueError(f"no tensor of the update belongs to a head of {num_classes} classes: their shapes are {shapes}")


def _device(seen: Observation) -> torch.device:
    return next(iter(seen.params.values())).device
