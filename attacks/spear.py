"""SPEAR: exact images of a whole batch from the gradient of a linear layer before a ReLU (Dimitrov et al. 2024).

The layer computes Z = X W' + b for a batch X (B, n), one column of Z for each of its m units. With D = dL/dZ (B, m), it is sent

    dL/dW = D' X   (m, n), of rank B,      dL/db = D' 1   (m,).

Any factorisation dL/dW = L R with inner dimension B has D' = L Q and X = Q^-1 R for one invertible Q (B, B). A ReLU makes D sparse:
about half of its entries, those of units that were off, are zero. So column k of Q is a direction q that B - 1 independent rows
of L are orthogonal to, and many rows besides, which no other direction is. Rows are drawn until all have been found; the scale of
each follows from dL/db.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.analytic import entrance, separate
from attacks.batching import one_by_one, streams
from attacks.evidence import Unsupported, gradient_of, reconstruction, relative_gap, size_of
from attacks.labels import labels_at
from fedsim.observation import Knowledge, Observation, Reconstruction

TESTED = 64  # rows that a direction is first tried on
AGREEING = 6  # of which so many must be orthogonal to it: by accident 1 in 10^7 directions has them


@dataclass(frozen=True)
class SPEAR:
    """Finds the directions in which a ReLU made the first layer's gradient sparse, and by them all images of a batch.

    Threat model: sees one client's gradient and the parameters it was computed at, knows the batch size; labels are solved for.
    The model's first layer is linear with a bias and is followed by a ReLU, whatever comes behind.

    Cost doubles with each image of the batch: B - 1 drawn units must all have been off for one image. It is more if images are
    alike, which leaves fewer units to tell them apart. The gradient's precision is no limit: images come back to MSE 1e-16 from
    float32.

    Departures: a draw is the inverse of B rows, whose columns are B candidates at once (each orthogonal to B - 1 of them), where
    the paper takes one null vector of B - 1 rows; of the candidates, the sparsest basis is chosen. Where the directions are not
    found, what `Analytic` can make of a batch is reported, `converged` False.

    draws      at most so many draws of B rows for a victim
    zero       cosine between a row and a direction below which they are orthogonal
    chunk      draws computed as one program
    tolerance  largest relative squared gap between the recomputed gradient and the sent one at which a reconstruction `converged`
    """

    draws: int = 200_000
    zero: float = 1e-5
    chunk: int = 2048
    tolerance: float = 1e-8

    def __post_init__(self) -> None:
        if self.draws < 1 or self.chunk < 1:
            raise ValueError(f"draws and chunk must be >= 1, got {self.draws} and {self.chunk}")
        if not (0 < self.zero < 0.1 and self.tolerance > 0):
            raise ValueError(f"zero must lie in (0, 0.1) and tolerance be > 0, got {self.zero} and {self.tolerance}")

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
        seed = int(torch.randint(2**62, (), generator=rng))
        chances = iter(streams(seen, seed, "spear"))
        return one_by_one(seen, lambda one: self._recover(one, known, model, next(chances)), report)

    def check_model(self, model: nn.Module, image_shape: tuple[int, ...]) -> None:
        """Raises Unsupported for a model that it cannot work on."""
        entrance(model, dict(model.named_parameters()), dict(model.named_buffers()), image_shape)

    def _recover(self, seen: Observation, known: Knowledge, model: nn.Module, rng: torch.Generator) -> Reconstruction:
        began = time.perf_counter()
        layer = entrance(model, seen.params, seen.buffers, known.image_shape)
        gradient = gradient_of(seen, known)
        weight, bias = gradient[f"{layer.name}.weight"].double(), gradient[f"{layer.name}.bias"].double()
        size = size_of(seen, known)
        if size > min(weight.shape):
            raise Unsupported(f"SPEAR needs a batch no larger than the first layer, got {size} images and {tuple(weight.shape)}")
        w, b = (seen.params[f"{layer.name}.{part}"].double() for part in ("weight", "bias"))
        finite = bool(weight.isfinite().all() and bias.isfinite().all())
        fed = self._batch(weight, bias, size, lambda fed: fed @ w.T + b > 0, rng) if finite else None
        images = layer.images(fed) if fed is not None else separate(layer, weight, bias, size, 1e-4)[0]
        images = images.nan_to_num(0.5).float().clamp(0, 1)
        labels, soft = labels_at(seen, known, model, images)
        gap = relative_gap(seen, known, model, images, soft)
        return reconstruction(images, labels, gap, fed is not None and gap <= self.tolerance, time.perf_counter() - began)

    def _batch(
        self, weight: Tensor, bias: Tensor, size: int, on: Callable[[Tensor], Tensor], rng: torch.Generator
    ) -> Tensor | None:
        """(B, n) what the layer was fed, or None where the directions were not found.

        on  (B, n) -> (B, m), which units are on for what the layer is fed: those whose gradient is not zero, if the batch is right
        """
        if size == 1:
            return (bias @ weight / bias.square().sum())[None] if bias.any() else None
        basis = _row_space(weight, size, rng)
        if basis is None:
            return None
        factor = weight @ basis  # L (m, B), with R = basis'
        lengths = factor.norm(dim=1)
        alive = lengths > 1e-5 * lengths.max()
        rows = factor[alive] / lengths[alive, None]  # a factor in front of a row does not move its zeros
        tested = min(TESTED, len(rows) - size)
        if tested < AGREEING:
            return None
        directions, fed = rows[:0], None
        for _ in range(-(-self.draws // self.chunk)):
            order = torch.randperm(len(rows), generator=rng).to(rows.device)
            test, drawn = rows[order[:tested]], rows[order[tested:]]
            picks = torch.rand(max(1, self.chunk * size // len(drawn)), len(drawn), generator=rng).argsort(1).to(rows.device)
            picks = picks[:, : len(drawn) // size * size].reshape(-1, size)
            inverse, info = torch.linalg.inv_ex(drawn[picks])
            candidates = inverse[info == 0].mT.flatten(0, 1)
            candidates = candidates / candidates.norm(dim=1, keepdim=True)
            candidates = candidates[((candidates @ test.T).abs() < self.zero).sum(1) >= AGREEING]
            if not len(candidates):
                continue
            directions = _sparsest(torch.cat([directions, candidates]), rows, self.zero)
            if len(directions) < size:
                continue
            scale = torch.linalg.lstsq(factor @ directions.T, bias[:, None]).solution
            fed = torch.linalg.solve(directions.T * scale.T, basis.T)
            if float((on(fed)[:, alive] == ((rows @ directions.T).abs() > self.zero).T).double().mean()) > 0.998:
                return fed
        return fed


def _sparsest(candidates: Tensor, rows: Tensor, zero: float) -> Tensor:
    """(<= B, B) independent directions out of candidates (N, B), refined; those first to which most rows (m, B) are orthogonal.

    A difference of two images' directions is orthogonal to the rows that both are, so it is found too. But it has fewer of them:
    the greedy choice of independent directions, the sparsest first, is the sparsest basis there is, and leaves it out.
    """
    counts = ((candidates @ rows.T).abs() < zero).sum(1)
    left = candidates[counts.argsort(descending=True, stable=True)]
    beyond = left.clone()  # what of each is outside the span of those chosen
    chosen: list[Tensor] = []
    span = left.new_empty(0, left.shape[1])
    while len(left):
        direction = _refined(left[0], rows, zero)
        keep = torch.ones(len(left), dtype=torch.bool, device=left.device)
        keep[0] = False
        if direction is not None:
            outside = direction - (direction @ span.T) @ span
            if float(outside.norm()) > 1e-3:
                outside = outside / outside.norm()
                chosen.append(direction)
                span = torch.cat([span, outside[None]])
                beyond = beyond - (beyond @ outside)[:, None] * outside
                keep &= beyond.norm(dim=1) > 1e-3
        left, beyond = left[keep], beyond[keep]
    return torch.stack(chosen) if chosen else span


def _refined(q: Tensor, rows: Tensor, zero: float) -> Tensor | None:
    """The direction that the rows orthogonal to `q` (B,) agree on; None if they do not, or if there are no more than any q has."""
    for _ in range(2):
        orthogonal = rows[(rows @ q).abs() < zero]
        if len(orthogonal) < len(q) - 1 + AGREEING:
            return None
        _, values, vectors = torch.linalg.svd(orthogonal, full_matrices=False)
        if values[-2] < 100 * values[-1]:
            return None
        q = vectors[-1]
    return q


def _row_space(weight: Tensor, size: int, rng: torch.Generator) -> Tensor | None:
    """(n, B) an orthonormal basis of what the rows of `weight` (m, n) span; None where that has fewer dimensions than B."""
    width = min(size + 8, *weight.shape)
    sketch = torch.randn(width, len(weight), generator=rng, dtype=weight.dtype).to(weight.device) @ weight
    for _ in range(2):  # power iterations, orthonormal in between (Halko et al. 2011, algorithm 4.4)
        wide, _ = torch.linalg.qr(sketch.T)
        tall, _ = torch.linalg.qr(weight @ wide)
        sketch = tall.T @ weight
    _, values, vectors = torch.linalg.svd(sketch, full_matrices=False)
    return vectors[:size].T if values[size - 1] > 1e-6 * values[0] else None
