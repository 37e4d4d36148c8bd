"""Generative priors: search among the images that a generator can draw, which is where photographs lie and noise does not.

A generator maps latents (B, L), about N(0, 1), to images (B, C, H, W) in [0, 1]. The attacker makes it from public images of the
victims' kind, `Knowledge.public`, which are in no client's hands. What was made is kept beside the decoded datasets.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from attacks.batching import alike, streams
from attacks.decoder import Decoder, draw, row_of
from attacks.matching import GradientMatching
from attacks.optimizers import LBFGS, Optimizer, minimise
from attacks.problems import MEMORY, Plan, Problems, in_chunks
from fedsim.checks import number, whole
from fedsim.data import Images, cache
from fedsim.models import Default
from fedsim.observation import Knowledge, Observation, Reconstruction
from fedsim.seeding import generator

VERSION = 1  # raise it when the same recipe and images would give another generator

ImageShape = tuple[int, int, int]


class Recipe(Protocol):
    """How a generator is made from public images. A frozen dataclass: its `repr` names what is kept of it."""

    def empty(self, image_shape: ImageShape, public: int) -> "Generator":
        """The network that `fit` makes of so many public images, with any weights."""
        ...

    def fit(self, public: Images) -> "Generator":
        """The network; what chance it takes is its own."""
        ...


class Eigenimages(nn.Module):
    """The mean image plus a combination of principal components: one linear layer. Not confined to [0, 1]."""

    def __init__(self, image_shape: ImageShape, latents: int) -> None:
        super().__init__()
        self.image_shape = image_shape
        self.inputs = latents
        self.linear = nn.Linear(latents, math.prod(image_shape))

    def forward(self, latents: Tensor) -> Tensor:
        return self.linear(latents).unflatten(-1, self.image_shape)


Generator = Eigenimages | Decoder


@dataclass(frozen=True)
class PrincipalComponents:
    """A linear generator: latents weigh the directions in which public images vary most, each by its standard deviation.

    Made in seconds without training, and at the same number of latents nearer to unseen images than a convolutional generator
    that was trained for minutes; see `Autoencoder`.

    latents  L; no more than pixels, nor than public images less one
    """

    latents: int = 256

    def __post_init__(self) -> None:
        whole("latents", self.latents)

    def empty(self, image_shape: ImageShape, public: int) -> Eigenimages:
        """The linear layer, with any weights."""
        return Eigenimages(image_shape, min(self.latents, public - 1, math.prod(image_shape)))

    def fit(self, public: Images) -> Eigenimages:
        """The linear layer."""
        network = self.empty(_shape(public), len(public))
        images = (public.pixels.float() / 255).flatten(1)
        away = images - images.mean(0)
        if len(away) < away.shape[1]:
            _, lengths, vectors = torch.linalg.svd(away, full_matrices=False)
            deviations, vectors = lengths / math.sqrt(len(away)), vectors.T
        else:  # of many images the covariance is the smaller matrix
            variances, vectors = torch.linalg.eigh(away.T @ away / len(away))
            deviations, vectors = variances.clamp(min=0).sqrt().flip(0), vectors.flip(1)
        with torch.no_grad():
            network.linear.weight.copy_((vectors * deviations)[:, : network.inputs])
            network.linear.bias.copy_(images.mean(0))
        return network


@dataclass(frozen=True)
class Autoencoder:
    """A convolutional generator of DCGAN's size: the decoding half of an autoencoder, trained for mean squared error by Adam.

    The codes of the public images are whitened afterwards, so that latents are N(0, 1) as far as two moments go.

    latents  L
    width    channels of its last maps, see `attacks.decoder.Decoder`
    epochs   passes over the public images and their mirror images; the learning rate falls to zero along a cosine
    rate     the learning rate at first
    batch    images in a step
    """

    latents: int = 128
    width: int = 32
    epochs: int = 8
    rate: float = 2e-3
    batch: int = 64

    def __post_init__(self) -> None:
        for name in ("latents", "width", "epochs", "batch"):
            whole(name, getattr(self, name))
        number("rate", self.rate, 0, above=True)

    def empty(self, image_shape: ImageShape, public: int) -> Decoder:
        """The network, with any weights."""
        return Decoder(image_shape, self.latents, self.width)

    def fit(self, public: Images) -> Decoder:
        """The trained network."""
        decoder, encoder = self.empty(_shape(public), len(public)), Encoder(_shape(public), self.latents, self.width)
        rng = generator(0, "autoencoder")
        for network in (encoder, decoder):
            Default()(network, rng)
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=self.rate)
        steps = self.epochs * math.ceil(len(public) / self.batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(self.epochs):
            for index in torch.randperm(len(public), generator=rng).split(self.batch):
                images, _ = public.batch(index)
                mirrored = torch.rand(len(images), 1, 1, 1, generator=rng) < 0.5
                images = torch.where(mirrored, images.flip(-1), images)
                loss = (decoder(encoder(images)) - images).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            codes = torch.cat([encoder(images) for images, _ in public.batches(500)]).double()
            spread = torch.linalg.cholesky(torch.cov(codes.T).reshape(self.latents, -1) + 1e-6 * torch.eye(self.latents))
            weight = decoder.linear.weight.double()
            decoder.linear.bias.add_((weight @ codes.mean(0)).float())
            decoder.linear.weight.copy_((weight @ spread).float())
        return decoder


class Encoder(nn.Module):
    """Images (B, C, H, W) to codes (B, L): `Decoder` backwards."""

    def __init__(self, image_shape: ImageShape, outputs: int, width: int) -> None:
        super().__init__()
        channels, height, width_px = image_shape
        self.pad = (0, -width_px % 8, 0, -height % 8)
        small = math.ceil(height / 8) * math.ceil(width_px / 8)
        layers: list[nn.Module] = []
        for before, after in ((channels, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.PixelUnshuffle(2), nn.Conv2d(4 * before, after, 3, padding=1), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width * small, outputs))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(nn.functional.pad(images, self.pad))


def fitted(recipe: Recipe, public: Images) -> Generator:
    """The generator that `recipe` makes of `public` images, in this process or in one before it."""
    public = public.to("cpu")
    about = json.dumps([VERSION, repr(recipe), *public.pixels.shape])
    key = hashlib.sha256(about.encode() + public.pixels.contiguous().numpy().tobytes()).hexdigest()
    path = cache.path_of("generator", key)
    with torch.random.fork_rng(devices=[]):  # PyTorch's layers draw from the global stream as they are made
        kept = cache.read_tensors(path)
        if kept is not None:
            network = recipe.empty(_shape(public), len(public))
            network.load_state_dict(kept[0])
        else:
            began = time.perf_counter()
            network = recipe.fit(public)
            cache.write_tensors(path, network.state_dict(), {})
            logging.getLogger("fedsim").info("made %s of %s: %.1f s", recipe, public, time.perf_counter() - began)
    return network.requires_grad_(False)


def _shape(public: Images) -> ImageShape:
    channels, height, width = public.pixels.shape[1:]
    return channels, height, width


@dataclass(frozen=True)
class GenerativePrior:
    """Gradient inversion with a generative prior (Jeon et al. 2021): the latents that explain the update best, then the weights.

    First minimises gap / unit + priors + likely * mean(z^2) over the latents of each victim's images. Then, if `tune` is given,
    gap / unit + priors over a copy of the generator's weights for each victim, shared by its images, at the latents found: that
    reaches images which the generator could not draw, and what noise there is in the update.

    Threat model: as `GradientMatching`; besides, holds public images of the victims' kind, `known.public`. In a federation these
    are the dataset's test images: no client trains on them.

    generator  how the generator is made
    matching   gap, priors, labels ("analytic" or "given"), restarts, tolerance, stop, chunk; its optimizer searches the latents
    tune       searches the weights; None leaves them alone
    likely     weight of the latents' mean square, which is 1 for public images
    """

    generator: Recipe
    matching: GradientMatching
    tune: Optimizer | None = None
    likely: float = 1e-3

    def __post_init__(self) -> None:
        number("likely", self.likely, 0)
        if self.matching.labels == "joint":
            raise ValueError('a generative prior is searched with labels known: take labels="analytic" or "given", got "joint"')
        if self.matching.box:
            raise ValueError("box=True clamps pixels, and what is searched here are latents: take box=False")

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
        network = self._network(known)
        plans = [Plan.of(one, known, False) for one in seen]
        seed = int(torch.randint(2**62, (), generator=rng))
        shapes = [(self.matching.restarts, plan.images * network.inputs) for plan in plans]
        chances = streams(seen, seed, "latents")
        starts = [0.1 * torch.randn(shape, generator=chance) for shape, chance in zip(shapes, chances, strict=True)]
        results: dict[int, Reconstruction] = {}
        for members in alike(seen, plans):
            group = Problems.of([seen[i] for i in members], plans[members[0]], known, model, self.matching)
            with torch.random.fork_rng(devices=[group.device] if group.device.type == "cuda" else []):
                torch.manual_seed(seed)  # for models that draw: dropout, variational bottlenecks
                group.labels = torch.stack([self.matching.labels_of(seen[i], i, plans[i], known, model) for i in members])
                begin = torch.stack([starts[i] for i in members]).to(group.device, group.dtype)
                results |= zip(members, self._solve(group, network.to(group.device, group.dtype), begin), strict=True)
            if report:
                report(len(results), len(seen))
        return [results[i] for i in range(len(seen))]

    def _network(self, known: Knowledge) -> "Generator":
        if known.public is None:
            raise ValueError("a generative prior needs known.public: images of the victims' kind, such as a test split's")
        if _shape(known.public) != tuple(known.image_shape):
            raise ValueError(f"public images must be {tuple(known.image_shape)} like the victims', got {_shape(known.public)}")
        if len(known.public) < 2:
            raise ValueError(f"a generator is made of 2 public images and more, got {len(known.public)}: raise data.test_size")
        return fitted(self.generator, known.public)

    def _solve(self, group: Problems, network: "Generator", starts: Tensor) -> list[Reconstruction]:
        began = time.perf_counter()
        v, r, _ = starts.shape
        every = torch.arange(v, device=starts.device)
        found, evaluations, chunk = self._search_latents(group, network, starts)
        images = network(found.reshape(v * r * group.count, -1)).reshape(v * r, -1)
        gaps = in_chunks(group.gaps, images, every.repeat_interleave(r), chunk).reshape(v, r)
        images = images.reshape(v, r, group.count, *group.image_shape)
        spent = evaluations.sum(1)
        if self.tune is not None:
            best = _finite(gaps).argmin(1)
            tuned, more = self._search_weights(group, network, found[every, best], chunk)
            images[every, best] = tuned
            gaps[every, best] = in_chunks(group.gaps, tuned.flatten(1), every, chunk)
            spent = spent + more
        gaps, images = _finite(gaps), images.nan_to_num().clamp(0, 1)
        most = group.enough(images[every, gaps.argmin(1)].flatten(1), chunk)
        seconds = time.perf_counter() - began
        assert group.labels is not None
        made = []
        for i, best in enumerate(gaps.argmin(1).tolist()):
            tried = int((evaluations[i] > 0).sum())
            made.append(
                Reconstruction(
                    images=images[i, best],
                    labels=group.labels[i],
                    loss=float(gaps[i, best]),
                    converged=bool(gaps[i, best] <= most[i]),
                    starts=images[i, :tried],
                    losses=gaps[i, :tried],
                    evaluations=int(spent[i]),
                    seconds=seconds * float(spent[i] / spent.sum()),
                )
            )
        return made

    def _search_latents(self, group: Problems, network: "Generator", starts: Tensor) -> tuple[Tensor, Tensor, int]:
        """Latents (V, R, B * L), evaluations (V, R), and how many problems were computed at a time."""
        size = group.count

        def decode(points: Tensor) -> Tensor:
            return network(points.reshape(len(points) * size, -1)).reshape(len(points), -1)

        def evaluate(points: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
            points = points.detach().requires_grad_()
            losses = group.objective(decode(points), problems) + self.likely * points.square().mean(1)
            return losses.detach(), torch.autograd.grad(losses.sum(), points)[0]

        chunk = self.matching.chunk or group.chunk(decode(starts[:1, 0]), self.matching.optimizer)
        minima = minimise(evaluate, starts, self.matching.optimizer, stop=self.matching.stop, chunk=chunk)
        return minima.points, minima.evaluations, chunk

    def _search_weights(self, group: Problems, network: "Generator", latents: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        """Images (V, B, C, H, W) at latents (V, B * L), and evaluations (V,)."""
        assert self.tune is not None
        row = row_of(network)
        memory = 2 * self.tune.history if isinstance(self.tune, LBFGS) else 2
        chunk = max(1, min(chunk, MEMORY // ((memory + 8) * row.numel() * row.element_size())))
        images, spent = [], []
        for victims in torch.arange(len(latents), device=latents.device).split(chunk):
            at = latents[victims].reshape(len(victims), group.count, -1)

            def evaluate(rows: Tensor, problems: Tensor, at: Tensor = at, victims: Tensor = victims) -> tuple[Tensor, Tensor]:
                rows = rows.detach().requires_grad_()
                losses = group.objective(draw(network, rows, at[problems]).flatten(1), victims[problems])
                return losses.detach(), torch.autograd.grad(losses.sum(), rows)[0]

            starts = row.expand(len(victims), 1, -1)
            minima = minimise(evaluate, starts, self.tune, stop=self.matching.stop, chunk=chunk)
            images.append(draw(network, minima.points[:, 0], at))
            spent.append(minima.evaluations[:, 0])
        return torch.cat(images), torch.cat(spent)


def _finite(gaps: Tensor) -> Tensor:
    return torch.where(gaps.isfinite(), gaps, torch.inf)
