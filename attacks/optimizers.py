"""Optimizers that minimise many functions at once: one row for each problem, and no row waits for another.

A search over P problems of D unknowns is a state whose tensors all begin with P. The caller evaluates every problem at its row of
`state.trial` (P, D) and hands losses (P,) and gradients (P, D) to `step`. For L-BFGS each such evaluation is one trial point of
each problem's own line search, so a problem in the middle of a hard one costs the others nothing. `minimise` runs the loop: it
keeps a fixed number of rows busy and hands the row of a finished problem to the next.

States are consumed: `step` writes to the state it is given, because an L-BFGS memory is too large to copy.
"""

import logging
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor

from fedsim.training import out_of_memory

log = logging.getLogger(__name__)

RUNNING, STALLED, DIVERGED = 0, 1, 2  # what a row's search is doing


@dataclass
class State:
    """P searches at some moment; every tensor begins with P.

    trial   (P, D) where the problems are to be evaluated next
    best    (P, D) best point so far
    loss    (P,) loss at `best`; inf before the first evaluation
    status  (P,) RUNNING; STALLED when no step along the gradient lowers the loss; DIVERGED where loss or gradient is no number,
            of a search with line searches at its start only
    """

    trial: Tensor
    best: Tensor
    loss: Tensor
    status: Tensor

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name)[rows])

    def put(self, rows: Tensor, other: "State") -> None:
        """Replace these rows by the rows of `other`."""
        for f in fields(self):
            getattr(self, f.name)[rows] = getattr(other, f.name)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b where b is positive, else 0."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1), 0)


@dataclass
class LBFGSState(State):
    """point, value, gradient: the last accepted step. direction, slope, t, low, high: its line search, `low` satisfies Armijo's
    condition and `high` does not. memory (P, 2m, D): the last m steps s and, after them, gradient differences y; the newest at
    (pairs - 1) % m. sy, yy (P, m, m): their inner products, for s no younger than y."""

    point: Tensor
    gradient: Tensor
    direction: Tensor
    slope: Tensor
    t: Tensor
    low: Tensor
    low_value: Tensor
    low_slope: Tensor
    high: Tensor
    high_value: Tensor
    trials: Tensor
    memory: Tensor
    sy: Tensor
    yy: Tensor
    pairs: Tensor


@dataclass(frozen=True)
class LBFGS:
    """Limited-memory BFGS with a line search for each problem (Nocedal & Wright 2006, algorithm 7.4).

    The line search brackets a point that satisfies the weak Wolfe conditions (Lewis & Overton 2013); a loss that is not finite
    counts as too high, so the search backs off instead of diverging. A direction that does not descend, or along which `trials`
    points did not help, drops the memory and starts again from steepest descent; if that fails too, the problem has stalled.

    evaluations  most evaluations of one problem
    history      pairs remembered; more pairs save evaluations and cost memory traffic: 20, 50, 100 took a median of 925, 680, 555
                 evaluations on DLG's LeNet, and 50 the least time
    armijo       decrease asked for, as a share of the slope's promise
    curvature    share of the slope that may remain
    reach        longest move of a single step, root mean square over the unknowns; None sets no limit
    trials       points tried along one direction
    """

    evaluations: int = 2000
    history: int = 50
    armijo: float = 1e-4
    curvature: float = 0.9
    reach: float | None = None
    trials: int = 20

    def __post_init__(self) -> None:
        _at_least_one(self, "evaluations", "history", "trials")
        if not 0 < self.armijo < self.curvature < 1:
            raise ValueError(f"0 < armijo < curvature < 1 must hold, got armijo={self.armijo}, curvature={self.curvature}")
        if self.reach is not None and self.reach <= 0:
            raise ValueError(f"reach must be positive or None, got {self.reach}")

    def start(self, points: Tensor) -> LBFGSState:
        """Searches that begin at `points` (P, D)."""
        p, d = points.shape
        zero, inf = points.new_zeros(p), points.new_full((p,), math.inf)
        count = torch.zeros(p, dtype=torch.int64, device=points.device)
        products = torch.zeros(p, self.history, self.history, dtype=torch.float64, device=points.device)
        return LBFGSState(
            trial=points.clone(),
            best=points.clone(),
            loss=inf,
            status=count.clone(),
            point=points.clone(),
            gradient=torch.zeros_like(points),
            direction=torch.zeros_like(points),
            slope=zero.clone(),
            t=zero.clone(),
            low=zero.clone(),
            low_value=zero.clone(),
            low_slope=zero.clone(),
            high=inf.clone(),
            high_value=inf.clone(),
            trials=count.clone(),
            memory=points.new_zeros(p, 2 * self.history, d),
            sy=products,
            yy=products.clone(),
            pairs=count.clone(),
        )

    def step(self, state: LBFGSState, loss: Tensor, gradient: Tensor) -> None:
        """Take in the evaluation at `state.trial`, and choose the next trial points."""
        slope = _dot(gradient, state.direction)
        finite = loss.isfinite() & gradient.isfinite().all(1)
        first = state.loss.isinf()
        state.status[first & ~finite] = DIVERGED
        loss = torch.where(finite, loss, math.inf)
        lower = loss <= state.loss + self.armijo * state.t * state.slope
        last = state.trials + 1 >= self.trials
        flat = slope >= self.curvature * state.slope
        accepted = finite & (first | lower & (flat | last))
        self._search(state, accepted, lower & finite, loss, slope)
        rows = accepted.nonzero().squeeze(1)
        if len(rows):
            self._accept(state, rows, loss[rows], gradient[rows])
        smallest = torch.finfo(loss.dtype).eps * state.point.abs().amax(1)
        failed = ~accepted & (last | (state.t * state.direction.abs().amax(1) <= smallest))
        failed &= state.status == RUNNING
        # A point that satisfied Armijo's condition is as good as accepted: go back to it.
        again = failed & (state.low > 0)
        state.t = torch.where(again, state.low, state.t)
        state.trials[again] = self.trials
        failed &= ~again
        state.status[failed & (state.pairs == 0)] = STALLED
        rows = (failed & (state.pairs > 0)).nonzero().squeeze(1)
        if len(rows):
            self._descend(state, rows)
        state.trial = torch.addcmul(state.point, state.t[:, None], state.direction)

    def _search(self, state: LBFGSState, accepted: Tensor, lower: Tensor, loss: Tensor, slope: Tensor) -> None:
        """Narrow the bracket around the next trial, or widen it where there is none yet."""
        too_long, too_short = ~accepted & ~lower, ~accepted & lower
        t = state.t
        # Before `low` moves up to t: where the secant of the two slopes says that the slope vanishes, or far on where it falls.
        bend = slope - state.low_slope
        secant = t + (t - state.low) * torch.where(bend > 0, _ratio(-slope, bend), math.inf).clamp(1, 9)
        state.high = torch.where(too_long, t, state.high)
        state.high_value = torch.where(too_long, loss, state.high_value)
        state.low = torch.where(too_short, t, state.low)
        state.low_value = torch.where(too_short, loss, state.low_value)
        state.low_slope = torch.where(too_short, slope, state.low_slope)
        width = state.high - state.low
        # The parabola through low's value and slope and high's value; inside a bracket its share of the width.
        curve = state.high_value - state.low_value - state.low_slope * width
        share = _ratio(-state.low_slope * width, 2 * curve).nan_to_num(0.0).clamp(0.1, 0.9)
        inside = state.low + torch.where(width.isfinite(), share * width, 0)
        state.t = torch.where(accepted, t, torch.where(state.high.isfinite(), inside, secant))
        state.trials += 1

    def _accept(self, state: LBFGSState, rows: Tensor, loss: Tensor, gradient: Tensor) -> None:
        """Move these rows to their trial points and choose new directions."""
        first = state.loss[rows].isinf()
        s, y = state.trial[rows] - state.point[rows], gradient - state.gradient[rows]
        sy, yy = _dot(s, y), _dot(y, y)
        # Pairs of hardly any curvature would blow up the inverse Hessian.
        useful = ~first & (sy > 1e-10 * yy.sqrt() * _dot(s, s).sqrt())
        at, slot = rows[useful], state.pairs[rows[useful]] % self.history
        state.memory[at, slot], state.memory[at, self.history + slot] = s[useful], y[useful]
        state.pairs[at] += 1
        state.point[rows] = state.best[rows] = state.trial[rows]
        state.gradient[rows], state.loss[rows] = gradient, loss
        direction = self._direction(state, rows, at)
        slope = _dot(direction, gradient)
        size = (_dot(gradient, gradient) * _dot(direction, direction)).sqrt()
        uphill = ~(slope < -1e-8 * size)  # also where it is not a number
        self._begin(state, rows, direction, slope)
        fresh = rows[uphill | (state.pairs[rows] == 0)]
        if len(fresh):
            self._descend(state, fresh)

    def _descend(self, state: LBFGSState, rows: Tensor) -> None:
        """Forget the pairs and go down the gradient."""
        gradient = state.gradient[rows]
        state.pairs[rows] = 0
        self._begin(state, rows, -gradient, -_dot(gradient, gradient))
        state.t[rows] = torch.minimum(state.t[rows], _ratio(torch.ones_like(state.t[rows]), gradient.abs().sum(1)))

    def _begin(self, state: LBFGSState, rows: Tensor, direction: Tensor, slope: Tensor) -> None:
        """Begin a line search along `direction`."""
        t = torch.ones_like(slope)
        if self.reach is not None:
            t = torch.minimum(t, _ratio(torch.full_like(slope, self.reach * direction.shape[1] ** 0.5), direction.norm(dim=1)))
        state.direction[rows], state.slope[rows], state.t[rows], state.trials[rows] = direction, slope, t, 0
        state.low[rows], state.low_value[rows], state.low_slope[rows] = 0, state.loss[rows], slope
        state.high[rows] = state.high_value[rows] = math.inf

    def _direction(self, state: LBFGSState, rows: Tensor, renewed: Tensor) -> Tensor:
        """Minus the inverse Hessian times the gradient at these rows; `renewed` are those whose newest pair is new.

        In the compact form of Byrd, Nocedal & Schnabel (1994), theorem 2.2: the two loops of the recursion are two triangular
        systems in the inner products of the pairs, so the memory, which is large, is read twice instead of 4m times.
        """
        m = self.history
        count = state.pairs[:, None]
        age = torch.arange(m - 1, -1, -1, device=count.device)  # oldest first, newest last
        slot = (count - 1 - age) % m
        newest = slot[:, -1]
        latest = state.memory[torch.arange(len(newest), device=newest.device), m + newest]
        # This way round: (2, D) @ (D, 2m) takes a quarter of the time of (2m, D) @ (D, 2).
        products = (torch.stack([latest, state.gradient], 1) @ state.memory.mT).double()
        at = newest[renewed]
        state.sy[renewed, :, at] = products[renewed, 0, :m]
        state.yy[renewed, :, at] = state.yy[renewed, at, :] = products[renewed, 0, m:]
        # From here on these rows only, in the order of age; places not filled yet become equations 1 x = 0.
        slot, filled = slot[rows], (age < count)[rows]

        def vector(part: Tensor, empty: float = 0.0) -> Tensor:
            return torch.where(filled, part[rows].gather(1, slot), empty)

        def square(part: Tensor) -> Tensor:
            place = slot[:, :, None].expand(-1, m, m)
            both = filled[:, :, None] & filled[:, None, :]
            return torch.where(both, part[rows].gather(1, place).gather(2, place.mT), 0)

        sg, yg = (vector(part) for part in products[:, 1].split(m, 1))
        diagonal = vector(state.sy.diagonal(dim1=1, dim2=2), empty=1.0)
        scale, for_s, for_y = _two_loops(square(state.sy).triu(1) + torch.diag_embed(diagonal), square(state.yy), sg, yg)
        weights = torch.cat([for_s, for_y], 1).to(state.memory.dtype)
        spread = state.memory.new_zeros(len(count), 2 * m)
        spread[rows] = torch.zeros_like(weights).scatter(1, torch.cat([slot, m + slot], 1), weights)
        combined = (spread[:, None, :] @ state.memory).squeeze(1)[rows]
        return -(scale[:, None].to(combined.dtype) * state.gradient[rows] + combined)


def _two_loops(upper: Tensor, yy: Tensor, sg: Tensor, yg: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse Hessian times g as `scale * g + for_s @ S + for_y @ Y`; all arguments oldest first.

    upper (P, m, m) s_i y_j for i <= j, else 0; yy (P, m, m); sg, yg (P, m) inner products with g
    """
    diagonal, last = upper.diagonal(dim1=1, dim2=2), yy[:, -1, -1]
    scale = torch.where(last > 0, diagonal[:, -1] / torch.where(last > 0, last, 1), 1)
    first = torch.linalg.solve_triangular(upper, sg[:, :, None], upper=True)
    rest = diagonal * first.squeeze(2) - scale[:, None] * (yg - (yy @ first).squeeze(2))
    second = torch.linalg.solve_triangular(upper.mT, rest[:, :, None], upper=False)
    return scale, second.squeeze(2), -scale[:, None] * first.squeeze(2)


Decay = Literal["steps", "linear", "cosine", "none"]


def _decayed(rate: float, decay: Decay, steps: Tensor, evaluations: int) -> Tensor:
    """(P,) the rate of each search's next step, of which it has taken `steps` (P,) out of `evaluations`."""
    if decay == "none":
        return torch.full(steps.shape, rate, device=steps.device)
    done = steps / evaluations
    if decay == "linear":
        return rate * (1 - done)
    if decay == "cosine":
        return rate * (1 + (math.pi * done).cos()) / 2
    passed = torch.stack([8 * (steps + 1) > eighths * evaluations for eighths in (3, 5, 7)]).sum(0)
    return rate * 0.1**passed


def _take_in(state: State, loss: Tensor, gradient: Tensor) -> Tensor:
    """Keep the trial where it is the best so far; returns the gradient, zero where it or the loss is not finite."""
    finite = loss.isfinite() & gradient.isfinite().all(1)
    state.status[~finite] = DIVERGED
    better = finite & (loss < state.loss)
    state.loss = torch.where(better, loss, state.loss)
    state.best = torch.where(better[:, None], state.trial, state.best)
    return torch.where(finite[:, None], gradient, 0)


@dataclass
class AdamState(State):
    """mean, square: running moments of the gradient; steps (P,) taken so far."""

    mean: Tensor
    square: Tensor
    steps: Tensor


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba 2015) for each problem.

    `signed` feeds it the gradient's signs, which makes the steps independent of the gradient's scale (Geiping et al. 2020).
    A decayed schedule knows its end: what it reaches after N evaluations is not what a longer one has reached by then.

    decay  "steps": rate / 10 after 3/8, 5/8 and 7/8 of the evaluations; "linear" or "cosine": to 0 at the end; "none"
    """

    evaluations: int = 2000
    rate: float = 0.1
    signed: bool = False
    decay: Decay = "steps"
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        _check_descent(self)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")

    def start(self, points: Tensor) -> AdamState:
        """Searches that begin at `points` (P, D)."""
        p = len(points)
        zero = torch.zeros(p, dtype=torch.int64, device=points.device)
        return AdamState(
            trial=points.clone(),
            best=points.clone(),
            loss=points.new_full((p,), math.inf),
            status=zero,
            mean=torch.zeros_like(points),
            square=torch.zeros_like(points),
            steps=zero.clone(),
        )

    def step(self, state: AdamState, loss: Tensor, gradient: Tensor) -> None:
        """Take in the evaluation at `state.trial`, and choose the next trial points."""
        gradient = _take_in(state, loss, gradient)
        gradient = gradient.sign() if self.signed else gradient
        rate = _decayed(self.rate, self.decay, state.steps, self.evaluations)
        state.steps += 1
        first, second = self.betas
        state.mean.lerp_(gradient, 1 - first)
        state.square.lerp_(gradient.square(), 1 - second)
        mean = state.mean / (1 - first ** state.steps[:, None])
        square = state.square / (1 - second ** state.steps[:, None])
        state.trial = state.trial - rate[:, None] * mean / (square.sqrt() + 1e-8)


@dataclass
class SGDState(State):
    """velocity: what the next step adds to; steps (P,) taken so far."""

    velocity: Tensor
    steps: Tensor


@dataclass(frozen=True)
class SGD:
    """Gradient descent with heavy-ball momentum (Polyak 1964) for each problem; `decay` as for `Adam`."""

    evaluations: int = 2000
    rate: float = 0.1
    momentum: float = 0.9
    decay: Decay = "none"

    def __post_init__(self) -> None:
        _check_descent(self)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum}")

    def start(self, points: Tensor) -> SGDState:
        """Searches that begin at `points` (P, D)."""
        p = len(points)
        zero = torch.zeros(p, dtype=torch.int64, device=points.device)
        return SGDState(
            trial=points.clone(),
            best=points.clone(),
            loss=points.new_full((p,), math.inf),
            status=zero,
            velocity=torch.zeros_like(points),
            steps=zero.clone(),
        )

    def step(self, state: SGDState, loss: Tensor, gradient: Tensor) -> None:
        """Take in the evaluation at `state.trial`, and choose the next trial points."""
        gradient = _take_in(state, loss, gradient)
        rate = _decayed(self.rate, self.decay, state.steps, self.evaluations)
        state.steps += 1
        state.velocity.mul_(self.momentum).add_(gradient)
        state.trial = state.trial - rate[:, None] * state.velocity


Optimizer = LBFGS | Adam | SGD


@dataclass(frozen=True)
class Stop:
    """When a search ends before its budget of evaluations.

    threshold  it has succeeded: its loss is this or less; the problem's later starts are not run
    variation  two evaluations after one another differ by less than this in loss
    patience   so many evaluations brought no smaller loss
    seconds    wall time of the whole program: every search ends where it is. What is found then depends on the machine and on
               what else is attacked
    """

    threshold: float = 0.0
    variation: float | None = None
    patience: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"threshold must be >= 0, got {self.threshold}")
        for name in ("variation", "patience", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be > 0 or None, got {value}")


@dataclass(frozen=True)
class Minima:
    """Where the starts of V problems ended; R starts each, of which `tried` were run.

    points       (V, R, D) best point of each start; the start itself where it was not run
    losses       (V, R) its loss; inf where the start diverged or was not run
    evaluations  (V, R) evaluations spent; 0 where the start was not run
    status       (V, R) RUNNING where the budget or `Stop` ended it, STALLED or DIVERGED
    tried        (V,) starts that were run; 0 where the time was over before
    moments      start (its problem times R plus its own number) -> (evaluations, loss, best point (D,)) as it went, if recorded
    """

    points: Tensor
    losses: Tensor
    evaluations: Tensor
    status: Tensor
    tried: Tensor
    moments: dict[int, list[tuple[int, float, Tensor]]] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Sequence["Minima"]) -> "Minima":
        """The minima of all parts, one after the other."""
        moments: dict[int, list[tuple[int, float, Tensor]]] = {}
        before = 0
        for part in parts:
            moments |= {before + start: of for start, of in part.moments.items()}
            before += part.losses.numel()
        return cls(
            points=torch.cat([part.points for part in parts]),
            losses=torch.cat([part.losses for part in parts]),
            evaluations=torch.cat([part.evaluations for part in parts]),
            status=torch.cat([part.status for part in parts]),
            tried=torch.cat([part.tried for part in parts]),
            moments=moments,
        )


@dataclass
class Pieces:
    """What `compute` makes of points (P, D) of problems (P,), `size` of them at a time, one behind the other.

    Where memory is out, on a GPU or a CPU, it goes on with half as many at a time, and says so. That changes nothing but how sums
    of floats are rounded, since problems do not interact; those that do stand `unit` together.
    """

    compute: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    size: int
    unit: int = 1

    def __call__(self, points: Tensor, problems: Tensor) -> tuple[Tensor, ...]:
        while (made := self._tried(points, problems)) is None:  # out of the handler, which holds what was computed so far
            torch.cuda.empty_cache()
        return made

    def _tried(self, points: Tensor, problems: Tensor) -> tuple[Tensor, ...] | None:
        try:
            pieces = zip(points.split(self.size), problems.split(self.size), strict=True)
            parts = [self.compute(p, v) for p, v in pieces]
            return parts[0] if len(parts) == 1 else tuple(torch.cat(part) for part in zip(*parts, strict=True))
        except (RuntimeError, MemoryError) as error:
            self.size = _halved(error, min(self.size, len(points)), self.unit)
            return None


def _halved(error: Exception, size: int, unit: int) -> int:
    """Half of `size` problems at a time, at least `unit`. Raises `error` if it is another one, or there is nothing to halve."""
    if not out_of_memory(error) or size <= unit:
        raise error
    half = max(unit, size // 2 // unit * unit)
    log.warning("no memory for %d problems at a time: going on with %d", size, half)
    return half


def minimise(
    evaluate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    starts: Tensor,
    optimizer: Optimizer,
    *,
    stop: Stop = Stop(),
    chunk: int,
    together: bool = False,
    blocks: Tensor | None = None,
    turn: int = 20,
    record: int = 0,
    project: Callable[[Tensor], Tensor] | None = None,
    report: Callable[[int, int], None] | None = None,
) -> Minima:
    """Minimise V functions from up to R starts each, `chunk` searches at a time.

    evaluate  (points (P, D), problems (P,)) -> losses (P,), gradients (P, D), for P <= chunk; `problems` lie in 0..V-1
    starts    (V, R, D); a problem's next start is only run when the ones before ended above the threshold
    together  run all starts of a problem side by side for the whole budget, for an `evaluate` that lets them meet; of `stop`,
              only the time counts
    blocks    (N, D) bool: the unknowns that move during a turn of `turn` evaluations; the N blocks take turns
    record    keep the best point at the first evaluation, then at every `record`-th and at the last; 0 keeps none
    project   applied to the points before they are evaluated, such as a clamp
    report    called with (problems finished, V) as they finish
    """
    v, r, d = starts.shape
    flat, device = starts.reshape(v * r, d), starts.device
    points, losses = flat.clone(), flat.new_full((v * r,), math.inf)
    evaluations = torch.zeros(v * r, dtype=torch.int64, device=device)
    status, tried = evaluations.clone(), torch.zeros(v, dtype=torch.int64, device=device)
    moments: dict[int, list[tuple[int, float, Tensor]]] = defaultdict(list)
    project = project or (lambda x: x)
    deadline = math.inf if stop.seconds is None else time.perf_counter() + stop.seconds

    waiting = deque(range(v * r) if together else range(0, v * r, r))
    chunk = max(r, chunk // r * r) if together else chunk
    pieces = Pieces(evaluate, chunk, r if together else 1)
    owner = torch.tensor([waiting.popleft() for _ in range(min(chunk, len(waiting)))], dtype=torch.int64, device=device)
    spent, since = torch.zeros_like(owner), torch.zeros_like(owner)
    last = flat.new_full((len(owner),), math.inf)
    least = last.clone()  # so far, over all turns
    state, finished = None, 0
    while state is None:
        try:
            state = optimizer.start(project(flat[owner]))
        except (RuntimeError, MemoryError) as error:
            few = _halved(error, len(owner), pieces.unit)
            waiting.extendleft(reversed(owner[few:].tolist()))
            owner, spent, since, last, least = owner[:few], spent[:few], since[:few], last[:few], least[:few]
    while len(owner):
        loss, gradient = pieces(state.trial, owner // r)
        if blocks is not None:
            gradient = gradient * blocks[(spent // turn) % len(blocks)]
        optimizer.step(state, loss, gradient)  # type: ignore[arg-type]
        state.trial = project(state.trial)
        spent += 1
        since, least = torch.where(state.loss < least, 0, since + 1), torch.minimum(state.loss, least)
        reached = (state.loss <= stop.threshold) & (not together)
        over = spent >= optimizer.evaluations
        if not together:
            # A turn that has come to rest waits for the next one.
            over |= reached | (state.status == DIVERGED if blocks is not None else state.status != RUNNING)
            if stop.variation is not None:
                over |= (loss - last).abs() < stop.variation
            if stop.patience is not None:
                over |= since >= stop.patience
        late = time.perf_counter() >= deadline
        if late:
            over |= True
            waiting.clear()
        last = loss
        if record:
            for i in (over | ((spent - 1) % record == 0)).nonzero().squeeze(1).tolist():
                moments[int(owner[i])].append((int(spent[i]), float(state.loss[i]), state.best[i].clone()))
        if blocks is not None and len(rows := (~over & (spent % turn == 0)).nonzero().squeeze(1)):
            state.put(rows, optimizer.start(state.best[rows]))  # what it remembers belongs to other unknowns
        rows = over.nonzero().squeeze(1)
        if not len(rows):
            continue
        ended = owner[rows]
        points[ended], status[ended], evaluations[ended] = state.best[rows], state.status[rows], spent[rows]
        losses[ended] = state.loss[rows]
        for start, success in zip(ended.tolist(), reached[rows].tolist(), strict=True):
            tried[start // r] += 1
            if success or tried[start // r] == r or late:
                finished += 1
            elif not together:
                waiting.append(start + 1)
        if report:
            report(finished, v)
        again = rows[: len(waiting)]
        if len(again):
            owner[again] = torch.tensor([waiting.popleft() for _ in range(len(again))], device=device)
            spent[again] = since[again] = 0
            last[again] = least[again] = math.inf
            state.put(again, optimizer.start(project(flat[owner[again]])))
        if len(again) < len(rows):
            rest = torch.ones(len(owner), dtype=torch.bool, device=device).index_fill(0, rows[len(again) :], False)
            kept = rest.nonzero().squeeze(1)
            owner, spent, since, last, least = owner[kept], spent[kept], since[kept], last[kept], least[kept]
            state.keep(kept)
    shape = (v, r)
    return Minima(
        points.reshape(v, r, d), losses.reshape(shape), evaluations.reshape(shape), status.reshape(shape), tried, dict(moments)
    )


def _check_descent(settings: Adam | SGD) -> None:
    _at_least_one(settings, "evaluations")
    if settings.rate <= 0:
        raise ValueError(f"rate must be positive, got {settings.rate}")
    if settings.decay not in ("steps", "linear", "cosine", "none"):
        raise ValueError(f'decay must be "steps", "linear", "cosine" or "none", got {settings.decay!r}')


def _at_least_one(settings: object, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be >= 1, got {getattr(settings, name)}")
