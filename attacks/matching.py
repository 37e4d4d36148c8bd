"""Gradient matching: find images whose gradients are the ones that were sent.

All problems, victims times starts, are one program (`attacks.problems`), each with an optimizer state and stopping of its own
(`attacks.optimizers`).
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from attacks.batching import alike, streams
from attacks.evidence import views
from attacks.hidden_noise import hidden_noises, sampled
from attacks.labels import labels_behind
from attacks.memory import keep_freed
from attacks.optimizers import LBFGS, Minima, Optimizer, Stop, minimise
from attacks.problems import SMALL, Plan, Problems, in_chunks
from attacks.terms import Gap, Prior, SquaredGap
from fedsim.cores import cores, on_one_thread, one_thread
from fedsim.models import Stochastic
from fedsim.observation import Attack, Knowledge, Observation, Reconstruction

ALONE = 8  # victims of a small network that are not worth a second worker
TILE = 4  # side of the pattern that init="tiles" repeats


@dataclass(frozen=True)
class GradientMatching:
    """Minimises gap(a candidate's update, the observed one) / unit + priors(candidate images) over the candidate.

    The unit is the gap of a candidate that explains nothing (|update|^2 for SquaredGap), so that a prior's weight means the same
    for large and small updates.

    Threat model: an honest but curious server, or anyone who reads the wire. It knows the model, the broadcast parameters, one
    client's update, the image shape and the number of classes; `labels` says where the labels come from. One who knows the clients'
    defense (`known.defense`) measures the gap to the nearest update that could have been sent as what was seen: entries that were
    not sent, or only as the cell of a quantizer, count where the candidate leaves the bounds that the defense leaves.

    gap          distance between updates
    priors       what is known about images
    labels       "joint": soft labels are optimised with the images; "analytic": read off the update first; "given": told
    optimizer    LBFGS(...), Adam(...) or SGD(...); it also holds the budget of evaluations per start
    restarts     at most so many starts for a victim; the next one runs only if those before it did not reach `stop.threshold`.
                 The start with the smallest gap is reported: the truth is never consulted
    init         "normal": N(0, 1); "uniform": U(0, 1); "grey": 0.5 + N(0, 0.1^2); "mean_image": that of public images, plus the
                 same noise; "tiles": a random square of 4 pixels, repeated; or an attack, whose reconstruction is improved on.
                 Label logits are N(0, 1)
    imitate      whether an update of several local steps is imitated step by step (Dimitrov et al. 2022), or taken for one
                 gradient as long as they are together, which is right for a small lr. Imitation knows lr, the number of steps and
                 the batch size, for the server ordered them, but not which image was in which batch. Over several epochs, each
                 of which has an order of its own, it looks for the images anew, and `agreement` ties them together
    agreement    weight of the squared difference between epochs of what does not depend on order: means of random features
    batch_norm   weight of the squared distance of the candidate's batch statistics from what is known of them (Yin et al. 2021,
                 equation 6), divided by the size of the latter: those that the client sent back tell its batch's, in place of the
                 broadcast ones of the paper
    consistency  weight of the mean squared distance from the mean over a victim's starts (Yin et al. 2021, equation 11, without
                 registration); the starts then run side by side, all of them, to the end of the budget
    update       "joint": all images of a batch move at once; "round_robin": one at a time, for `turn` evaluations each (Zhu et
                 al. 2019 for batches); for LBFGS
    penalty      whether the penalty that a model adds to its loss is known to be part of the clients'
    noise        "drawn": a model that draws at random draws anew at each evaluation; "sought": what its bottlenecks drew is an
                 unknown beside the images, in a search that begins at a draw of the attacker's own
    matched      "all" gradients, or those "before_noise": of the layers in front of where a model first draws
    box          clamp images to [0, 1] after every step; not for LBFGS
    tolerance    largest gap / unit at which a reconstruction `converged`. On CIFAR-10 and DLG's LeNet a squared gap of 1e-3,
                 1e-4, 1e-5, 1e-6, 1e-7 units comes with a median MSE of 0.053, 0.024, 0.009, 0.002, 0.0005. It must be a
                 tenth of what noise in the place of the images leaves as well: where updates hardly depend on the images, any
                 image has a small gap
    stop         when a start ends before its budget, by the value of what is minimised
    dtype        "float32" or "float64"
    record       keep a `Trace`: the best point at every `record`-th evaluation; 0 keeps none
    chunk        problems computed at a time; None chooses from the memory they take. No influence on the result but by rounding
    workers      threads that share the victims on a CPU, a core each; None takes all cores, but leaves a worker 8 victims of a
                 small network. No influence on the result but by rounding
    """

    gap: Gap = SquaredGap()
    priors: tuple[Prior, ...] = ()
    labels: Literal["joint", "analytic", "given"] = "joint"
    optimizer: Optimizer = LBFGS()
    restarts: int = 1
    init: Literal["normal", "uniform", "grey", "mean_image", "tiles"] | Attack = "normal"
    imitate: bool = False
    agreement: float = 1.0
    batch_norm: float = 0.0
    consistency: float = 0.0
    update: Literal["joint", "round_robin"] = "joint"
    turn: int = 20
    penalty: bool = True
    noise: Literal["drawn", "sought"] = "drawn"
    matched: Literal["all", "before_noise"] = "all"
    box: bool = False
    tolerance: float = 1e-5
    stop: Stop = Stop(threshold=1e-6)
    dtype: Literal["float32", "float64"] = "float32"
    record: int = 0
    chunk: int | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        for name, choices in {
            "labels": ("joint", "analytic", "given"),
            "update": ("joint", "round_robin"),
            "noise": ("drawn", "sought"),
            "matched": ("all", "before_noise"),
            "dtype": ("float32", "float64"),
            "init": ("normal", "uniform", "grey", "mean_image", "tiles"),
        }.items():
            value = getattr(self, name)
            if value not in choices and not (name == "init" and callable(value)):
                named = ", ".join(f'"{choice}"' for choice in choices[:-1]) + f' or "{choices[-1]}"'
                raise ValueError(f"{name} must be {named}{' or an attack' * (name == 'init')}, got {value!r}")
        for name in ("restarts", "turn"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("chunk", "workers"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1 or None, got {getattr(self, name)}")
        for name in ("agreement", "batch_norm", "consistency", "record"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.box and isinstance(self.optimizer, LBFGS):
            raise ValueError(
                "box=True needs optimizer=Adam(...): clamping breaks the line search of LBFGS; use the prior OutOfRange"
            )
        if self.consistency and isinstance(self.optimizer, LBFGS):
            raise ValueError("consistency needs optimizer=Adam(...): its starts step together, and LBFGS would see the loss move")
        if self.update == "round_robin" and not isinstance(self.optimizer, LBFGS):
            raise ValueError('update="round_robin" needs optimizer=LBFGS(...)')
        if not self.tolerance > 0:
            raise ValueError(f"tolerance must be > 0, got {self.tolerance}")

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
        keep_freed()
        seed = int(torch.randint(2**62, (), generator=rng))
        given = None if isinstance(self.init, str) else self.init(seen, known, model, rng)
        plans = [Plan.of(one, known, self.imitate) for one in seen]
        starts = [
            torch.cat(
                [
                    self._starts(plan, known, chance, given[i] if given else None),
                    sampled(self.noises(model), self.restarts, plan.copies * plan.images, chance),
                ],
                1,
            )
            for i, (plan, chance) in enumerate(zip(plans, streams(seen, seed, "start"), strict=True))
        ]
        results: dict[int, Reconstruction] = {}
        for members in alike(seen, plans):
            plan = plans[members[0]]
            group = Problems.of([seen[i] for i in members], plan, known, model, self)
            # A small network gains nothing by more threads, which beside other processes wait for each other most of the time.
            small = group.device.type == "cpu" and group.parameters <= SMALL
            threads = on_one_thread() if small else contextlib.nullcontext()
            with threads, torch.random.fork_rng(devices=[group.device] if group.device.type == "cuda" else []):
                torch.manual_seed(seed)  # for models that draw: dropout, variational bottlenecks
                if self.labels != "joint":
                    labels = [self.labels_of(seen[i], i, plan, known, model) for i in members]
                    if given:
                        labels = [_beside(given[i], those) for i, those in zip(members, labels, strict=True)]
                    group.labels = torch.stack(labels).repeat(1, plan.copies)
                before = len(results)
                solved = self._solve(
                    group,
                    torch.stack([starts[i] for i in members]).to(group.device, group.dtype),
                    lambda finished, before=before: report(before + finished, len(seen)) if report else None,  # type: ignore[misc]
                )
            results |= zip(members, solved, strict=True)
        return [results[i] for i in range(len(seen))]

    def _starts(self, plan: Plan, known: Knowledge, rng: torch.Generator, given: Reconstruction | None) -> Tensor:
        """(R, D) starts of one victim: images, then label logits."""
        count, r, k = plan.copies * plan.images, self.restarts, known.num_classes
        shape = (r, count, *known.image_shape)
        if self.init == "uniform":
            images = torch.rand(shape, generator=rng)
        elif self.init == "tiles":
            c, h, w = known.image_shape
            tile = torch.rand((r, count, c, TILE, TILE), generator=rng)
            images = tile.repeat(1, 1, 1, math.ceil(h / TILE), math.ceil(w / TILE))[..., :h, :w]
        else:
            images = torch.randn(shape, generator=rng)
        if self.init == "grey":
            images = 0.5 + 0.1 * images
        elif self.init == "mean_image":
            if known.public is None:
                raise ValueError('init="mean_image" needs known.public, images of the same kind; or take init="grey"')
            images = known.public.pixels.float().mean(0).cpu() / 255 + 0.1 * images
        elif given is not None:
            if given.images.shape != (plan.images, *known.image_shape):
                raise ValueError(f"{self.init} made images {tuple(given.images.shape)}, the update is of {plan.images}")
            further = 0.1 * (torch.arange(r) > 0).reshape(-1, 1, 1, 1, 1)  # the first start is what was given
            images = given.images.cpu().repeat(plan.copies, 1, 1, 1) + further * images
        images = images.flatten(1)
        if self.labels != "joint":
            return images
        logits = torch.randn(r, count, k, generator=rng)
        if given is not None:
            logits = logits + 3 * nn.functional.one_hot(given.labels.cpu(), k).repeat(plan.copies, 1)
        return torch.cat([images, logits.flatten(1)], 1)

    @property
    def looks_behind_noise(self) -> bool:
        """Whether this is an attack of somebody who knows that the model draws."""
        return self.noise == "sought" or self.matched == "before_noise"

    def noises(self, model: nn.Module) -> dict[str, Stochastic]:
        """The modules whose noise is sought."""
        return hidden_noises(model) if self.noise == "sought" else {}

    def labels_of(self, one: Observation, index: int, plan: Plan, known: Knowledge, model: nn.Module) -> Tensor:
        """(n,) the labels of a victim's images."""
        if self.labels == "analytic":
            return labels_behind(views(one, known), known, model, plan.images)
        if known.labels is None:
            raise ValueError('labels="given" needs known.labels; use "analytic" or "joint" for an attacker who is not told')
        return known.labels[index].to(next(iter(one.params.values())).device)

    def _solve(self, group: Problems, starts: Tensor, report: Callable[[int], None]) -> list[Reconstruction]:
        began = time.perf_counter()
        v, r, _ = starts.shape
        state = torch.get_rng_state()
        chunk = group.chunk(starts[:1, 0], self.optimizer)
        chunk = self.chunk or chunk
        draws = not torch.equal(state, torch.get_rng_state())  # threads would share the stream that such a model draws from
        torch.set_rng_state(state)
        least = 1 if group.parameters > SMALL else ALONE
        workers = 1 if draws or group.device.type != "cpu" else self.workers or max(1, min(cores(), v // least))
        minima = (
            self._minimise(group, starts, chunk, report) if workers == 1 else self._shared(group, starts, chunk, report, workers)
        )
        problems = torch.arange(v, device=starts.device).repeat_interleave(r)
        gaps = in_chunks(group.gaps, minima.points.flatten(0, 1), problems, chunk).reshape(v, r)
        gaps = torch.where(minima.losses.isfinite() & gaps.isfinite(), gaps, torch.inf)
        victims = torch.arange(v, device=starts.device)
        most = group.enough(minima.points[victims, gaps.argmin(1)], chunk)  # a start that was not tried has no finite gap here
        seconds = time.perf_counter() - began
        spent = minima.evaluations.sum(1)
        share = (seconds * spent / spent.sum().clamp(min=1)).tolist()
        return [self._reconstruction(group, minima, gaps[i], float(most[i]), i, share[i], chunk) for i in range(v)]

    def _minimise(self, group: Problems, starts: Tensor, chunk: int, report: Callable[[int], None]) -> Minima:
        return minimise(
            group.evaluate,
            starts,
            self.optimizer,
            stop=self.stop,
            chunk=chunk,
            together=self.consistency > 0,
            blocks=group.blocks() if self.update == "round_robin" and group.count > 1 else None,
            turn=self.turn,
            record=self.record,
            project=group.clamp if self.box else None,
            report=lambda finished, _: report(finished),
        )

    def _shared(self, group: Problems, starts: Tensor, chunk: int, report: Callable[[int], None], workers: int) -> Minima:
        """As `_minimise`, each worker with a share of the victims; one core a worker."""
        shares = torch.arange(len(starts)).tensor_split(workers)
        finished, lock, stopped = [0] * workers, threading.Lock(), threading.Event()

        def work(i: int, share: Tensor) -> Minima:
            one_thread()

            def count(done: int) -> None:
                with lock:
                    finished[i] = done
                    report(sum(finished))

            own = group.take(share, stopped)
            return self._minimise(own, starts[share], max(1, chunk // workers) if self.chunk is None else chunk, count)

        with on_one_thread(), ThreadPoolExecutor(workers) as pool:
            try:
                works = [pool.submit(work, i, share) for i, share in enumerate(shares)]
                for one in wait(works, return_when=FIRST_EXCEPTION).done:
                    one.result()
                return Minima.joined([one.result() for one in works])
            except BaseException:  # Ctrl-C: the others would go on to their end
                stopped.set()
                raise

    def _reconstruction(
        self, group: Problems, minima: Minima, gaps: Tensor, most: float, i: int, seconds: float, chunk: int
    ) -> Reconstruction:
        tried = max(1, int(minima.tried[i]))  # none, where the time was over before
        best = int(gaps[:tried].argmin())
        images = torch.stack([group.united(start) for start in group.images(minima.points[i, :tried])])
        soft = group.probabilities(minima.points[i, best : best + 1], torch.tensor([i], device=gaps.device))[0, : group.plan.images]
        moments = minima.moments.get(i * self.restarts + best)
        return Reconstruction(
            images=images[best],
            labels=soft.argmax(-1),
            loss=float(gaps[best]),
            converged=bool(gaps[best] <= most),
            starts=images,
            losses=gaps[:tried],
            evaluations=int(minima.evaluations[i].sum()),
            seconds=seconds,
            trace=group.trace(moments, i, chunk) if moments else None,
            probabilities=soft if group.labels is None else None,
        )


def _beside(given: Reconstruction, labels: Tensor) -> Tensor:
    """Labels (n,) in the order of the images that are given, if those have the same; else as they are."""
    own = given.labels.to(labels)
    return own if torch.equal(own.sort().values, labels.sort().values) else labels
