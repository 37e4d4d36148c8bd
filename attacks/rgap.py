"""R-GAP: one image in closed form, layer by layer from the last to the first (Zhu & Blaschko 2021).

For a layer z = W x + b with r = dL/dz known, its input x obeys two sets of linear equations: W x = z - b, and dL/dW = r x' (for a
convolution, a sum of such products over places). The least squares solution is the previous layer's output; undoing the activation
gives that layer's z, and backpropagation through x gives its r. It starts at the head, whose bias's gradient is r itself.
All is computed in float64: rounding is amplified at each layer, by small slopes of activations most of all.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.batching import one_by_one
from attacks.evidence import Unsupported, gradient_of, reconstruction, relative_gap, size_of
from attacks.labels import analytic_labels
from fedsim.models import Classifier, Normalize
from fedsim.observation import Knowledge, Observation, Reconstruction

# Activations that can be undone: from the output y to the input z.
INVERSES: dict[type[nn.Module], Callable[[Tensor, nn.Module], Tensor]] = {
    nn.Sigmoid: lambda y, _: torch.logit(y, eps=1e-12),
    nn.Tanh: lambda y, _: y.clamp(-1 + 1e-12, 1 - 1e-12).atanh(),
    nn.LeakyReLU: lambda y, a: torch.where(y > 0, y, y / a.negative_slope),  # type: ignore[operator]
    nn.ELU: lambda y, a: torch.where(y > 0, y, (y / a.alpha).clamp(min=-1 + 1e-12).log1p()),  # type: ignore[operator]
    nn.Softplus: lambda y, a: (a.beta * y.clamp(min=1e-12)).expm1().log() / a.beta,  # type: ignore[operator]
}
LINEAR = (nn.Linear, nn.Conv2d)
REFINEMENTS = 20  # of the normal equations' solution, whose square condition they make up for
RESHAPING = (nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d)


@dataclass(frozen=True)
class Count:
    """A layer's linear system: `unknowns` entries of its input, and the equations its weights and their gradient give.

    Fewer equations than unknowns: the layer's input is not determined, and the attack returns about the smallest that fits. Enough
    of them are necessary, not sufficient: they may depend on one another.
    """

    layer: str
    unknowns: int
    from_weights: int
    from_gradient: int

    @property
    def determined(self) -> bool:
        """Whether there are as many equations as unknowns."""
        return self.from_weights + self.from_gradient >= self.unknowns


@dataclass(frozen=True)
class RGAP:
    """Solves each layer's input from its output, its weights and their gradient; from the head back to the image.

    Threat model: sees one client's gradient for a single image and the parameters it was computed at; the label is read off the
    gradient. Works on a `Classifier` whose features are a chain of linear layers, convolutions without groups, Flatten and
    activations that can be undone (sigmoid, tanh, leaky ReLU, ELU, softplus); biases may be there or not, but for the head's.

    How good it is depends on each layer's rank (see `analyse`) and on how far activations saturate; errors add up over layers.
    Departures: an equation for z counts by the slope of the activation that z was found through, since that is what its error was
    divided by (a sigmoid LeNet comes back at 100 dB and more); all starts at the head's bias, whatever the classes.

    weights    how much the equations W x = z count beside dL/dW = r x'; each is tried until one explains the gradient
    tolerance  largest relative squared gap between the recomputed gradient and the sent one at which a reconstruction `converged`
    """

    weights: Sequence[float] = (0.1, 0.01)
    tolerance: float = 1e-8

    def __post_init__(self) -> None:
        if not self.weights or min(self.weights) <= 0:
            raise ValueError(f"weights must be positive numbers, one at least, got {self.weights}")
        if self.tolerance <= 0:
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
        """One reconstruction for each observation, in order; draws nothing."""
        return one_by_one(seen, lambda one: self._solve(one, known, model), report)

    def check_model(self, model: nn.Module, image_shape: tuple[int, ...]) -> None:
        """Raises Unsupported for a model that it cannot work on."""
        _chain(model)

    def _solve(self, seen: Observation, known: Knowledge, model: nn.Module) -> Reconstruction:
        began = time.perf_counter()
        if (size := size_of(seen, known)) != 1:
            raise Unsupported(f"R-GAP reconstructs single images, got a batch of {size}: use spear, or an attack by optimisation")
        chain = _chain(model)
        assert isinstance(model, Classifier)
        gradient = {name: t.double() for name, t in gradient_of(seen, known).items()}
        params = {name: t.double() for name, t in seen.params.items()}
        labels = analytic_labels(gradient, known.num_classes)
        images, gaps = [], []
        for weight in self.weights:
            images.append(_image(model, chain, known, params, gradient, weight))
            gaps.append(relative_gap(seen, known, model, images[-1], labels))
            if gaps[-1] <= self.tolerance:
                break
        best = min(range(len(gaps)), key=gaps.__getitem__)
        found = reconstruction(images[best], labels, gaps[best], gaps[best] <= self.tolerance, time.perf_counter() - began)
        return replace(found, starts=torch.stack(images), losses=torch.tensor(gaps), evaluations=len(gaps))


def _image(
    model: Classifier,
    chain: Sequence[tuple[str, nn.Module]],
    known: Knowledge,
    params: Mapping[str, Tensor],
    gradient: Mapping[str, Tensor],
    weight: float,
) -> Tensor:
    """(1, C, H, W), from the head's gradient back to the image."""
    r = gradient["head.bias"]
    x = r @ gradient["head.weight"] / r.square().sum()
    r = r @ params["head.weight"]
    trust = torch.ones_like(x)
    for (name, layer), shape in zip(reversed(chain), reversed(_shapes(chain, known.image_shape)), strict=True):
        if isinstance(layer, LINEAR):
            x, r = _input(layer, name, shape, x, r, weight * trust / trust.max(), params, gradient)
            trust = torch.ones_like(x)
        elif isinstance(layer, tuple(INVERSES)):
            z = INVERSES[type(layer)](x, layer)
            (slope,) = torch.autograd.grad(layer(z.requires_grad_()).sum(), z)
            x, r, trust = z.detach(), r * slope, slope.abs()
        x, r, trust = x.reshape(shape), r.reshape(shape), trust.reshape(shape)
    if isinstance(model.normalize, Normalize):
        x = x * model.normalize.std + model.normalize.mean
    return x[None].nan_to_num(0.5).float().clamp(0, 1)


def analyse(model: nn.Module, image_shape: tuple[int, int, int]) -> list[Count]:
    """How many unknowns and equations each layer of `model` has, from the first to the last; Unsupported as `RGAP` would be."""
    chain = _chain(model)
    counts = []
    for (name, layer), shape in zip(chain, _shapes(chain, image_shape), strict=True):
        if isinstance(layer, LINEAR):
            outputs = int(layer(torch.zeros(1, *shape)).numel())
            unknowns = int(torch.Size(shape).numel())
            # A channel has one equation for each weight that sees it, of which no more can be independent than it has places;
            # the rows of r x' all say the same of x.
            equations = min(layer.weight.numel(), unknowns)
            counts.append(Count(name, unknowns, outputs, equations))
    return counts


def _chain(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The features' layers in order with their names; Unsupported if `RGAP` cannot work on the model."""
    if not isinstance(model, Classifier) or model.bottleneck is not None:
        what = "a Classifier with a bottleneck" if isinstance(model, Classifier) else f"this {type(model).__name__}"
        raise Unsupported(f"R-GAP needs a plain fedsim.models.Classifier, not {what}: use analytic, or an attack by optimisation")
    if model.head.bias is None:
        raise Unsupported("R-GAP starts at the gradient of the head's bias, and this head has none")
    if not isinstance(model.normalize, Normalize | nn.Identity):
        raise Unsupported(f"R-GAP undoes Normalize, not {type(model.normalize).__name__}")
    chain: list[tuple[str, nn.Module]] = []
    layers: Iterable[tuple[str, nn.Module]] = model.features.named_modules(remove_duplicate=False)
    for name, layer in layers:
        if isinstance(layer, nn.Sequential):
            continue
        refused = isinstance(layer, nn.Dropout | nn.Dropout2d) and layer.p > 0 and layer.training
        refused |= isinstance(layer, nn.Conv2d) and (layer.groups > 1 or layer.padding_mode != "zeros")
        refused |= isinstance(layer, LINEAR) and any(layer is earlier for _, earlier in chain)  # their gradients are summed
        if refused or not isinstance(layer, (*LINEAR, *RESHAPING, *INVERSES)):
            raise Unsupported(f"R-GAP cannot go back through {layer}: it undoes dense layers, convolutions and smooth activations")
        chain.append((f"features.{name}".rstrip("."), layer))
    return chain


@torch.no_grad()
def _shapes(chain: Sequence[tuple[str, nn.Module]], image_shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shape of each layer's input, without the batch."""
    x, shapes = torch.zeros(1, *image_shape), []
    for _, layer in chain:
        shapes.append(tuple(x.shape[1:]))
        device = next((p.device for p in layer.parameters()), x.device)
        x = layer(x.to(device))
    return shapes


def _input(
    layer: nn.Module,
    name: str,
    shape: tuple[int, ...],
    z: Tensor,
    r: Tensor,
    trust: Tensor,
    params: Mapping[str, Tensor],
    gradient: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """(x, dL/dx), flat, of a linear layer whose output z and r = dL/dz are known; `trust`, like z, weighs the equations for z."""
    weight, target = params[f"{name}.weight"], gradient[f"{name}.weight"]
    if isinstance(layer, nn.Linear):  # r x' alone determines x, and better than W x = z does
        return r @ target / r.square().sum(), r @ weight
    assert isinstance(layer, nn.Conv2d)
    channels, places = shape[0], shape[1] * shape[2]
    basis = torch.eye(channels * places, dtype=z.dtype, device=z.device).reshape(-1, *shape)
    matrix = F.conv2d(basis, weight, None, layer.stride, layer.padding, layer.dilation).flatten(1).T
    known = (z - params[f"{name}.bias"][:, None, None] if layer.bias is not None else z).flatten()
    # dL/dW[o, c] sums r[o] times x[c] at each offset: one map (O k k, H W), the same for every channel c of x.
    patches = F.unfold(basis[:places, :1], layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
    products = torch.einsum("nkl,ol->okn", patches, r.flatten(1)).flatten(0, 1) / r.norm()
    sent = target.transpose(0, 1).flatten(1).T / r.norm()  # (O k k, C)
    weights = trust.flatten().square()
    normal = torch.block_diag(*[products.T @ products] * channels) + matrix.T @ (weights[:, None] * matrix)
    normal.diagonal().add_(1e-13 * normal.diagonal().max())
    root, _ = torch.linalg.cholesky_ex(normal)  # of a system that has none nothing comes, and the gap will tell
    x = torch.zeros_like(normal[0])
    for _ in range(REFINEMENTS):
        missing = (products.T @ (sent - products @ x.reshape(channels, -1).T)).T.flatten()
        missing = missing + matrix.T @ (weights * (known - matrix @ x))
        x = x + torch.cholesky_solve(missing[:, None], root).squeeze(1)
    return x, r.flatten() @ matrix
