"""What a client can see of a malicious server before it sends anything: in the model it is handed, and in its own gradients.

The client needs nobody's help for this: it looks at the broadcast weights, and at one forward and backward pass of its own batch.
A check knows the traps it was made for; one that finds nothing proves nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedsim.checks import number, one_of
from fedsim.training import loss_of

FEW = 8  # units: smaller layers have no room for a trap, and may have alike rows by chance
WHAT = {
    "parallel rows": "{:.0%} of the units of {} measure the same thing, or nothing: this singles out images",
    "dominant image": "one image of the batch outweighs all others {:.3g} times in the gradient of {}: it is sent almost alone",
    "owned units": "{:.0%} of the batch's images stand alone in some unit of {}: the gradient reveals what that layer saw of them",
}
TRAPS = ("parallel rows", "dominant image")


class Refused(ValueError):
    """A client that will not train what it was sent; the message is one line."""


@dataclass(frozen=True)
class Finding:
    """What a check saw in one layer; as a string, in plain words.

    check   "parallel rows", "dominant image" or "owned units"
    layer   name of the layer's weight
    value   what was measured, and `limit`, the most it may be
    """

    check: str
    layer: str
    value: float
    limit: float

    @property
    def trap(self) -> bool:
        """Whether honest models do not show this. Units of honest ReLU layers are often owned: a leak, but nobody's malice."""
        return self.check in TRAPS

    def __str__(self) -> str:
        return WHAT[self.check].format(self.value, self.layer)


@dataclass(frozen=True)
class Inspection:
    """A client's checks of the model it is handed, before it trains. The limits are measured: see `docs/malicious-server.md`.

    action     "off", "warn", or "refuse" to train what holds a trap
    parallel   largest share of a linear layer's rows that may be parallel or zero. An imprint module's all are (Fowl et al. 2021)
    dominance  how many times one image may outweigh all others together in a linear layer's gradient: the disaggregation
               signal-to-noise ratio of Garov et al. (2023, arXiv:2306.03013), here of linear layers only
    owned      largest share of the batch's images that may stand alone in the gradient of some unit of a linear layer, so that the
               unit's gradient is the layer's input for that image. Honest ReLU layers do this to small batches (Boenisch et al.
               2023, arXiv:2112.02918), so it is warned of and never refused

    The last two need a batch of several images, for a single one is sent alone whatever the model.
    """

    action: str = "warn"
    parallel: float = 0.5
    dominance: float = 100.0
    owned: float = 0.5

    def __post_init__(self) -> None:
        one_of("inspect.action", self.action, ["off", "warn", "refuse"])
        number("inspect.parallel", self.parallel, 0, 1, above=True)
        number("inspect.dominance", self.dominance, 0, above=True)
        number("inspect.owned", self.owned, 0, 1, above=True)

    def __call__(
        self,
        model: nn.Module,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        images: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> list[Finding]:
        """Findings at `params`, in the order of layers; those of gradients only if a batch is given. Empty if `action` is "off"."""
        if self.action == "off":
            return []
        found = [Finding("parallel rows", name, value, self.parallel) for name, value in parallel_rows(model, params).items()]
        if images is not None and labels is not None and len(images) > 1:
            for name, (dominance, owned) in exposure(model, params, buffers, images, labels).items():
                found.append(Finding("dominant image", name, dominance, self.dominance))
                found.append(Finding("owned units", name, owned, self.owned))
        return [one for one in found if one.value > one.limit]


@torch.no_grad()
def parallel_rows(model: nn.Module, params: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of each linear layer's rows that are zero or parallel to their common direction, by the name of its weight.

    The common direction is the first right singular vector of the normalised rows, from three steps of the power method.
    """
    shares = {}
    for name, _ in _linear(model):
        weight = params[f"{name}.weight"]
        if len(weight) < FEW:
            continue
        rows = nn.functional.normalize(weight)
        direction = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0)).to(rows)
        for _ in range(3):
            direction = nn.functional.normalize(rows.T @ (rows @ direction), dim=0)
        alike = ((rows @ direction).abs() > 0.99) | ~rows.any(1)
        shares[f"{name}.weight"] = float(alike.float().mean())
    return shares


def exposure(
    model: nn.Module,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    ratio: float = 100.0,
) -> dict[str, tuple[float, float]]:
    """How far a batch's gradient is one image's, in each linear layer by the name of its weight: (dominance, owned).

    With inputs a_j and output gradients d_j, image j adds the matrix d_j a_j' to the layer's gradient.
    dominance  max over j of |d_j a_j'| / |sum over i != j of d_i a_i'|; inf where the others add nothing
    owned      share of images for which that ratio reaches `ratio` in a single row, d_jr a_j against the others' d_ir a_i

    All lengths follow from the Gram matrices of one pass. A model that draws (dropout) draws from the global stream.
    """
    inputs, outputs = _pass(model, params, buffers, images, labels)
    found = {}
    for name in inputs:
        a, d = inputs[name].double(), outputs[name].double()
        gram = a @ a.T
        own, others = _apart(gram * (d @ d.T))
        dominance = torch.where(own > 0, (own / others).sqrt(), 0.0).max()
        own_rows = d.square() * gram.diagonal()[:, None]
        summed = gram @ d
        other_rows = _rest(own_rows, d * summed, (d * summed).sum(0))
        owned = ((own_rows > 0) & (own_rows >= ratio**2 * other_rows)).any(1)
        found[f"{name}.weight"] = (float(dominance), float(owned.float().mean()))
    return found


def _apart(products: Tensor) -> tuple[Tensor, Tensor]:
    """Squared lengths (B,) of each image's part, and of the sum of all others', from their inner products (B, B)."""
    own = products.diagonal()
    return own, _rest(own, products.sum(1), products.sum())


def _rest(own: Tensor, with_sum: Tensor, whole: Tensor) -> Tensor:
    """|s - g|^2 = |s|^2 - 2 g's + |g|^2; zero below what float32 gradients resolve."""
    others = whole - 2 * with_sum + own
    return torch.where(others <= 1e-12 * own, 0.0, others)


def _linear(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module


def _pass(
    model: nn.Module, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], images: Tensor, labels: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs (B, D) of the linear layers and gradients (B, U) of their outputs; not of layers that see several rows an image, or
    that the loss does not depend on."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def note(name: str, given: Tensor, made: Tensor) -> None:
        if given.dim() == 2 and len(given) == len(images):
            inputs[name], outputs[name] = given.detach(), made

    hooks = [
        module.register_forward_hook(lambda _, given, made, name=name: note(name, given[0], made))
        for name, module in _linear(model)
    ]
    try:
        with torch.enable_grad():
            leaves = {name: t.detach().requires_grad_() for name, t in params.items()}
            held = {name: t.clone() for name, t in buffers.items()}  # BatchNorm writes to them
            loss = loss_of(functional_call(model, {**leaves, **held}, (images,)), labels)
            gradients = torch.autograd.grad(loss, list(outputs.values()), allow_unused=True) if outputs else ()
    finally:
        for hook in hooks:
            hook.remove()
    found = {name: gradient for name, gradient in zip(outputs, gradients, strict=True) if gradient is not None}
    return {name: inputs[name] for name in found}, found
