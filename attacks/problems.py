"""Candidates for what was sent, and how far each is from it: many victims and starts as one program.

Problems, victims times starts, are a leading dimension P in every tensor. Each has its own parameters (victims of different rounds
saw different ones), target and labels. Pixels are in [0, 1]. A candidate's update is computed by `fedsim.training.local_update`,
which clients train with.
"""

import contextlib
import copy
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from attacks.evidence import batch_statistics, believed, completed, gradient_of, sent_entries, size_of, views
from attacks.factored import Factored, gradients_of
from attacks.hidden_noise import as_buffers, in_front_of_noise
from attacks.lanes import WIDTH, innermost, lanes, library
from attacks.metrics import match
from attacks.optimizers import LBFGS, Optimizer, Pieces
from attacks.terms import Candidates, Gradients, Observed, distance, scaled, squared_norm
from fedsim.defense import Belief, Explained
from fedsim.observation import Knowledge, Observation, Trace
from fedsim.seeding import generator
from fedsim.training import batch_loss, local_update, probabilities, stacked_loss

if TYPE_CHECKING:
    from attacks.matching import GradientMatching

CHUNK = {"cpu": 48, "cuda": 1024}  # problems at a time, where memory allows: measured, more does not help
MEMORY = 2**31  # bytes one chunk may take
SMALL = 2**18  # parameters; measured, larger networks are as fast on PyTorch's kernels, and not held up by the last few searches
SEES = 0.1  # of the gap that noise leaves, what a reconstruction leaves at most


@dataclass(frozen=True)
class Plan:
    """What a candidate for one update consists of, and in which steps its update is computed.

    images  n distinct images
    copies  how often each is looked for: once for each epoch, if imitated epochs differ in the order of their batches
    steps   indices among the copies * n images of each local step
    views   updates of the same images that it is held against: those of earlier rounds as well, where a client has no others
    """

    images: int
    copies: int
    steps: tuple[tuple[int, ...], ...]
    views: int = 1

    @classmethod
    def of(cls, one: Observation, known: Knowledge, imitate: bool) -> "Plan":
        n, steps, seen = size_of(one, known), known.local_steps or 1, len(views(one, known))
        if not imitate or steps == 1:
            return cls(n, 1, (tuple(range(n)),), seen)
        batch = known.batch_size or n
        batches = [tuple(range(first, min(first + batch, n))) for first in range(0, n, batch)]
        epochs = math.ceil(steps / len(batches))
        copies = epochs if len(batches) > 1 else 1
        schedule = [tuple(i + n * (epoch % copies) for i in batch) for epoch in range(epochs) for batch in batches]
        return cls(n, copies, tuple(schedule[:steps]), seen)


@dataclass
class Problems:
    """V victims of equal shapes: what was broadcast and sent, stacked, and how to evaluate candidates against it.

    A victim of several views has as many rows, one after the other, in `params`, `buffers`, `target` and `beliefs`.

    training  how a candidate is trained on, as settings of `local_update`
    beliefs   of an attacker who knows the defense, what is possible in place of `target`, of tensors that are not known exactly
    rescaled  whether candidates are brought to the observed length before that: where the defense hides it, and the gap ignores it
    sent      of tensors of which a part was sent, 1 at its entries and 0 at others; that length is of the entries that were sent
    statistics  of an attack with a prior on them, those of BatchNorm layers' batches, see `batch_statistics`
    """

    attack: "GradientMatching"
    plan: Plan
    model: nn.Module
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    target: dict[str, Tensor]
    image_shape: tuple[int, ...]  # (C, H, W)
    num_classes: int
    training: dict[str, Any]
    beliefs: dict[str, Belief]
    rescaled: bool = False
    sent: dict[str, Tensor] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None  # (V, copies * n), or probabilities with K beside; None when they are optimised too
    stopped: threading.Event | None = None  # set when nobody waits for the result any more

    def __post_init__(self) -> None:
        nothing = {name: torch.zeros_like(t) for name, t in self.target.items()}
        unit = self.attack.gap.unit(self.target | completed(nothing, self.beliefs))
        unit = torch.where(unit > 0, unit, 1)  # an update of zeros is explained by a gradient of zeros
        self.unit = self._over_views(unit)
        self._rows: Tensor | None = None
        self._gathered: tuple[dict[str, Tensor], dict[str, Tensor], Observed] = {}, {}, Observed()
        self._possible: dict[str, Belief] = {}
        self._sent: dict[str, Tensor] = {}
        channels = self.image_shape[0]
        self._filters = torch.randn(64, channels, 5, 5, generator=generator(0, "agreement")).to(self.device, self.dtype)

    @classmethod
    def of(
        cls, seen: Sequence[Observation], plan: Plan, known: Knowledge, model: nn.Module, attack: "GradientMatching"
    ) -> "Problems":
        """The observations stacked, with all their views."""
        seen = [view for one in seen for view in views(one, known)]
        steps = known.local_steps or 1
        training = {"lr": 1.0}
        if len(plan.steps) > 1:
            if known.lr is None:
                raise ValueError("imitating local steps needs known.lr, the clients' learning rate; or take imitate=False")
            training = {
                "lr": known.lr,
                "momentum": known.momentum,
                "weight_decay": known.weight_decay,
                "proximal": known.proximal,
            }
        elif known.lr is None and steps > 1 and not attack.gap.scale_free:
            raise ValueError(f"{attack.gap} needs known.lr to compare an update of {steps} local steps; or use CosineGap()")
        dtype = getattr(torch, attack.dtype)
        if len(plan.steps) > 1 and attack.noises(model):
            raise ValueError('noise="sought" needs federation=fedsgd or imitate=False: each local step draws noise of its own')
        if plan.views > 1 and attack.noises(model):
            raise ValueError('noise="sought" needs one update of a client at a time (same_images=False): each drew its own noise')
        first = seen[0]
        matched = list(first.packets)
        if attack.matched == "before_noise":
            matched = in_front_of_noise(model, first.params, first.buffers, known.image_shape)

        def stack(dicts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
            stacked = {name: torch.stack([one[name] for one in dicts]) for name in dicts[0]}
            return {name: t.to(dtype) if t.is_floating_point() else t for name, t in stacked.items()}

        target = stack([one.update if len(plan.steps) > 1 else gradient_of(one, known) for one in seen])
        beliefs = {}
        if isinstance(known.defense, Explained):
            every = [believed(one, known, imitated=len(plan.steps) > 1) for one in seen]
            beliefs = {
                name: Belief(*(torch.stack([getattr(b[name], part) for b in every]).to(dtype) for part in _parts(Belief)))
                for name in matched
                if not all(b[name].is_exact for b in every)
            }
        rescaled = attack.gap.scale_free and getattr(known.defense, "rescales", False)
        masks = {name: [sent_entries(one, name) for one in seen] for name in beliefs} if rescaled else {}
        return cls(
            attack=attack,
            plan=plan,
            model=model,
            params=stack([one.params for one in seen]),
            buffers=stack([one.buffers for one in seen]),
            target={name: target[name] for name in matched},
            beliefs=beliefs,
            rescaled=rescaled,
            sent={
                name: torch.stack([torch.ones_like(t) if m is None else m.to(t) for m, t in zip(of, target[name], strict=True)])
                for name, of in masks.items()
                if any(m is not None for m in of)
            },
            statistics=stack([batch_statistics(one, known, model) for one in seen]) if attack.batch_norm else {},
            image_shape=known.image_shape,
            num_classes=known.num_classes,
            training=training,
        )

    def take(self, rows: Tensor, stopped: threading.Event) -> "Problems":
        """These victims alone, for a thread of their own, computed as they are here."""
        seen = self._views(rows)
        params, buffers, target = ({n: t[seen] for n, t in part.items()} for part in (self.params, self.buffers, self.target))
        own = replace(
            self,
            model=copy.deepcopy(self.model),  # functional_call puts parameters into the module while it runs
            params=params,
            buffers=buffers,
            target=target,
            beliefs={n: _each(b, lambda t: t[seen]) for n, b in self.beliefs.items()},
            sent={n: t[seen] for n, t in self.sent.items()},
            statistics={n: t[seen] for n, t in self.statistics.items()},
            labels=None if self.labels is None else self.labels[rows],
            stopped=stopped,
        )
        own.__dict__["lanes"] = self.lanes
        return own

    @cached_property
    def lanes(self) -> bool:
        """Whether the problems lie across the lanes of vector registers: where there are many, and each is small.

        Said of all problems, not of those that are computed at a time, since the two roads round differently.
        """
        small = self.parameters <= SMALL
        many = len(self.unit) * self.plan.views * self.attack.restarts >= WIDTH // 2
        return small and many and self.device.type == "cpu" and self.dtype == torch.float32 and library() is not None

    @property
    def parameters(self) -> int:
        """Parameters of one network."""
        return sum(t[0].numel() for t in self.params.values())

    @property
    def device(self) -> torch.device:
        return next(iter(self.params.values())).device

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.params.values())).dtype

    @property
    def count(self) -> int:
        """Images of a candidate, copies and all."""
        return self.plan.copies * self.plan.images

    @property
    def pixels(self) -> int:
        """Unknowns that are pixels."""
        return self.count * int(torch.Size(self.image_shape).numel())

    def images(self, points: Tensor) -> Tensor:
        """(P, copies * n, C, H, W) of points (P, D)."""
        return points[:, : self.pixels].reshape(-1, self.count, *self.image_shape)

    def united(self, images: Tensor) -> Tensor:
        """(n, C, H, W) in [0, 1] of one candidate's images (copies * n, C, H, W): the mean over epochs, matched to the first.

        Of a last epoch that is not whole only the images of its steps count: nothing that was sent tells of the others.
        """
        n = self.plan.images
        taken = torch.tensor(sorted({i for step in self.plan.steps for i in step}), device=images.device)
        first, *others = images.clamp(0, 1).float().split(n)
        total, counts = first.clone(), torch.ones(n, 1, 1, 1, device=images.device)
        for i, epoch in enumerate(others, 1):
            other = epoch[taken[taken // n == i] - n * i]
            found, places = match(torch.nan_to_num(other), torch.nan_to_num(first))
            total.index_add_(0, places, other[found])
            counts.index_add_(0, places, torch.ones_like(counts[: len(places)]))
        return total / counts

    def clamp(self, points: Tensor) -> Tensor:
        """Points with their images clamped to [0, 1]."""
        return torch.cat([points[:, : self.pixels].clamp(0, 1), points[:, self.pixels :]], 1)

    def enough(self, points: Tensor, chunk: int) -> Tensor:
        """(V,) the gap up to which a point of each problem (V, D) explains what was sent: the tolerance, and no more than a part of
        what noise from U(0, 1), always the same, leaves in the place of its images. Where noise does as well, nothing was seen, and
        no gap is small enough: -1."""
        images = torch.rand(self.pixels, generator=generator(0, "noise")).expand(len(points), -1)
        noise = torch.cat([images.to(points), points[:, self.pixels :]], 1)
        unseen = in_chunks(self.gaps, noise, torch.arange(len(points), device=points.device), chunk)
        bar = torch.fmin(self.attack.tolerance * self.unit, SEES * unseen)  # noise may leave no number
        return torch.where(unseen == 0, -1.0, bar)

    def blocks(self) -> Tensor:
        """(copies * n, D) bool: the unknowns of each image, its label's logits among them."""
        eye = torch.eye(self.count, dtype=torch.bool, device=self.device)
        parts = [eye.repeat_interleave(self.pixels // self.count, 1)]
        if self.labels is None:
            parts.append(eye.repeat_interleave(self.num_classes, 1))
        parts += [eye.repeat_interleave(math.prod(m.noise_shape), 1) for m in self.attack.noises(self.model).values()]
        return torch.cat(parts, 1)

    def probabilities(self, points: Tensor, problems: Tensor) -> Tensor:
        """(P, copies * n, K) label probabilities: of the points, or those known beforehand."""
        if self.labels is not None:
            return probabilities(self.labels[problems], self.num_classes).to(points.dtype)
        logits = points[:, self.pixels : self.pixels + self.count * self.num_classes]
        return logits.reshape(len(points), self.count, self.num_classes).softmax(-1)

    def noises(self, points: Tensor) -> dict[str, Tensor]:
        """What modules drew, as the points have it: buffers (P, copies * n, ...)."""
        end = self.pixels + (self.count * self.num_classes if self.labels is None else 0)
        return as_buffers(self.attack.noises(self.model), points[:, end:], self.count)

    def evaluate(self, points: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (P,) and their gradients (P, D) at points (P, D) of these problems."""
        if self.stopped is not None and self.stopped.is_set():
            raise InterruptedError("the attack was interrupted")
        points = points.detach().requires_grad_()
        losses = self.objective(points, problems)
        # Problems do not interact, so the gradient of the sum holds each one's own.
        (gradient,) = torch.autograd.grad(losses.sum(), points)
        return losses.detach(), gradient

    def objective(self, points: Tensor, problems: Tensor) -> Tensor:
        """What is minimised, (P,), at points (P, D) of these problems; differentiable."""
        losses = self._gaps(points, problems) / self.unit[problems]
        images = self.images(points)
        for prior in self.attack.priors:
            losses = losses + prior(images)
        if self.plan.copies > 1 and self.attack.agreement:
            losses = losses + self.attack.agreement * self._disagreement(images)
        if self.attack.batch_norm:
            losses = losses + self.attack.batch_norm * self._unusual_statistics(images, problems)
        if self.attack.consistency:
            losses = losses + self.attack.consistency * self._inconsistency(images, problems)
        return losses

    def gaps(self, points: Tensor, problems: Tensor) -> Tensor:
        """The gap alone, without priors, (P,)."""
        return self._gaps(points.detach(), problems).detach()

    def trace(self, moments: Sequence[tuple[int, float, Tensor]], problem: int, chunk: int) -> Trace:
        """The moments of one start of this problem, with what they look like and how far each layer is."""
        points = torch.stack([point for _, _, point in moments])

        def layers(points: Tensor, problems: Tensor) -> Tensor:
            updates, target = self._updates(points.detach(), problems)
            far = [self._over_views(distance(updates[name], t).detach(), len(points)) for name, t in target.items()]
            return torch.stack(far, 1)

        far = in_chunks(layers, points, torch.full((len(points),), problem, device=points.device), chunk)
        return Trace(
            evaluations=torch.tensor([evaluations for evaluations, _, _ in moments]),
            losses=torch.tensor([loss for _, loss, _ in moments]),
            images=torch.stack([self.united(one) for one in self.images(points)]),
            layers=dict(zip(self.target, far.T, strict=True)),
        )

    def _gaps(self, points: Tensor, problems: Tensor) -> Tensor:
        updates, target = self._updates(points, problems)
        return self._over_views(self.attack.gap(updates, target), len(points))

    def _views(self, problems: Tensor) -> Tensor:
        """Rows (P * views,) of these problems."""
        k = self.plan.views
        return problems if k == 1 else (problems[:, None] * k + torch.arange(k, device=problems.device)).flatten()

    def _over_views(self, values: Tensor, count: int | None = None) -> Tensor:
        """The mean over each problem's views, (P,) of (P * views,) and of what they were filled up with."""
        k = self.plan.views
        values = values if count is None else values[: count * k]
        return values if k == 1 else values.reshape(-1, k).mean(1)

    def _updates(self, points: Tensor, problems: Tensor) -> tuple[Candidates, Gradients]:
        """The candidates' updates, differentiable in the points, and the observed ones; filled up to whole registers."""
        if self.plan.views > 1:
            points = points.repeat_interleave(self.plan.views, 0)
        rows, problems = self._views(problems), problems.repeat_interleave(self.plan.views)
        if self.lanes and (missing := -len(points) % WIDTH):
            points = torch.cat([points, points[-1:].expand(missing, -1)])
            rows, problems = (torch.cat([t, t[-1:].expand(missing)]) for t in (rows, problems))
        params, buffers, target = self._gather(rows)
        images, labels = self.images(points), self.probabilities(points, problems)
        buffers = {**buffers, **self.noises(points)}
        if len(points) == 1 and len(self.plan.steps) == 1:

            def loss(leaves: Mapping[str, Tensor]) -> Tensor:
                return batch_loss(self.model, leaves, own, images[0], labels[0], penalty=self.attack.penalty)

            own = {n: t[0].clone() for n, t in buffers.items()}  # BatchNorm in training mode writes to them
            found = gradients_of(loss, {n: t[0] for n, t in params.items()})
            return self._explained({n: t[None] if isinstance(t, Tensor) else t for n, t in found.items()}, target)
        steps = (
            [torch.tensor(step, device=points.device) for step in self.plan.steps] if len(self.plan.steps) > 1 else [slice(None)]
        )
        with lanes() if self.lanes else contextlib.nullcontext():
            trained = local_update(
                self.model,
                params,
                buffers,
                ((images[:, step], labels[:, step]) for step in steps),
                **self.training,
                loss_of_batch=partial(stacked_loss, penalty=self.attack.penalty),
                differentiable=True,
            )
        return self._explained(trained.update, target)

    def _explained(self, candidates: Candidates, observed: Observed) -> tuple[Candidates, Gradients]:
        """With what was observed, or the nearest that it may have been."""
        if not self._possible:
            return candidates, observed
        if self.rescaled:
            candidates = {name: candidates[name] for name in observed}
            ours = squared_norm({n: _whole(t) * self._sent[n] if n in self._sent else t for n, t in candidates.items()})
            factors = squared_norm(observed).sqrt() * ours.clamp(min=torch.finfo(ours.dtype).tiny).rsqrt()
            candidates = {name: scaled(t, factors) for name, t in candidates.items()}
        dense = {n: _whole(candidates[n]) for n in self._possible}
        return {**candidates, **dense}, {**observed, **completed(dense, self._possible)}

    def _disagreement(self, images: Tensor) -> Tensor:
        """(P,) variance over epochs of the mean over their images of random features, relative to their size."""
        features = nn.functional.conv2d(images.flatten(0, 1), self._filters, stride=2).relu()
        means = features.reshape(len(images), self.plan.copies, self.plan.images, -1).mean(2)
        spread = means.var(1, correction=0).mean(1)
        return spread / means.detach().square().mean((1, 2)).clamp(min=1e-12)

    def _unusual_statistics(self, images: Tensor, problems: Tensor) -> Tensor:
        """(P,) squared distance of batch means and variances from what is known of them, summed over BatchNorm layers."""
        norms = [(name, m) for name, m in self.model.named_modules() if f"{name}.running_mean" in self.statistics]
        if not norms:
            raise ValueError("batch_norm > 0 needs a model with BatchNorm layers, this one has none; take batch_norm=0")
        rows = self._views(problems)
        params, buffers, _ = self._gather(rows)
        told = {name: t[rows] for name, t in self.statistics.items()}
        images = images.repeat_interleave(self.plan.views, 0)

        def distance(params: dict[str, Tensor], buffers: dict[str, Tensor], told: dict[str, Tensor], images: Tensor) -> Tensor:
            terms: list[Tensor] = []

            def compare(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
                def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                    over = [0, *range(2, inputs[0].dim())]
                    correction = int(inputs[0].numel() > inputs[0].shape[1])  # running variances are unbiased ones
                    mean, var = inputs[0].mean(over), inputs[0].var(over, correction=correction)
                    for ours, theirs in ((mean, told[f"{name}.running_mean"]), (var, told[f"{name}.running_var"])):
                        terms.append((ours - theirs).square().sum() / theirs.square().sum().clamp(min=1.0))

                return hook

            hooks = [module.register_forward_pre_hook(compare(name)) for name, module in norms]
            try:
                functional_call(self.model, {**params, **buffers}, (images,))
            finally:
                for hook in hooks:
                    hook.remove()
            return torch.stack(terms).sum()

        buffers = {name: t.clone() for name, t in buffers.items()}  # BatchNorm in training mode writes to them
        return self._over_views(vmap(distance, randomness="different")(params, buffers, told, images))

    def _inconsistency(self, images: Tensor, problems: Tensor) -> Tensor:
        """(P,) mean squared distance from the mean over the starts of the same victim."""
        flat = images.flatten(1)
        ones = torch.ones(len(flat), dtype=flat.dtype, device=flat.device)
        count = flat.new_zeros(len(self.unit)).index_add(0, problems, ones)
        total = flat.new_zeros(len(self.unit), flat.shape[1]).index_add(0, problems, flat.detach())
        return (flat - (total / count.clamp(min=1)[:, None])[problems]).square().mean(1)

    def _gather(self, rows: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], Observed]:
        """Parameters, buffers and target of these rows; kept until others are asked for."""
        if self._rows is None or not torch.equal(self._rows, rows):
            self._rows = rows.clone()
            place = innermost if self.lanes else lambda t: t
            params, buffers, target = (
                {n: place(t[rows]) for n, t in part.items()} for part in (self.params, self.buffers, self.target)
            )
            self._gathered = params, buffers, Observed(target)
            self._possible = {n: _each(b, lambda t: place(t[rows])) for n, b in self.beliefs.items()}
            self._sent = {n: place(t[rows]) for n, t in self.sent.items()}
        return self._gathered

    def chunk(self, point: Tensor, optimizer: Optimizer) -> int:
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
        if self.device.type == "cpu" and self.parameters > SMALL:
            return 1  # one network of this size fills a core, and a layer of problems would fetch more from memory
        return max(1, min(CHUNK.get(self.device.type, CHUNK["cpu"]), MEMORY // saved))


def _parts(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


def _whole(one: Tensor | Factored) -> Tensor:
    return one.dense()[None] if isinstance(one, Factored) else one


def _each(belief: Belief, change: Callable[[Tensor], Tensor]) -> Belief:
    return Belief(*(change(getattr(belief, part)) for part in _parts(Belief)))


def in_chunks(compute: Callable[[Tensor, Tensor], Tensor], points: Tensor, problems: Tensor, chunk: int) -> Tensor:
    (made,) = Pieces(lambda p, v: (compute(p, v),), chunk)(points, problems)
    return made
