# SPDX-License-Identifier: Apache-2.0
"""What a run shows and leaves behind: its folder, metrics, progress and pictures."""

from __future__ import annotations

import csv
import io
import json
import resource
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from python_models.checkpoint import remove_temporaries, write_atomically
from python_models.distributed import ALONE, World
from python_models.errors import DivergenceError, UserError

METRICS = {
    "epoch": "number of the epoch, from 1",
    "step": "student steps made",
    "lr": "learning rate of the student in the epoch's last step",
    "accuracy": "of the student on the test images, without compensation, in percent",
    "accuracy_compensated": "the same with KDCI's compensation; a diagnostic",
    "dictionary_entropy": "of the confounder dictionary's proportions, in nats: at most log K",
    "compensation_ratio": "mean |F| / mean |S|: KDCI's compensation by the student's logits, on "
    "the epoch's last batch",
    "attention_prototypes": "exp of the mean entropy of its attention: K where all prototypes are "
    "attended to alike, 1 where each image attends to one",
    "compensation_shift": "mean KL(softmax(S) || softmax(S + F)), in nats, likewise",
    "class_entropy": "of the teacher's predictions on the epoch's images, in nats: log of the "
    "number of classes where all are equally common, 0 where one is all",
    "class_min": "share of the rarest class among these predictions, in [0, 1]",
    "class_max": "share of the most frequent class among them",
    "image_diversity": "root mean square distance, per pixel, of the last generator phase's images "
    "from each other: 0 where all are the same, 0.41 for uniform noise",
    "images_per_second": "images in student steps, by all the time of the run",
    "peak_memory_mb": "largest memory until then, in 10^6 bytes: on a GPU what PyTorch handed out, "
    "on a CPU of the whole process",
    "seconds": "time of the run",
}
"""Columns of a distillation's metrics.csv; all others are loss terms, averaged over the epoch."""


class RunFolder:
    """The files of a run.

    Args:
        path: The folder; made if it is not there.
        resume: Go on with the run in it.
        overwrite: Remove the run in it; files that no run wrote stay.

    Raises:
        UserError: If it holds a run and neither is asked for, or none and ``resume`` is.
    """

    OWN = (
        "metrics.csv",
        "summary.json",
        "checkpoints",
        "images.png",
        "class_proportions.png",
        "skipped.txt",
        "student.safetensors",
        "teacher.safetensors",
        "tensorboard",
        # Last, so that nothing of a run is left where it is gone.
        "config.yaml",
    )

    def __init__(self, path: Path, *, resume: bool, overwrite: bool) -> None:
        self.path = path
        if path.exists() and not path.is_dir():
            raise UserError(f"out_dir={path} is a file: give a folder")
        holds_run = self.config.exists()
        if resume and not holds_run:
            raise UserError(f"out_dir={path} holds no run to resume: leave --resume out")
        if holds_run and not resume and not overwrite:
            raise UserError(
                f"out_dir={path} already holds a run: go on with --resume, replace it with "
                "--overwrite, or give another --out-dir"
            )
        if overwrite:
            for name in self.OWN:
                found = path / name
                if found.is_dir():
                    shutil.rmtree(found)
                else:
                    found.unlink(missing_ok=True)
        if holds_run:
            for file in (*(path / name for name in self.OWN), self.checkpoint):
                remove_temporaries(file)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make out_dir={path}: {error.strerror}") from error

    @classmethod
    def at(cls, path: Path) -> RunFolder:
        """Return the files of a folder as it is, whether or not there is a run in it."""
        folder = cls.__new__(cls)
        folder.path = path
        return folder

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One line per epoch."""
        return self.path / "metrics.csv"

    @property
    def summary(self) -> Path:
        """The results."""
        return self.path / "summary.json"

    @property
    def checkpoint(self) -> Path:
        """The state to resume from."""
        return self.path / "checkpoints" / "last.pt"

    @property
    def images(self) -> Path:
        """Picture of the images that the student learns from."""
        return self.path / "images.png"

    @property
    def class_proportions(self) -> Path:
        """Picture of how often the teacher sees each class in them."""
        return self.path / "class_proportions.png"

    @property
    def tensorboard(self) -> Path:
        """Folder of the same metrics for TensorBoard, where it was asked for."""
        return self.path / "tensorboard"

    @property
    def skipped(self) -> Path:
        """The image files that could not be used, if there are any."""
        return self.path / "skipped.txt"

    def weights(self, role: str) -> Path:
        """Return the file of the trained network, a ``student`` or ``teacher``."""
        return self.path / f"{role}.safetensors"


def loss_term(name: str) -> str:
    """Return what a loss term of this name is called in errors."""
    return f"the loss term {name!r}"


class LossLog:
    """Averages loss terms over an epoch and stops the run at the first NaN or Inf.

    Each term is looked at in the order of the steps, so that the one named is where it began. On a
    GPU the values are read in batches, since reading each would wait for the device; the error
    still names the exact step.

    Args:
        device: Where the losses are.
        world: The processes; what is recorded is the mean of theirs.
    """

    def __init__(self, device: torch.device, world: World = ALONE) -> None:
        self._world = world
        self._interval = 1 if device.type == "cpu" else 20
        # Where, what, its value, and the term's name where it counts in the averages.
        self._pending: list[tuple[str, str, Tensor, str | None]] = []
        self._calls = 0
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.last: dict[str, float] = {}

    def add(self, step: int, losses: Mapping[str, Tensor]) -> None:
        """Record the terms of one step.

        Raises:
            DivergenceError: If a recorded term is NaN or infinite.
        """
        self._append(
            (f"step {step}", loss_term(name), value, name) for name, value in losses.items()
        )

    def watch(self, where: str, values: Mapping[str, Tensor]) -> None:
        """Look whether scalars are finite, without recording them.

        Args:
            where: Names the place, for the error.
            values: Scalars by what they are, for the error; for example `loss_term`.

        Raises:
            DivergenceError: If a watched or recorded value is NaN or infinite.
        """
        self._append((where, what, value, None) for what, value in values.items())

    def _append(self, entries: Iterable[tuple[str, str, Tensor, str | None]]) -> None:
        self._pending += [
            (where, what, value.detach(), name) for where, what, value, name in entries
        ]
        self._calls += 1
        if self._calls % self._interval == 0:
            self.flush()

    def flush(self) -> None:
        """Read the recorded terms.

        Raises:
            DivergenceError: If one is NaN or infinite.
        """
        if not self._pending:
            return
        stacked = torch.stack([value.double() for _, _, value, _ in self._pending])
        values = self._world.mean(stacked).tolist()
        for (where, what, _, name), value in zip(self._pending, values, strict=True):
            if value != value or value in (float("inf"), float("-inf")):
                raise DivergenceError(f"{what} became {value} at {where}")
            if name is None:
                continue
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
            self.last[name] = value
        self._pending.clear()

    def averages(self) -> dict[str, float]:
        """Return the averages since the last `reset`."""
        self.flush()
        return {name: self.sums[name] / self.counts[name] for name in self.sums}

    def reset(self) -> None:
        """Begin a new epoch."""
        self.sums, self.counts = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Return the sums."""
        self.flush()
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the sums."""
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])


def write_metrics(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one line per row; a row may lack columns that others have."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    write_atomically(path, lambda temporary: temporary.write_text(buffer.getvalue()))


def write_summary(path: Path, values: Mapping[str, Any]) -> None:
    """Write a run's results as JSON."""
    text = json.dumps(dict(values), indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def peak_memory_mb(device: torch.device) -> float:
    """Return the most memory that was used until now, in MB (10^6 bytes).

    On a GPU it is what PyTorch's allocator handed out since ``reset_peak_memory_stats``; on a CPU
    the resident set of the whole process, Python and its libraries included, which cannot be reset:
    of several runs in one process the later ones report at least the earlier ones' peak.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts KiB, macOS bytes.
    return size * (1 if sys.platform == "darwin" else 1024) / 1e6


class Progress:
    """Progress bar with ETA on a terminal, a line per epoch elsewhere.

    Args:
        title: What is running.
        total: Number of steps.
        done: Steps made before.
        is_shown: Whether to show anything: of several processes one does.
    """

    def __init__(self, title: str, total: int, done: int = 0, *, is_shown: bool = True) -> None:
        self._is_shown = is_shown
        self._title = title
        self._total = total
        self._done = done
        self._first = done
        self._begin = time.monotonic()
        self._fields: dict[str, str] = {}
        self._bar: Any = None
        if is_shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=done, desc=title, unit="step", dynamic_ncols=True, leave=False
            )

    def step(self, losses: Mapping[str, float]) -> None:
        """Count one step and show the last loss terms."""
        self._done += 1
        if self._bar is not None:
            self._fields.update({name: f"{value:.3g}" for name, value in losses.items()})
            self._bar.set_postfix(self._fields, refresh=False)
            self._bar.update()

    def epoch(self, text: str, fields: Mapping[str, str]) -> None:
        """Report the end of an epoch.

        Args:
            text: The whole report, printed where there is no bar.
            fields: Its short form, kept beside the bar.
        """
        if self._bar is not None:
            self._fields.update(fields)
            return
        if not self._is_shown:
            return
        made = self._done - self._first
        spent = time.monotonic() - self._begin
        left = spent / made * (self._total - self._done) if made else 0.0
        print(f"{self._title}: {text}, {duration(left)} left", flush=True)

    def note(self, text: str) -> None:
        """Print a line without disturbing the bar."""
        if self._bar is not None:
            self._bar.write(text)
        elif self._is_shown:
            print(text, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """Return seconds as ``1 h 02 min``, ``3 min 20 s`` or ``12 s``."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def picture_of_images(path: Path, images: Tensor, columns: int = 8) -> None:
    """Save images ``[n, c, h, w]`` in [0, 1] as one grid, enlarged by whole pixels."""
    from matplotlib.image import imsave

    grid = image_grid(images, columns)
    factor = max(1, 640 // grid.shape[1])
    grid = grid.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    write_atomically(path, lambda temporary: imsave(temporary, grid.numpy(), format="png"))


def image_grid(images: Tensor, columns: int) -> Tensor:
    """Return images ``[n, c, h, w]`` in [0, 1] as one, ``[height, width, 3]``, with white gaps."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    grid = torch.ones(rows * (height + 2) + 2, columns * (width + 2) + 2, 3)
    pixels = images.detach().float().cpu().clamp(0, 1)
    if channels < 3:
        pixels = pixels[:, :1].expand(-1, 3, -1, -1)
    for index, image in enumerate(pixels):
        top = 2 + index // columns * (height + 2)
        left = 2 + index % columns * (width + 2)
        grid[top : top + height, left : left + width] = image[:3].permute(1, 2, 0)
    return grid


def picture_of_proportions(
    path: Path, counts: Tensor, class_names: Sequence[str] | None = None
) -> None:
    """Save a bar chart of how often the teacher predicted each class."""
    from matplotlib.figure import Figure

    shares = 100.0 * counts.double().cpu() / counts.sum().clamp(min=1).cpu()
    classes = len(shares)
    figure = Figure(figsize=(max(5.0, min(14.0, 0.3 * classes + 2)), 3.2), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(classes), shares.tolist(), width=0.8, color="tab:blue")
    axes.axhline(100 / classes, color="black", linewidth=0.8, linestyle="--", label="even")
    axes.set_ylabel("images (%)")
    axes.set_title("Classes the teacher sees in the training images")
    if class_names is not None and classes <= 20:
        axes.set_xticks(range(classes), class_names, rotation=45, ha="right")
    else:
        axes.set_xlabel("class")
    axes.legend()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
