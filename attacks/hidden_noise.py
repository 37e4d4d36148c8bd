"""Models that draw at random while a client trains, and what an attacker who knows that does about it.

The gradient of a layer behind a draw is that of one draw. An attacker who draws anew at each evaluation chases a target that moves,
and never comes to rest, which is all the protection there is. It can leave those gradients out, or look for the draw together with
the image (Scheliga et al. 2022, arXiv:2208.04767; Balunovic et al. 2022 for the general rule). And where a linear layer sees the
image first, nothing behind it matters (`attacks.Analytic`).
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedsim.models import Stochastic


def hidden_noises(model: nn.Module) -> dict[str, Stochastic]:
    """The modules of a model in its mode that take their noise as an input, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Stochastic) and m.training}


def in_front_of_noise(
    model: nn.Module, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], image_shape: tuple[int, ...]
) -> list[str]:
    """Names of the parameters that a model uses before it first draws; a bottleneck's own are not among them.

    params, buffers  of one client
    """
    behind: set[str] = set()
    drawn = False

    def entered(name: str, module: nn.Module) -> None:
        nonlocal drawn
        drawn = drawn or (module.training and isinstance(module, Stochastic | nn.modules.dropout._DropoutNd))
        if drawn:
            behind.update(f"{name}.{own}".removeprefix(".") for own, _ in module.named_parameters(recurse=False))

    hooks = [
        module.register_forward_pre_hook(lambda module, _, name=name: entered(name, module))
        for name, module in model.named_modules()
    ]
    tensors = {**params, **{name: t.clone() for name, t in buffers.items()}}  # BatchNorm writes to them
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            functional_call(model, tensors, (next(iter(params.values())).new_zeros(2, *image_shape),))
    finally:
        for hook in hooks:
            hook.remove()
    left = [name for name in params if name not in behind]
    if not left:
        raise ValueError(
            f'matched="before_noise" leaves nothing to match, {type(model).__name__} draws before its first layer with weights; '
            'take noise="sought"'
        )
    return left


def sampled(noises: Mapping[str, Stochastic], starts: int, images: int, rng: torch.Generator) -> Tensor:
    """(starts, ...) draws of all modules for so many images, flattened: where a search for the noise begins."""
    drawn = [module.sample(torch.empty(starts, images, *module.noise_shape), rng).flatten(1) for module in noises.values()]
    return torch.cat([torch.empty(starts, 0), *drawn], 1)


def as_buffers(noises: Mapping[str, Stochastic], flat: Tensor, images: int) -> dict[str, Tensor]:
    """What `sampled` flattened, (P, ...), as the buffers (P, images, *noise_shape) by which the modules take it."""
    sizes = [images * math.prod(module.noise_shape) for module in noises.values()]
    parts = zip(noises.items(), flat.split(sizes, 1), strict=True)
    return {f"{name}.noise".removeprefix("."): part.reshape(-1, images, *module.noise_shape) for (name, module), part in parts}
