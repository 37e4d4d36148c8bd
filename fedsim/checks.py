"""Checks where values enter: each raises one line that names the value and the way out."""

import difflib
import math
from collections.abc import Iterable


def whole(name: str, value: object, low: int = 1, high: int | None = None) -> None:
    """Raises ValueError unless `value` is an integer in `low..high`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        span = f">= {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name} must be a whole number {span}, got {value!r}")


def number(name: str, value: object, low: float = -math.inf, high: float = math.inf, *, above: bool = False) -> None:
    """Raises ValueError unless `value` is a finite number in [low, high], or in (low, high] with `above`."""
    right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not right or value < low or value > high or (above and value == low):  # type: ignore[operator]
        span = f"{'>' if above else '>='} {low:g}" if high == math.inf else f"in {'(' if above else '['}{low:g}, {high:g}]"
        raise ValueError(f"{name} must be a {'finite number' if low == -math.inf else f'number {span}'}, got {value!r}")


def switch(name: str, value: object) -> None:
    """Raises ValueError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")


def one_of(name: str, value: str, choices: Iterable[str]) -> str:
    """`value`, or a ValueError that names all of `choices` and the nearest."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}: {nearest(str(value), choices)}choices: {', '.join(choices)}")
    return value


def nearest(word: str, choices: Iterable[str]) -> str:
    """`did you mean 'x'? ` for the choice most like `word`, or an empty string when none is like it."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"did you mean {found[0]!r}? " if found else ""
