"""Choosing by name: a misspelt name is answered with the nearest one."""

import difflib
from collections.abc import Iterable


def one_of(kind: str, value: str, choices: Iterable[str]) -> str:
    """`value`, or a ValueError that names the nearest of `choices` and all of them."""
    choices = tuple(choices)
    if value in choices:
        return value
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown {kind} {value!r}: {hint}choices: {', '.join(choices)}")
