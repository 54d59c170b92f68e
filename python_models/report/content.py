# SPDX-License-Identifier: Apache-2.0
"""What all sections of the page are made from, and how numbers are written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_models.report import figures
from python_models.report.collect import Comparison, Run, Task
from python_models.report.measure import Findings, Original
from python_models.report.page import NOT_KNOWN, Markup, paragraph, picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(eq=False)
class Report:
    """All that the page is made from, and the figures that it leaves.

    Attributes:
        task: What was distilled.
        comparisons: Pairs first.
        original: The original data.
        findings: What was measured, by name of the run.
        notes: What was passed over.
        figures: PNG files by name, filled while the sections are made.
        left_out: What is not in the page, and why, likewise.
    """

    task: Task
    comparisons: Sequence[Comparison]
    original: Original
    findings: Mapping[str, Findings]
    notes: Sequence[str] = ()
    figures: dict[str, bytes] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        """Every run once, in the order of the comparisons."""
        return list({run.name: run for c in self.comparisons for run in c.runs}.values())

    @property
    def pairs(self) -> list[tuple[Comparison, Run, Run]]:
        """The comparisons that are pairs, with the vanilla and the KDCI run."""
        return [(c, c.vanilla, c.kdci) for c in self.comparisons if c.vanilla and c.kdci]

    @property
    def title(self) -> str:
        """Of the page."""
        methods = ", ".join(dict.fromkeys(run.method for run in self.runs))
        return f"{self.task.dataset or 'Unnamed dataset'}, distilled by {methods}"

    def draw(self, name: str, figure: Figure, alt: str, caption: str) -> Markup:
        """Keep a figure as a PNG file and return it for the page."""
        return self.embed(name, figures.to_png(figure), alt, caption)

    def embed(self, name: str, png: bytes, alt: str, caption: str) -> Markup:
        """Keep a PNG file and return it for the page."""
        self.figures[f"{name}.png"] = png
        return picture(png, alt, caption)

    def leave_out(self, what: str, reasons: Mapping[str, str] | str) -> Markup:
        """Note what is missing, and return the note for the page.

        Args:
            what: The part.
            reasons: Why; by run where runs have their own.
        """
        if not isinstance(reasons, str):
            runs_of: dict[str, list[str]] = {}
            for run, reason in reasons.items():
                runs_of.setdefault(reason, []).append(run)
            reasons = "; ".join(f"{', '.join(runs)}: {why}" for why, runs in runs_of.items())
        self.left_out.append(f"{what}: {reasons}")
        return paragraph(f"{what} left out: {reasons}.", "left-out")

    def reasons(self, part: str, runs: Sequence[Run]) -> dict[str, str]:
        """Return why runs lack a part, for those that do."""
        found = {run.name: self.findings[run.name].left_out.get(part) for run in runs}
        return {name: reason for name, reason in found.items() if reason is not None}


def percent(value: float | None) -> str:
    """Return a percentage as text."""
    return NOT_KNOWN if value is None or not math.isfinite(value) else f"{value:.2f} %"


def points(value: float | None) -> str:
    """Return a difference of percentages as text."""
    return NOT_KNOWN if value is None or not math.isfinite(value) else f"{value:+.2f} points"


def number(value: float | None, digits: int = 4) -> str:
    """Return a number as text."""
    return NOT_KNOWN if value is None or not math.isfinite(value) else f"{value:,.{digits}g}"
