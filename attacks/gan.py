"""The baseline that DLG was compared with: a generator that the shared model teaches what a class looks like.

Hitaj, Ateniese and Perez-Cruz (2017) let a participant train a generator against the shared model, used as the discriminator: what
it calls a class is taken for real. Melis et al. (2019) call such images class representatives: they show what a class looks like to
the model, not what one client's image looked like.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from attacks.batching import alike, streams
from attacks.decoder import Decoder, draw, row_of
from attacks.matching import GradientMatching
from attacks.optimizers import Adam, minimise
from attacks.problems import CHUNK, Plan
from attacks.terms import Prior
from fedsim.checks import number, whole
from fedsim.models import Default
from fedsim.observation import Knowledge, Observation, Reconstruction

MEMORY = 2**30  # bytes that the generators trained at a time may take


@dataclass(frozen=True)
class ClassGAN:
    """Trains a generator for each victim until the shared model calls what it draws the victim's classes (Hitaj et al. 2017).

    A conditional generator: latents N(0, 1) and the class, one-hot, go in. Its loss is the model's cross-entropy on images
    drawn from `samples` fixed latents for each label of the batch, plus the priors. What is reported for a label is the image whose
    class the model is surest of.

    Threat model: a participant or an eavesdropper who sees the broadcast parameters; of the update it uses the labels only, which
    are read off it or told. It holds no image at all: the shared model's opinion is its only measure of what is real. The paper's
    attacker also trains the shared model on what it drew, under another label, so that its victim teaches it more; this one
    disturbs nothing, and takes the model of the victim's round as it is.

    The loss is no gradient gap: a model can be sure of an image that resembles no client's.

    labels     "analytic": read off the update; "given": told
    samples    latents for each label
    latents    L, numbers in a latent
    width      channels of the generator's last maps, see `attacks.decoder.Decoder`
    optimizer  trains the generators; holds the number of steps
    priors     what is known about images
    restarts   generators for each victim, from weights of their own; the one with the smallest loss is reported
    tolerance  cross-entropy at which a generator `converged`: the model is as good as sure of all its images
    """

    labels: Literal["analytic", "given"] = "analytic"
    samples: int = 8
    latents: int = 64
    width: int = 16
    optimizer: Adam = Adam(300, rate=2e-3)
    priors: tuple[Prior, ...] = ()
    restarts: int = 1
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        if self.labels not in ("analytic", "given"):
            raise ValueError(f'labels must be "analytic" or "given", got {self.labels!r}')
        for name in ("samples", "latents", "width", "restarts"):
            whole(name, getattr(self, name))
        number("tolerance", self.tolerance, 0, above=True)

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
        seed = int(torch.randint(2**62, (), generator=rng))
        plans, chances = [Plan.of(one, known, False) for one in seen], streams(seen, seed, "generator")
        reader = GradientMatching(labels=self.labels)
        results: dict[int, Reconstruction] = {}
        for members in alike(seen, plans):
            device = next(iter(seen[members[0]].params.values())).device
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(seed)  # PyTorch's layers draw as they are made, and so do models with dropout
                decoder = Decoder(known.image_shape, self.latents + known.num_classes, self.width)
                group = _Generators(
                    model,
                    decoder,
                    params=_stack([seen[i].params for i in members]),
                    buffers=_stack([seen[i].buffers for i in members]),
                    labels=torch.stack([reader.labels_of(seen[i], i, plans[i], known, model) for i in members]),
                    noise=torch.stack([self._noise(plans[i].images, chances[i]) for i in members]).to(device),
                    num_classes=known.num_classes,
                    priors=self.priors,
                )
                starts = torch.stack([self._starts(decoder, chances[i]) for i in members]).to(device)
                results |= zip(members, self._train(group, starts), strict=True)
            if report:
                report(len(results), len(seen))
        return [results[i] for i in range(len(seen))]

    def _noise(self, size: int, rng: torch.Generator) -> Tensor:
        """(B, S, L) latents of one victim."""
        return torch.randn(size, self.samples, self.latents, generator=rng)

    def _starts(self, decoder: Decoder, rng: torch.Generator) -> Tensor:
        """(R, D) untrained generators of one victim."""
        rows = []
        for _ in range(self.restarts):
            Default()(decoder, rng)
            rows.append(row_of(decoder))
        return torch.stack(rows)

    def _train(self, group: "_Generators", starts: Tensor) -> list[Reconstruction]:
        began = time.perf_counter()
        v, r, d = starts.shape
        chunk = max(1, min(CHUNK.get(starts.device.type, CHUNK["cpu"]), MEMORY // (10 * d * starts.element_size())))
        minima = minimise(group.evaluate, starts, self.optimizer, chunk=chunk)
        problems = torch.arange(v * r, device=starts.device) // r
        parts = zip(minima.points.flatten(0, 1).split(chunk), problems.split(chunk), strict=True)
        images, losses = (torch.cat(part) for part in zip(*(group.surest(*part) for part in parts), strict=True))
        images, losses = images.unflatten(0, (v, r)), torch.where(minima.losses.isfinite(), losses.reshape(v, r), torch.inf)
        seconds, spent = time.perf_counter() - began, minima.evaluations.sum(1)
        made = []
        for i, best in enumerate(losses.argmin(1).tolist()):
            made.append(
                Reconstruction(
                    images=images[i, best],
                    labels=group.labels[i],
                    loss=float(losses[i, best]),
                    converged=bool(losses[i, best] <= self.tolerance),
                    starts=images[i],
                    losses=losses[i],
                    evaluations=int(spent[i]),
                    seconds=seconds * float(spent[i] / spent.sum()),
                )
            )
        return made


@dataclass
class _Generators:
    """V victims of equal shapes: what was broadcast to them, stacked, and what their generators are fed.

    labels (V, B); noise (V, B, S, L)
    """

    model: nn.Module
    decoder: Decoder
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    labels: Tensor
    noise: Tensor
    num_classes: int
    priors: tuple[Prior, ...]

    def evaluate(self, rows: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (P,) of generators with the weights `rows` (P, D), and their gradients."""
        rows = rows.detach().requires_grad_()
        images = self._images(rows, problems)
        losses = self._entropies(images, problems).mean((1, 2))
        for prior in self.priors:
            losses = losses + prior(images)
        (gradient,) = torch.autograd.grad(losses.sum(), rows)
        return losses.detach(), gradient

    @torch.no_grad()
    def surest(self, rows: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        """(P, B, C, H, W) for each label the image that the model takes for it most surely; and the cross-entropy of all, (P,)."""
        images = self._images(rows, problems)
        entropies = self._entropies(images, problems)
        surest = entropies.argmin(2)[..., None, None, None, None]
        found = images.unflatten(1, entropies.shape[1:]).take_along_dim(surest, 2).squeeze(2)
        return found.nan_to_num(), entropies.mean((1, 2))

    def _images(self, rows: Tensor, problems: Tensor) -> Tensor:
        """(P, B * S, C, H, W)"""
        labels = nn.functional.one_hot(self.labels, self.num_classes).to(self.noise.dtype)
        classes = labels[:, :, None].expand(*self.noise.shape[:3], self.num_classes)
        return draw(self.decoder, rows, torch.cat([self.noise, classes], -1).flatten(1, 2)[problems])

    def _entropies(self, images: Tensor, problems: Tensor) -> Tensor:
        """(P, B, S) cross-entropy of the shared model on what was drawn."""
        params = {name: t[problems] for name, t in self.params.items()}
        buffers = {name: t[problems] for name, t in self.buffers.items()}  # copies: BatchNorm in training mode writes to them
        labels = self.labels[:, :, None].expand(self.noise.shape[:3]).flatten(1)[problems]

        def entropies(params: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
            output = functional_call(self.model, {**params, **buffers}, (images,))
            logits = output[0] if isinstance(output, tuple) else output
            return nn.functional.cross_entropy(logits, labels, reduction="none")

        return vmap(entropies, randomness="different")(params, buffers, images, labels).unflatten(1, self.noise.shape[1:3])


def _stack(dicts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([one[name] for one in dicts]) for name in dicts[0]}
