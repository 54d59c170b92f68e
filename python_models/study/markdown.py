# SPDX-License-Identifier: Apache-2.0
"""The tables of a study as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from python_models.study.table import Comparison, Difference, Line


def accuracy_table(lines: Sequence[Line], baseline: str) -> str:
    """Return the table of accuracies and of differences from the baseline."""
    header = (
        *("entry", "variant", "runs", "accuracy (%)"),
        *(f"minus {baseline}", "95 % interval", "better/worse", "floor (%)"),
    )
    text = (
        "Accuracy of the last student on the test images, without compensation, mean over seeds "
        "with its standard deviation. Differences are of pairs that share all but the variant, "
        "in percentage points, their mean with Student's 95 % interval over the seeds."
    )
    if any(line.difference is not None and line.difference.half_width is None for line in lines):
        text += "\nWhere there is one pair alone, there is no interval: it takes several seeds."
    return "\n".join([*aligned(header, [_line(line) for line in lines]), "", text])


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Return the table of the differences that a study asks for besides."""
    header = ("entry", "variants", "pairs", "difference", "95 % interval", "better/worse")
    body = [
        (
            *(found.entry, f"{found.variant} minus {found.other}", str(found.difference.pairs)),
            *_difference(found.difference),
        )
        for found in comparisons
    ]
    return "\n".join(["Paired differences between variants:", "", *aligned(header, body)])


def aligned(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table, aligned so that it reads as plain text too."""
    widths = [max(len(row[i]) for row in (header, *body)) for i in range(len(header))]

    def row(words: Sequence[str]) -> str:
        return f"| {' | '.join(w.ljust(n) for w, n in zip(words, widths, strict=True))} |"

    return [row(header), f"|{'|'.join('-' * (n + 2) for n in widths)}|", *map(row, body)]


def _line(line: Line) -> tuple[str, ...]:
    runs = str(len(line.accuracies))
    if len(line.accuracies) < line.planned:
        runs += f" of {line.planned}"
    accuracy = "-" if line.mean is None else f"{line.mean:.2f}"
    if line.deviation is not None:
        accuracy += f" ± {line.deviation:.2f}"
    floor = "-"
    if line.floor is not None:
        state = "missed" if line.misses_floor else "met" if line.accuracies else "no run"
        floor = f"{line.floor:g}: {state}"
    difference = ("-", "-", "-") if line.difference is None else _difference(line.difference)
    return (line.entry, line.variant, runs, accuracy, *difference, floor)


def _difference(found: Difference) -> tuple[str, str, str]:
    """Return mean, interval and signs."""
    interval = "one pair"
    if found.half_width is not None:
        low, high = found.mean - found.half_width, found.mean + found.half_width
        interval = f"{low:+.2f} to {high:+.2f}"
    return (f"{found.mean:+.2f}", interval, f"{found.better}/{found.worse}")
