"""The clients of a round trained as one program: every tensor begins with the client.

It computes what training them one by one computes, up to the rounding of float32. Clients with fewer images or steps than others
are filled up with images that count nothing.
"""

import functools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from torch import Tensor, nn

from fedsim.client import draws
from fedsim.defense import hooks_of
from fedsim.records import ARRAYS, CONFIG, record, tensors_of
from fedsim.setup import Setup, model_of
from fedsim.training import IGNORED, Batch, Trained, batch_loss, out_of_memory, stacked_loss

log = logging.getLogger(__name__)

MEMORY = {"cpu": 2**29, "cuda": 2**33}  # bytes that a chunk may take: fixed, since the number of clients in it decides the rounding
FEW = 10  # clients: fewer are not worth a program
SMALL = 2**18  # parameters, with which a program is worth it on a CPU
COPIES = 8  # of its parameters that a client takes: its own, their gradients, the update, momentum, and what is passing


def obstacle(setup: Setup) -> str | None:
    """Why the clients of a run cannot be trained as one program; None if they can."""
    model, batch = model_of(setup), setup.batch(setup.shards[0][:1])
    if model.training and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return "BatchNorm in training mode writes statistics of each client's own: federation.train_mode=false, or another model"
    if draws(model, batch[0]):
        return "the model draws at random, for one client at a time"
    with torch.no_grad():
        if isinstance(model(batch[0]), tuple):  # as PRECODE's in eval mode, which draws nothing
            return "the model adds a penalty, a mean over its batch, in which images that fill it up would count"
    if hooks_of(setup.defense, setup.dataset.num_classes, setup.seed, 1, 0).gradients:
        return f"{setup.defense!r} computes gradients of its own"
    return None


def cohort_of(setup: Setup, vectorized: bool | str, chunk: int | None = None) -> tuple["Cohort | None", str]:
    """What `engine.vectorized` makes of a run, and why: None if clients are trained one by one.

    `auto` trains them together on a GPU, and on a CPU where that was measured to be faster (benchmarks/RESULTS.md): many clients of
    a small network, each of which sends the gradient of one image.
    """
    if not vectorized:
        return None, "one by one"
    why, clients = obstacle(setup), setup.protocol.per_round
    if vectorized == "auto":
        if setup.device.type == "cpu" and why is None:
            steps = setup.protocol.batches(setup.shards[0], setup.seed, 1, 0)
            small = sum(p.numel() for p in model_of(setup).parameters()) <= SMALL
            if not small or clients < FEW or len(steps) > 1 or len(steps[0]) > 1:
                why = f"faster on a CPU, but for {FEW} and more clients of a small network that send the gradient of one image"
        elif clients < FEW:
            why = why or f"fewer than {FEW} clients a round"
        if why is not None:
            return None, f"one by one: {why}"
    if why is not None:
        raise ValueError(f"engine.vectorized={vectorized} is not possible: {why}; take engine.vectorized=auto")
    return Cohort(setup, chunk), "as one program"


class Cohort:
    """Trains the clients that are asked, in chunks, and keeps each one's result until its app takes it.

    chunk  clients at a time; None takes as many as fit
    """

    def __init__(self, setup: Setup, chunk: int | None = None) -> None:
        self.setup, self.chunk = setup, chunk
        self._ready: dict[tuple[int, int], Trained] = {}

    def train(
        self, asked: Sequence[tuple[Message, int]], run: Callable[[Callable[..., None], Iterable[list[int]]], Iterable[None]] = map
    ) -> None:
        """Trains the clients of these messages.

        asked  training messages, with the numbers of the clients that they go to
        run    `map`, or that of a pool, over chunks
        """
        self._ready.clear()  # of a round before, whose app failed before it took them
        groups: dict[tuple[int, int, float], list[tuple[Message, int]]] = defaultdict(list)
        for message, client in asked:
            order = record(message.content, ConfigRecord, CONFIG)
            arrays = record(message.content, ArrayRecord, ARRAYS)  # one object for all, unless a server sends each another model
            groups[id(arrays), int(order["server-round"]), float(order.get("proximal-mu", 0.0))].append((message, client))  # type: ignore[arg-type]
        for (_, round, proximal), members in groups.items():
            model = model_of(self.setup)
            tensors = tensors_of(record(members[0][0].content, ArrayRecord, ARRAYS), self.setup.device)
            params = {name: tensors[name] for name, _ in model.named_parameters()}
            buffers = {name: tensors[name] for name, _ in model.named_buffers()}
            clients = [client for _, client in members]
            chunk = self.chunk or self._fitting(params, buffers, clients, round)
            parts = [clients[i : i + chunk] for i in range(0, len(clients), chunk)]
            list(run(functools.partial(self._train, params=params, buffers=buffers, round=round, proximal=proximal), parts))

    def take(self, round: int, client: int) -> Trained | None:
        """What `client` trained in `round`, once; None if it was not among those asked."""
        return self._ready.pop((round, client), None)

    def _train(
        self, clients: list[int], *, params: dict[str, Tensor], buffers: dict[str, Tensor], round: int, proximal: float
    ) -> None:
        setup, count, short = self.setup, len(clients), False
        try:
            trained = setup.protocol.train(
                model_of(setup),
                {name: t.expand(count, *t.shape) for name, t in params.items()},
                {name: t.expand(count, *t.shape) for name, t in buffers.items()},
                self._batches(clients, round),
                proximal,
                loss_of_batch=stacked_loss,
            )
        except Exception as error:
            if not out_of_memory(error) or count == 1:
                # One by one, so that a client whose data or defense raises is left out of the round alone.
                log.exception("round %d: %d clients cannot be trained as one program", round, count)
                return
            log.warning("round %d: not enough memory to train %d clients at once: %d and fewer", round, count, (count + 1) // 2)
            short = True
        if short:  # out of the handler, which holds what was computed so far
            torch.cuda.empty_cache()
            for half in (clients[: (count + 1) // 2], clients[(count + 1) // 2 :]):
                self._train(half, params=params, buffers=buffers, round=round, proximal=proximal)
            return
        self._ready |= {(round, client): trained.of(i) for i, client in enumerate(clients)}

    def _batches(self, clients: Sequence[int], round: int) -> Iterator[Batch]:
        """The batches of each step, (P, B, ...), of as many steps as the longest takes."""
        setup = self.setup
        own = [setup.protocol.batches(setup.shards[client], setup.seed, round, client) for client in clients]
        hooks = [hooks_of(setup.defense, setup.dataset.num_classes, setup.seed, round, client).batch for client in clients]
        for step in range(max(map(len, own))):
            found = [setup.batch(places[step] if step < len(places) else places[0][:0]) for places in own]
            yield _stacked([hook(*batch) if hook and len(batch[0]) else batch for hook, batch in zip(hooks, found, strict=True)])

    def _fitting(self, params: dict[str, Tensor], buffers: dict[str, Tensor], clients: Sequence[int], round: int) -> int:
        """Clients at a time, by what one keeps for its backward pass."""
        saved = 0

        def count(t: Tensor) -> Tensor:
            nonlocal saved
            saved += t.numel() * t.element_size()
            return t

        setup = self.setup
        images, labels = setup.batch(setup.protocol.batches(setup.shards[clients[0]], setup.seed, round, clients[0])[0])
        leaves = {name: t.detach().requires_grad_() for name, t in params.items()}
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            batch_loss(model_of(setup), leaves, {name: t.clone() for name, t in buffers.items()}, images, labels)
        saved = 2 * saved + COPIES * sum(t.numel() * t.element_size() for t in params.values())
        return max(1, MEMORY.get(setup.device.type, MEMORY["cpu"]) // saved)


def _stacked(batches: Sequence[Batch]) -> Batch:
    """Batches (P, B, ...), the smaller ones filled up with images that count nothing."""
    largest = max(len(images) for images, _ in batches)
    soft = next((labels for _, labels in batches if labels.is_floating_point()), None)
    filled = []
    for images, labels in batches:
        missing = largest - len(images)
        if soft is not None and not labels.is_floating_point():  # of nobody: it has taken its steps
            labels = soft.new_zeros(0, *soft.shape[1:])
        if missing and soft is not None and soft.dim() == 2:
            labels = labels * (largest / max(1, len(images)))  # the mean is over all places, and these are worth as much together
        fill = labels.new_full((missing, *labels.shape[1:]), 0 if labels.is_floating_point() else IGNORED)
        filled.append((torch.cat([images, images.new_zeros(missing, *images.shape[1:])]), torch.cat([labels, fill])))
    return torch.stack([images for images, _ in filled]), torch.stack([labels for _, labels in filled])
