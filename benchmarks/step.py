# SPDX-License-Identifier: Apache-2.0
"""KDCI's share of training steps (the paper's Table 2): with and without it, in one run.

Two kinds of lines. A *network's* step is one of a student at batch 256: forward, distillation loss,
backward, SGD; with KDCI the dictionary is rebuilt from the batch in **every** step, which no method
does. A *method's* step is what the training loop makes of it, generator phase included: a whole
round, by its student steps, with the settings of a preset on Fashion-MNIST's shapes.

KDCI's part is told in two ways. The difference of interleaved runs with and without holds all
there is, caches included, but is the small difference of large times: its spread stands beside it.
The parts alone (loss with its gradients and the update of KDCI's weights; dictionary) are exact,
but run in caches that nobody else uses. Shares are theirs:

* ``share``: loss and dictionary, at the method's cadence, once in ``kd_steps`` student steps, by
  the step without KDCI. The step without has a distillation loss as well, which this does not take
  off, as the paper's operators do not.
* ``net_share``: the same less that loss, which KDCI's replaces; below 0 where it is faster.
* ``every_step_share``: with the dictionary rebuilt in every step.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.data import teacher_like_logits
from benchmarks.harness import Contender, Timer, Timing, measure
from benchmarks.memory import allocated_peak
from kdci_ext import KDCI
from python_models.checkpoint import NetworkInfo, export_network
from python_models.config import distill_config
from python_models.engine import Distillation
from python_models.losses import kd_divergence
from python_models.methods import METHODS as KNOWN_METHODS
from python_models.networks import build_network
from python_models.teacher import load_network

BATCH = 256
WANTED = {"wrn16_1": 0.0015}
"""Largest ``share`` that we want on one thread, by network."""


@dataclass(frozen=True)
class Network:
    """A student, its task, and the dictionaries to try: their sizes and whose cadence they have."""

    name: str
    classes: int
    channels: int
    dictionaries: tuple[tuple[int, str], ...]


GENERATED, INVERTED, SAMPLED = (8, "fast"), (32, "deepinversion"), (128, "dfnd")
NETWORKS = (
    Network("lenet5", 10, 1, (GENERATED, INVERTED)),
    Network("wrn16_1", 100, 3, (GENERATED, INVERTED, SAMPLED)),
    Network("resnet18", 100, 3, (GENERATED, INVERTED)),
)


@dataclass(frozen=True)
class MethodRun:
    """A method with a preset's settings; ``quick`` shortens a round where memory is measured."""

    name: str
    preset: str
    values: tuple[tuple[str, Any], ...] = ()
    quick: tuple[tuple[str, Any], ...] = ()


METHODS = (
    MethodRun("fast", "demo-fashion", (("warmup", 0),)),
    MethodRun("deepinversion", "deepinversion-fashion", quick=(("g_steps", 3), ("kd_steps", 2))),
    MethodRun("dfnd", "dfnd-fashion", (("unlabelled", "wild.npz"), ("select", 2000))),
)
UNLABELLED = 4000
MethodOrNetwork = TypeVar("MethodOrNetwork", Network, MethodRun)


@dataclass(frozen=True)
class Row:
    """A line of the result file. NaN stands for what is not known; times are in milliseconds.

    Attributes:
        kind: "network" or "method".
        kd_steps: Student steps between two dictionaries; 0: one for the whole run.
        without_ms: A student step without KDCI, with its 20th and 80th percentile.
        with_ms: Likewise with KDCI, see the module.
        rounds: Samples of the one that has fewer; ``rejected`` and ``noisy`` are those of both.
        difference_ms: Of the medians; its spread is the root of the summed squares of the two
            halves of p80 - p20.
        loss_ms: KDCI's loss alone, its gradients and the update of its weights.
        plain_loss_ms: The loss that it replaces, with its gradient.
        dictionary_ms: A dictionary alone.
        memory_without_mib: Most that PyTorch had allocated at once from building the networks to
            the end of a step with the optimiser's state; ``memory_with_mib`` likewise, and
            ``memory_share`` their difference by the former.
    """

    kind: str
    name: str
    batch: int
    classes: int
    prototypes: int
    kd_steps: int
    without_ms: float
    without_p20_ms: float
    without_p80_ms: float
    with_ms: float
    with_p20_ms: float
    with_p80_ms: float
    rounds: int
    rejected: int
    noisy: int
    difference_ms: float
    difference_spread_ms: float
    loss_ms: float
    plain_loss_ms: float
    dictionary_ms: float
    share: float
    net_share: float
    every_step_share: float
    memory_without_mib: float
    memory_with_mib: float
    memory_share: float


def find(names: Sequence[str], known: Sequence[MethodOrNetwork]) -> tuple[MethodOrNetwork, ...]:
    """Return networks or methods by name.

    Raises:
        ValueError: If there is none of a name.
    """
    by_name = {each.name: each for each in known}
    for name in names:
        if name not in by_name:
            raise ValueError(f"unknown name {name!r}: expected some of {', '.join(by_name)}")
    return tuple(by_name[name] for name in names)


# --- the parts alone ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """Times of KDCI's parts alone, and of the loss that it replaces."""

    loss_ms: float
    plain_loss_ms: float
    dictionary_ms: float

    def shares(self, step_ms: float, kd_steps: int) -> tuple[float, float, float]:
        """Return share, net share and every-step share of a step that takes ``step_ms``."""
        amortised = self.dictionary_ms / kd_steps if kd_steps else 0.0
        each = (
            self.loss_ms + amortised,
            self.loss_ms - self.plain_loss_ms + amortised,
            self.loss_ms + self.dictionary_ms,
        )
        return each[0] / step_ms, each[1] / step_ms, each[2] / step_ms


def bench_parts(
    batch: int,
    classes: int,
    prototypes: int,
    rows: int,
    optimizer: str,
    timer: Timer,
    seconds: float,
    min_rounds: int,
) -> Parts:
    """Time KDCI's parts on teacher-like logits, the dictionary from ``rows`` of them."""
    torch.manual_seed(0)
    teacher = teacher_like_logits(batch, classes)
    student = (teacher + torch.randn(batch, classes)).requires_grad_()
    features = teacher_like_logits(rows, classes, seed=1)
    kdci = KDCI(classes, prototypes)
    kdci.update(features)
    updates = make_optimizer(optimizer, list(kdci.parameters()))

    def loss(_: int) -> None:
        student.grad = None
        updates.zero_grad()
        kdci.loss(student, teacher, 4.0).backward()
        updates.step()

    def plain(_: int) -> None:
        student.grad = None
        kd_divergence(student, teacher, 4.0).backward()

    contenders = [
        Contender("loss", loss),
        Contender("plain", plain),
        Contender("dictionary", lambda _: kdci.update(features)),
    ]
    found = measure(contenders, timer, seconds=seconds, min_rounds=min_rounds)
    return Parts(*(found[each.name].median_ms for each in contenders))


def make_optimizer(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimiser of a training loop."""
    if name == "adam":
        return torch.optim.Adam(parameters, lr=1e-3)
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=5e-4)


# --- a network's step -----------------------------------------------------------------------------


class Student:
    """A student in training, with KDCI of ``prototypes`` or, where that is None, without."""

    def __init__(self, network: Network, prototypes: int | None) -> None:
        torch.manual_seed(0)
        self.network = build_network(network.name, network.classes, network.channels).train()
        parameters = list(self.network.parameters())
        self.kdci: KDCI | None = None
        if prototypes is not None:
            self.kdci = KDCI(network.classes, prototypes)
            parameters += self.kdci.parameters()
        self.optimizer = make_optimizer("sgd", parameters)

    def step(self, images: Tensor, teacher_logits: Tensor) -> None:
        """Make a step, with KDCI from a dictionary of its own."""
        logits = self.network(images)
        if self.kdci is None:
            loss = kd_divergence(logits, teacher_logits, 4.0)
        else:
            self.kdci.update(teacher_logits)
            loss = self.kdci.loss(logits, teacher_logits, 4.0)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def bench_network(
    network: Network,
    timer: Timer,
    seconds: float,
    *,
    min_rounds: int = 3,
    batch: int = BATCH,
    size: int = 32,
) -> list[Row]:
    """Measure a student's step without KDCI and with each dictionary, all in turn."""
    torch.manual_seed(1)
    images = torch.randn(batch, network.channels, size, size)
    teacher_logits = teacher_like_logits(batch, network.classes)
    sizes: list[int | None] = [None, *(k for k, _ in network.dictionaries)]

    def contender(prototypes: int | None) -> Contender:
        student = Student(network, prototypes)
        return Contender(str(prototypes), lambda _: student.step(images, teacher_logits))

    timings = measure([contender(k) for k in sizes], timer, seconds=seconds, min_rounds=min_rounds)

    def train(prototypes: int | None) -> None:
        student = Student(network, prototypes)
        few = 2 if prototypes is None else prototypes
        student.step(images[:few], teacher_logits[:few])  # leaves the optimiser's state behind
        student.step(images, teacher_logits)

    memories = {k: allocated_peak(lambda k=k: train(k)) / 2**20 for k in sizes}  # type: ignore[misc]
    rows = []
    for prototypes, method in network.dictionaries:
        parts = bench_parts(
            *(batch, network.classes, prototypes, batch, "sgd", timer, seconds / 4, min_rounds)
        )
        rows.append(
            _row(
                *("network", network.name, batch, network.classes, prototypes),
                _cadence(method),
                timings["None"],
                timings[str(prototypes)],
                1,
                parts,
                *(memories[None], memories[prototypes]),
            )
        )
    return rows


def _cadence(method: str) -> int:
    """Return the student steps between two dictionaries of a method's defaults."""
    if KNOWN_METHODS.get(method).needs_unlabelled:
        return 0
    return distill_config(method=method).training.kd_steps


def _row(
    kind: str,
    name: str,
    batch: int,
    classes: int,
    prototypes: int,
    kd_steps: int,
    without: Timing,
    with_kdci: Timing,
    steps: int,
    parts: Parts,
    memory_without: float,
    memory_with: float,
) -> Row:
    """Return a line; a sample of the timings is ``steps`` student steps."""
    halves = [(timing.p80_ms - timing.p20_ms) / 2 / steps for timing in (without, with_kdci)]
    times = [
        value / steps
        for timing in (without, with_kdci)
        for value in (timing.median_ms, timing.p20_ms, timing.p80_ms)
    ]
    return Row(
        *(kind, name, batch, classes, prototypes, kd_steps),
        *times,
        min(without.rounds, with_kdci.rounds),
        without.rejected + with_kdci.rejected,
        without.noisy + with_kdci.noisy,
        times[3] - times[0],
        math.hypot(*halves),
        *(getattr(parts, each.name) for each in fields(parts)),
        *parts.shares(times[0], kd_steps),
        *(memory_without, memory_with, memory_with / memory_without - 1),
    )


# --- a method's step ------------------------------------------------------------------------------


def write_task(folder: Path) -> dict[str, Any]:
    """Write a teacher and unlabelled images of Fashion-MNIST's shapes; their contents are noise.

    Returns:
        Settings of `distill_config` that name them.
    """
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    np.savez(
        folder / "wild.npz",
        images=random.integers(0, 256, (UNLABELLED, 32, 32), dtype=np.uint8),
        labels=np.zeros(UNLABELLED, dtype=np.int64),
    )
    teacher = folder / "teacher.safetensors"
    info = NetworkInfo("lenet5_bn", 10, (1, 32, 32), (0.5,), (0.5,), "fashion-mnist")
    export_network(teacher, build_network("lenet5_bn", 10, 1), info)
    # So many epochs that the learning rate never ends.
    return {
        "teacher": str(teacher),
        "data_root": folder,
        "device": "cpu",
        "evaluate": False,
        "epochs": 10_000,
    }


def start(task: dict[str, Any], method: MethodRun, **values: Any) -> Distillation:
    """Return a run of a method before its first round."""
    config = distill_config(preset=method.preset, **{**task, **dict(method.values), **values})
    assert config.task.teacher is not None
    run = Distillation(config, load_network(config.task.teacher, None, None), torch.device("cpu"))
    run.prepare()
    return run


def bench_method(
    method: MethodRun, timer: Timer, seconds: float, *, min_rounds: int = 3, **values: Any
) -> list[Row]:
    """Measure a method's rounds with and without KDCI, in turn; ``values`` override settings."""
    with tempfile.TemporaryDirectory() as folder:
        task = {**write_task(Path(folder)), **values}
        runs = {str(kdci): start(task, method, kdci=kdci) for kdci in (False, True)}

        def contender(name: str) -> Contender:
            run = runs[name]

            def finish_round(_: int) -> None:
                for _step in range(run.config.training.kd_steps):
                    run.advance()

            return Contender(name, finish_round)

        timings = measure(
            [contender(name) for name in runs], timer, seconds=seconds, min_rounds=min_rounds
        )

        def train(kdci: bool) -> None:
            run = start(task, method, kdci=kdci, **dict(method.quick))
            for _ in range(2 * run.config.training.kd_steps):  # with the optimisers' states
                run.advance()

        memories = [allocated_peak(lambda kdci=kdci: train(kdci)) / 2**20  # type: ignore[misc]
                    for kdci in (False, True)]  # fmt: skip
        run = runs["True"]
        training = run.config.training
        assert run.kdci is not None
        is_sampling = KNOWN_METHODS.get(method.name).needs_unlabelled
        rows = len(run.method.images) if is_sampling else training.batch_size
        parts = bench_parts(
            *(training.batch_size, run.info.num_classes, run.kdci.num_prototypes, rows),
            *(training.optimizer, timer, seconds / 4, min_rounds),
        )
        return [
            _row(
                *("method", method.name, training.batch_size, run.info.num_classes),
                run.kdci.num_prototypes,
                0 if is_sampling else training.kd_steps,
                timings["False"],
                timings["True"],
                training.kd_steps,
                parts,
                *memories,
            )
        ]


# --- what is shown --------------------------------------------------------------------------------


def print_header() -> None:
    """Print the names of the columns of :func:`print_rows`."""
    print(f"\n{'step of':16} {'B':>4} {'C':>4} {'K':>4} {'without, ms':>24} {'with, ms':>24} "
          f"{'difference':>19} {'loss':>8} {'(plain)':>8} {'diction.':>8} {'share':>8} {'net':>8} "
          f"{'every':>8} {'memory':>8} {'rounds':>8}")  # fmt: skip


def print_rows(rows: Sequence[Row]) -> None:
    """Print lines of the table."""
    for r in rows:
        without = f"{r.without_ms:.5g} ({r.without_p20_ms:.4g}-{r.without_p80_ms:.4g})"
        with_kdci = f"{r.with_ms:.5g} ({r.with_p20_ms:.4g}-{r.with_p80_ms:.4g})"
        difference = f"{r.difference_ms:+.3g} ± {r.difference_spread_ms:.2g}"
        rounds = f"{r.rounds}" + (f" -{r.rejected}" if r.rejected else "")
        rounds += f" !{r.noisy}" if r.noisy else ""
        print(f"{r.name:16} {r.batch:4} {r.classes:4} {r.prototypes:4} {without:>24} "
              f"{with_kdci:>24} {difference:>19} {r.loss_ms:8.3g} {r.plain_loss_ms:8.3g} "
              f"{r.dictionary_ms:8.3g} {r.share:8.3%} {r.net_share:8.3%} "
              f"{r.every_step_share:8.3%} {r.memory_share:8.3%} {rounds:>8}")  # fmt: skip
    sys.stdout.flush()


def summarize(rows: Sequence[Row]) -> list[str]:
    """Say what was wanted and what was found, a line each."""
    lines = []
    for row in rows:
        wanted = WANTED.get(row.name) if row.prototypes in (GENERATED[0], INVERTED[0]) else None
        if row.kind == "network" and wanted is not None:
            marks = ["[yes]" if s <= wanted else "[no]" for s in (row.share, row.every_step_share)]
            lines.append(
                f"{row.name}, K={row.prototypes}: KDCI's share {row.share:.3%} (<= {wanted:.2%}) "
                f"{marks[0]}, {row.net_share:.3%} beyond the loss that it replaces; with a "
                f"dictionary in every step {row.every_step_share:.3%} {marks[1]}"
            )
        elif row.kind == "method":
            measured = row.difference_ms / row.without_ms
            spread = row.difference_spread_ms / row.without_ms
            lines.append(
                f"{row.name}: {row.share:+.2%} of the time of a step by the parts alone, "
                f"{measured:+.2%} ± {spread:.2%} by the difference; {row.memory_share:+.2%} of the "
                "memory (the paper, on an RTX 3090: +1.27 to +3.30 %, +0.05 to +0.12 %)"
            )
    return lines
