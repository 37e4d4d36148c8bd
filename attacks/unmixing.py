"""From what a client trained on back to its images, where a known defense mixed them (MixUp, InstaHide) or transformed them (ATS).

Gradient matching finds a batch as it was trained on, with its soft labels. These are mixed as the images are, so they tell the
weights: with B labels of B classes the mixture (B, B) is their matrix. Labels that repeat tell sums of weights only; then the
defense, which whoever knows it can run, says how they may be split. Linear mixtures are solved for. Of a reflected pixel,
p or 1 - p, what is left is |2 p - 1| (Carlini et al. 2021), and which way round it was is chosen for the smoothest images.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from attacks.batching import streams
from attacks.evidence import views
from attacks.labels import labels_at
from attacks.metrics import match
from attacks.terms import total_variation
from fedsim.defense import Mixing, Reversible
from fedsim.observation import Attack, Knowledge, Observation, Reconstruction

PRESENT = 0.25  # images' worth of a class, from which on it is taken to be in the batch: each of its images has about 1
AS_NEAR = 0.02  # mean squared distance from the soft labels up to which draws of a mixture are told apart by the images alone
SINGULAR = 1e-3  # determinant of a mixture that loses an image
ERROR = 3e-3  # variance of a reconstruction's error, in that of images
FIT = 50.0  # what a squared error weighs beside an absolute difference of neighbours
MOST = 4  # images whose signs are looked for together: 2^4 choices for each pixel


@dataclass(frozen=True)
class Unmixed:
    """What `attack` reconstructs of a batch, with the mixing of a known defense undone.

    Each message is of mixtures of its own. Those that a client sent of the same images (`known.same_images`) are reconstructed one
    by one, and solved for the images together. Nothing tells a reflected batch from its negative; the one whose pixels are more
    like those of public images is taken. Left as they are: updates of several local steps or clients, each with a mixture of its
    own, reflected batches of more than 4 images, batches of which images are missing, and a search that diverged.

    Threat model: that of `attack`, of an attacker who also knows the clients' defense.

    attack  reconstructs what was trained on, with soft labels
    mixing  the defense, or the part of it that mixes
    draws   mixtures that it is asked for where labels repeat
    """

    attack: Attack
    mixing: Mixing
    draws: int = 2000

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws must be >= 1, got {self.draws}")

    def __call__(
        self,
        seen: Sequence[Observation],
        known: Knowledge,
        model: nn.Module,
        rng: torch.Generator,
        *,
        report: Callable[[int, int], None] | None = None,
    ) -> list[Reconstruction]:
        """One reconstruction for each observation, in order."""
        each = [views(one, replace(known, defense=None)) for one in seen]
        labels = None if known.labels is None else [y for y, own in zip(known.labels, each, strict=True) for _ in own]
        told = replace(known, labels=labels)
        made = iter(self.attack([view for own in each for view in own], told, model, rng, report=report))
        seed = int(torch.randint(2**62, (), generator=rng))
        found = []
        for own, chance in zip(each, streams(seen, seed, "mixtures"), strict=True):
            batches = [next(made) for _ in own]
            several = (known.local_steps or 1) > 1 or bool(own[-1].summed)
            large = self.mixing.reflects and len(batches[-1].images) > MOST
            if several or large or any(one.missed or not bool(one.images.isfinite().all()) for one in batches):
                found.append(batches[-1])
                continue
            soft = [
                labels_at(view, known, model, one.images)[1] if one.probabilities is None else one.probabilities
                for view, one in zip(own, batches, strict=True)
            ]
            images, hard = unmixed(self.mixing, [one.images for one in batches], soft, chance, known, self.draws)
            spent, seconds = sum(one.evaluations for one in batches), sum(one.seconds for one in batches)
            whole = replace(batches[-1], labels=hard, evaluations=spent, seconds=seconds, probabilities=None, certain=None)
            starts = torch.full_like(whole.starts, torch.nan)  # what another start would have given was not solved for
            starts[whole.losses.argmin()] = images
            found.append(_instead(whole, images, starts))
        return found


@dataclass(frozen=True)
class Undone:
    """What `attack` reconstructs of a batch, with the transformation of its images by a known defense undone.

    Left as they are: updates of several local steps, which may have transformed the same image in several ways.

    Threat model: that of `attack`, of an attacker who also knows the clients' defense.

    attack     reconstructs what was trained on
    transform  the defense, or the part of it that transforms images
    """

    attack: Attack
    transform: Reversible

    def __call__(
        self,
        seen: Sequence[Observation],
        known: Knowledge,
        model: nn.Module,
        rng: torch.Generator,
        *,
        report: Callable[[int, int], None] | None = None,
    ) -> list[Reconstruction]:
        """One reconstruction for each observation, in order."""
        found = self.attack(seen, known, model, rng, report=report)
        if (known.local_steps or 1) > 1:
            return found
        return [
            _instead(one, self.transform.undone(one.images), torch.stack([self.transform.undone(start) for start in one.starts]))
            for one in found
        ]


def _instead(one: Reconstruction, images: Tensor, starts: Tensor) -> Reconstruction:
    """A reconstruction with other images in the place of those it reports, and of those of its starts."""
    return replace(one, images=images, starts=starts, attack=f"{one.attack}, undone".removeprefix(", "))


def unmixed(
    mixing: Mixing, batches: Sequence[Tensor], soft: Sequence[Tensor], rng: torch.Generator, known: Knowledge, draws: int = 2000
) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W) in [0, 1] and labels (B,) behind one or several batches of mixtures of them.

    batches  each (B, C, H, W), in any order
    soft     their label probabilities, each (B, K)
    """
    undo = _unfolded if mixing.reflects else _solved
    signed = [2 * z - 1 for z in batches]
    told = [_mixture(mixing, z, q, rng, draws) for z, q in zip(signed, soft, strict=True)]
    # The best conditioned mixture gives the order of the images.
    first = max(range(len(told)), key=lambda i: float(torch.linalg.svdvals(told[i][0]).min()))
    together, (_, labels, _) = undo(told[first][0], signed[first]), told[first]
    weights = []
    for (mixture, own, distinct), z in zip(told, signed, strict=True):
        if not (distinct and torch.equal(own, labels)):  # where labels do not say which image is which, likeness does
            found, places = match(*(t.abs() if mixing.reflects else (t + 1) / 2 for t in (undo(mixture, z), together)))
            mixture = mixture[:, torch.empty_like(found).index_copy(0, places, found)]
        weights.append(mixture)
    if len(batches) > 1:
        together = undo(torch.cat(weights), torch.cat(signed))
    if mixing.reflects and known.public is not None:
        usual = known.public.pixels.float().mean(0).to(together) / 127.5 - 1
        together = together if float((together * usual).sum()) >= 0 else -together
    return ((together + 1) / 2).clamp(0, 1), labels


def _mixture(mixing: Mixing, z: Tensor, q: Tensor, rng: torch.Generator, draws: int) -> tuple[Tensor, Tensor, bool]:
    """(B, B) how much of each image is in each mixture, (B,) the images' labels, and whether these are all different.

    z  (B, C, H, W) the mixtures, in [-1, 1]
    q  (B, K) their label probabilities
    """
    size, q = len(z), q.double()
    mass = q.sum(0)
    present = (mass >= mass.max().clamp(max=PRESENT)).nonzero().squeeze(1)
    present = mass.topk(size).indices.sort().values if len(present) > size else present
    q = q[:, present] / q[:, present].sum(1, keepdim=True).clamp(min=1e-6)
    if len(present) == size:
        return q.to(z), present, True
    tried = torch.stack([mixing.mixture(size, rng) for _ in range(draws)]).to(q)
    classes = torch.linalg.lstsq(tried + 1e-3 * torch.eye(size).to(q), q.expand(draws, -1, -1)).solution.argmax(-1)
    whose = one_hot(classes, len(present)).to(q)  # (draws, B, classes)
    far = (tried @ whose - q).square().mean((1, 2))
    near = (far <= far.min() + AS_NEAR).nonzero().squeeze(1)
    # The labels say how much of each class there is, and the draw how that is shared by the images of the class.
    shares = tried[near] / (tried[near] @ whose[near]).clamp(min=1e-6).gather(2, classes[near][:, None].expand(-1, size, -1))
    fitted = shares * q.gather(1, classes[near].flatten().expand(size, -1)).reshape(size, len(near), size).transpose(0, 1)
    best = far[near].argmin() if mixing.reflects else torch.stack([_unlikely(one, z) for one in fitted]).argmin()
    return fitted[best].to(z), present[classes[near[best]]], False


def _unlikely(weights: Tensor, z: Tensor) -> Tensor:
    """Minus the log-likelihood, by pixel, of these weights of mixtures z, up to a constant; inf where they lose an image.

    Differences of neighbouring pixels of photographs have Laplace distributions, and are independent from image to image: the
    density of independent component analysis (Bell & Sejnowski 1995).
    """
    size = torch.linalg.det(weights).abs()
    if size < SINGULAR:
        return torch.full_like(size, torch.inf)
    x = torch.einsum("ij,jchw->ichw", torch.linalg.inv(weights), z.double())
    return size.log() + total_variation(x).log().sum()


def _solved(weights: Tensor, z: Tensor) -> Tensor:
    """(B, C, H, W) images of M mixtures by weights (M, B): least squares, with what they leave open taken from the mean mixture."""
    a, mean = weights.double(), z.double().mean(0)
    off = torch.einsum("mb,mchw->bchw", a, z.double() - mean)
    inverse = torch.linalg.inv(a.T @ a + ERROR * torch.eye(a.shape[1]).to(a))
    return (mean + torch.einsum("ab,bchw->achw", inverse, off)).to(z)


def _unfolded(weights: Tensor, z: Tensor) -> Tensor:
    """(B, C, H, W) images in [-1, 1] of M reflected mixtures by weights (M, B), up to their negative: all signs turned at once.

    Of a pixel the magnitudes m of its mixtures are known. Each choice of signs for B of them gives the pixel of all images; those
    that are out of range, or do not explain the other mixtures, are unlikely, and so are those unlike their neighbours'.
    """
    rows, m = weights.double(), z.double().abs()
    size = rows.shape[1]
    base = max(range(0, len(rows), size), key=lambda i: float(torch.linalg.svdvals(rows[i : i + size]).min()))
    signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=size))).to(rows)
    chosen = signs[:, :, None, None, None] * m[base : base + size]  # (S, B, C, H, W)
    states = torch.stack([_solved(rows[base : base + size], one) for one in chosen])
    misfit = (torch.einsum("mb,sbchw->smchw", rows, states).abs() - m).square().sum(1)
    outside = (states - states.clamp(-1, 1)).square().sum(1)
    best = _smoothest(states, FIT * (misfit + outside))  # (C, H, W)
    x = states.gather(0, best.expand(1, size, *best.shape)).squeeze(0)
    side = torch.einsum("mb,bchw->mchw", rows, x).sign()
    return _solved(rows, side * m).to(z)


def _smoothest(states: Tensor, cost: Tensor, rounds: int = 48) -> Tensor:
    """(C, H, W) the state of each pixel, so that costs (S, C, H, W) and absolute differences of neighbours are small together.

    Neighbours are those of a pixel in its plane, and itself in the next colour. Min-sum belief propagation. What is as good turned
    into its negative everywhere is decided in one place.

    states  (S, B, C, H, W) values of B images
    """
    cost = cost.clone()
    brightest = int(states.abs().sum((0, 1)).argmax())
    cost.flatten(1)[:, brightest] += torch.where(states.sum(1).flatten(1)[:, brightest] < 0, 1.0, 0.0)
    ways = [(axis, step) for axis in (2, 3, 1) for step in (1, -1)]  # of (S, C, H, W)
    far, inside = [], []
    for axis, step in ways:
        before = states.roll(step, axis + 1)
        far.append((states[:, None] - before[None]).abs().clamp(max=1).sum(2))  # (to, from, C, H, W)
        edge = torch.ones_like(cost[:1])
        edge.select(axis, 0 if step == 1 else -1).zero_()
        inside.append(edge)
    told = [torch.zeros_like(cost) for _ in ways]
    for _ in range(rounds):
        belief = cost + torch.stack(told).sum(0)
        passed = [(belief - told[i ^ 1]).roll(step, axis) for i, (axis, step) in enumerate(ways)]
        heard = [(far[i] + one[None]).amin(1) for i, one in enumerate(passed)]
        heard = [(one - one.amin(0)) * edge for one, edge in zip(heard, inside, strict=True)]
        told = [(old + new) / 2 for old, new in zip(told, heard, strict=True)]
    return (cost + torch.stack(told).sum(0)).argmin(0)
