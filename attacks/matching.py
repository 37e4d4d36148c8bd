"""Gradient matching: find images whose gradients are the ones that were sent.

All problems, victims times starts, are one program: a leading dimension P in every tensor. Each problem has its own parameters
(victims of different rounds saw different ones), target, labels, optimizer state and stopping; see `attacks.optimizers`.
Pixels are in [0, 1]; gradients are those of `fedsim.training.batch_loss`, the loss that clients train with.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from attacks.labels import analytic_labels
from attacks.optimizers import LBFGS, Adam, Minima, minimise
from attacks.terms import Gap, Prior, SquaredGap
from fedsim.observation import Knowledge, Observation, Reconstruction
from fedsim.seeding import generator
from fedsim.training import batch_loss

CHUNK = {"cpu": 48, "cuda": 1024}  # problems at a time, where memory allows: measured, more does not help
MEMORY = 2**31  # bytes one chunk may take


@dataclass(frozen=True)
class GradientMatching:
    """Minimises gap(gradients of a candidate, observed update) / unit + priors(candidate images) over the candidate.

    The unit is the gap of a candidate that explains nothing (|update|^2 for SquaredGap), so that a prior's weight means the same
    for large and small updates.

    Threat model: an honest but curious server, or anyone who reads the wire. It knows the model, the broadcast parameters, one
    client's update, the image shape and the number of classes; `labels` says where the labels come from.

    An update of several local steps is taken for one gradient times lr times the number of steps: right for a small lr.

    gap         distance between updates
    priors      what is known about images
    labels      "joint": soft labels are optimised with the images; "analytic": read off the update first; "given": told
    optimizer   LBFGS(...) or Adam(...); it also holds the budget of evaluations per start
    restarts    at most so many starts for a victim; the next one runs only if those before it did not reach `enough`. The start
                with the smallest loss is reported: the truth is never consulted
    init        "normal": N(0, 1); "uniform": U(0, 1); "grey": 0.5 + N(0, 0.1^2), for images; label logits are N(0, 1)
    box         clamp images to [0, 1] after every step; for Adam
    tolerance   largest gap / unit at which a reconstruction `converged`. On CIFAR-10 and DLG's LeNet a squared gap of 1e-3, 1e-4,
                1e-5, 1e-6, 1e-7 units comes with a median MSE of 0.053, 0.024, 0.009, 0.002, 0.0005
    enough      value of what is minimised at which a start ends
    chunk       problems computed at a time; None chooses from the memory they take. No influence on the result
    """

    gap: Gap = SquaredGap()
    priors: tuple[Prior, ...] = ()
    labels: Literal["joint", "analytic", "given"] = "joint"
    optimizer: LBFGS | Adam = LBFGS()
    restarts: int = 1
    init: Literal["normal", "uniform", "grey"] = "normal"
    box: bool = False
    tolerance: float = 1e-5
    enough: float = 1e-6
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.labels not in ("joint", "analytic", "given"):
            raise ValueError(f'labels must be "joint", "analytic" or "given", got {self.labels!r}')
        if self.init not in ("normal", "uniform", "grey"):
            raise ValueError(f'init must be "normal", "uniform" or "grey", got {self.init!r}')
        if self.restarts < 1:
            raise ValueError(f"restarts must be >= 1, got {self.restarts}")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk must be >= 1 or None, got {self.chunk}")
        if self.box and isinstance(self.optimizer, LBFGS):
            raise ValueError(
                "box=True needs optimizer=Adam(...): clamping breaks the line search of LBFGS; use the prior OutOfRange"
            )
        if not (self.tolerance > 0 and self.enough >= 0):
            raise ValueError(f"tolerance must be > 0 and enough >= 0, got {self.tolerance} and {self.enough}")

    def __call__(
        self,
        seen: Sequence[Observation],
        known: Knowledge,
        model: nn.Module,
        rng: torch.Generator,
        *,
        report: Callable[[int, int], None] | None = None,
    ) -> list[Reconstruction]:
        """One reconstruction for each observation, in order; `report(finished, total)` is called as victims finish."""
        sizes = [known.batch_size or one.num_examples for one in seen]
        # A victim's starts are its own: they do not depend on who else is attacked, nor on how problems are grouped below.
        seed = int(torch.randint(2**62, (), generator=rng))
        asked: Counter[tuple[int, int]] = Counter()
        starts = []
        for one, size in zip(seen, sizes, strict=True):
            who = (one.round, one.client)
            starts.append(self._starts(size, known, generator(seed, "start", *who, asked[who])))
            asked[who] += 1
        groups: dict[object, list[int]] = defaultdict(list)
        for i, one in enumerate(seen):
            groups[(sizes[i], tuple((name, p.shape) for name, p in one.packets.items()))].append(i)
        results: dict[int, Reconstruction] = {}
        for members in groups.values():
            group = _Problems.of([seen[i] for i in members], sizes[members[0]], known, model, self)
            with torch.random.fork_rng(devices=[group.device] if group.device.type == "cuda" else []):
                torch.manual_seed(seed)  # for models that draw: dropout, variational bottlenecks
                if self.labels != "joint":
                    group.labels = torch.stack([self._labels(seen[i], i, sizes[i], known, model) for i in members])
                before = len(results)
                solved = self._solve(
                    group,
                    torch.stack([starts[i] for i in members]).to(group.device),
                    lambda finished, before=before: report(before + finished, len(seen)) if report else None,  # type: ignore[misc]
                )
            results |= zip(members, solved, strict=True)
        return [results[i] for i in range(len(seen))]

    def _starts(self, size: int, known: Knowledge, rng: torch.Generator) -> Tensor:
        """(R, D) starts of one victim: images, then label logits."""
        shape = (self.restarts, size * int(torch.Size(known.image_shape).numel()))
        if self.init == "uniform":
            images = torch.rand(shape, generator=rng)
        else:
            images = torch.randn(shape, generator=rng)
            images = images if self.init == "normal" else 0.5 + 0.1 * images
        if self.labels != "joint":
            return images
        return torch.cat([images, torch.randn(self.restarts, size * known.num_classes, generator=rng)], 1)

    def _labels(self, one: Observation, index: int, size: int, known: Knowledge, model: nn.Module) -> Tensor:
        if self.labels == "analytic":
            scale = (known.lr or 1.0) * (known.local_steps or 1)
            gradient = {name: t / scale for name, t in one.update.items()}
            return analytic_labels(gradient, known.num_classes, size, _predicted(one, known, model))
        if known.labels is None:
            raise ValueError('labels="given" needs known.labels; use "analytic" or "joint" for an attacker who is not told')
        return known.labels[index].to(next(iter(one.params.values())).device)

    def _solve(self, group: "_Problems", starts: Tensor, report: Callable[[int], None]) -> list[Reconstruction]:
        began = time.perf_counter()
        v, r, _ = starts.shape
        unit = group.unit
        chunk = self.chunk or group.chunk(starts[:1, 0], self.optimizer)
        minima = minimise(
            group.evaluate,
            starts,
            self.optimizer,
            target=torch.full_like(unit, self.enough),
            chunk=chunk,
            project=group.clamp if self.box else None,
            report=lambda finished, _: report(finished),
        )
        gaps = _in_chunks(group.gaps, minima.points.flatten(0, 1), r, chunk).reshape(v, r)
        gaps = torch.where(minima.losses.isfinite() & gaps.isfinite(), gaps, torch.inf)
        seconds = time.perf_counter() - began
        spent = minima.evaluations.sum(1)
        share = (seconds * spent / spent.sum()).tolist()
        return [self._reconstruction(group, minima, gaps[i], i, float(unit[i]), share[i]) for i in range(v)]

    def _reconstruction(
        self, group: "_Problems", minima: Minima, gaps: Tensor, i: int, unit: float, seconds: float
    ) -> Reconstruction:
        tried = int(minima.tried[i])
        best = int(gaps[:tried].argmin())
        images = group.images(minima.points[i]).clamp(0, 1)
        return Reconstruction(
            images=images[best],
            labels=group.hard_labels(minima.points[i], i)[best],
            loss=float(gaps[best]),
            converged=bool(gaps[best] <= self.tolerance * unit),
            starts=images[:tried],
            losses=gaps[:tried],
            evaluations=int(minima.evaluations[i].sum()),
            seconds=seconds,
        )


@dataclass
class _Problems:
    """V victims of equal shapes: what was broadcast and sent, stacked, and how to evaluate candidates against it."""

    model: nn.Module
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    target: dict[str, Tensor]
    shape: tuple[int, ...]  # (B, C, H, W)
    num_classes: int
    gap: Gap
    priors: tuple[Prior, ...]
    labels: Tensor | None = None  # (V, B), or None when they are optimised too

    def __post_init__(self) -> None:
        unit = self.gap.unit(self.target)
        self.unit = torch.where(unit > 0, unit, 1)  # an update of zeros is explained by a gradient of zeros
        self._rows: Tensor | None = None
        self._gathered: tuple[dict[str, Tensor], ...] = ()

    @classmethod
    def of(
        cls, seen: Sequence[Observation], size: int, known: Knowledge, model: nn.Module, attack: GradientMatching
    ) -> "_Problems":
        """The observations stacked, and scaled to gradients."""
        steps = known.local_steps or 1
        if known.lr is None and steps > 1 and not attack.gap.scale_free:
            raise ValueError(f"{attack.gap} needs known.lr to compare an update of {steps} local steps; or use CosineGap()")
        scale = (known.lr or 1.0) * steps
        updates = [one.update for one in seen]

        def stack(dicts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
            return {name: torch.stack([one[name] for one in dicts]) for name in dicts[0]}

        return cls(
            model=model,
            params=stack([one.params for one in seen]),
            buffers=stack([one.buffers for one in seen]),
            target={name: t / scale for name, t in stack(updates).items()},
            shape=(size, *known.image_shape),
            num_classes=known.num_classes,
            gap=attack.gap,
            priors=attack.priors,
        )

    @property
    def device(self) -> torch.device:
        return next(iter(self.params.values())).device

    @property
    def pixels(self) -> int:
        return int(torch.Size(self.shape).numel())

    def images(self, points: Tensor) -> Tensor:
        """(P, B, C, H, W) of points (P, D)."""
        return points[:, : self.pixels].reshape(-1, *self.shape)

    def clamp(self, points: Tensor) -> Tensor:
        """Points with their images clamped to [0, 1]."""
        return torch.cat([points[:, : self.pixels].clamp(0, 1), points[:, self.pixels :]], 1)

    def probabilities(self, points: Tensor, problems: Tensor) -> Tensor:
        """(P, B, K) label probabilities: of the points, or those known beforehand."""
        if self.labels is not None:
            return nn.functional.one_hot(self.labels[problems], self.num_classes).to(points.dtype)
        return points[:, self.pixels :].reshape(len(points), self.shape[0], self.num_classes).softmax(-1)

    def hard_labels(self, points: Tensor, problem: int) -> Tensor:
        """(P, B) int64."""
        problems = torch.full((len(points),), problem, device=points.device)
        return self.probabilities(points, problems).argmax(-1)

    def evaluate(self, points: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (P,) and their gradients (P, D) at points (P, D) of these problems."""
        points = points.detach().requires_grad_()
        losses = self._gaps(points, problems) / self.unit[problems]
        for prior in self.priors:
            losses = losses + prior(self.images(points))
        # Problems do not interact, so the gradient of the sum holds each one's own.
        (gradient,) = torch.autograd.grad(losses.sum(), points)
        return losses.detach(), gradient

    def gaps(self, points: Tensor, problems: Tensor) -> Tensor:
        """The gap alone, without priors."""
        return self._gaps(points.detach(), problems).detach()

    def _gaps(self, points: Tensor, problems: Tensor) -> Tensor:
        params, buffers, target = self._gather(problems)
        params = {name: t.detach().requires_grad_() for name, t in params.items()}
        buffers = {name: t.clone() for name, t in buffers.items()}  # BatchNorm in training mode writes to them

        def loss(params: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
            return batch_loss(self.model, params, buffers, images, labels)

        losses = vmap(loss, randomness="different")(params, buffers, self.images(points), self.probabilities(points, problems))
        wanted = [params[name] for name in target]
        gradients = torch.autograd.grad(losses.sum(), wanted, create_graph=True)
        return self.gap(dict(zip(target, gradients, strict=True)), target)

    def _gather(self, problems: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Parameters, buffers and target of these problems; kept until other problems are asked for."""
        if self._rows is None or not torch.equal(self._rows, problems):
            self._rows = problems.clone()
            self._gathered = tuple({n: t[problems] for n, t in part.items()} for part in (self.params, self.buffers, self.target))
        params, buffers, target = self._gathered
        return params, buffers, target

    def chunk(self, point: Tensor, optimizer: LBFGS | Adam) -> int:
        """Problems to compute at a time, by what one saves for its backward passes."""
        saved = 0

        def count(t: Tensor) -> Tensor:
            nonlocal saved
            saved += t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            self.evaluate(point, torch.zeros(1, dtype=torch.int64, device=point.device))
        memory = 2 * optimizer.history if isinstance(optimizer, LBFGS) else 2
        saved += (memory + 8) * point.numel() * point.element_size()
        return max(1, min(CHUNK.get(self.device.type, CHUNK["cpu"]), MEMORY // saved))


def _in_chunks(gaps: Callable[[Tensor, Tensor], Tensor], points: Tensor, starts: int, chunk: int) -> Tensor:
    problems = torch.arange(len(points), device=points.device) // starts
    return torch.cat([gaps(p, v) for p, v in zip(points.split(chunk), problems.split(chunk), strict=True)])


@torch.no_grad()
def _predicted(one: Observation, known: Knowledge, model: nn.Module) -> Tensor:
    """(K,) what the model answers to noise, on average: about what an untrained one answers to anything."""
    device = next(iter(one.params.values())).device
    noise = torch.rand((32, *known.image_shape), generator=torch.Generator().manual_seed(0)).to(device)
    buffers = {name: t.clone() for name, t in one.buffers.items()}
    output = functional_call(model, {**one.params, **buffers}, (noise,))
    logits = output[0] if isinstance(output, tuple) else output
    return logits.softmax(-1).mean(0)
