"""The rounds of secure aggregation as Flower messages: what clients answer, and the strategy that asks them.

    advertise, share   queries before training
    train              as ever; the broadcast carries shares, and the reply is a masked vector
    reveal             a query after training

Keys and shares travel as arrays of bytes, so that whoever counts arrays counts them. The vector is the update as the defense left
it, the change of the BatchNorm statistics, and the training loss; all of it is masked.
"""

import logging
import os
import struct
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Bulyan, FedMedian, FedTrimmedAvg, Krum, MultiKrum, QFedAvg, Strategy
from torch import Tensor

from fedsim.errors import FederationError
from fedsim.observation import SUM
from fedsim.records import (
    CONFIG,
    MASKED,
    VECTOR,
    array_of,
    bytes_of,
    client_of,
    flattened,
    is_masked,
    masked_reply_of,
    numpy_of,
    record,
    reply_of,
    tensors_of,
    unflattened,
    with_content,
)
from fedsim.secure_aggregation import (
    SEALED,
    SECRET,
    Advert,
    Codes,
    Rejected,
    Secrets,
    Secure,
    TooFew,
    advertise,
    mask,
    reveal,
    share,
    unmask,
)
from fedsim.seeding import generator
from fedsim.server import MOST_EXAMPLES, Forwarding
from fedsim.setup import Config, Setup, setup_of
from fedsim.training import Trained
from fedsim.wire import Packets, pack, unpack

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

SECURE = "secure-aggregation"  # the record of keys and shares, and of what a client keeps between the steps of a round
STEPS = ("advertise", "share", "reveal")  # what clients are asked for besides training
COMPARING = (Krum, MultiKrum, Bulyan, FedMedian, FedTrimmedAvg, QFedAvg)


def check_averages(strategy: Strategy) -> None:
    """Raises ValueError for a strategy that must see each client's update."""
    if isinstance(strategy, COMPARING):
        name = type(strategy).__name__
        raise ValueError(
            f"strategy={name.lower()} compares the clients' updates, which aggregation=secure hides: take fedavg, fedavgm, "
            "fedprox, fedadam, fedadagrad or fedyogi, or aggregation=plain"
        )


# Bytes.


def _sent(**entries: bytes) -> RecordDict:
    made = ArrayRecord()
    made.update({name: array_of(np.frombuffer(data, np.uint8)) for name, data in entries.items()})
    return RecordDict({SECURE: made})


def _bytes(content: RecordDict, name: str) -> bytes:
    return bytes_of(record(content, ArrayRecord, SECURE)[name])


def _table(entries: Mapping[int, bytes]) -> bytes:
    """Client numbers, each before its entry."""
    return b"".join(struct.pack("<I", client) + data for client, data in sorted(entries.items()))


def _entries(data: bytes, size: int) -> dict[int, bytes]:
    """The entries of `size` bytes that `_table` wrote."""
    if len(data) % (4 + size):
        raise Rejected(f"{len(data)} bytes are no table of entries of {size}")
    return dict(struct.iter_unpack(f"<I{size}s", data))


# The clients.


def answer_steps(app: ClientApp, config: Config) -> None:
    """Lets the clients of `app` take the steps of secure aggregation around training."""

    @app.query("advertise")
    def _(message: Message, context: Context) -> Message:
        setup, client = setup_of(config), client_of(context)
        round = int(record(message.content, ConfigRecord, CONFIG)["server-round"])  # type: ignore[arg-type]
        examples, session = len(setup.examples(round, client)), _secure(setup).session(context.run_id, round)
        secrets, advert = advertise(client, examples, session, _entropy(setup, round, client))
        _keep(context, secrets)
        return Message(_sent(advert=advert.to_bytes()), reply_to=message)

    @app.query("share")
    def _(message: Message, context: Context) -> Message:
        secrets = _kept(context)
        adverts = Advert.all_from(_bytes(message.content, "adverts"))
        secrets, sealed = share(secrets, adverts, _threshold(setup_of(config)))
        _keep(context, secrets)
        return Message(_sent(shares=_table(sealed)), reply_to=message)

    @app.query("reveal")
    def _(message: Message, context: Context) -> Message:
        secrets = _kept(context)
        del context.state[SECURE]  # whatever comes of it: a second answer could lay a vector bare
        answered = list(np.frombuffer(_bytes(message.content, "answered"), "<u4"))
        return Message(_sent(shares=_table(reveal(secrets, answered, _threshold(setup_of(config))))), reply_to=message)


def shares_in(message: Message, context: Context, setup: Setup, round: int) -> dict[int, bytes]:
    """The shares that other clients sent along with the broadcast. Raises Rejected where a server asks for an update without."""
    client = client_of(context)
    if SECURE not in message.content or SECURE not in context.state:
        raise Rejected(f"client {client} was asked for its update, and this run has aggregation=secure: it sends none unmasked")
    if _kept(context).session != _secure(setup).session(context.run_id, round):
        raise Rejected(f"client {client} was asked for its vector of round {round}, and has advertised no keys for that round")
    return _entries(_bytes(message.content, "shares"), SEALED)


def masked_reply(
    context: Context, setup: Setup, shares: Mapping[int, bytes], packets: Packets, trained: Trained, broadcast: Mapping[str, Tensor]
) -> RecordDict:
    """The client's reply: `packets`, the change of its buffers since the `broadcast`, and its loss, under its masks."""
    aggregation, secrets = _secure(setup), _kept(context)
    examples = {one.client: one.examples for one in secrets.adverts}
    weight = examples[secrets.client] / sum(examples.values())
    moved = {name: t.double() - broadcast[name].double() for name, t in trained.buffers.items()}
    values = flattened(unpack(packets), moved, float(trained.loss))
    if clipped := int((np.abs(values) > aggregation.clip).sum()):
        log.warning(
            "client %d: %d of %d entries exceed aggregation.clip=%g", secrets.client, clipped, len(values), aggregation.clip
        )
    secrets, masked = mask(secrets, shares, aggregation.encode(values, weight), _threshold(setup))
    _keep(context, secrets)
    about = {"bits": aggregation.bits, "scale": weight * 2.0**aggregation.fraction_bits}
    return masked_reply_of(aggregation.to_bytes(masked), about, examples[secrets.client], secrets.client)


def _secure(setup: Setup) -> Secure:
    if not isinstance(setup.aggregation, Secure):
        raise Rejected("this run has no secure aggregation, and a client was asked to take part in one")
    return setup.aggregation


def _threshold(setup: Setup) -> int:
    return _secure(setup).needed(setup.protocol.per_round)


def _entropy(setup: Setup, round: int, client: int) -> Callable[[int], bytes]:
    if not _secure(setup).seeded:
        return os.urandom
    rng = generator(setup.seed, "masks", round, client)
    return lambda size: bytes(torch.randint(256, (size,), generator=rng).tolist())


# Between the steps of a round a client's secrets are in Flower's context: unlike a defense's memory, no later round needs them.


def _keep(context: Context, secrets: Secrets) -> None:
    context.state[SECURE] = ConfigRecord(
        {
            "session": secrets.session,
            "client": secrets.client,
            "seeds": [secrets.cipher_seed, secrets.mask_seed, secrets.self_seed],
            "adverts": b"".join(one.to_bytes() for one in secrets.adverts),
            "held": _table({client: b"".join(both) for client, both in secrets.held.items()}),
        }
    )


def _kept(context: Context) -> Secrets:
    if SECURE not in context.state:
        raise Rejected(f"client {client_of(context)} has no secrets: it advertised no keys, or has revealed its shares already")
    kept: Any = record(context.state, ConfigRecord, SECURE)
    cipher_seed, mask_seed, self_seed = kept["seeds"]
    held = {client: (both[:SECRET], both[SECRET:]) for client, both in _entries(kept["held"], 2 * SECRET).items()}
    adverts = Advert.all_from(kept["adverts"])
    return Secrets(kept["session"], kept["client"], cipher_seed, mask_seed, self_seed, adverts, held)


# The server.


@dataclass
class _Progress:
    """How far a round has got: who advertised keys, and who shared secrets."""

    session: bytes
    adverts: tuple[Advert, ...] = ()
    sharers: tuple[int, ...] = ()


class SecureStrategy(Forwarding):
    """Runs secure aggregation around training; hands on what the server then has: masked replies, and their sum.

    The sum is one more reply, of client SUM, with the weighted mean update. A round in which too few clients stay has no sum: the
    model stays as it is. A client whose answer cannot be used has vanished.

    nodes    node ids in the order of their clients: nobody speaks for another
    clients  whom a round asks: the threshold is of these
    buffers  BatchNorm statistics among the arrays
    """

    def __init__(
        self, inner: Strategy, aggregation: Secure, nodes: Sequence[int], clients: int, run: int, buffers: Sequence[str] = ()
    ) -> None:
        super().__init__(inner)
        self.aggregation, self.threshold, self.run = aggregation, aggregation.needed(clients), run
        self._nodes, self._clients = list(nodes), {node: client for client, node in enumerate(nodes)}
        self.buffers = frozenset(buffers)
        self._params: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        self._round: _Progress | None = None

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        messages = list(super().configure_train(server_round, arrays, config, grid))
        tensors = tensors_of(arrays)
        self._params = {name: t for name, t in tensors.items() if name not in self.buffers}
        self._buffers = {name: t for name, t in tensors.items() if name in self.buffers}
        self._grid, self._round = grid, _Progress(self.aggregation.session(self.run, server_round))
        try:
            return self._shared(server_round, messages, self._round)
        except Rejected as why:
            _gives_up(server_round, why)
            self._round = None
            return []

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        if self._round is not None:
            try:
                replies.append(self._summed(server_round, replies, self._round))
            except Rejected as why:
                _gives_up(server_round, why)
        return super().aggregate_train(server_round, replies)

    def _shared(self, round: int, messages: list[Message], now: _Progress) -> list[Message]:
        """The training messages to those who have shared their secrets, with what the others sealed for them."""
        asked = RecordDict({CONFIG: ConfigRecord({"server-round": round})})
        chosen = [self._clients[message.metadata.dst_node_id] for message in messages]
        adverts = self._ask(round, "advertise", dict.fromkeys(chosen, asked), _advert)
        now.adverts = tuple(adverts[client] for client in sorted(adverts))
        if not adverts:
            raise FederationError(f"round {round}: none of the {len(messages)} chosen clients advertised keys; see the log for why")
        self._enough("clients advertised keys", adverts)
        everybody = _sent(adverts=b"".join(one.to_bytes() for one in now.adverts))

        def sealed_by(client: int, answer: RecordDict) -> dict[int, bytes]:
            return _shares(answer, SEALED, adverts.keys() - {client})

        sealed = self._ask(round, "share", dict.fromkeys(adverts, everybody), sealed_by)
        now.sharers = tuple(sorted(sealed))
        self._enough("clients shared their secrets", sealed)
        kept = [message for message in messages if self._clients[message.metadata.dst_node_id] in sealed]
        for message in kept:
            mine = self._clients[message.metadata.dst_node_id]
            shares = {client: entries[mine] for client, entries in sealed.items() if client != mine}
            message.content = RecordDict({**message.content, **_sent(shares=_table(shares))})
        return kept

    def _summed(self, round: int, replies: list[Message], now: _Progress) -> Message:
        """A reply with the weighted mean of what the masked ones hold."""
        masked: dict[int, Codes] = {}
        template = None
        for reply in replies:
            if is_masked(reply):
                template, vector = reply, numpy_of(record(reply.content, ArrayRecord, MASKED)[VECTOR])
                masked[self._clients[reply.metadata.src_node_id]] = self.aggregation.from_bytes(vector.data)
        self._enough("clients sent a masked update", masked)
        assert template is not None
        answered = np.array(sorted(masked), "<u4").tobytes()

        def revealed_by(client: int, answer: RecordDict) -> dict[int, bytes]:
            return _shares(answer, SECRET, now.sharers)

        revealed = self._ask(round, "reveal", dict.fromkeys(masked, _sent(answered=answered)), revealed_by)
        self._enough("clients revealed their shares", revealed)
        total = unmask(now.session, now.adverts, masked, now.sharers, revealed, self.threshold)
        examples = {one.client: one.examples for one in now.adverts}
        seen = sum(examples[client] for client in masked)
        mean = self.aggregation.decode(total, seen / sum(examples.values()))
        update, moved, loss = unflattened(mean, self._params, self._buffers)
        statistics = {name: (t.double() + moved[name]).float() for name, t in self._buffers.items()}
        content = reply_of(pack(update), statistics, seen, loss, SUM, sorted(masked))
        return with_content(template, content)

    def _ask(
        self, round: int, step: str, contents: Mapping[int, RecordDict], read: Callable[[int, RecordDict], Answer]
    ) -> dict[int, Answer]:
        """By client, what `read` makes of its answer, and a warning if some have none, or none that can be read."""
        messages = [
            Message(content, dst_node_id=self._nodes[client], message_type=f"query.{step}") for client, content in contents.items()
        ]
        answers, why = {}, []
        for reply in self._grid.send_and_receive(messages, timeout=self.aggregation.timeout):
            client = self._clients[reply.metadata.src_node_id]
            if reply.has_error():
                why.append(reply.error.reason)
                continue
            try:
                answers[client] = read(client, reply.content)
            except Exception as error:  # whatever reading it raises, what was sent is to blame
                why.append(f"client {client}: {error if isinstance(error, Rejected) else f'{type(error).__name__}: {error}'}")
        if lost := len(messages) - len(answers):
            reason = why[0] if why else "no reply came in time"
            log.warning("round %d: %d of %d clients vanished when asked to %s: %s", round, lost, len(messages), step, reason)
        return {client: answers[client] for client in contents if client in answers}

    def _enough(self, what: str, some: Mapping[int, object]) -> None:
        if len(some) < self.threshold:
            raise TooFew(f"{len(some)} {what}, and {self.threshold} are needed")


def _advert(client: int, answer: RecordDict) -> Advert:
    """What the client advertises. Raises Rejected where it speaks for another, or would leave the others without a secret."""
    (advert,) = Advert.all_from(_bytes(answer, "advert"))
    if advert.client != client:
        raise Rejected(f"it says that it is client {advert.client}")
    if not 1 <= advert.examples <= MOST_EXAMPLES:
        raise Rejected(f"it claims {advert.examples} examples")
    advert.check()
    return advert


def _shares(answer: RecordDict, size: int, clients: Collection[int]) -> dict[int, bytes]:
    """By client, a share of `size` bytes. Raises Rejected where there is not one for each of `clients`."""
    entries = _entries(_bytes(answer, "shares"), size)
    if odd := set(clients) ^ entries.keys():
        raise Rejected(f"its share for client {min(odd)} is missing, or nobody asked for it")
    return entries


def _gives_up(round: int, why: Rejected) -> None:
    log.warning("round %d: no sum, the model stays as it is: %s", round, why)
