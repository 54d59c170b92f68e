# SPDX-License-Identifier: Apache-2.0
"""Plots of a study: accuracies, paired differences, overhead, dictionary sizes, curves."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from python_models.checkpoint import write_atomically
from python_models.compensation import num_prototypes
from python_models.config import flatten
from python_models.report.collect import read_metrics
from python_models.report.figures import COLORS, panels_of, style, to_png
from python_models.study.folder import StudyFolder
from python_models.study.grid import Study
from python_models.study.results import Row, finished, timings
from python_models.study.table import Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = "kdci_prototypes"
PALETTE = (
    *("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A7A7A", "#000000"),
    *("#882255", "#DDCC77", "#332288", "#44AA99", "#999933", "#117733", "#AA4499"),
)
"""Colours of the variants but the first, told apart by colour-blind readers: those of Okabe and
Ito, then of Paul Tol."""
CURVES = {
    "curves.png": ("accuracy", "accuracy (%)"),
    "prior.png": ("compensation_ratio", "mean |F| / mean |S|"),
    "attention.png": ("attention_prototypes", "prototypes attended to"),
}
"""Files of curves over epochs: the column of metrics.csv, and what it is."""
COSTS = {"seconds": "time", "peak_memory_mb": "peak memory"}
"""Columns of timings.csv that a variant may cost more of."""


class Point(NamedTuple):
    """A column at an epoch: mean over seeds, and standard deviation (zero for a single seed)."""

    epoch: int
    mean: float
    deviation: float


Curves = Mapping[tuple[str, str], Sequence[Point]]
"""By entry and variant."""
Sizes = Mapping[str, Sequence[Mapping[str, int]]]
"""By entry, groups of variants that differ in the number of prototypes alone: it by variant."""


def write_plots(folder: StudyFolder, lines: Sequence[Line]) -> list[Path]:
    """Draw what there are results for into the study folder; returns the files."""
    study = folder.study
    colors = _colors(lines)
    figures = {}
    with style():
        measured = [line for line in lines if line.accuracies]
        if measured:
            figures["accuracy.png"] = accuracies(study, measured, colors)
        if any(line.difference is not None for line in lines):
            figures["differences.png"] = differences(lines, study.baseline, colors)
        ratios = overheads(timings(folder), study.baseline)
        if ratios:
            figures["overhead.png"] = overhead(ratios, study.baseline, colors)
        sizes = dictionary_sizes(study, {(line.entry, line.variant) for line in measured})
        if sizes:
            figures["sizes.png"] = by_size(measured, sizes, study.baseline, colors)
        for name, (column, label) in CURVES.items():
            found = mean_curves(folder, column)
            if found:
                figures[name] = by_epoch(found, colors, label, has_zero=column != "accuracy")
        pngs = {folder.path / name: to_png(figure) for name, figure in figures.items()}
    for path, png in pngs.items():
        write_atomically(path, functools.partial(Path.write_bytes, data=png))
    return list(pngs)


def _colors(lines: Sequence[Line]) -> dict[str, str]:
    names = list(dict.fromkeys(line.variant for line in lines))
    others = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names[1:])}
    return {names[0]: COLORS["vanilla"], **others}


def accuracies(study: Study, lines: Sequence[Line], colors: Mapping[str, str]) -> Figure:
    """Draw mean accuracies as bars by method and variant, a panel a task."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    found = {(line.entry, line.variant): line for line in lines}
    tasks: dict[str, dict[str, str]] = {}
    for cell in study.cells:
        if any(line.entry == cell.entry for line in lines):
            tasks.setdefault(cell.task, {})[cell.method] = cell.entry
    variants = [name for name in study.variants if any(line.variant == name for line in lines)]
    groups = max(map(len, tasks.values()))
    width = min(13.0, max(4.0, 1.5 + 0.26 * groups * (len(variants) + 1)))
    figure = Figure(figsize=(width, 0.4 + 2.6 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), squeeze=False)[:, 0]
    for axes, (task, entries) in zip(panels, tasks.items(), strict=True):
        for position, variant in enumerate(variants):
            bars = [
                (group + (position - (len(variants) - 1) / 2) * 0.8 / len(variants), line)
                for group, entry in enumerate(entries.values())
                if (line := found.get((entry, variant))) is not None
            ]
            heights = [line.mean or 0.0 for _, line in bars]
            spreads = [line.deviation or 0.0 for _, line in bars]
            lefts = [left for left, _ in bars]
            axes.bar(lefts, heights, 0.8 / len(variants), color=colors[variant])
            for left, height, spread in zip(lefts, heights, spreads, strict=True):
                if spread:
                    axes.errorbar(left, height, yerr=spread, ecolor="black", capsize=2)
                axes.annotate(
                    f"{height:.1f}",
                    (left, height + spread),
                    (0, 3),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    rotation=90,
                    fontsize=6,
                )
        axes.set_xticks(range(len(entries)), list(entries))
        axes.set_ylim(0, 119)
        axes.set_yticks(range(0, 101, 20))
        axes.set_title(task, fontsize=8)
        axes.set_ylabel("accuracy (%)")
    _say_what_is_drawn(figure)
    shown = [Patch(color=colors[variant], label=variant) for variant in variants]
    figure.legend(handles=shown, loc="outside right upper", fontsize=7)
    return figure


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


Ratios = Mapping[tuple[str, str], Mapping[str, Sequence[float]]]
"""By entry and variant, then by column of timings.csv: ratios to the baseline, one a seed."""


def overheads(rows: Iterable[Row], baseline: str) -> Ratios:
    """Return what variants cost beside the baseline run of the same seed.

    Args:
        rows: Those of `timings`.
        baseline: The variant to divide by.
    """
    found = {(row["entry"], row["variant"], row["seed"]): row for row in rows}
    ratios: dict[tuple[str, str], dict[str, list[float]]] = {}
    for (entry, variant, seed), row in found.items():
        base = found.get((entry, baseline, seed))
        if variant == baseline or base is None:
            continue
        for column in COSTS:
            if row[column] and base[column]:
                of_variant = ratios.setdefault((entry, variant), {})
                of_variant.setdefault(column, []).append(row[column] / base[column])
    return ratios


def overhead(ratios: Ratios, baseline: str, colors: Mapping[str, str]) -> Figure:
    """Draw each variant's mean ratio of time and of memory with its range, a row each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 1.0 + 0.3 * len(ratios)), layout="constrained")
    panels = figure.subplots(1, len(COSTS), sharey=True)
    for axes, (column, label) in zip(panels, COSTS.items(), strict=True):
        axes.axvline(1, color="black", linewidth=0.8)
        for position, ((_, variant), columns) in enumerate(ratios.items()):
            if values := columns.get(column):
                mean, color = statistics.fmean(values), colors[variant]
                axes.plot(mean, position, "o", color=color, markersize=4)
                if len(values) > 1:
                    span = [[mean - min(values)], [max(values) - mean]]
                    axes.errorbar(mean, position, xerr=span, color=color, capsize=3)
        axes.grid(axis="x", alpha=0.25)
        axes.set_xlabel(label)
    figure.supxlabel(f"ratio to {baseline} with the same seed, mean and range over seeds", size=8)
    panels[0].set_yticks(range(len(ratios)), [", ".join(key) for key in ratios])
    panels[0].set_ylim(len(ratios) - 0.5, -0.5)
    return figure


def dictionary_sizes(study: Study, measured: Iterable[tuple[str, str]]) -> Sizes:
    """Return the entries of several dictionary sizes, with all their variants of KDCI.

    Args:
        study: The study.
        measured: Entries and variants that have results.
    """
    known = set(measured)
    groups: dict[str, dict[str, dict[str, int]]] = {}
    for cell in study.cells:
        if cell.config.compensation.kdci and (cell.entry, cell.variant) in known:
            settings = flatten(cell.config)
            others = repr([pair for pair in settings.items() if pair[0] not in (SIZE, "seed")])
            of_entry = groups.setdefault(cell.entry, {})
            of_entry.setdefault(others, {})[cell.variant] = num_prototypes(cell.config)
    return {
        entry: list(found.values())
        for entry, found in groups.items()
        if any(len(set(sizes.values())) > 1 for sizes in found.values())
    }


def by_size(
    lines: Sequence[Line], sizes: Sizes, baseline: str, colors: Mapping[str, str]
) -> Figure:
    """Draw accuracy against the number of prototypes, a panel an entry.

    A line joins variants that differ in it alone; others are on their own.
    """
    found = {(line.entry, line.variant): line for line in lines}
    figure, panels = panels_of(len(sizes))
    for axes, (entry, groups) in zip(panels, sizes.items(), strict=True):
        for group in groups:
            points = sorted((size, variant) for variant, size in group.items())
            of_group = [found[entry, variant] for _, variant in points]
            names = [variant for _, variant in points]
            axes.errorbar(
                [size for size, _ in points],
                [line.mean or 0.0 for line in of_group],
                yerr=[line.deviation or 0.0 for line in of_group],
                fmt="o-",
                color=colors[names[0]],
                markersize=3,
                capsize=3,
                label=names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}",
            )
        base = found.get((entry, baseline))
        if base is not None and base.mean is not None:
            axes.axhline(base.mean, color=colors[baseline], linestyle="--", label=baseline)
        ticks = sorted({size for group in groups for size in group.values()})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(size) for size in ticks])
        axes.set_xlabel("prototypes in the dictionary")
        axes.set_title(entry, fontsize=8)
        axes.legend(fontsize=7)
    panels[0].set_ylabel("accuracy (%)")
    _say_what_is_drawn(figure)
    return figure


def mean_curves(folder: StudyFolder, column: str) -> dict[tuple[str, str], list[Point]]:
    """Return a column over seeds at each epoch that all finished runs measured it."""
    runs: dict[tuple[str, str], list[dict[int, float]]] = {}
    for cell, job in finished(folder).items():
        epochs = read_metrics(job.folder.metrics)
        curve = {int(row["epoch"]): row[column] for row in epochs if column in row}
        if curve:
            runs.setdefault((cell.entry, cell.variant), []).append(curve)
    found = {}
    for key, curves in runs.items():
        points = []
        for epoch in sorted(set.intersection(*map(set, curves))):
            values = [curve[epoch] for curve in curves]
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            points.append(Point(epoch, statistics.fmean(values), deviation))
        found[key] = points
    return found


def by_epoch(curves: Curves, colors: Mapping[str, str], label: str, *, has_zero: bool) -> Figure:
    """Draw a column over epochs, a panel an entry, a line a variant; with zero, or not.

    The band about a line is of one standard deviation over seeds.
    """
    entries = list(dict.fromkeys(entry for entry, _ in curves))
    figure, panels = panels_of(len(entries))
    for axes, entry in zip(panels, entries, strict=True):
        for (owner, variant), points in curves.items():
            if owner == entry and points:
                epochs, means, deviations = zip(*points, strict=True)
                color = colors[variant]
                axes.plot(epochs, means, "o-", color=color, label=variant, markersize=2)
                if any(deviations):
                    low = [m - d for m, d in zip(means, deviations, strict=True)]
                    high = [m + d for m, d in zip(means, deviations, strict=True)]
                    axes.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)
        if has_zero:
            axes.set_ylim(0, 1.05 * axes.dataLim.y1)
        _finish(axes, entry)
    panels[0].set_ylabel(label)
    _say_what_is_drawn(figure)
    return figure


def _say_what_is_drawn(figure: Figure) -> None:
    figure.supxlabel("mean and standard deviation over seeds", size=8)


def _finish(axes: Axes, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=8)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=7)
