"""The gradient of the matching loss by each route PyTorch has to it, on many small problems at once: milliseconds, compile time.

    python benchmarks/routes.py [--problems 48]

The loss is |g(x) - t|^2 for a gradient g by the weights; wanted is its gradient by the image x. Embedded images; one thread.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, grad_and_value, jvp, vmap

import attacks
from attacks.lanes import library
from attacks.problems import Plan, Problems
from fedsim.data import load
from fedsim.models import lenet
from fedsim.observation import Knowledge, Observation
from fedsim.seeding import generator
from fedsim.training import local_update, split
from fedsim.wire import pack

Route = Callable[[Tensor], Tensor]


def routes(problems: int) -> tuple[dict[str, Route], Tensor]:
    """Routes from images (P, 1, C, H, W) to gradients of the same shape, and where to evaluate them."""
    data = load("synthetic", train_size=max(100, problems), test_size=20)
    images, labels = data.train.batch(torch.arange(problems))
    seen = []
    for i in range(problems):
        model = lenet(data.image_shape, data.num_classes, rng=generator(0, "network", i))
        params, _ = split(model)
        seen.append(
            Observation(params, pack(local_update(model, params, {}, [(images[i : i + 1], labels[i : i + 1])], lr=1.0).update), 1)
        )
    known = Knowledge(data.image_shape, data.num_classes, lr=1.0, local_steps=1)
    weights = {name: torch.stack([one.params[name] for one in seen]) for name in seen[0].params}
    target = {name: torch.stack([one.update[name] for one in seen]) for name in seen[0].params}
    y = labels[:, None]

    def loss(w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, w, (x,)), y)

    def double_backward(x: Tensor, *, residual: bool) -> Tensor:
        x = x.detach().requires_grad_()
        w = {name: t.detach().requires_grad_() for name, t in weights.items()}
        gradients = torch.autograd.grad(vmap(loss)(w, x, y).sum(), list(w.values()), create_graph=True)
        if residual:
            off = [2 * (g - t).detach() for g, t in zip(gradients, target.values(), strict=True)]
            return torch.autograd.grad(gradients, x, grad_outputs=off)[0]
        gap = torch.stack([(g - t).square().sum() for g, t in zip(gradients, target.values(), strict=True)]).sum()
        return torch.autograd.grad(gap, x)[0]

    def nested(x: Tensor) -> Tensor:
        def gap(x: Tensor, w: dict[str, Tensor], y: Tensor, t: dict[str, Tensor]) -> Tensor:
            gradients = grad(loss)(w, x, y)
            return torch.stack([(gradients[name] - t[name]).square().sum() for name in t]).sum()

        return vmap(grad_and_value(gap))(x, weights, y, target)[0]

    def forward_over_reverse(x: Tensor) -> Tensor:
        def one(x: Tensor, w: dict[str, Tensor], y: Tensor, t: dict[str, Tensor]) -> Tensor:
            gradients = grad(loss)(w, x, y)
            off = {name: 2 * (gradients[name] - t[name]) for name in t}
            return jvp(lambda w: grad(loss, argnums=1)(w, x, y), (w,), (off,))[1]

        return vmap(one)(x, weights, y, target)

    def engine(*, lanes: bool) -> Route:
        attack = attacks.GradientMatching(restarts=1, labels="given")
        group = Problems.of(seen, Plan.of(seen[0], known, False), known, model, attack)
        group.labels = y
        group.__dict__["lanes"] = lanes  # in place of the engine's own choice
        unit = group.unit.reshape(-1, 1, 1, 1, 1)
        return lambda x: group.evaluate(x.flatten(1), torch.arange(problems))[1].reshape(x.shape) * unit

    found: dict[str, Route] = {
        "create_graph": lambda x: double_backward(x, residual=False),
        "vjp of the residual": lambda x: double_backward(x, residual=True),
        "torch.func, grad of grad": nested,
        "torch.func, forward over reverse": forward_over_reverse,
        "torch.compile, grad of grad": torch.compile(nested),
        "torch.compile, forward over reverse": torch.compile(forward_over_reverse),
        "the engine, PyTorch's kernels": engine(lanes=False),
    }
    if library() is not None:
        found["the engine, lanes"] = engine(lanes=True)
    return found, torch.rand(images[:, None].shape, generator=generator(0, "points"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ways, x = routes(arguments.problems)
    print(f"LeNet (sigmoid), {arguments.problems} problems of one image: gradient of the squared gap by the image")
    truth = ways["create_graph"](x)
    first, seconds = {}, dict.fromkeys(ways, float("inf"))
    errors = {}
    for name, way in ways.items():
        began = time.perf_counter()
        errors[name] = float((way(x) - truth).norm() / truth.norm())
        first[name] = time.perf_counter() - began
    for _ in range(arguments.repeats):
        for name, way in ways.items():
            began = time.process_time()
            way(x)
            seconds[name] = min(seconds[name], time.process_time() - began)
    for name in ways:
        each = 1000 * seconds[name] / arguments.problems
        print(f"  {name:36s} {each:6.3f} ms each   first call {first[name]:6.1f} s   relative difference {errors[name]:.0e}")


if __name__ == "__main__":
    main()
