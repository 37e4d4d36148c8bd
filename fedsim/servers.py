"""Who runs the server: an honest one, which trains the model it says it trains, or a malicious one, which changes it to steal.

A server is a frozen dataclass, callable as `server(model, public, rng)`: what it hands to its clients in place of `model`. `pinned`
names the parameters that it sets anew after each round, since training would wear its trap down. Results of a malicious server are
never those of an honest but curious one: `name` stands in every row of a run's leaks, and `changes` on the threat-model card.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from fedsim.checks import number, one_of, whole
from fedsim.data import Images, Sentences
from fedsim.models.imprint import KINDS, Imprinted, imprinted

TIES = 1e-5  # of the measurement's deviation: what keeps the edges of bins apart where public images measure the same


class Server(Protocol):
    """Who decides what the clients train."""

    name: ClassVar[str]

    @property
    def changes(self) -> str:
        """What it does to the model, in plain words; empty for an honest server."""
        ...

    def __call__(self, model: nn.Module, public: Images | Sentences, rng: torch.Generator) -> nn.Module:
        """The model that is broadcast in place of `model`. `public` are images that anybody has, not the clients'."""
        ...

    def pinned(self, model: nn.Module) -> list[str]:
        """Parameters of the broadcast model that are set anew after every round."""
        ...


@dataclass(frozen=True)
class Honest:
    """Hands out the model as it is. An honest but curious server reads what comes back, and changes nothing."""

    name: ClassVar[str] = "honest"
    changes: ClassVar[str] = ""

    def __call__(self, model: nn.Module, public: Images | Sentences, rng: torch.Generator) -> nn.Module:
        return model

    def pinned(self, model: nn.Module) -> list[str]:
        return []


@dataclass(frozen=True)
class Imprint:
    """Robbing the Fed (Fowl et al. 2021): puts an imprint module in front of the model. `attacks.Imprint` reads what it caught.

    Threat model: malicious. The server chooses the architecture and the weights; clients run what they are sent. It needs public
    images like the clients', here the dataset's test split, to know how the measurement is distributed.

    bins         units, each made to catch one image; B images of k equally likely bins are alone with probability (1 - 1/k)^(B - 1)
    kind         "relu", the paper's dense variant; "hardtanh", its sparse one, for several local steps
    measurement  "brightness", the mean of all pixels; "random", a functional drawn from N(0, 1)
    fit          edges of the bins: "empirical", quantiles of the public images' measurements; "normal", those of the normal
                 distribution with their mean and deviation, for an attacker who knows no more
    strength     how far the module shifts a pixel, about; of unusual images ten times as far, by "relu". The base model must still
                 learn from them
    """

    bins: int = 256
    kind: str = "relu"
    measurement: str = "brightness"
    fit: str = "empirical"
    strength: float = 0.1

    name: ClassVar[str] = "imprint"

    def __post_init__(self) -> None:
        whole("server.bins", self.bins, low=2)
        one_of("server.kind", self.kind, KINDS)
        one_of("server.measurement", self.measurement, ["brightness", "random"])
        one_of("server.fit", self.fit, ["empirical", "normal"])
        number("server.strength", self.strength, 0, above=True)

    @property
    def changes(self) -> str:
        return f"puts a layer of {self.bins} units in front of it that copies single images of a batch into the gradient"

    def __call__(self, model: nn.Module, public: Images | Sentences, rng: torch.Generator) -> Imprinted:
        if not isinstance(public, Images):
            raise ValueError("server=imprint catches images, and this run is on text: take server=honest")
        pixels = public.pixels[0].numel()
        trap = imprinted(model, pixels, self.bins, self.kind)
        draw = torch.randn(2, pixels, generator=rng)
        functional = torch.full((pixels,), 1 / pixels) if self.measurement == "brightness" else draw[0]
        functional, edges = self._edges(functional, public)
        # A unit's output is about 1: up to 1 for hardtanh, and in deviations of the measurement for relu.
        trap.imprint.set(functional, edges, draw[1] * self.strength / self.bins)
        return trap

    def pinned(self, model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters() if name.startswith("imprint.")]

    def _edges(self, functional: Tensor, public: Images) -> tuple[Tensor, Tensor]:
        """The functional (D,) scaled to unit deviation on public images, and the edges (bins + 1,): bins equally likely there.

        The first and the last edge are the least and the greatest measurement that pixels in [0, 1] allow.
        """
        measured = torch.cat(list(_measured(functional, public)))
        functional, measured = functional / measured.std(), measured / measured.std()
        shares = torch.arange(1, self.bins, dtype=torch.float64) / self.bins
        if self.fit == "empirical":
            inner = torch.quantile(measured.double(), shares)
        else:
            inner = measured.mean() + torch.special.ndtri(shares)
        low, high = (part.sum().double().reshape(1) for part in (functional.clamp(max=0), functional.clamp(min=0)))
        edges = torch.cat([low - TIES, inner.clamp(low, high), high])
        return functional, (edges + TIES * torch.arange(self.bins + 1)).float()


def _measured(functional: Tensor, public: Images) -> Iterable[Tensor]:
    for images, _ in public.batches(500):
        yield images.flatten(1) @ functional
