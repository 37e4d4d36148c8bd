"""A Flower SuperLink and its SuperNodes: every client a process of its own, on this machine or on others."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp

from fedsim.checks import number


@dataclass(frozen=True)
class Deployment:
    """Clients on the SuperNodes of `grid`; whoever does not answer within `timeout` seconds is left out of the round.

    A SuperNode runs the ClientApp it was sent, so `run` starts the ServerApp alone. Flower hands `grid` and `context` to the app
    when a SuperLink starts it (`experiments/app.py`).
    """

    timeout: float = 600.0
    grid: Grid | None = None
    context: Context | None = None

    def __post_init__(self) -> None:
        number("engine.timeout", self.timeout, 0, above=True)

    def run(self, server: ServerApp, client: ClientApp, clients: int, device: str) -> None:
        """Runs the ServerApp to its end. Raises ValueError where no SuperLink has started it."""
        if self.grid is None or self.context is None:
            raise ValueError("engine=deployment needs a SuperLink: use `fedsim deploy`, or `flwr run`, or take engine=inline")
        server(cast(Grid, _Bounded(self.grid, self.timeout)), self.context)


class _Bounded:
    """A grid that waits `timeout` seconds for replies at most, and answers each message: with an error for a node that did not."""

    def __init__(self, grid: Grid, timeout: float) -> None:
        self._grid, self._timeout = grid, timeout

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        messages = list(messages)
        if not messages:
            return []
        patience = self._timeout if timeout is None else min(timeout, self._timeout)
        replies = list(self._grid.send_and_receive(messages, timeout=patience))
        by_message = {reply.metadata.reply_to_message_id: reply for reply in replies}
        return [_answer(message, by_message.get(message.metadata.message_id), patience) for message in messages]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)


def _answer(message: Message, reply: Message | None, patience: float) -> Message:
    """The reply, or an error in the name of the node that was asked: the SuperLink reports a lost node in its own."""
    if reply is not None and reply.metadata.src_node_id == message.metadata.dst_node_id:
        return reply
    reason = f"no reply within {patience:.0f} s" if reply is None else reply.error.reason
    return Message(Error(ErrorCode.NODE_UNAVAILABLE, reason), reply_to=message)
