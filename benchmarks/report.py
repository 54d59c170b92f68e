# SPDX-License-Identifier: Apache-2.0
"""The README's tables and the plot, from result files."""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import compensation, dictionary
from benchmarks.harness import RESULTS, load

if TYPE_CHECKING:
    from benchmarks import step

README_FILES = {
    "dictionary": "dictionary-1-thread",
    "compensation": "compensation-1-thread",
    "step": "step-1-thread",
    "study": "study-mini",
}


def fill_readme(text: str, results: Path = RESULTS) -> str:
    """Return a README whose tables, between ``<!-- bench:NAME -->`` markers, are the saved ones.

    Raises:
        ValueError: If a marker is missing.
        FileNotFoundError: If a result file is missing.
    """
    tables: dict[str, Callable[[Path], str]] = {
        "dictionary": _dictionary_table,
        "compensation": _compensation_table,
        "step": _step_table,
        "study": _study_table,
    }
    for name, table in tables.items():
        begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.S)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"README.md must hold {begin} and {end} once, around the table")
        filled = f"{begin}\n{table(results / f'{README_FILES[name]}.csv')}\n{end}"
        text = pattern.sub(lambda _, filled=filled: filled, text)
    return text


def _dictionary_table(path: Path) -> str:
    about, rows = load(path, dictionary.Row)
    return dictionary_table(about, rows)


def _compensation_table(path: Path) -> str:
    about, rows = load(path, compensation.Row)
    return compensation_table(about, rows)


def _step_table(path: Path) -> str:
    from benchmarks import step  # needs python_models, which the other benchmarks do not

    about, rows = load(path, step.Row)
    return step_table(about, rows)


def _study_table(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return study_table(list(csv.DictReader(file)))


def study_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return a study of two variants in Markdown, an entry a line.

    Args:
        rows: Those of its results.csv, of the first variant the baseline.
    """
    from python_models.study.table import paired_difference

    baseline, other = dict.fromkeys(row["variant"] for row in rows)
    found = {(r["entry"], r["variant"], r["seed"]): float(r["accuracy"]) for r in rows}
    lines = [
        f"| method | seeds | {baseline} (%) | {other} minus {baseline} | 95 % interval "
        "| better / worse |",
        "|---|---|---|---|---|---|",
    ]
    for entry in dict.fromkeys(row["entry"] for row in rows):
        of_other = [row["seed"] for row in rows if (row["entry"], row["variant"]) == (entry, other)]
        seeds = [seed for seed in of_other if (entry, baseline, seed) in found]
        alone = [found[entry, baseline, seed] for seed in seeds]
        paired = paired_difference(
            [found[entry, other, seed] - found[entry, baseline, seed] for seed in seeds]
        )
        width = paired.half_width
        interval = (
            "-" if width is None else f"{paired.mean - width:+.2f} to {paired.mean + width:+.2f}"
        )
        spread = f" ± {statistics.stdev(alone):.2f}" if len(alone) > 1 else ""
        lines.append(
            f"| {entry} | {len(seeds)} | {statistics.fmean(alone):.2f}{spread} "
            f"| {paired.mean:+.2f} | {interval} | {paired.better} / {paired.worse} |"
        )
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    teacher = float(rows[0]["teacher_accuracy"])
    lines += [
        "",
        f"Accuracy on the test images of {rows[0]['dataset']}, of the last step; teacher "
        f"{teacher:.2f} %. Differences in percentage points over pairs that share all but KDCI, "
        f"their mean with Student's interval. Commit {commits}.",
    ]
    return "\n".join(lines)


def dictionary_table(about: Mapping[str, str], rows: Sequence[dictionary.Row]) -> str:
    """Return the table of the dictionary in Markdown, a shape a line, and where it is from."""
    lines = [
        "| n x d, K, q | this library | fastest peer | its time | scikit-learn "
        "| inertia, ours by fastest's | time / floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for label in dict.fromkeys(row.shape for row in rows):
        here = [row for row in rows if row.shape == label]
        native = next(row for row in here if row.peer == "native")
        best = dictionary.find_best(here)
        sklearn = next((r for r in here if r.peer == "scikit-learn" and r.rounds > 0), None)
        cells = [f"{native.n:,} x {native.d:,}, {native.k}, {native.q}", _ms(native.median_ms)]
        if best is None:
            cells += ["none ran", "", "", ""]
        else:
            cells += [best.peer, f"{_ms(best.median_ms)}, x{best.x_native:.2f}"]
            cells.append(
                f"{_ms(sklearn.median_ms)}, x{sklearn.x_native:.2f}" if sklearn else "not run"
            )
            cells.append(f"{native.inertia / best.inertia - 1:+.2%}")
        cells.append(f"{native.x_floor:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _source(about)])


def compensation_table(about: Mapping[str, str], rows: Sequence[compensation.Row]) -> str:
    """Return the table of compensation in Markdown, a shape and pass a line.

    Memory is that of the process beyond the inputs, ours and that of the faster eager form.
    """
    lines = [
        "| B x d, K, H | pass | this library | eager, the faster of two | torch.compile "
        "| error, ours and eager's | MiB, ours and eager's | floor / time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, name in dict.fromkeys((row.shape, row.step) for row in rows):
        here = [row for row in rows if (row.shape, row.step) == (label, name)]
        native = next(row for row in here if row.contender == compensation.NATIVE)
        eager = compensation.find_best(here, compensation.EAGER)
        compiled = compensation.find_best(here, [compensation.COMPILED])
        batch, d, k, hidden = label.split("x")
        errors = [
            row.output_error if name == "forward" else row.gradient_error
            for row in (native, eager)
            if row is not None
        ]
        memories = [row.memory_mib for row in (native, eager) if row is not None]
        cells = [
            f"{batch} x {d}, {k}, {hidden}",
            name,
            _ms(native.median_ms),
            *(
                f"{_ms(row.median_ms)}, x{row.x_native:.1f}" if row else "not run"
                for row in (eager, compiled)
            ),
            ", ".join(f"{value:.1g}" for value in errors),
            ", ".join(f"{value:.3g}" for value in memories),
            f"{native.floor_share:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _source(about)])


def step_table(about: Mapping[str, str], rows: Sequence[step.Row]) -> str:
    """Return the table of KDCI's share of training steps in Markdown."""
    lines = [
        "| step of | batch, classes, K | without KDCI | KDCI's loss | dictionary | share | "
        "in every step | with - without | memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"{row.name} ({row.kind})",
            f"{row.batch}, {row.classes}, {row.prototypes}",
            _ms(row.without_ms),
            _ms(row.loss_ms),
            _ms(row.dictionary_ms),
            f"{row.share:.2%}",
            f"{row.every_step_share:.2%}",
            f"{row.difference_ms / row.without_ms:+.1%} ± "
            f"{row.difference_spread_ms / row.without_ms:.1%}",
            f"{row.memory_share:+.2%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _source(about)])


def _source(about: Mapping[str, str]) -> str:
    names = ("machine", "build", "commit", "date", "peak", "options")
    named = [f"{name} {about[name]}" if name in ("commit", "peak") else about[name]
             for name in names if name in about]  # fmt: skip
    return f"{'; '.join(named)}."


def _ms(value: float) -> str:
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"


def plot_dictionary(about: Mapping[str, str], rows: Sequence[dictionary.Row], path: Path) -> Path:
    """Draw the ratios peer / native, a panel a shape, bars on a log axis; the same bytes each time.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    labels = list(dict.fromkeys(row.shape for row in rows))
    columns = min(2, len(labels))
    lines = -(-len(labels) // columns)
    peers = [peer for peer in dict.fromkeys(row.peer for row in rows) if peer != "native"]
    # Text as text, and ids that do not change from run to run.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kdci", "font.size": 9}):
        figure, axes = plt.subplots(
            *(lines, columns),
            figsize=(5 * columns, lines * (0.9 + 0.24 * len(peers))),
            sharex=True,
            squeeze=False,
        )
        for axis in axes.flat[len(labels) :]:
            axis.set_visible(False)
        for label, axis in zip(labels, axes.flat, strict=False):
            here = {row.peer: row for row in rows if row.shape == label}
            native = here["native"]
            for height, name in enumerate(peers):
                row = here.get(name)
                if row is None or row.rounds == 0:
                    note = "absent" if row is None else row.note.split(":")[0]
                    axis.text(1.03, height, note, va="center", color="0.5", fontsize=7.5)
                    continue
                ratio = row.x_native
                axis.barh(height, ratio - 1, left=1, color="C0" if ratio >= 1 else "C3")
                axis.text(max(ratio, 1) * 1.04, height, f"{ratio:.3g}", va="center", fontsize=7.5)
            axis.set_yticks(range(len(peers)), peers)
            axis.set_ylim(len(peers) - 0.5, -0.5)
            axis.set_xscale("log")
            axis.axvline(1, color="0.2", linewidth=0.8)
            title = f"n={native.n:,} d={native.d:,} K={native.k} q={native.q}: "
            axis.set_title(title + _ms(native.median_ms), fontsize=9, loc="left")
            axis.spines[["top", "right"]].set_visible(False)
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
        ratios = [row.x_native for row in rows if row.rounds > 0]
        axes[0, 0].set_xlim(min(0.5, *ratios) * 0.8, max(ratios) * 1.8)
        figure.suptitle(
            f"Confounder dictionary: time of others by ours ({about['clock']})\n{about['machine']}",
            fontsize=9,
        )
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return path
