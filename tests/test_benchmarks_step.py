# SPDX-License-Identifier: Apache-2.0
"""The laws of the benchmarks of compensation and of training steps; nothing here times anything."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import astuple, replace
from typing import Any

import pytest
import torch

from benchmarks import compensation, harness, report, step
from benchmarks.compensation import PASSES, Shape
from benchmarks.harness import Timer, Timing
from benchmarks.memory import allocated_peak

TINY = Shape(40, 6, 5, 16, 1, 1)


def still_timer() -> Timer:
    """A timer for measurements whose times do not matter."""
    return Timer(time.process_time, lambda: 1.0)


# --- memory ---------------------------------------------------------------------------------------


def test_allocated_peak_counts_what_is_there_at_once() -> None:
    """1 MiB kept, then 2 MiB that go before 1 MiB comes: 3 at most, and what was there before
    and is let go meanwhile takes nothing off.
    """
    before = [torch.empty(1 << 18)]

    def work() -> list[torch.Tensor]:
        kept = [torch.empty(1 << 18)]
        passing = torch.empty(1 << 19)
        del passing
        return [*kept, torch.empty(1 << 18)]

    assert allocated_peak(work) == 3 << 20
    assert allocated_peak(lambda: len(before)) == 0


# --- compensation ---------------------------------------------------------------------------------


def test_floor_and_allowance_by_hand() -> None:
    """(256, 10, 8, 256). Products: 256 x 10 x 256 and 8 x 10 x 256 for queries and keys, 256 x 8 x
    10 for the prior, two operations each, the first twice backward. 524,288 terms at 3 and 6
    multiply-adds, 264 x 256 exponentials at 12.
    """
    shape = compensation.find_shapes(["256x10x8x256"])[0]
    forward = 2 * (655_360 + 20_480 + 20_480) + 2 * (3 * 524_288 + 12 * 67_584)
    backward = 2 * (2 * 655_360 + 20_480 + 20_480) + 2 * 6 * 524_288
    assert compensation.floor_gflop(shape, "forward") * 1e9 == pytest.approx(forward)
    for name in PASSES[1:]:
        assert compensation.floor_gflop(shape, name) * 1e9 == pytest.approx(forward + backward)
    inputs = 256 * 10 + 8 * 10 + 8 + 2 * 256 * 10 + 256
    gradients = 256 * 10 + 2 * 256 * 10 + 256
    assert shape.allowance == 4 * (inputs + gradients + 256 * 8 + 264 * 256)


@pytest.mark.parametrize("name", PASSES)
def test_the_exact_result_is_that_of_the_whole_batch(name: str) -> None:
    """Made a few rows at a time, it is what autograd says in float64 about all of them."""
    inputs = compensation.make_inputs(TINY)
    wide = compensation.Inputs(*(v.detach().double() for v in vars(inputs).values()))
    for value in wide.trained:
        value.requires_grad_()
    expected = compensation.make_calls(name, wide)[compensation.REFERENCE]()
    found = compensation.exact(name, inputs)
    assert len(found) == len(expected) == (1 if name == "forward" else 5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.detach())


def test_errors_are_relative_to_the_largest_value() -> None:
    truth = (torch.tensor([1.0, -4.0]).double(), torch.tensor([2.0]).double())
    assert compensation.errors((torch.tensor([1.0, -3.0]), torch.tensor([2.5])), truth) == (
        pytest.approx(0.25),
        pytest.approx(0.25),
    )
    assert math.isnan(compensation.errors(truth[:1], truth[:1])[1])


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch.compile fail where its result is called, as it does without a compiler."""

    def compile_(function: Callable[..., Any], **options: object) -> Callable[..., Any]:
        def fail(*operands: object) -> Any:
            raise RuntimeError("no C++\ncompiler")

        return fail

    monkeypatch.setattr(torch, "compile", compile_)


@pytest.mark.usefixtures("no_compiler")
def test_a_shape_is_measured_in_all_passes() -> None:
    """All contenders compute the same, a term of size B K H shows in the memory of those who make
    one, and who cannot run has a reason.
    """
    rows = compensation.bench_shape(TINY, still_timer(), 100.0, 0, min_rounds=1)
    assert [(row.step, row.contender) for row in rows] == [
        (name, contender)
        for name in PASSES
        for contender in ("native", *compensation.EAGER, "torch.compile", "reference")
    ]
    for row in rows:
        if row.contender == "torch.compile":
            assert (row.rounds, row.note) == (0, "failed: RuntimeError: no C++ compiler")
            continue
        assert (row.rounds, row.note) == (1, "")
        assert row.output_error < 1e-5
        assert (
            math.isnan(row.gradient_error) if row.step == "forward" else row.gradient_error < 1e-5
        )
        term = 4 * TINY.batch * TINY.k * TINY.hidden / 2**20
        if row.contender != "native":
            assert row.memory_mib > term
        assert row.floor_share == pytest.approx(row.floor_ms / row.median_ms)


def compensation_row(contender: str, ms: float, **changes: Any) -> compensation.Row:
    shape = compensation.SHAPES[0]
    fine = compensation.Row(
        *(shape.label, "forward+backward", contender, ms, ms, ms, 9, 0, 0, 1.0, ms / 2.0),
        *(1e-7, 2e-7, 0.25, 0.5, 1.0, 1.0 / ms, ""),
    )
    return replace(fine, **changes)


COMPENSATION_ROWS = [
    compensation_row("native", 2.0),
    compensation_row("eager, broadcast", 30.0),
    compensation_row("eager, einsum", 26.0, gradient_error=1e-6),
    compensation_row("torch.compile", 18.0),
    compensation_row("reference", 27.0),
]


def all_passes() -> list[compensation.Row]:
    return [replace(row, step=name) for name in PASSES for row in COMPENSATION_ROWS]


def test_what_was_wanted_of_compensation_and_what_was_found() -> None:
    """The faster eager form counts; errors are judged by the largest of plain PyTorch's."""
    (line,) = compensation.summarize(all_passes())
    assert "eager, einsum x13.0 (>= 12) [yes]" in line
    assert "torch.compile x9.0 (>= 10) [no]" in line
    assert "0.50 of the floor (>= 0.5) [yes]" in line
    assert "memory of forward+backward x0.50 (<= 1) [yes]" in line
    assert "error by plain PyTorch's x1.00 (<= 2) [yes], of gradients x0.20 (<= 3) [yes]" in line
    worse = [
        replace(row, output_error=3e-7) if row.contender == "native" else row
        for row in all_passes()
    ]
    assert "x3.00 (<= 2) [no]" in compensation.summarize(worse)[0]


ABOUT = {"machine": "a machine", "commit": "abc", "date": "2026-01-01"}


def test_the_table_of_compensation() -> None:
    lines = report.compensation_table(ABOUT, COMPENSATION_ROWS).splitlines()
    assert lines[2] == (
        "| 256 x 10, 8, 256 | forward+backward | 2 ms | 26 ms, x13.0 | 18 ms, x9.0 "
        "| 2e-07, 1e-06 | 0.25, 0.25 | 0.50 |"
    )
    assert lines[-1] == "a machine; commit abc; 2026-01-01."


# --- steps ----------------------------------------------------------------------------------------


def test_shares_by_hand() -> None:
    """Loss 2, the plain one 1, dictionary 10 ms, of a step of 100 ms; every fifth step has a
    dictionary, or none has where it is built once.
    """
    parts = step.Parts(2.0, 1.0, 10.0)
    assert parts.shares(100.0, 5) == pytest.approx((0.04, 0.03, 0.12))
    assert parts.shares(100.0, 0) == pytest.approx((0.02, 0.01, 0.12))


def step_row(**changes: Any) -> step.Row:
    without = Timing(200.0, 180.0, 240.0, 5, 1, 0, 1.0)
    with_kdci = Timing(206.0, 190.0, 270.0, 4, 2, 1, 1.0)
    parts = step.Parts(2.0, 1.0, 10.0)
    made = step._row(*("method", "fast", 128, 10, 8, 5, without, with_kdci, 2, parts, 100.0, 100.5))
    return replace(made, **changes)


def test_differences_by_hand() -> None:
    """Samples of two student steps: 100 and 103 ms; half-widths of 15 and 20 ms make 25."""
    row = step_row()
    assert (row.without_ms, row.with_ms) == (100.0, 103.0)
    assert (row.without_p20_ms, row.without_p80_ms, row.with_p80_ms) == (90.0, 120.0, 135.0)
    assert row.difference_ms == pytest.approx(3.0)
    assert row.difference_spread_ms == pytest.approx(25.0)
    assert (row.rounds, row.rejected, row.noisy) == (4, 3, 1)
    assert row.share == pytest.approx(0.04)
    assert row.memory_share == pytest.approx(0.005)


def test_cadences_are_those_of_the_methods() -> None:
    """Generators rebuild the dictionary once a round, sampling methods build it once."""
    assert step._cadence("fast") == 400
    assert step._cadence("dfnd") == 0


def test_a_network_is_measured_with_each_dictionary() -> None:
    """A line for each size of the dictionary, against the same step without."""
    network = step.Network("lenet5", 10, 1, ((3, "fast"), (5, "dfnd")))
    rows = step.bench_network(network, still_timer(), 0, min_rounds=1, batch=16)
    assert [(row.prototypes, row.kd_steps) for row in rows] == [(3, 400), (5, 0)]
    assert rows[0].without_ms == rows[1].without_ms
    weights = 4 * 256 * (2 * 10 + 1) / 2**20
    for row in rows:
        assert (row.kind, row.name, row.batch, row.classes) == ("network", "lenet5", 16, 10)
        assert min(row.without_ms, row.with_ms, row.loss_ms, row.dictionary_ms) > 0
        # At least KDCI's weights and their momentum.
        assert row.memory_with_mib - row.memory_without_mib >= 2 * weights


TINY_SETTINGS: dict[str, dict[str, Any]] = {
    "fast": {"synthesis_batch_size": 8, "pool_size": 32, "kd_steps": 2},
    "deepinversion": {
        "synthesis_batch_size": 8,
        "pool_size": 32,
        "kd_steps": 2,
        "g_steps": 2,
        "kdci_prototypes": 5,
    },
    "dfnd": {"select": 40, "kdci_prototypes": 5},
}


@pytest.mark.parametrize("method", step.METHODS, ids=lambda method: method.name)
def test_a_method_is_measured_with_its_preset(
    method: step.MethodRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole rounds with and without KDCI; the settings that are not named are the preset's."""
    monkeypatch.setattr(step, "UNLABELLED", 64)
    tiny = replace(method, values=(), quick=())
    values = {**dict(method.values), **TINY_SETTINGS[method.name], "batch_size": 8}
    (row,) = step.bench_method(tiny, still_timer(), 0, min_rounds=1, **values)
    assert (row.kind, row.name, row.batch, row.classes) == ("method", method.name, 8, 10)
    assert row.kd_steps == (0 if method.name == "dfnd" else 2)
    assert row.memory_with_mib > row.memory_without_mib > 0


def test_what_was_wanted_of_steps_and_what_was_found() -> None:
    rows = [
        step_row(),
        step_row(kind="network", name="wrn16_1", share=0.0014, every_step_share=0.002),
        step_row(kind="network", name="wrn16_1", prototypes=128),
    ]
    lines = step.summarize(rows)
    assert len(lines) == 2
    assert "+4.00% of the time of a step by the parts alone, +3.00% ± 25.00%" in lines[0]
    assert "0.140% (<= 0.15%) [yes], 3.000% beyond the loss that it replaces" in lines[1]
    assert "in every step 0.200% [no]" in lines[1]


def test_files_and_table_of_steps(tmp_path: Any) -> None:
    harness.save(tmp_path / "a.csv", ABOUT, [step_row()])
    _, (found,) = harness.load(tmp_path / "a.csv", step.Row)
    for got, expected in zip(astuple(found), astuple(step_row()), strict=True):
        assert got == expected or got == pytest.approx(expected, rel=1e-5)
    table = report.step_table(ABOUT, [found]).splitlines()
    assert table[2] == (
        "| fast (method) | 128, 10, 8 | 100 ms | 2 ms | 10 ms | 4.00% | 12.00% "
        "| +3.0% ± 25.0% | +0.50% |"
    )


def test_unknown_names_are_told() -> None:
    with pytest.raises(ValueError, match="unknown name 'resnet': expected some of lenet5"):
        step.find(["resnet"], step.NETWORKS)
    with pytest.raises(ValueError, match="unknown shape '1x2x3'"):
        compensation.find_shapes(["1x2x3"])
