# SPDX-License-Identifier: Apache-2.0
"""Keeps what a study found: copies its tables and plots from the run folder to the result files."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

from benchmarks.harness import RESULTS, processor
from python_models.processes import cores

CSVS = {"results": "", "health": "-health", "timings": "-timings"}
"""What each of a study's CSV files adds to its name among the results."""


def save_study(folder: Path, results: Path = RESULTS) -> Path:
    """Copy a study's tables and plots.

    Args:
        folder: Of a study, as ``kdci study`` leaves it.
        results: Where to.

    Returns:
        The page that shows all of it.

    Raises:
        FileNotFoundError: If there is no study's table in the folder.
        ValueError: If nothing is done in it, or runs are not of a clone at a commit.
    """
    table = folder / "table.md"
    if not table.is_file():
        raise FileNotFoundError(
            f"folder={folder} holds no table.md: give the folder of a study that kdci study has run"
        )
    with (folder / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"folder={folder} holds no run that is done")
    commits = sorted({row["commit"] for row in rows})
    if "" in commits:
        raise ValueError(
            f"folder={folder} holds runs of unknown code: make them in a clone, by "
            "`python -m python_models study`"
        )
    stem = f"study-{rows[0]['study']}"
    for old in [*results.glob(f"{stem}.*"), *results.glob(f"{stem}-*")]:
        old.unlink()
    for name, suffix in CSVS.items():
        shutil.copyfile(folder / f"{name}.csv", results / f"{stem}{suffix}.csv")
    parts = [
        table.read_text(encoding="utf-8"),
        f"Made at commit {', '.join(commits)} on {cores()} cores, {processor()}, by\n",
        f"```bash\nkdci study {rows[0]['study']}\n```\n",
        "Times are those of runs beside each other and beside whatever else the machine did.",
    ]
    for plot in sorted(folder.glob("*.png")):
        shutil.copyfile(plot, results / f"{stem}-{plot.name}")
        parts.append(f"\n![{plot.stem}]({stem}-{plot.name})")
    page = results / f"{stem}.md"
    page.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return page
