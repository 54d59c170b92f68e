# SPDX-License-Identifier: Apache-2.0
"""A run tells how it is, stops where a number is not finite, and on Ctrl-C soon and at no loss."""

import builtins
import csv
import itertools
import math
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_task import CLASSES, METHOD_SETTINGS, make_task, start, tiny_config
from torch import Tensor

from python_models import interruption
from python_models.checkpoint import load_checkpoint
from python_models.distill import distill
from python_models.engine import Distillation
from python_models.errors import DivergenceError, Interrupted, UserError
from python_models.health import Health, image_diversity
from python_models.methods import METHODS
from python_models.methods.base import Method
from python_models.methods.descent import Descent
from python_models.reporting import LossLog, Progress

CPU = torch.device("cpu")


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    return make_task(tmp_path)


def rows_of(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))


def advance(run: Distillation, step: int) -> Distillation:
    """Make student steps until there are this many."""
    while run.step < step:
        run.advance()
    return run


# --- NaN and Inf ----------------------------------------------------------------------------------

GENERATOR_TERMS = {
    "cmi": "cr",
    "dafl": "act",
    "deepinversion": "tv_l1",
    "fast": "oh",
    "mosaickd": "discriminator",
}
"""A term of each generator's loss."""


@pytest.mark.parametrize("method", GENERATOR_TERMS)
def test_a_nan_within_a_generator_phase_is_named(
    method: str, task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one of a step before the phase's last, which alone is recorded."""
    phases = {name for name in METHODS if METHODS.get(name).begin_round is not Method.begin_round}
    assert phases == {*GENERATOR_TERMS, "noise"}  # noise has no loss
    original, calls, term = Descent.backward, itertools.count(), GENERATOR_TERMS[method]

    def poisoned(self: Descent, terms: Any, *others: Any) -> Tensor:
        if term in terms and next(calls) == 3:
            terms = {**terms, term: terms[term] * math.inf}
        return original(self, terms, *others)

    monkeypatch.setattr(Descent, "backward", poisoned)
    run = start(task, method)
    run.prepare()
    expected = (
        rf"^the loss term 'generator_{term}' became -?inf at step \d+ \(round \d+, step \d+ of its "
        r"generator\)$"
    )
    with pytest.raises(DivergenceError, match=expected):
        advance(run, run.total_steps)


@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_a_nan_in_any_student_term_is_named(method: str, task: dict[str, Any]) -> None:
    def begin(spoilt: str) -> Distillation:
        run = start(task, method, kdci=True)
        run.prepare()
        original = run.method.student_losses

        def poisoned(*arguments: Any) -> dict[str, Tensor]:
            terms = original(*arguments)
            names.update(terms)
            return {k: v * math.nan if k == spoilt else v for k, v in terms.items()}

        run.method.student_losses = poisoned  # type: ignore[method-assign]
        return run

    names: set[str] = set()
    steps = advance(begin("none"), 9).step
    assert "kd" in names
    for name in sorted(names):
        run = begin(name)
        with pytest.raises(
            DivergenceError, match=rf"^the loss term '{name}' became nan at step \d"
        ):
            advance(run, steps)


def test_weights_that_a_step_spoilt_are_named_and_the_good_checkpoint_is_kept(
    task: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step of the second epoch: no loss comes after it in which it would show."""
    original, calls = Descent.step, itertools.count(1)

    def spoiling(self: Descent) -> None:
        original(self)
        if next(calls) == 8:
            self._optimizers[0].param_groups[0]["params"][0].data[0] = math.inf

    monkeypatch.setattr(Descent, "step", spoiling)
    out = tmp_path / "run"
    expected = r"^student\..* became nan or infinite by step 8; the last checkpoint, .*last.pt, is"
    with pytest.raises(DivergenceError, match=expected):
        distill(tiny_config(task, "noise", out_dir=out))
    assert load_checkpoint(out / "checkpoints" / "last.pt")["run"]["step"] == 4
    assert not (out / "student.safetensors").exists()


def test_a_prediction_that_would_spoil_the_dictionary_is_named(
    task: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(task, "noise")
    with torch.no_grad():
        next(run.teacher.parameters()).fill_(math.nan)
    with pytest.raises(
        DivergenceError, match=r"prediction for the dictionary became nan at step 0"
    ):
        run.advance()


@given(
    bad=st.integers(0, 60),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
    interval=st.integers(1, 30),
)
def test_however_rarely_values_are_read_the_first_bad_one_is_named(
    bad: int, value: float, interval: int
) -> None:
    """As on a GPU, where the values of many steps are read at once."""
    log = LossLog(CPU)
    log._interval = interval

    def fill() -> None:
        for step in range(61):
            name, found = "ab"[step % 2], torch.tensor(value if step >= bad else 1.0)
            if step % 3:
                log.add(step, {name: found})
            else:
                log.watch(f"step {step}", {f"the loss term '{name}'": found})
        log.flush()

    with pytest.raises(DivergenceError, match=f"'{'ab'[bad % 2]}' became {value} at step {bad}$"):
        fill()


# --- signs of health ------------------------------------------------------------------------------


@given(b=st.integers(2, 6), seed=st.integers(0, 1000))
def test_diversity_is_the_root_mean_square_distance_of_pairs(b: int, seed: int) -> None:
    images = torch.rand(b, 2, 3, 4, generator=torch.Generator().manual_seed(seed))
    pairs = [(x - y).square().mean() for x, y in itertools.permutations(images.double(), 2)]
    expected = torch.stack(pairs).mean().sqrt()
    assert image_diversity(images).item() == pytest.approx(expected.item(), rel=1e-5)
    assert image_diversity(images[:1].expand(b, -1, -1, -1)).item() == pytest.approx(0, abs=1e-6)


def test_diversity_of_uniform_noise() -> None:
    """Two independent uniform numbers differ by 1/6 in the mean square."""
    images = torch.rand(400, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert image_diversity(images).item() == pytest.approx(math.sqrt(1 / 6), rel=0.01)


@given(
    counts=st.lists(
        st.lists(st.integers(0, 50), min_size=3, max_size=3).filter(any), min_size=1, max_size=4
    )
)
def test_class_proportions_are_those_of_each_epoch(counts: list[list[int]]) -> None:
    health, so_far = Health(3, CPU), torch.zeros(3, dtype=torch.int64)
    for epoch in counts:
        so_far += torch.tensor(epoch)
        # A resume between changes nothing.
        again = Health(3, CPU)
        again.load_state_dict(health.state_dict())
        found = health.end_epoch(so_far)
        assert again.end_epoch(so_far) == found
        shares = [count / sum(epoch) for count in epoch]
        entropy = -sum(share * math.log(share) for share in shares if share)
        assert found == {
            "class_entropy": pytest.approx(entropy, abs=1e-12),
            "class_min": pytest.approx(min(shares)),
            "class_max": pytest.approx(max(shares)),
        }


@pytest.mark.parametrize("method", ["dfnd", "fast", "mosaickd", "noise"])
def test_every_epoch_tells_how_it_was(
    method: str, task: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """metrics.csv holds all signs, the line of an epoch speed, memory and the time that is left."""
    out = tmp_path / "run"
    distill(tiny_config(task, method, out_dir=out))
    rows = rows_of(out)
    for row in rows:
        assert 0 <= float(row["class_entropy"]) <= math.log(CLASSES) + 1e-9
        assert 0 <= float(row["class_min"]) <= 1 / CLASSES <= float(row["class_max"]) <= 1
        assert float(row["peak_memory_mb"]) > 1
        assert float(row["images_per_second"]) > 0
    makes_images = METHODS.get(method).begin_round is not Method.begin_round
    assert ("image_diversity" in rows[0]) == makes_images
    if makes_images:
        # Of generators that have learned nothing, images may differ little, but they differ.
        assert all(0 < float(row["image_diversity"]) < 1 for row in rows)
    lines = [line for line in capsys.readouterr().out.splitlines() if "epoch" in line]
    assert len(lines) == len(rows)
    assert all(re.search(r" \d+ images/s, \d+ MB, .* left$", line) for line in lines)


def test_a_bar_on_a_terminal_and_lines_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for is_terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda answer=is_terminal: answer)
        progress = Progress("title", 4)
        for _ in range(4):
            progress.step({"kd": 0.5})
        progress.epoch("epoch 1/1, kd 0.5", {"images/s": "7"})
        progress.close()
        found = capsys.readouterr()
        assert ("epoch 1/1, kd 0.5" in found.out) == (not is_terminal)
        assert ("title" in found.err) == is_terminal


# --- TensorBoard ----------------------------------------------------------------------------------


def test_without_tensorboard_its_flag_is_an_error_of_one_line(
    task: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything is written."""
    original = builtins.__import__

    def import_(name: str, *arguments: Any, **others: Any) -> Any:
        if name.split(".")[0] == "tensorboard" or name == "torch.utils.tensorboard":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, *arguments, **others)

    monkeypatch.setattr(builtins, "__import__", import_)
    out = tmp_path / "run"
    with pytest.raises(
        UserError, match=r"tensorboard=True .* pip install .kdci_ext\[tensorboard\]"
    ):
        distill(tiny_config(task, "noise", tensorboard=True, out_dir=out))
    assert not out.exists()


def test_tensorboard_holds_the_metrics(task: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    distill(tiny_config(task, "noise", tensorboard=True, out_dir=out))
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    rows = rows_of(out)
    assert set(events.Tags()["scalars"]) == set(rows[0]) - {"step"}
    for name in ("kd", "accuracy", "class_entropy"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(int(row["step"]), pytest.approx(float(row[name]), rel=1e-4)) for row in rows]
        assert found == expected


# --- Ctrl-C ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dafl", "deepinversion", "fast", "mosaickd"])
def test_ctrl_c_gives_a_long_round_up_and_costs_nothing(
    method: str, task: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the generator's fourth step; the run goes on to bitwise the same student."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    distill(tiny_config(task, method, out_dir=whole))
    original, calls, rounds = Descent.backward, itertools.count(), []

    def interrupting(self: Descent, terms: Any, *others: Any) -> Tensor:
        if self._watch is not None:
            call = next(calls)
            if call == 3:
                os.kill(os.getpid(), signal.SIGINT)
            rounds.append(call)
        return original(self, terms, *others)

    with monkeypatch.context() as patch:
        patch.setattr(interruption, "LONG_ROUND", 0.0)
        patch.setattr(Descent, "backward", interrupting)
        with pytest.raises(Interrupted, match="go on with: kdci distill --resume"):
            distill(tiny_config(task, method, out_dir=parts))
    assert rounds == list(range(4))  # no step of the generator came after
    distill(tiny_config(task, method, out_dir=parts, resume=True))
    name = "student.safetensors"
    assert (whole / name).read_bytes() == (parts / name).read_bytes()


def test_after_short_rounds_no_state_is_kept() -> None:
    """What it costs is spent on long rounds alone."""
    kept = []

    def state() -> dict[str, Tensor]:
        kept.append(1)
        return {"weights": weights}

    weights = torch.zeros(3)
    start = interruption.RoundStart(state)
    with start.making(True):
        weights += 1
        assert start.state is not None
        assert start.state["weights"].tolist() == [0.0, 0.0, 0.0]
    assert start.state is None
    for is_due in (True, False):
        with start.making(is_due):
            assert start.state is None
    assert len(kept) == 1
