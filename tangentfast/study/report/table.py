"""A table as text, once, and its two written forms: Markdown and LaTeX (booktabs)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Table"]

WIDE = 7  # columns from which a LaTeX table is scaled to the width of the text

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "α": r"$\alpha$", "ξ": r"$\xi$", "τ": r"$\tau$", "Σ": r"$\Sigma$", "θ": r"$\theta$",
    "±": r"$\pm$", "×": r"$\times$", "−": r"$-$", "–": "--", "≥": r"$\geq$",
    "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


def latex(text: str) -> str:
    """`text` with what LaTeX would read as a command made plain."""
    return "".join(_LATEX.get(letter, letter) for letter in text)


def markdown(text: str) -> str:
    """`text` with what Markdown would read as markup made plain, on one line."""
    text = re.sub(r"([\\`*|~])", r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;")
    return " ".join(text.split())


@dataclass(frozen=True)
class Table:
    """Rows of text under `columns`.

    Args:
        name: Of the file, and of the LaTeX label.
        caption: One line.
        columns: Headings.
        rows: As many texts a row as there are columns.
        labels: The number of first columns that name the row; they are set to the left.
        best: (row, column) of the cells that are set in bold.
        note: What a reader must know besides.
    """

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    labels: int = 1
    best: frozenset[tuple[int, int]] = frozenset()
    note: str = ""

    def markdown(self) -> str:
        """A Markdown table, without its caption."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cells) + " |\n"

        marks = ["---"] * self.labels + ["---:"] * (len(self.columns) - self.labels)
        lines = [line([markdown(heading) for heading in self.columns]), line(marks)]
        for i, row in enumerate(self.rows):
            cells = [markdown(cell) for cell in row]
            lines.append(
                line([f"**{c}**" if (i, j) in self.best else c for j, c in enumerate(cells)])
            )
        return "".join(lines)

    def latex(self) -> str:
        """A LaTeX table float; it needs booktabs, and graphicx where it is wide."""

        def line(cells: Sequence[str]) -> str:
            return " & ".join(cells) + r" \\"

        body = [
            line(
                [
                    rf"\textbf{{{latex(c)}}}" if (i, j) in self.best else latex(c)
                    for j, c in enumerate(row)
                ]
            )
            for i, row in enumerate(self.rows)
        ]
        marks = "l" * self.labels + "r" * (len(self.columns) - self.labels)
        tabular = [
            rf"\begin{{tabular}}{{{marks}}}", r"\toprule",
            line([latex(heading) for heading in self.columns]), r"\midrule",
            *body, r"\bottomrule", r"\end{tabular}",
        ]  # fmt: skip
        if len(self.columns) >= WIDE:
            tabular = [r"\resizebox{\textwidth}{!}{%", *tabular[:-1], tabular[-1] + "}"]
        caption = " ".join(part for part in (f"{self.caption}.", self.note) if part)
        head = [r"\begin{table}", r"\centering", rf"\caption{{{latex(caption)}}}"]
        label = rf"\label{{tab:{self.name}}}"
        return "\n".join([*head, label, *tabular, r"\end{table}", ""])
