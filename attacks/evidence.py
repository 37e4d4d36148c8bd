"""Evidence: whether a reconstruction explains what was sent. It needs no truth, so an attacker can gather it.

What a client sent is held against what it would have sent had the reconstruction been its batch. The unit is what was sent itself:
a relative squared gap of 1 is that of a reconstruction that explains nothing, 1e-12 is the rounding of float32.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedsim.defense import Belief, Beliefs, batch_parts, beliefs_of
from fedsim.observation import Knowledge, Observation, Reconstruction
from fedsim.training import batch_loss
from fedsim.updates import Update


class Unsupported(ValueError):
    """An attack cannot work on this model or batch whatever was sent; the message says why, and what can."""


def size_of(seen: Observation, known: Knowledge) -> int:
    """Images behind what was seen: one batch, or as many as several local steps went through."""
    return min(seen.num_examples, (known.batch_size or seen.num_examples) * (known.local_steps or 1))


def views(seen: Observation, known: Knowledge) -> list[Observation]:
    """The updates that tell of the same images: what was seen last, and before it what the client sent earlier.

    Not where a known defense trained on something else each time.
    """
    found = [seen]
    while known.same_images and not batch_parts(known.defense) and found[0].previous is not None:
        found.insert(0, found[0].previous)
    return found


def gradient_of(seen: Observation, known: Knowledge) -> Update:
    """The update as a mean gradient: several local steps are taken for one, see `step_length`. What weight decay added to the
    entries that were sent is taken off, exactly so of one step."""
    scale = step_length(known)
    return {name: t / scale - _decay(seen, known, name) for name, t in seen.update.items()}


def _decay(seen: Observation, known: Knowledge, name: str) -> Tensor | float:
    """What weight decay added to the gradient of a parameter, where it was sent."""
    if not known.weight_decay:
        return 0.0
    decay, sent = known.weight_decay * seen.params[name], sent_entries(seen, name)
    return decay if sent is None else decay * sent


def step_length(known: Knowledge) -> float:
    """What an update is in units of gradients: several local steps are taken for one, as long as they are together.

    Step t of them is lr (1 - m^t) / (1 - m) long with momentum m, which has it repeat the gradients of the steps before.
    """
    steps, m = known.local_steps or 1, known.momentum
    return (known.lr or 1.0) * sum((1 - m**t) / (1 - m) for t in range(1, steps + 1))


def believed(seen: Observation, known: Knowledge, *, imitated: bool = False) -> Beliefs:
    """What an attacker who knows `known.defense` can say of the gradient, or of the update where its training is `imitated`. A sum
    of updates is what it is.

    An entry that was sent and is known to lie in a cell has the weight here that its value can be trusted with beside the others':
    one on a coarse lattice less. Where there is no cell, the defense's own weight stands.
    """
    beliefs = beliefs_of(seen.packets, None if seen.summed else known.defense, seen.before)
    cells = {name: (b.high - b.low).isfinite() & seen.packets[name].sent() for name, b in beliefs.items()}
    squares = {name: torch.where(cells[name], b.high - b.low, 0.0).double().square() for name, b in beliefs.items()}
    coarse, scale = sum(int((t > 0).sum()) for t in squares.values()), step_length(known)
    typical = sum(float(t.sum()) for t in squares.values()) / max(1, coarse)
    told = {}
    for name, b in beliefs.items():
        trust = typical / (typical + squares[name]) if typical else torch.ones_like(b.weight)
        value, low, high = (t if imitated else t / scale for t in (b.value, b.low, b.high))
        if not imitated and known.weight_decay:  # of entries that were not sent as well: these are bounds of the same sum
            value, low, high = (t - known.weight_decay * seen.params[name] for t in (value, low, high))
        told[name] = Belief(value, low, high, torch.where(cells[name], trust.to(b.weight), b.weight))
    return told


def completed(candidate: Mapping[str, Tensor], beliefs: Mapping[str, Belief]) -> dict[str, Tensor]:
    """The update that a candidate's is held against where beliefs stand in for an observed one. Differentiable.

    An entry that is known stays what it is. One of which only bounds are known (weight 0) becomes the candidate's own, clamped to
    them. One with both, such as a quantizer's cell and its centre, is sqrt(weight) of the distance from the value away, and beyond
    the bounds as much again as from the nearer one: a squared gap weighs the centre by `weight`, and minds leaving the cell.
    """
    done = {}
    for name, b in beliefs.items():
        g, root = candidate[name], b.weight.sqrt()
        beyond = torch.where(b.low < b.high, 1.0, 1 - root) * (g - g.clamp(b.low, b.high))
        done[name] = g - root * (g - b.value) - beyond
    return done


def sent_entries(seen: Observation, name: str) -> Tensor | None:
    """Which entries of a tensor were sent, bool in its shape; None if all of them were."""
    packet = seen.packets[name]
    return None if packet.support is None or packet.rank is not None else packet.sent()


def batch_statistics(seen: Observation, known: Knowledge, model: nn.Module) -> dict[str, Tensor]:
    """What can be said of the mean and (unbiased) variance that each BatchNorm layer's batch had, under the names of its buffers.

    A client in training mode sends running statistics back that its batches have moved, past any defense: of one step they are
    (sent - (1 - m) broadcast) / m exactly, with the layer's momentum m, and of several a weighted mean of all batches'. Where they
    have not moved, nothing was sent back, or what was is masked, the broadcast ones are all there is.
    """
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.modules.batchnorm._BatchNorm) or not layer.track_running_stats:
            continue
        steps, counter = known.local_steps or 1, f"{name}.num_batches_tracked"
        for part in (f"{name}.running_mean", f"{name}.running_var"):
            before = seen.buffers[part]
            after = before if seen.masked else seen.sent_buffers.get(part, before)
            kept = 1.0 - steps / (float(seen.buffers[counter]) + steps) if layer.momentum is None else (1 - layer.momentum) ** steps
            found[part] = before if kept == 1 or torch.equal(after, before) else (after - kept * before) / (1 - kept)
    return found


def relative_gap(
    seen: Observation, known: Knowledge, model: nn.Module, images: Tensor, labels: Tensor, *, scale_free: bool = False
) -> float:
    """|gradient at the reconstruction - sent|^2 / |sent|^2, over the entries that were sent; inf where that is no number.

    What the model draws at random is drawn from one seed. Nobody knows the client's, so a model that draws leaves a gap.

    images      (B, C, H, W)
    labels      (B,) int64, or (B, K) probabilities
    scale_free  take the gradient by the factor that brings it nearest: defenses shorten updates, and not all say so
    """
    sent = gradient_of(seen, known)
    params = {name: t.detach().requires_grad_() for name, t in seen.params.items()}
    buffers = {name: t.clone() for name, t in seen.buffers.items()}  # BatchNorm in training mode writes to them
    device = next(iter(params.values())).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        loss = batch_loss(model, params, buffers, images.to(device), labels.to(device))
    ours = torch.autograd.grad(loss, [params[name] for name in sent])
    made = {}
    for name, gradient in zip(sent, ours, strict=True):
        mask = sent_entries(seen, name)
        made[name] = gradient if mask is None else gradient * mask  # what was not sent reads as 0
    factor = 1.0
    if scale_free:
        length, product = _product(made, made), _product(made, sent)
        factor = max(0.0, product / length) if length else 0.0
    off = {name: factor * g - sent[name] for name, g in made.items()}
    gap, size = _product(off, off), _product(sent, sent)
    return (gap / size if size else gap) if math.isfinite(gap) else math.inf


def _product(some: Update, others: Update) -> float:
    return sum(float((t.double() * others[name].double()).sum()) for name, t in some.items())


@torch.no_grad()
def draws(seen: Observation, model: nn.Module, images: Tensor) -> bool:
    """Whether what a model makes of images depends on chance: dropout, or a variational bottleneck."""
    one, other = (fed_to_linear(model, seen.params, seen.buffers, images, draw=draw)[1] for draw in (0, 1))
    return not torch.equal(one, other)


@torch.no_grad()
def fed_to_linear(
    model: nn.Module, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], images: Tensor, *, draw: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """What each `nn.Linear` of a model is fed (B, in_features), by name in the order of use; and the logits (B, K).

    Layers that are fed anything else than one vector for each image, such as the tokens of a transformer, are left out. `draw` is
    the seed of what the model draws at random.
    """
    fed: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def note(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                if inputs[0].shape[:-1] == images.shape[:1]:
                    fed.setdefault(name, inputs[0])

            handles.append(module.register_forward_pre_hook(note))
    buffers = {name: t.clone() for name, t in buffers.items()}
    try:
        with torch.random.fork_rng(devices=[images.device] if images.device.type == "cuda" else []):
            torch.manual_seed(draw)
            output = functional_call(model, {**params, **buffers}, (images,))
    finally:
        for handle in handles:
            handle.remove()
    return fed, output[0] if isinstance(output, tuple) else output


def reconstruction(images: Tensor, labels: Tensor, gap: float, converged: bool, seconds: float) -> Reconstruction:
    """What an attack without restarts reports: images (B, C, H, W), clamped here, labels (B,), and the gap it checked itself by."""
    images = images.float().clamp(0, 1)
    return Reconstruction(
        images=images,
        labels=labels,
        loss=gap,
        converged=converged,
        starts=images[None],
        losses=torch.tensor([gap]),
        evaluations=1,
        seconds=seconds,
    )
