"""What a run says while it goes: a live line in a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedsim.federation import Round

console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 132)


def size(count: float) -> str:
    """Bytes for people: `8.6 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def span(seconds: float) -> str:
    """Seconds for people: `2:05`, `1:00:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Shows each round of one run: accuracy, leak so far, bytes sent, time left."""

    def __init__(self, rounds: int, done: int = 0) -> None:
        self.rounds, self.done = rounds, done
        self.stolen = self.attacked = self.unfinished = 0
        self.bytes_up = 0
        self._first, self._began = done, time.monotonic()
        self._printed = 0.0
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def round(self, report: Round) -> None:
        """A round is finished."""
        self.done = report.round
        self.bytes_up += report.bytes_up
        last = report.round == self.rounds
        # Rounds of milliseconds would flood a log: one line a second is enough, and those that tell something new.
        if self._live:
            self._live.update(self._table(report))
        elif last or report.round == 0 or time.monotonic() - self._printed > 1:
            self._printed = time.monotonic()
            console.print(self._line(report))

    def attacking(self, finished: int, total: int) -> None:
        """An attack has come to the end of `finished` of `total` victims."""
        if self._live:
            self._live.update(Text(f"  attacking: {finished}/{total} victims"))

    def leaks(self, verdicts: list[str]) -> None:
        """Images were attacked, with these verdicts."""
        self.attacked += len(verdicts)
        self.stolen += verdicts.count("stolen")
        self.unfinished += verdicts.count("not converged")

    def leak(self) -> str:
        """The leak so far: `3/4 stolen, 1 not converged`."""
        if not self.attacked:
            return "nothing attacked yet"
        return f"{self.stolen}/{self.attacked} stolen" + (f", {self.unfinished} not converged" if self.unfinished else "")

    def _left(self) -> str:
        ran = self.done - self._first
        return span((time.monotonic() - self._began) / ran * (self.rounds - self.done)) if ran else "?"

    def _line(self, report: Round) -> str:
        accuracy = "" if report.accuracy is None else f"accuracy {report.accuracy:6.1%}   "
        return f"  round {self.done:4d}/{self.rounds}   {accuracy}{self.leak()}   sent {size(self.bytes_up)}   left {self._left()}"

    def _table(self, report: Round) -> Table:
        table = Table.grid(padding=(0, 3))
        bar = "━" * int(24 * self.done / max(1, self.rounds))
        accuracy = "" if report.accuracy is None else f"accuracy {report.accuracy:.1%}"
        cells = [f"  round {self.done}/{self.rounds}", f"[cyan]{bar:<24}[/]", accuracy, self.leak()]
        table.add_row(*cells, f"sent {size(self.bytes_up)}", f"left {self._left()}")
        return table
