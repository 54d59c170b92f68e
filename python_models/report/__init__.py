# SPDX-License-Identifier: Apache-2.0
"""``kdci report``: a page about distillation runs, that needs no other file and no network.

The parts: `collect` reads run folders and pairs them, `measure` looks at students and images,
`figures` draws, `sections` orders what `recorded` and `measured` say, `page` makes HTML of it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from python_models.checkpoint import write_atomically
from python_models.config import ReportConfig
from python_models.errors import UserError
from python_models.report import figures
from python_models.report.collect import common_task, compare, read_runs
from python_models.report.content import Report
from python_models.report.measure import Measurer, frechet_distance, load_original
from python_models.report.page import GENERATOR, document
from python_models.report.sections import build

__all__ = ["ReportConfig", "ReportResult", "frechet_distance", "report"]

MIN_IMAGES = 2
"""A covariance takes two images."""


@dataclass(frozen=True)
class ReportResult:
    """What a report wrote.

    Attributes:
        page: The HTML file.
        figures: The figures in it, as PNG files.
        left_out: What is not in it, and why.
    """

    page: Path
    figures: tuple[Path, ...]
    left_out: tuple[str, ...]


def report(config: ReportConfig) -> ReportResult:
    """Run ``kdci report``.

    Args:
        config: Which runs, and where the page goes.

    Returns:
        The files, and what could not be shown.

    Raises:
        UserError: If a folder holds no run or a damaged one, if the runs are of different tasks, or
            if the page cannot be written.

    Example:
        >>> report(ReportConfig(runs=(Path("runs/vanilla"), Path("runs/kdci")))).page
        PosixPath('runs/report/report.html')
    """
    if config.images < MIN_IMAGES:
        raise UserError(f"images={config.images} must be >= {MIN_IMAGES}")
    runs, notes = read_runs([Path(path) for path in config.runs])
    task = common_task(runs)
    folder = Path(config.out_dir)
    _require_free(folder)
    original = load_original(task, runs, config)
    measurer = Measurer(original, config)
    # Restoring a run seeds torch's global stream, which is the caller's.
    with torch.random.fork_rng([measurer.device] if measurer.device.type == "cuda" else []):
        findings = {run.name: measurer.measure(run) for run in runs}
    if not original.class_names:
        original = replace(original, class_names=tuple(map(str, range(measurer.num_classes))))
    made = Report(task, compare(runs), original, findings, notes)
    with figures.style():
        lead, sections = build(made)
    page = document(made.title, lead, sections)
    html = folder / "report.html"
    write_atomically(html, functools.partial(Path.write_text, data=page, encoding="utf-8"))
    files = tuple(folder / "figures" / name for name in made.figures)
    for file, png in zip(files, made.figures.values(), strict=True):
        write_atomically(file, functools.partial(Path.write_bytes, data=png))
    for old in set((folder / "figures").glob("*.png")) - set(files):
        old.unlink()
    return ReportResult(html, files, tuple(made.left_out))


def _require_free(folder: Path) -> None:
    """Check that a folder may be written to: it holds nothing that a report would replace.

    Raises:
        UserError: If not.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out_dir={folder} is a file: give a folder")
    page, pictures = folder / "report.html", folder / "figures"
    if page.exists():
        if f'content="{GENERATOR}"' not in page.read_text(encoding="utf-8", errors="replace"):
            raise UserError(f"{page} is not by kdci report: give another --out-dir")
    elif pictures.exists():
        raise UserError(f"{pictures} is there, but not from a report: give another --out-dir")
