"""Tables for a terminal, and as Markdown, LaTeX or CSV for papers and documents."""

import csv
import io
import re

from rich import box
from rich.table import Table

from experiments.summary import Summary
from fedsim.checks import one_of

FORMATS = ("markdown", "latex", "csv")
_LATEX = {char: f"\\{char}" for char in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
}


def written(table: Summary, form: str = "markdown") -> str:
    """The table, what knowing nothing scores, title and notes, as text that ends with a line; CSV holds the rows alone."""
    one_of("format", form, FORMATS)
    return {"markdown": _markdown, "latex": _latex, "csv": _csv}[form](table)


def drawn(told: Summary) -> Table:
    """The table for a terminal. Where it is narrow the first column keeps its words whole: they tell the rows apart."""
    table = Table(title=told.title, title_justify="left", box=box.SIMPLE_HEAD)
    longest = max((len(word) for row in told.rows + told.guesses for word in row[0].split()), default=0)
    for i, column in enumerate(told.columns):
        table.add_column(
            column,
            justify="left" if told.words or not i else "right",
            no_wrap=column == "against none",
            min_width=None if i else longest,
            overflow="ellipsis" if i else "fold",
        )
    for row in told.rows:
        table.add_row(*row)
    for row in told.guesses:
        table.add_row(*row, style="dim")
    table.caption, table.caption_justify = "\n".join(told.notes) or None, "left"
    return table


def _markdown(table: Summary) -> str:
    body = markdown_rows(table.columns, table.rows + table.guesses, words=table.words)
    notes = [text for note in table.notes for text in ("", note)]
    return "\n".join([table.title, "", *body, *notes, ""])


def markdown_rows(columns: list[str], rows: list[list[str]], *, words: bool = False) -> list[str]:
    """The lines of a table, its first column to the left, and the others to the right unless they are words."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(re.sub(r"([\\|<>*_`\[\]])", r"\\\1", cell).replace("\n", "; ") for cell in cells) + " |"

    return [line(columns), "| " + " | ".join(["---", *["---" if words else "---:"] * (len(columns) - 1)]) + " |", *map(line, rows)]


def _latex(table: Summary) -> str:
    """A `tabular` of the package booktabs, with title and notes as the caption of its `table`."""

    def told(text: str) -> str:
        return "".join(_LATEX.get(char, char) for char in text).replace("\n", "; ")

    def lines(rows: list[list[str]]) -> list[str]:
        return [" & ".join(map(told, row)) + r" \\" for row in rows]

    caption = ". ".join([table.title, *table.notes])
    guesses = [r"\midrule", *lines(table.guesses)] if table.guesses else []
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{told(caption)}}}",
            rf"\begin{{tabular}}{{l{('l' if table.words else 'r') * (len(table.columns) - 1)}}}",
            r"\toprule",
            *lines([table.columns]),
            r"\midrule",
            *lines(table.rows),
            *guesses,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _csv(table: Summary) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([table.columns, *table.rows, *table.guesses])
    return out.getvalue()
