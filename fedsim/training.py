"""What a client computes: the loss, its gradient, and some steps of SGD.

Written functionally (parameters in, update out): the client calls it to train, and an attacker calls the same function to imitate
the client, so sign and scale cannot drift apart. A model is any `nn.Module` whose output is logits (B, K), or a pair of logits
and a scalar penalty that its loss adds. A masked language model's are (B, L, V), one prediction for each token.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedsim.updates import Update, difference

# images (B, C, H, W) in [0, 1]; labels (B,) int64, or (B, K) probabilities
# or token ids (B, L); labels (B, L) int64, IGNORED where nothing is predicted, or weights (B, L, V)
Batch = tuple[Tensor, Tensor]
IGNORED = -100  # the label of a token that is not predicted


def loss_of(output: Tensor | tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits against class indices (B,) or probabilities (B, K), plus the model's own penalty.

    Of tokens (B, L, V), the mean over those predicted: labels are indices (B, L) that may be IGNORED, or weights (B, L, V) >= 0, in
    which case each token counts as much as its weights add up to.
    """
    logits, penalty = output if isinstance(output, tuple) else (output, 0.0)
    if logits.dim() == 3:
        if labels.dim() == 3:
            return -(labels * logits.log_softmax(-1)).sum() / labels.sum() + penalty
        logits, labels = logits.flatten(0, 1), labels.flatten()
    return F.cross_entropy(logits, labels, ignore_index=IGNORED) + penalty


def predictions(labels: Tensor) -> int:
    """How many predictions `labels` ask for: one an image, one a masked token."""
    return int((labels != IGNORED).sum())


def probabilities(labels: Tensor, classes: int) -> Tensor:
    """Labels (B,) of classes as probabilities (B, classes); those that are probabilities as they are."""
    return labels if labels.is_floating_point() else F.one_hot(labels, classes).float()


def split(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Detached copies of a model's parameters and of its buffers (BatchNorm statistics)."""
    params = {name: t.detach().clone() for name, t in model.named_parameters()}
    buffers = {name: t.detach().clone() for name, t in model.named_buffers()}
    return params, buffers


def batch_loss(
    model: nn.Module,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    penalty: bool = True,
) -> Tensor:
    """The loss of one batch at `params`, differentiable in all of them, and in the images; with the model's `penalty`, if any."""
    output = functional_call(model, {**params, **buffers}, (images,))
    return loss_of(output if penalty or not isinstance(output, tuple) else output[0], labels)


def stacked_loss(
    model: nn.Module,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    penalty: bool = True,
) -> Tensor:
    """The P losses, as `batch_loss`, of P batches at parameters of their own: every argument begins with P.

    They share nothing, so the gradient of their sum holds each one's own. One alone needs no vmap, which would make grouped
    convolutions.
    """
    loss = partial(batch_loss, model, penalty=penalty)
    if len(images) == 1:
        alone, theirs = ({name: t[0] for name, t in part.items()} for part in (params, buffers))
        return loss(alone, theirs, images[0], labels[0])[None]
    return vmap(loss, randomness="different")(params, buffers, images, labels)


def batch_gradients(
    model: nn.Module, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], images: Tensor, labels: Tensor
) -> tuple[Tensor, Update]:
    """The loss of one batch at `params`, and its gradient by name."""
    leaves = {name: t.detach().requires_grad_() for name, t in params.items()}
    loss = batch_loss(model, leaves, buffers, images, labels)
    return loss.detach(), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@dataclass(frozen=True)
class Hooks:
    """What a defense changes of local training itself, its randomness included; see `fedsim.defense.hooks_of`.

    batch      the batch that is trained on instead of a batch
    gradients  loss and gradient by name, of (model, parameters, buffers, images, labels, number of the step from 0)
    """

    batch: Callable[[Tensor, Tensor], Batch] | None = None
    gradients: Callable[[nn.Module, Update, dict[str, Tensor], Tensor, Tensor, int], tuple[Tensor, Update]] | None = None


@dataclass(frozen=True)
class Trained:
    """What local training leaves: the update, the new buffers, and the mean loss over its steps, a scalar.

    Of P clients at once, everything begins with P.
    """

    update: Update
    buffers: dict[str, Tensor]
    loss: Tensor

    def of(self, client: int) -> "Trained":
        """One of the P."""
        update, buffers = ({name: t[client] for name, t in part.items()} for part in (self.update, self.buffers))
        return Trained(update, buffers, self.loss[client])


def local_update(
    model: nn.Module,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    batches: Iterable[Batch],
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    proximal: float = 0.0,
    loss_of_batch: Callable[..., Tensor] = batch_loss,
    differentiable: bool = False,
    hooks: Hooks = Hooks(),
) -> Trained:
    """Parameters before minus after one step of SGD for each batch.

    With one batch, `lr=1` and neither momentum nor decay this is the batch gradient itself, which is what FedSGD sends.
    `proximal` is FedProx's mu (Li et al. 2020, equation 2). The model's own mode (train or eval) decides about dropout and
    BatchNorm; its own parameters are neither read nor written.

    Many clients train at once with `loss_of_batch=stacked_loss`, and everything begins with P; of these, one whose labels in a step
    are all IGNORED, or add up to 0, has taken all its steps before. An attacker imitates clients so, and `differentiable` gives it
    the update's derivatives with respect to the batches. A client passes the `hooks` of its defense; they are not differentiated
    through.
    """
    if differentiable and hooks != Hooks():
        raise ValueError(
            "an update is differentiable in the batch that is trained on: apply the defense's hooks before, leave out hooks"
        )
    start = {name: t.detach().requires_grad_(differentiable) for name, t in params.items()}
    buffers = {name: t.clone() for name, t in buffers.items()}  # BatchNorm writes to them
    moved: Update = {}  # kept rather than subtracted from `start` in the end, which would round the update to the size of a weight
    velocity: dict[str, Tensor] = {}
    losses: list[Tensor] = []
    active: list[Tensor] = []  # of many clients, which took each step
    for step, (images, labels) in enumerate(batches):
        if hooks.batch:
            images, labels = hooks.batch(images, labels)
        now = difference(start, moved) if moved else start
        if hooks.gradients:
            loss, gradients = hooks.gradients(model, now, buffers, images, labels, step)
        else:
            leaves = now if differentiable else {name: t.detach().requires_grad_() for name, t in now.items()}
            loss = loss_of_batch(model, leaves, buffers, images, labels)
            wanted = list(leaves.values())
            gradients = dict(zip(now, torch.autograd.grad(loss.sum(), wanted, create_graph=differentiable), strict=True))
        losses.append(loss.detach())
        if many := loss.dim() > 0 and not differentiable:
            active.append(_asked(labels))
        for name in now:
            gradient = gradients[name]
            if weight_decay:
                gradient = gradient.add(now[name], alpha=weight_decay)
            if proximal and name in moved:
                gradient = gradient.sub(moved[name], alpha=proximal)
            if momentum:
                gradient = velocity[name] = velocity[name].mul(momentum).add(gradient) if name in velocity else gradient
            if name in moved:
                further = moved[name].add(gradient, alpha=lr)
                moved[name] = torch.where(_as(active[-1], further), further, moved[name]) if many else further
            else:
                moved[name] = gradient if lr == 1 else gradient.mul(lr)
    if not losses:
        raise ValueError("a local update needs at least one batch, got none")
    loss = torch.stack(losses)
    if active:
        steps = torch.stack(active)
        return Trained(moved, buffers, torch.where(steps, loss, 0).sum(0) / steps.sum(0))
    return Trained(moved, buffers, loss.mean(0))


def _asked(labels: Tensor) -> Tensor:
    """(P,) whether anything is to be predicted of each of P batches."""
    return (labels if labels.is_floating_point() else labels != IGNORED).flatten(1).any(1)


def _as(mask: Tensor, like: Tensor) -> Tensor:
    """A mask (P,) that broadcasts over tensors of P."""
    return mask.reshape(-1, *[1] * (like.dim() - 1))


def out_of_memory(error: Exception) -> bool:
    """Whether an error is a GPU's, Python's, or torch's on a CPU, which raises a RuntimeError like any other."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    batches: Iterable[Batch],
) -> tuple[float, float]:
    """Accuracy in [0, 1] and mean loss over all images of `batches`, or all tokens to be predicted, in eval mode."""
    was_training = model.training
    model.eval()
    right = total = 0
    loss = 0.0
    try:
        for images, labels in batches:
            output = functional_call(model, {**params, **buffers}, (images,))
            logits = output[0] if isinstance(output, tuple) else output
            right += int((logits.argmax(-1) == labels).sum())
            loss += float(F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum"))
            total += predictions(labels)
    finally:
        model.train(was_training)
    if not total:
        raise ValueError("nothing to evaluate on: no images")
    return right / total, loss / total
