"""The server: any Flower strategy, around it what turns updates into weights, around that the eavesdropper.

    Seeded( Checked( Metered( Secure( Pinning( Eavesdropping( Update( FedAvg | FedAdam | Krum | … ) ) ) ) ) ) )

Each wraps the next and changes one thing; none overrides a strategy. Secure is in `fedsim/secure_rounds.py`.
"""

import contextlib
import functools
import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedsim.errors import FederationError
from fedsim.observation import SUM, Observation
from fedsim.records import (
    ARRAYS,
    BUFFERS,
    MASKED,
    METRICS,
    PACKETS,
    RESTARTED,
    SENDER,
    VECTOR,
    array_of,
    arrays_of,
    computed_arrays_of,
    is_masked,
    numpy_of,
    observation_of,
    packets_of,
    record,
    tensors_of,
    wire_bytes,
    with_content,
    with_error,
    with_packets,
)
from fedsim.seeding import seed_of
from fedsim.wire import Packet

log = logging.getLogger(__name__)

LARGEST = 1e10  # entry of an update: sums of squares of such are still finite in float32
ASKED = 500  # nodes at a time which client they are; messages take memory
MOST_EXAMPLES = 10**9  # a client may claim


class Forwarding(Strategy):
    """A strategy that hands everything to `inner`."""

    def __init__(self, inner: Strategy) -> None:
        self.inner = inner

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        return self.inner.configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        return self.inner.aggregate_train(server_round, replies)

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        return self.inner.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return self.inner.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        self.inner.summary()


class UpdateStrategy(Forwarding):
    """Lets a strategy that averages weights work on clients that send updates.

    Clients send packets, because weights would not survive the wire: `w - (w - u)` in float32 turns 16 levels into 158. The server
    knows `w`, so it gives `inner` what it expects, `w - scale * update`. Replies are put in the order of their clients first, since
    a sum of floats depends on its order.

    BatchNorm statistics (`buffers`) are no weights: Adam on the server could make a variance negative. They bypass `inner` and are
    averaged by the clients' numbers of examples.

    Masked replies are left out: their sum, if there is one, stands beside them as one more reply.
    """

    def __init__(self, inner: Strategy, buffers: Sequence[str] = (), scale: float = 1.0) -> None:
        super().__init__(inner)
        self.buffers = frozenset(buffers)
        self.scale = scale
        self._params: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        tensors = tensors_of(arrays)
        self._params = {name: t for name, t in tensors.items() if name not in self.buffers}
        self._buffers = {name: t for name, t in tensors.items() if name in self.buffers}
        messages = list(super().configure_train(server_round, arrays_of(self._params), config, grid))
        everything = arrays_of(tensors)
        for message in messages:
            message.content = RecordDict({**message.content, ARRAYS: everything})
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = sorted((reply for reply in replies if not is_masked(reply)), key=_sender)
        if not any(reply.has_content() for reply in replies):
            return None, None  # secure aggregation that ended without a sum
        seen = {
            i: observation_of(reply.content, self._params, self._buffers, server_round)
            for i, reply in enumerate(replies)
            if reply.has_content()
        }
        weights = [self._weights(reply, seen[i]) if i in seen else reply for i, reply in enumerate(replies)]
        arrays, metrics = super().aggregate_train(server_round, weights)
        if arrays is None:
            return None, metrics
        after = {name: numpy_of(array).astype(np.float32) for name, array in arrays.items()}  # Adam's are float64
        return _record_of({**after, **self._mean_buffers(list(seen.values()))}), metrics

    def _weights(self, reply: Message, seen: Observation) -> Message:
        before = {name: t.numpy() for name, t in self._params.items()}
        after = {name: (one, functools.partial(_moved, one, seen.packets[name], self.scale)) for name, one in before.items()}
        content = RecordDict({ARRAYS: computed_arrays_of(after), METRICS: record(reply.content, MetricRecord, METRICS)})
        return with_content(reply, content)

    def _mean_buffers(self, seen: list[Observation]) -> dict[str, np.ndarray]:
        total = sum(one.num_examples for one in seen)
        means = {
            name: sum((one.num_examples / total * one.sent_buffers[name].double() for one in seen), torch.zeros(()).double())
            for name in self._buffers
        }
        integers = {name for name, t in self._buffers.items() if not t.is_floating_point()}  # the number of batches seen
        return {
            name: (mean.round() if name in integers else mean).to(self._buffers[name].dtype).numpy() for name, mean in means.items()
        }


def _record_of(arrays: dict[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: array_of(array) for name, array in arrays.items()})


def _moved(before: np.ndarray, packet: Packet, scale: float) -> np.ndarray:
    """`before - scale * update`, of memory of its own. In NumPy: torch would wait for all cores, some of which are busy."""
    after = np.multiply(packet.dense().numpy(), np.float32(scale))
    return np.subtract(before, after, out=after)


def _sender(reply: Message) -> int:
    return int(record(reply.content, ConfigRecord, SENDER)["client"]) if reply.has_content() else -1  # type: ignore[arg-type]


class PinningStrategy(Forwarding):
    """Sets `pinned` parameters anew after each round: a malicious server does not let training wear its trap down."""

    def __init__(self, inner: Strategy, pinned: Mapping[str, Tensor]) -> None:
        super().__init__(inner)
        self.pinned = arrays_of(pinned)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is not None:
            arrays.update(self.pinned)
        return arrays, metrics


class EavesdroppingStrategy(Forwarding):
    """Shows `listen` the replies of the clients that `choose` picks, before `inner` sees them, and hands all replies on unchanged.

    choose  of a round and the clients that replied, those to listen to; no reply is even decoded for the others
    listen  called once a round in which somebody was picked, with one observation for each, in the order of clients; whoever
            listens where updates are masked gets their sum as well, last
    """

    def __init__(
        self,
        inner: Strategy,
        choose: Callable[[int, list[int]], Sequence[int]],
        listen: Callable[[list[Observation]], None],
        buffers: Sequence[str] = (),
    ) -> None:
        super().__init__(inner)
        self.choose, self.listen = choose, listen
        self.buffers = frozenset(buffers)
        self._sent = ArrayRecord()

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        self._sent = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        by_client = {_sender(reply): reply.content for reply in replies if reply.has_content()}
        clients = sorted(client for client in by_client if client != SUM)
        if chosen := sorted(self.choose(server_round, clients)):
            chosen += [SUM] if SUM in by_client else []
            tensors = tensors_of(self._sent)
            params = {name: t for name, t in tensors.items() if name not in self.buffers}
            buffers = {name: t for name, t in tensors.items() if name in self.buffers}
            self.listen([observation_of(by_client[client], params, buffers, server_round) for client in chosen])
        return super().aggregate_train(server_round, replies)


class CheckedStrategy(Forwarding):
    """Takes a reply that is no update of this model for a failure of its client, and hands the others on.

    Clients may be broken, or mean harm. What is not a number, or so large that its square overflows, would be in all weights after
    one round. Of a masked reply nobody can tell more than its length.

    nodes  node ids in the order of their clients: nobody speaks for another
    bits   of an entry of the vectors that travel under secure aggregation; None where updates travel plain
    """

    def __init__(self, inner: Strategy, nodes: Sequence[int], buffers: Sequence[str] = (), bits: int | None = None) -> None:
        super().__init__(inner)
        self.buffers, self.bits = frozenset(buffers), bits
        self._clients = {node: client for client, node in enumerate(nodes)}
        self._like: dict[str, Tensor] = {}

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        self._like = tensors_of(arrays)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        read = self._with_update if self.bits is None else self._with_vector
        return super().aggregate_train(server_round, [self._checked(reply, read) for reply in replies])

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return super().aggregate_evaluate(server_round, [self._checked(reply, self._with_scores) for reply in replies])

    def _checked(self, reply: Message, read: Callable[[Message], Message]) -> Message:
        client = self._clients.get(reply.metadata.src_node_id)
        if reply.has_error():
            return with_error(reply, f"client {client}: {reply.error.reason}")
        try:
            return read(reply)
        except _Flaw as error:
            flaw = str(error)
        except Exception as error:  # whatever reading it raises, what was sent is to blame
            flaw = f"it cannot be read: {type(error).__name__}: {error}"
        return with_error(reply, f"client {client}: {flaw}")

    def _with_update(self, reply: Message) -> Message:
        """The reply with its packets read. Raises _Flaw where something is wrong with it."""
        content = self._signed(reply, "train-loss").content
        update, statistics = record(content, ArrayRecord, PACKETS), record(content, ArrayRecord, BUFFERS)
        for sent, names in ((update, self._like.keys() - self.buffers), (statistics, self.buffers)):
            if sent.keys() != names:
                missing, unknown = sorted(names - sent.keys()), sorted(sent.keys() - names)
                raise _Flaw(f"{missing[0]} is missing" if missing else f"{unknown[0]} is no tensor of this model")
        packets = packets_of(content)
        for name, packet in packets.items():
            if packet.shape != tuple(self._like[name].shape):  # before its entries are laid out
                raise _Flaw(f"{name} is {packet.shape}, not {tuple(self._like[name].shape)}")
            _check_values(name, packet.dense())
        for name, t in tensors_of(statistics).items():
            like = self._like[name]
            if t.shape != like.shape or t.dtype != like.dtype:
                raise _Flaw(f"{name} is {t.dtype} {tuple(t.shape)}, not {like.dtype} {tuple(like.shape)}")
            _check_values(name, t)
        return with_content(reply, with_packets(content, packets))

    def _with_vector(self, reply: Message) -> Message:
        """The reply, if it is a masked one. Raises _Flaw where something is wrong with it."""
        assert self.bits is not None
        sender: Any = record(self._signed(reply).content, ConfigRecord, SENDER)
        if sender["bits"] != self.bits or not 0 < sender["scale"] < math.inf:
            raise _Flaw(f"its entries are of {sender['bits']!r} bits in units of 1 / {sender['scale']!r}")
        vector = numpy_of(record(reply.content, ArrayRecord, MASKED)[VECTOR])
        takes = (1 + sum(t.numel() for t in self._like.values())) * self.bits // 8  # the loss is the last entry
        if vector.dtype != np.uint8 or vector.shape != (takes,):
            raise _Flaw(f"its vector is {vector.dtype} {vector.shape}, and the model takes {takes} bytes")
        return reply

    def _with_scores(self, reply: Message) -> Message:
        """The reply. Raises _Flaw where something is wrong with what it reports."""
        return self._reporting(reply, "accuracy", "loss")

    def _signed(self, reply: Message, *metrics: str) -> Message:
        """The reply. Raises _Flaw where it speaks for others than its own client, or does not report these metrics."""
        sender: Any = record(reply.content, ConfigRecord, SENDER)
        if sender["client"] != self._clients.get(reply.metadata.src_node_id):
            raise _Flaw(f"it says that it comes from client {sender['client']!r}")
        if list(sender["summed"]):
            raise _Flaw(f"it says that it is a sum of clients {sender['summed']!r}")
        return self._reporting(reply, *metrics)

    def _reporting(self, reply: Message, *names: str) -> Message:
        """The reply. Raises _Flaw where it does not report its number of examples and `names`: strategies average all replies'."""
        metrics = record(reply.content, MetricRecord, METRICS)
        if metrics.keys() != {"num-examples", *names}:
            raise _Flaw(f"its metrics are {sorted(metrics)}")
        examples = metrics["num-examples"]
        if not isinstance(examples, int) or not 1 <= examples <= MOST_EXAMPLES:
            raise _Flaw(f"it claims {examples!r} examples")
        odd = [
            f"{name} is {value!r}"
            for name, value in metrics.items()
            if not isinstance(value, int | float) or not math.isfinite(value)
        ]
        if odd:
            raise _Flaw(odd[0])
        return reply


class _Flaw(ValueError):
    """What is wrong with a reply."""


def _check_values(name: str, t: Tensor) -> None:
    if not t.numel():
        return
    low, high = (float(end) for end in t.aminmax())  # both NaN if any entry is
    if not max(-low, high) <= LARGEST:
        raise _Flaw(f"an entry of {name} is {max(-low, high):g}, and none may be above {LARGEST:g}")


class MeteredStrategy(Forwarding):
    """Counts what a round sends, and ends the run when no client answers.

    bytes_down, bytes_up  payload of the last round's training messages and replies, and of what else was asked in it
    replies, failures     how many clients sent an update, and how many did not or failed
    left_out              nodes of those that did not or failed
    train_metrics, evaluate_metrics  what the clients reported, averaged by `inner`
    """

    def __init__(self, inner: Strategy) -> None:
        super().__init__(inner)
        self.bytes_down = self.bytes_up = self.replies = self.failures = 0
        self.left_out: list[int] = []
        self._asked: set[int] = set()
        self._training = False
        self.train_metrics: MetricRecord | None = None
        self.evaluate_metrics: MetricRecord | None = None

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        self.bytes_down = self.bytes_up = 0
        self._asked = set()
        messages = list(super().configure_train(server_round, arrays, config, cast(Grid, _Counting(grid, self))))
        self._training = bool(messages)
        self.sends(messages)
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        answers = [reply for reply in replies if reply.has_content()]
        for reply in replies:
            if reply.has_error():
                log.warning("round %d: a client failed and is left out: %s", server_round, reply.error.reason)
            elif RESTARTED in reply.content:
                log.warning("round %d: a worker was killed; another took its place, and did again what it was at", server_round)
        self.replies = len(answers)
        self.failures = len(self._asked) - len(answers)
        self.left_out = sorted(self._asked - {reply.metadata.src_node_id for reply in answers})
        self.receives(replies)
        if not answers and self._training:
            why = next((reply.error.reason for reply in replies if reply.has_error()), "no reply came in time")
            raise FederationError(f"round {server_round}: none of the {self.failures} chosen clients sent an update: {why}")
        arrays, self.train_metrics = super().aggregate_train(server_round, replies)
        return arrays, self.train_metrics

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        self.evaluate_metrics = super().aggregate_evaluate(server_round, replies)
        return self.evaluate_metrics

    def sends(self, messages: Sequence[Message]) -> None:
        """Counts what goes out to clients."""
        self.bytes_down += sum(wire_bytes(message.content) for message in messages)
        self._asked |= {message.metadata.dst_node_id for message in messages}

    def receives(self, replies: Sequence[Message]) -> None:
        """Counts what comes back."""
        self.bytes_up += sum(wire_bytes(reply.content) for reply in replies if reply.has_content())


class _Counting:
    """A grid whose every message a meter counts: what a wrapped strategy asks of clients by itself."""

    def __init__(self, grid: Grid, meter: MeteredStrategy) -> None:
        self._grid, self._meter = grid, meter

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        messages = list(messages)
        self._meter.sends(messages)
        replies = list(self._grid.send_and_receive(messages, timeout=timeout))
        self._meter.receives(replies)
        return replies

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)


class SeededStrategy(Forwarding):
    """Makes which clients are chosen a function of the seed and the round, and counts rounds from `after`.

    Strategies sample node ids with Python's global random numbers, and the ids are random themselves; here they are sampled from
    `nodes` in the order of their clients, with the global state set for the purpose and put back. A resumed run continues with
    round `after + 1`, while Flower's own loop counts from 1 again.
    """

    def __init__(self, inner: Strategy, seed: int, nodes: Sequence[int], after: int = 0) -> None:
        super().__init__(inner)
        self.seed, self.nodes, self.after = seed, list(nodes), after

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        with _random_seeded(seed_of(self.seed, "clients", server_round + self.after)):
            return list(super().configure_train(server_round + self.after, arrays, config, cast(Grid, _Ordered(grid, self.nodes))))

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        return super().aggregate_train(server_round + self.after, replies)

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        with _random_seeded(seed_of(self.seed, "evaluators", server_round + self.after)):
            return list(
                super().configure_evaluate(server_round + self.after, arrays, config, cast(Grid, _Ordered(grid, self.nodes)))
            )

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        by_client = sorted(replies, key=lambda reply: self.nodes.index(reply.metadata.src_node_id))
        return super().aggregate_evaluate(server_round + self.after, by_client)


class _Ordered:
    """A grid that lists its nodes in a given order."""

    def __init__(self, grid: Grid, nodes: list[int]) -> None:
        self._grid, self._nodes = grid, nodes

    def get_node_ids(self) -> list[int]:
        return list(self._nodes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)


@contextlib.contextmanager
def _random_seeded(seed: int) -> Iterator[None]:
    before = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)


def nodes_by_client(grid: Grid, clients: int, timeout: float = 600.0) -> list[int]:
    """Node ids in the order of their clients 0, 1, …, asked of the nodes themselves. Raises FederationError when one is missing."""
    until = time.monotonic() + timeout
    while len(nodes := list(grid.get_node_ids())) < clients:
        if time.monotonic() > until:
            raise FederationError(f"{len(nodes)} of {clients} clients connected within {timeout:.0f} s")
        time.sleep(0.05)
    found: dict[int, int] = {}
    why = ""
    for first in range(0, len(nodes), ASKED):
        asked = [Message(RecordDict(), dst_node_id=node, message_type="query") for node in nodes[first : first + ASKED]]
        replies = list(grid.send_and_receive(asked, timeout=max(1.0, until - time.monotonic())))
        found |= {_sender(reply): reply.metadata.src_node_id for reply in replies if reply.has_content()}
        why = why or next((f": {' '.join(str(reply.error.reason).split())}" for reply in replies if reply.has_error()), "")
    if missing := [client for client in range(clients) if client not in found]:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise FederationError(f"no answer from client {missing[0]}{more}{why}")
    return [found[client] for client in range(clients)]


# What a strategy remembers from round to round (Adam's moments, a momentum vector) are arrays among its attributes. They are saved
# by their kind, since each strategy has its own: a name such as "m_t:dict:000000:conv1.weight" says how to put them back, and
# where, for strategies that pair lists by position.

_SCALARS = (bool, int, float)


def strategy_state(strategy: Strategy) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the numbers a strategy holds, as flat dicts; `restore_strategy` puts them back."""
    arrays: dict[str, np.ndarray] = {}
    numbers: dict[str, Any] = {}
    for name, value in vars(_innermost(strategy)).items():
        if isinstance(value, _SCALARS):
            numbers[name] = value
        elif isinstance(value, np.ndarray):
            arrays[f"{name}:array:000000:"] = value
        elif isinstance(value, ArrayRecord):
            arrays |= {f"{name}:record:{i:06d}:{key}": a.numpy() for i, (key, a) in enumerate(value.items())}
        elif isinstance(value, dict) and value and all(isinstance(v, np.ndarray) for v in value.values()):
            arrays |= {f"{name}:dict:{i:06d}:{key}": a for i, (key, a) in enumerate(value.items())}
        elif isinstance(value, list) and value and all(isinstance(v, np.ndarray) for v in value):
            arrays |= {f"{name}:list:{i:06d}:": a for i, a in enumerate(value)}
    return arrays, numbers


def restore_strategy(strategy: Strategy, arrays: dict[str, np.ndarray], numbers: dict[str, Any]) -> None:
    """Sets the attributes that `strategy_state` read."""
    target = _innermost(strategy)
    for name, value in numbers.items():
        setattr(target, name, value)
    grouped: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for full, array in sorted(arrays.items()):
        name, kind, _, key = full.split(":", 3)
        grouped.setdefault((name, kind), {})[key or str(len(grouped.get((name, kind), {})))] = array
    for (name, kind), group in grouped.items():
        if kind == "array":
            (value,) = group.values()
        elif kind == "record":
            value = ArrayRecord({key: Array(a) for key, a in group.items()})
        else:
            value = group if kind == "dict" else list(group.values())
        setattr(target, name, value)


def _innermost(strategy: Strategy) -> Strategy:
    while isinstance(strategy, Forwarding):
        strategy = strategy.inner
    return strategy
