# SPDX-License-Identifier: Apache-2.0
"""Plots of a study: paired differences, accuracy by the dictionary's size, curves over epochs."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from python_models.checkpoint import write_atomically
from python_models.report.collect import read_metrics
from python_models.report.figures import COLORS, panels_of, style, to_png
from python_models.study.folder import StudyFolder
from python_models.study.results import finished
from python_models.study.table import Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = "kdci_prototypes"
PALETTE = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A7A7A", "#000000")
"""Colours of the variants but the first, of Okabe and Ito, told apart by colour-blind readers."""
CURVES = {
    "curves.png": ("accuracy", "accuracy (%)"),
    "prior.png": ("compensation_ratio", "mean |F| / mean |S|"),
    "attention.png": ("attention_prototypes", "prototypes attended to"),
}
"""Files of curves over epochs: the column of metrics.csv, and what it is."""
Curves = Mapping[tuple[str, str], Sequence[tuple[int, float]]]
"""By entry and variant, pairs of epoch and mean."""


def write_plots(folder: StudyFolder, lines: Sequence[Line]) -> list[Path]:
    """Draw what there are results for into the study folder; returns the files."""
    colors = _colors(lines)
    sizes = {
        name: int(values[SIZE])
        for name, values in folder.study.variants.items()
        if isinstance(values.get(SIZE), int)
    }
    figures = {}
    with style():
        if any(line.difference is not None for line in lines):
            figures["differences.png"] = differences(lines, folder.study.baseline, colors)
        if len(sizes) > 1 and any(line.accuracies and line.variant in sizes for line in lines):
            figures["sizes.png"] = by_size(lines, sizes, folder.study.baseline, colors)
        for name, (column, label) in CURVES.items():
            found = mean_curves(folder, column)
            if found:
                label = f"{label}, mean over seeds"
                figures[name] = by_epoch(found, colors, label, has_zero=column != "accuracy")
        pngs = {folder.path / name: to_png(figure) for name, figure in figures.items()}
    for path, png in pngs.items():
        write_atomically(path, functools.partial(Path.write_bytes, data=png))
    return list(pngs)


def _colors(lines: Sequence[Line]) -> dict[str, str]:
    names = list(dict.fromkeys(line.variant for line in lines))
    others = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names[1:])}
    return {names[0]: COLORS["vanilla"], **others}


def differences(lines: Sequence[Line], baseline: str, colors: Mapping[str, str]) -> Figure:
    """Draw each variant's mean paired difference with its interval, a row each."""
    from matplotlib.figure import Figure

    shown = [line for line in lines if line.difference is not None]
    figure = Figure(figsize=(6.0, 1.0 + 0.3 * len(shown)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="black", linewidth=0.8)
    for position, line in enumerate(shown):
        assert line.difference is not None
        axes.errorbar(
            line.difference.mean,
            position,
            xerr=line.difference.half_width,
            fmt="o",
            color=colors[line.variant],
            markersize=4,
            capsize=3,
        )
    axes.set_yticks(range(len(shown)), [f"{line.entry}, {line.variant}" for line in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.25)
    axes.set_xlabel(f"accuracy minus {baseline} (points), mean over seeds and 95 % interval")
    return figure


def by_size(
    lines: Sequence[Line], sizes: Mapping[str, int], baseline: str, colors: Mapping[str, str]
) -> Figure:
    """Draw accuracy against the number of prototypes, a panel an entry."""
    entries = list(dict.fromkeys(line.entry for line in lines if line.variant in sizes))
    figure, panels = panels_of(len(entries))
    for axes, entry in zip(panels, entries, strict=True):
        measured = [line for line in lines if line.entry == entry and line.mean is not None]
        points = sorted((sizes[x.variant], x) for x in measured if x.variant in sizes)
        axes.errorbar(
            [size for size, _ in points],
            [line.mean or 0.0 for _, line in points],
            yerr=[
                statistics.stdev(x.accuracies) if len(x.accuracies) > 1 else 0.0 for _, x in points
            ],
            fmt="o-",
            color=COLORS["KDCI"],
            markersize=3,
            capsize=3,
            label="KDCI",
        )
        for line in measured:
            if line.variant == baseline and line.mean is not None:
                axes.axhline(line.mean, color=colors[baseline], linestyle="--", label=baseline)
        axes.set_xscale("log", base=2)
        axes.set_xticks([size for size, _ in points], [str(size) for size, _ in points])
        axes.set_xlabel("prototypes in the dictionary")
        axes.set_title(entry, fontsize=8)
        axes.legend(fontsize=7)
    panels[0].set_ylabel("accuracy (%), mean and standard deviation")
    return figure


def mean_curves(folder: StudyFolder, column: str) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """Return a column's mean over seeds at each epoch that all finished runs measured it."""
    runs: dict[tuple[str, str], list[dict[int, float]]] = {}
    for cell, job in finished(folder).items():
        epochs = read_metrics(job.folder.metrics)
        curve = {int(row["epoch"]): row[column] for row in epochs if column in row}
        if curve:
            runs.setdefault((cell.entry, cell.variant), []).append(curve)
    return {
        key: [
            (epoch, statistics.fmean(curve[epoch] for curve in curves))
            for epoch in sorted(set.intersection(*map(set, curves)))
        ]
        for key, curves in runs.items()
    }


def by_epoch(curves: Curves, colors: Mapping[str, str], label: str, *, has_zero: bool) -> Figure:
    """Draw a column's mean over epochs, a panel an entry, a line a variant; with zero, or not."""
    entries = list(dict.fromkeys(entry for entry, _ in curves))
    figure, panels = panels_of(len(entries))
    for axes, entry in zip(panels, entries, strict=True):
        for (owner, variant), points in curves.items():
            if owner == entry and points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, "o-", color=colors[variant], label=variant, markersize=2)
        if has_zero:
            axes.set_ylim(bottom=0)
        _finish(axes, entry)
    panels[0].set_ylabel(label)
    return figure


def _finish(axes: Axes, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=8)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=7)
