# SPDX-License-Identifier: Apache-2.0
"""Measures competitors side by side and writes down where and on what.

Each round times every contender once, in turn, so that a machine whose speed drifts slows all of
them alike; the figure of a contender is its median over the rounds, and the spread is kept beside
it. Times are of the process's CPU clock on one thread, and of the wall clock on several: there
threads that wait burn CPU time.
"""

from __future__ import annotations

import csv
import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

import kdci_ext

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """A line of a result file; times in milliseconds."""

    benchmark: str
    shape: str
    contender: str
    threads: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int
    slower_than_native: float
    quality: float


@dataclass(frozen=True)
class Contender:
    """Something to time; ``quality`` is what it reached (such as inertia), NaN where none."""

    name: str
    run: Callable[[], object]
    quality: float = float("nan")


def measure(
    benchmark: str, shape: str, contenders: Sequence[Contender], *, seconds: float = 2.0
) -> list[Row]:
    """Time the contenders in turn until each has had ``seconds``, or 200 rounds.

    The contender named "native" is what the others are compared with. A sample is the mean over
    so many calls that it lasts about 2 ms, since clocks tick.
    """
    threads = torch.get_num_threads()
    clock = time.process_time if threads == 1 else time.perf_counter
    calls: dict[str, int] = {}
    for contender in contenders:
        contender.run()
        start = time.perf_counter()
        contender.run()
        calls[contender.name] = max(1, round(2e-3 / (time.perf_counter() - start)))
    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    gc.collect()
    gc.disable()
    try:
        began = time.perf_counter()
        rounds = 0
        while rounds < 5 or (
            rounds < 200 and time.perf_counter() - began < seconds * len(contenders)
        ):
            for contender in contenders:
                count = calls[contender.name]
                start = clock()
                for _ in range(count):
                    contender.run()
                samples[contender.name].append((clock() - start) / count * 1e3)
            rounds += 1
    finally:
        gc.enable()
    native = statistics.median(samples["native"])
    rows = []
    for contender in contenders:
        ordered = sorted(samples[contender.name])
        median = statistics.median(ordered)
        rows.append(
            Row(
                *(benchmark, shape, contender.name, threads, median),
                *(ordered[rounds // 5], ordered[rounds * 4 // 5], rounds),
                *(median / native, contender.quality),
            )
        )
    return rows


def machine() -> str:
    """Describe the machine, the versions and the commit in one line."""
    processor = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    root = Path(__file__).parent.parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True
    ).stdout.strip()
    info = kdci_ext.build_info()
    return (
        f"{processor}, {torch.get_num_threads()} of {torch.multiprocessing.cpu_count()} cores, "
        f"simd {info['simd']}, {info['compiler']}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, kdci_ext {info['version']} at {commit or 'no commit'}"
    )


def report(rows: Sequence[Row]) -> None:
    """Print the rows as a table."""
    print(f"{'benchmark':20} {'shape':22} {'contender':28} {'median ms':>10} {'p20-p80':>17} "
          f"{'x native':>9} {'quality':>10}")  # fmt: skip
    for row in rows:
        spread = f"{row.p20_ms:.4g}-{row.p80_ms:.4g}"
        quality = "" if row.quality != row.quality else f"{row.quality:.6g}"
        print(f"{row.benchmark:20} {row.shape:22} {row.contender:28} {row.median_ms:10.4g} "
              f"{spread:>17} {row.slower_than_native:9.1f} {quality:>10}")  # fmt: skip


def save(name: str, rows: Sequence[Row], folder: Path = RESULTS) -> Path:
    """Write the rows to ``folder/name.csv`` under a comment that says where they are from."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.csv"
    with path.open("w", newline="") as file:
        file.write(f"# {machine()}\n")
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            )
    return path
