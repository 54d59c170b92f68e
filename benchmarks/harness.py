# SPDX-License-Identifier: Apache-2.0
"""Measures contenders side by side and writes down where and on what.

Each round times every contender once, in turn, so that a machine whose speed drifts slows all of
them alike. The figure of a contender is the median over its rounds; the spread is kept beside it.
Times are of the process's CPU clock on one thread, and of the wall clock on several (there, threads
that wait burn CPU time) and on a GPU.

Calls that last less than ``SLOW_S`` are timed as they are in a loop. After another contender's turn
caches, branch predictors and the allocator's free memory are that one's, for which the first calls
pay: before each sample come calls that are not timed, for ``LEAD_S``, and what a call returned is
freed before the next one. All contenders alike.

Beside every sample runs a check: a short burst of float32 matrix products, whose rate is bound by
the multipliers alone. A sample whose check, before or after it, falls more than ``TOLERANCE`` below
the best rate seen was disturbed: it is dropped and repeated. The CPU clock does not see that
another process took the core for a while, but it does see a lower clock rate and a cache or memory
that is shared, and so does the check, which is timed by the same clock.
"""

from __future__ import annotations

import csv
import gc
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

import kdci_ext

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"

TOLERANCE = 0.15
"""How far below its best a check may fall."""
MAX_REJECTED = 50
"""Samples of one contender that are dropped and repeated at most; see also :func:`measure`."""
MAX_ROUNDS = 200
SAMPLE_S = 2e-3
"""A sample is the mean over so many calls that it lasts about this long, since clocks tick."""
LEAD_S = 5e-2
"""How long the calls before a sample take that are not timed."""
SLOW_S = 0.3
"""A call that lasts longer needs no warm-up: its first call is its first sample."""

RowT = TypeVar("RowT")


@dataclass(frozen=True)
class Contender:
    """Something to time; ``run`` takes a seed, which changes from round to round."""

    name: str
    run: Callable[[int], object]


@dataclass(frozen=True)
class Timing:
    """What the samples of a contender come to.

    Attributes:
        median_ms: Median, and the 20th and 80th percentile in ``p20_ms`` and ``p80_ms``.
        rounds: Samples that count.
        rejected: Samples dropped because their check failed.
        noisy: Samples that count though their check failed: no more could be repeated.
        cores: CPU time by wall time, which shows whether the contender kept to its threads.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int
    rejected: int
    noisy: int
    cores: float


@dataclass
class Timer:
    """The clocks and the check that a measurement uses.

    Attributes:
        clock: Seconds, of the kind that is reported.
        check: Makes one burst and returns its rate.
        wall: Seconds of the wall clock, which limits are kept by.
        cpu: Seconds of the process's CPU clock.
    """

    clock: Callable[[], float]
    check: Callable[[], float]
    wall: Callable[[], float] = time.perf_counter
    cpu: Callable[[], float] = time.process_time
    best: float = 0.0

    def burst(self) -> float:
        """Run the check and remember its best rate."""
        rate = self.check()
        self.best = max(self.best, rate)
        return rate

    def quiet(self, rate: float) -> bool:
        """Whether a check's rate says that nothing disturbed it."""
        return rate >= (1 - TOLERANCE) * self.best


def _clock(threads: int, device: str) -> Callable[[], float]:
    """Return the clock that is reported, see the module."""

    def synchronized() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    if device != "cpu":
        return synchronized
    return time.process_time if threads == 1 else time.perf_counter


def make_timer(threads: int, device: str = "cpu") -> Timer:
    """Return the timer for a number of threads, its check's best rate already known."""
    size = 384
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    out = torch.empty_like(a)
    repeats = 2 * threads if device == "cpu" else 50

    clock = _clock(threads, device)

    def check() -> float:
        torch.mm(a, b, out=out)  # brings back to the caches what the sample before drove out
        start = clock()
        for _ in range(repeats):
            torch.mm(a, b, out=out)
        return repeats * 2e-9 * size**3 / (clock() - start)

    timer = Timer(clock, check)
    for _ in range(100):
        timer.burst()
    return timer


@dataclass
class _Record:
    """The samples of a contender so far; a sample is (milliseconds, rate of its worse check).

    A sample is the mean of ``calls`` calls, after ``lead`` that are not timed.
    """

    calls: int = 1
    lead: int = 0
    samples: list[tuple[float, float]] = field(default_factory=list)
    rejected: int = 0
    spent: float = 0.0
    wasted: float = 0.0
    cpu: float = 0.0


def measure(
    contenders: Sequence[Contender],
    timer: Timer,
    *,
    seconds: float,
    min_rounds: int = 5,
    seeds: int = 5,
    limit_s: float = math.inf,
    collect: Callable[[str, int, object], None] | None = None,
) -> dict[str, Timing]:
    """Time the contenders in turn.

    Args:
        contenders: What to time.
        timer: Clocks and check.
        seconds: Rounds are made until this time has passed, ``MAX_ROUNDS`` at most. Dropped samples
            may take as long again for each contender, or as long as ``min_rounds`` samples.
        min_rounds: Rounds at least, whatever time they take.
        seeds: Round r runs with seed r % seeds.
        limit_s: A contender that has taken this long in all makes no more samples.
        collect: Called with name, seed and result after each sample, outside of the clock.

    Returns:
        The timing of each contender by its name.
    """
    records = {contender.name: _Record() for contender in contenders}
    # Checks between two samples serve both: the one after the first is the one before the second.
    last_check = [timer.burst()]

    def sample(contender: Contender, seed: int) -> float:
        """Take a sample, keep it if its check allows, and return the wall time of a call."""
        record = records[contender.name]
        before, result = last_check[0], None
        for _ in range(record.lead):
            contender.run(seed)
        wall, cpu, start = timer.wall(), timer.cpu(), timer.clock()
        for _ in range(record.calls):
            result = None  # what a loop frees before it makes it anew
            result = contender.run(seed)
        taken = timer.clock() - start
        cpu, wall = timer.cpu() - cpu, timer.wall() - wall
        record.spent += wall
        record.cpu += cpu
        last_check[0] = timer.burst()
        rate = min(before, last_check[0])
        if collect is not None:
            began = timer.wall()
            collect(contender.name, seed, result)
            if timer.wall() - began > SAMPLE_S:
                last_check[0] = timer.burst()
        may_repeat = (
            record.rejected < MAX_REJECTED
            and record.wasted + wall <= max(seconds, min_rounds * wall)
            and record.spent + wall <= limit_s
        )
        if timer.quiet(rate) or not may_repeat:
            record.samples.append((taken / record.calls * 1e3, rate))
        else:
            record.rejected += 1
            record.wasted += wall
        return wall / record.calls

    gc.collect()
    gc.disable()
    try:
        for contender in contenders:
            if sample(contender, 0) < SLOW_S:
                began = timer.wall()
                while timer.wall() - began < SAMPLE_S:
                    wall = timer.wall()
                    contender.run(0)
                    wall = timer.wall() - wall
                calls, lead = (
                    max(1, round(duration / max(wall, 1e-9))) for duration in (SAMPLE_S, LEAD_S)
                )
                records[contender.name] = _Record(calls, lead)
        began, rounds = timer.wall(), 0
        while rounds < min_rounds or (rounds < MAX_ROUNDS and timer.wall() - began < seconds):
            for contender in contenders:
                record = records[contender.name]
                while len(record.samples) <= rounds:
                    if record.samples and record.spent >= limit_s:
                        break
                    sample(contender, rounds % seeds)
            rounds += 1
    finally:
        gc.enable()
    return {name: _summarize(record, timer, min_rounds) for name, record in records.items()}


def _summarize(record: _Record, timer: Timer, min_rounds: int) -> Timing:
    # By the best rate of the whole run, which the first samples were not judged by.
    quiet = [ms for ms, rate in record.samples if timer.quiet(rate)]
    failed = len(record.samples) - len(quiet)
    if len(quiet) >= min(min_rounds, len(record.samples)):
        kept, rejected, noisy = quiet, record.rejected + failed, 0
    else:
        kept, rejected, noisy = [ms for ms, _ in record.samples], record.rejected, failed
    kept.sort()
    return Timing(
        *(statistics.median(kept), kept[len(kept) // 5], kept[len(kept) * 4 // 5]),
        *(len(kept), rejected, noisy, record.cpu / max(record.spent, 1e-9)),
    )


def fma_peak(threads: int, device: str = "cpu") -> tuple[float, str]:
    """Measure the rate of float32 multiply-adds.

    Returns:
        GFLOP/s of one thread times the threads (or of the GPU), and what measured it: the native
        library's probe where it has one, else the fastest of torch's matrix products, which on
        processors that its BLAS has no kernels for is far below what they can do.
    """
    native = getattr(kdci_ext._load._C, "fma_gflops", None)
    if native is not None and device == "cpu":
        return max(native() for _ in range(5)) * threads, "native probe"
    best, clock, before = 0.0, _clock(1, device), torch.get_num_threads()
    torch.set_num_threads(1)
    for size in (256, 512, 1024) if device == "cpu" else (4096, 8192):
        a = torch.randn(size, size, device=device)
        for _ in range(max(4, int(2e9 / size**3))):
            start = clock()
            a @ a
            best = max(best, 2e-9 * size**3 / (clock() - start))
    torch.set_num_threads(before)
    return best * (threads if device == "cpu" else 1), "torch.mm"


def processor() -> str:
    """Return the processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def header(threads: int, packages: Sequence[str], **more: object) -> dict[str, str]:
    """Describe the machine, the versions, the commit and the day; nothing that names a host."""
    # Result files and the README are what a benchmark writes: they do not make a commit dirty.
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results",
                   ":!README.md")  # fmt: skip
    commit = _git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    info = kdci_ext.build_info()
    versions = [f"kdci_ext {info['version']}", f"torch {torch.__version__}"]
    for package in packages:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{package} absent")
    return {
        "machine": f"{processor()}, {threads} of {torch.multiprocessing.cpu_count()} cores",
        "build": f"simd {info['simd']}, {info['compiler']}, Python {platform.python_version()}",
        "versions": ", ".join(versions),
        "cuda": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else "no GPU: the CUDA kernels were not run",
        "commit": commit or "none",
        "threads": str(threads),
        "date": date.today().isoformat(),
        **{name: str(value) for name, value in more.items()},
    }


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def save(path: Path, about: Mapping[str, str], rows: Sequence[Any]) -> None:
    """Write dataclass rows as CSV below ``# key: value`` lines; NaN is an empty cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in about.items())
        writer = csv.DictWriter(file, [f.name for f in fields(rows[0])], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _cell(value) for name, value in asdict(row).items()})


def _cell(value: object) -> object:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


def load(path: Path, kind: type[RowT]) -> tuple[dict[str, str], list[RowT]]:
    """Read what :func:`save` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If its columns are not those of ``kind``.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    about = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    reader = csv.DictReader(line for line in lines if not line.startswith("# "))
    types = {f.name: f.type for f in fields(kind)}  # type: ignore[arg-type]
    if list(reader.fieldnames or []) != list(types):
        raise ValueError(
            f"{path.name} has the columns {reader.fieldnames}, expected {list(types)}: "
            "was it written by another version?"
        )
    convert = {"float": lambda text: float(text or "nan"), "int": int, "str": str}
    return about, [
        kind(**{name: convert[str(types[name])](text) for name, text in row.items()})
        for row in reader
    ]
