"""This process: clients run one after the other, or in a pool of threads, each on one core. No Ray, no SuperLink, no network.

The names of Flower used here that are not public are all in this file: the type of `Grid.run`, the identity that `Message()` reads,
the codes of errors, and the place of a message's id.
"""

import errno
import logging
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedsim.checks import whole
from fedsim.cores import cores, one_thread

log = logging.getLogger(__name__)

# Is given training messages with the numbers of the clients they go to, and the `map` of a pool of threads.
Ahead = Callable[[list[tuple[Message, int]], Callable[..., Iterable[None]]], None]

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
_SERVER = 1  # Flower's node id of the server; client i is node i + 2


class InlineGrid(Grid):
    """A grid whose clients are function calls.

    ahead  is told of the clients that are asked to train, before any of them is called
    """

    def __init__(self, app: ClientApp, clients: int, workers: int = 1, ahead: Ahead | None = None) -> None:
        self._app, self._clients, self._ahead = app, clients, ahead
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="client", initializer=one_thread)
        self._contexts: dict[int, Context] = {}
        self._replies: dict[str, Message] = {}
        self._run = Run.create_empty(uuid.uuid4().int >> 66)

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        return [client + _SERVER + 1 for client in range(self._clients)]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        replies = list(self.send_and_receive(messages))
        self._replies |= {reply.metadata.reply_to_message_id: reply for reply in replies}
        return [reply.metadata.reply_to_message_id for reply in replies]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Replies in the order of the messages. A function call cannot be abandoned, so `timeout` is not used."""
        messages = list(messages)
        asked = [(m, m.metadata.dst_node_id - _SERVER - 1) for m in messages if m.metadata.message_type == MessageType.TRAIN]
        if self._ahead is not None and asked:
            self._ahead(asked, self._pool.map)
        return list(self._pool.map(self._answer, messages))

    def _answer(self, message: Message) -> Message:
        message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
        # Strategies put one content object into all messages of a round; each client gets its own.
        message.content = RecordDict(dict(message.content.items()))
        try:
            context = self._context(message.metadata.dst_node_id)
            reply = self._app(message, context)
            if not context.state:  # most clients keep nothing here, and there may be very many
                self._contexts.pop(message.metadata.dst_node_id, None)
        except Exception as error:  # whatever a client's code raises is that client's failure, reported as Flower does
            if isinstance(error, OSError) and error.errno in _DISK:
                raise  # in this process its disk is the run's: on without it, the run would not be the one that was asked for
            log.exception("client %d failed", message.metadata.dst_node_id - _SERVER - 1)
            reason = f"{type(error).__name__}: {error}"
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
        reply.metadata.__dict__["_message_id"] = str(uuid.uuid4())
        return reply

    def _context(self, node: int) -> Context:
        if node not in self._contexts:
            place: UserConfig = {"partition-id": node - _SERVER - 1, "num-partitions": self._clients}
            self._contexts[node] = Context(self._run.run_id, node, place, RecordDict(), {})
        return self._contexts[node]

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class Inline:
    """This process, with `workers` threads of one core each; None takes one for each core, and one in all on a GPU.

    vectorized  whether the clients of a round train as one program, see `fedsim.cohort`: True, False, or "auto", where it is faster
    chunk       how many of them at a time; None takes as many as fit
    """

    workers: int | None = None
    vectorized: bool | str = "auto"
    chunk: int | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "chunk"):
            if getattr(self, name) is not None:
                whole(f"engine.{name}", getattr(self, name))
        if not isinstance(self.vectorized, bool) and self.vectorized != "auto":
            raise ValueError(f"engine.vectorized must be true, false or auto, got {self.vectorized!r}")

    def run(self, server: ServerApp, client: ClientApp, clients: int, device: str, ahead: Ahead | None = None) -> None:
        """Runs the apps to their end."""
        workers = self.workers or (1 if device.startswith("cuda") else cores())
        grid = InlineGrid(client, clients, min(workers, clients), ahead)
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = grid.run.run_id, _SERVER, 1
        try:
            server(grid, Context(grid.run.run_id, _SERVER, {}, RecordDict(), {}))
        finally:
            grid.close()
