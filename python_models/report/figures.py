# SPDX-License-Identifier: Apache-2.0
"""The figures of a report, each drawn from plain numbers.

Vanilla, KDCI and the original keep their colours (of Okabe and Ito, told apart by colour-blind
readers), line styles and order in all of them.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from python_models.report.collect import Comparison, Run
from python_models.report.measure import GRID_COLUMNS
from python_models.reporting import image_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"vanilla": "#D55E00", "KDCI": "#0072B2", "original": "#7A7A7A"}
STYLES = {"vanilla": "o--", "KDCI": "o-"}
DPI = 130
PANEL = (3.6, 2.7)
"""Width and height of a panel in inches: two beside each other are legible on a phone."""
NAMED_CLASSES = 20
"""Classes that have room for their names on an axis."""


def style() -> AbstractContextManager[None]:
    """Return a context with the settings of matplotlib that the figures are made for."""
    from matplotlib import rc_context

    # Names of folders and classes are no formulas.
    return rc_context({"font.size": 8, "text.parse_math": False})


def to_png(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG file, the same for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def accuracy_curves(comparisons: Sequence[Comparison], teacher: float | None) -> Figure:
    """Draw accuracy over epochs, a panel a comparison, on common axes."""
    figure, panels = panels_of(len(comparisons), share=True)
    for axes, comparison in zip(panels, comparisons, strict=True):
        for run in comparison.runs:
            _curve(axes, run, "accuracy")
        if teacher is not None:
            axes.axhline(teacher, color="black", linewidth=0.8, linestyle=":", label="teacher")
        axes.set_title(textwrap.fill(comparison.title, 50), fontsize=8)
        _by_epoch(axes)
        axes.legend(fontsize=7, loc="lower right")
    panels[0].set_ylabel("accuracy (%)")
    return figure


def curves(runs: Sequence[Run], columns: Mapping[str, str]) -> Figure:
    """Draw columns of metrics.csv over epochs, a panel each.

    Args:
        runs: Those to draw in each panel.
        columns: Titles of the panels by column.
    """
    figure, panels = panels_of(len(columns))
    for axes, (column, title) in zip(panels, columns.items(), strict=True):
        for run in runs:
            _curve(axes, run, column)
        axes.set_title(title, fontsize=8)
        _by_epoch(axes)
    # A run may lack a term that its partner has.
    fullest = max(panels, key=lambda axes: len(axes.lines))
    fullest.legend(fontsize=7)
    return figure


def _by_epoch(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _curve(axes: Axes, run: Run, column: str) -> None:
    points = run.column(column)
    if points:
        axes.plot(
            *zip(*points, strict=True),
            STYLES[run.label],
            color=COLORS[run.label],
            label=run.label,
            linewidth=1.4,
            markersize=3,
        )


def class_proportions(
    original: Tensor, counts: Mapping[str, Tensor], class_names: Sequence[str], source: str
) -> Figure:
    """Draw the share of each class in the training images beside the original.

    Args:
        original: Shares ``[c]``.
        counts: Number of images the teacher put in each class, ``[c]``, by label of the run.
        class_names: Their names.
        source: What the original is, for the legend.
    """
    from matplotlib.figure import Figure

    classes = len(class_names)
    shares = {source: original, **{label: shares_of(count) for label, count in counts.items()}}
    figure = Figure(figsize=(min(11.0, max(6.0, 0.75 * classes)), 3.2), layout="constrained")
    axes = figure.subplots()
    positions = np.arange(classes)
    width = 0.8 / len(shares)
    for index, (label, share) in enumerate(shares.items()):
        color = COLORS.get(label, COLORS["original"])
        values = 100 * share.double().numpy()
        if classes <= NAMED_CLASSES:
            left = positions + (index - (len(shares) - 1) / 2) * width
            axes.bar(left, values, width=width, color=color, label=label)
        else:  # bars would be hair-thin
            axes.step(positions, values, where="mid", color=color, linewidth=1, label=label)
    axes.set_ylabel("images (%)")
    if classes <= NAMED_CLASSES:
        axes.set_xticks(positions, class_names, rotation=30, ha="right", fontsize=8)
    else:
        axes.set_xlabel("class")
    axes.legend(fontsize=8)
    return figure


def shares_of(counts: Tensor) -> Tensor:
    """Return counts ``[c]`` as shares of their sum, float64 on the CPU."""
    counts = counts.double().cpu()
    return counts / counts.sum().clamp(min=1)


def image_grids(grids: Mapping[str, Tensor], class_names: Sequence[str]) -> Figure:
    """Draw grids of `measure.by_class` beside each other, a row a class."""
    from matplotlib.figure import Figure

    rows = max(len(grid) for grid in grids.values()) // GRID_COLUMNS
    figure = Figure(
        figsize=(PANEL[0] * len(grids) + 0.6, PANEL[0] * rows / GRID_COLUMNS + 0.4),
        layout="constrained",
    )
    panels = figure.subplots(1, len(grids), squeeze=False)[0]
    for axes, (title, images) in zip(panels, grids.items(), strict=True):
        axes.imshow(image_grid(images, GRID_COLUMNS).numpy())
        axes.set_title(title, fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    step = images.shape[-2] + 2
    panels[0].set_yticks([2 + step * (row + 0.5) for row in range(rows)], class_names[:rows])
    panels[0].tick_params(length=0, labelsize=8)
    return figure


def embeddings(points: Mapping[str, tuple[Tensor, Tensor]], class_names: Sequence[str]) -> Figure:
    """Draw embeddings beside each other, a colour a class.

    Args:
        points: Positions ``[m, 2]`` and classes ``[m]`` by title.
        class_names: Names of the classes.
    """
    from matplotlib import colormaps

    figure, panels = panels_of(len(points), height=3.4)
    palette = colormaps["tab10" if len(class_names) <= 10 else "tab20"]
    for axes, (title, (places, labels)) in zip(panels, points.items(), strict=True):
        for label in sorted(set(labels.tolist())):
            x, y = places[labels == label].T.numpy()
            axes.scatter(x, y, s=5, color=palette(label), label=class_names[label], linewidths=0)
        axes.set_title(title, fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, fontsize=7, markerscale=2.5)
    return figure


def cases(images: Tensor, captions: Sequence[str]) -> Figure:
    """Draw images ``[n, c, h, w]`` in [0, 1] with lines of text below each."""
    from matplotlib.figure import Figure

    columns = min(6, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.25 * columns, 1.75 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels:
        axes.axis("off")
    for axes, image, caption in zip(panels, images, captions, strict=False):
        axes.imshow(image_grid(image[None], 1).numpy())
        lines = [_cut(line) for line in caption.splitlines()]
        # A title is above its axes; a negative offset puts it below.
        axes.set_title("\n".join(lines), fontsize=6.5, y=-0.02, va="top")
    return figure


def _cut(line: str, width: int = 24) -> str:
    return line if len(line) <= width else f"{line[: width - 1]}\N{HORIZONTAL ELLIPSIS}"


def dictionary(prototypes: Tensor, proportions: Tensor, class_names: Sequence[str]) -> Figure:
    """Draw a confounder dictionary: prototypes by classes, and the proportions beside.

    Args:
        prototypes: ``[K, c]``.
        proportions: ``[K]``; the most common prototype is drawn first.
        class_names: Names of the classes.
    """
    from matplotlib.figure import Figure

    order = proportions.argsort(descending=True, stable=True)
    values, shares = prototypes[order].numpy(), shares_of(proportions)[order].numpy()
    count, classes = values.shape
    height = min(10.0, max(2.6, 0.22 * count + 1.2))
    figure = Figure(figsize=(8.0, height), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
    limit = float(np.abs(values).max()) or 1.0
    picture = left.imshow(values, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit)
    left.set_ylabel("prototype, the most common first")
    left.set_yticks([])
    if classes <= NAMED_CLASSES:
        left.set_xticks(range(classes), class_names, rotation=30, ha="right", fontsize=8)
    else:
        left.set_xlabel("class")
    right.barh(range(count), 100 * shares, color=COLORS["KDCI"])
    right.set_xlabel("proportion (%)")
    figure.colorbar(picture, ax=left, label="teacher's logit", location="left", shrink=0.8)
    return figure


def panels_of(
    count: int, *, share: bool = False, height: float = PANEL[1]
) -> tuple[Figure, list[Axes]]:
    """Return a figure of panels, two in a row."""
    from matplotlib.figure import Figure

    columns = min(count, 2)
    rows = -(-count // columns)
    figure = Figure(figsize=(PANEL[0] * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share).flatten()
    for unused in axes[count:]:
        unused.axis("off")
    for used in axes[:count]:
        used.tick_params(labelsize=8)
        used.grid(alpha=0.25)
    return figure, list(axes[:count])
