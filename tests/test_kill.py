# SPDX-License-Identifier: Apache-2.0
"""A run that is killed at any instant and resumed ends where it would have ended."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from killed_runs import RunServer
from test_resume import metrics_of, weights_of
from tiny_task import METHOD_SETTINGS, make_task, write_config

from python_models.checkpoint import load_checkpoint

KILLED = -9


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunServer]:
    # Read by the process that all others are forked from, when the first test starts it.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return RunServer(tmp_path)


def files_of(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_a_killed_run_ends_where_the_uninterrupted_one_ends(
    method: str, tmp_path: Path, server: RunServer
) -> None:
    """SIGKILL at three random instants of a run that saves after every step, the second of them
    while it writes a checkpoint: the checkpoint is whole or the one before it, and the resumed
    runs end in the uninterrupted one's student and metrics, bit by bit.
    """
    config = write_config(tmp_path, make_task(tmp_path), method, checkpoint_minutes=1e-9)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    start = ["distill", "--config", str(config), "--out-dir"]
    ended = server.run(*start, str(whole))
    assert ended.code == 0, (tmp_path / "output.txt").read_text()
    total = ended.events
    assert total is not None
    assert 0 < total.writing < total.training
    # Each process goes on where the one before it saved, so that none reaches the run's end when
    # it dies after the time between two of these.
    instants = sorted(random.Random(method).uniform(0.02, 0.98) for _ in range(3))
    lived = [b - a for a, b in zip([0.0, *instants], instants, strict=False)]
    kills = [
        ("training", 1 + int(lived[0] * total.training)),
        ("writing", 1 + int(lived[1] * total.writing)),
        ("training", 1 + int(lived[2] * total.training)),
    ]
    words = [*start, str(parts)]
    for kill in kills:
        ended = server.run(*words, kill=kill)
        assert ended.code == KILLED, (tmp_path / "output.txt").read_text()
        assert not (parts / "student.safetensors").exists()
        for path in (parts / "checkpoints").glob("*.pt"):
            load_checkpoint(path)
        words = ["distill", "--resume", "--out-dir", str(parts)]
    ended = server.run(*words)
    assert ended.code == 0, (tmp_path / "output.txt").read_text()
    assert "damaged" not in (tmp_path / "output.txt").read_text()
    assert weights_of(whole) == weights_of(parts)
    assert metrics_of(whole) == metrics_of(parts)
    assert files_of(parts) == files_of(whole)
    assert {"checkpoints/last.pt", "checkpoints/previous.pt"} <= files_of(parts)


def test_a_process_may_be_killed_before_and_after_training_too(
    tmp_path: Path, server: RunServer
) -> None:
    """SIGKILL at instants all over a process, from reading the command line to the last picture."""
    config = write_config(tmp_path, make_task(tmp_path), "noise")
    start = ["distill", "--config", str(config), "--out-dir"]
    whole = tmp_path / "whole"
    total = server.run(*start, str(whole), count_all=True).events
    assert total is not None
    instants = random.Random(0)
    for number in range(5):
        run = tmp_path / str(number)
        # A fifth of the process each.
        event = 1 + int((number + instants.random()) / 5 * total.process)
        ended = server.run(*start, str(run), kill=("process", event), count_all=True)
        assert ended.code == KILLED
        # Without its settings there is no run yet, and nothing to resume.
        begun = (run / "config.yaml").exists()
        again = ["distill", "--resume", "--out-dir", str(run)] if begun else [*start, str(run)]
        assert server.run(*again).code == 0, (tmp_path / "output.txt").read_text()
        assert weights_of(run) == weights_of(whole)
        assert metrics_of(run) == metrics_of(whole)
        assert files_of(run) == files_of(whole)


def test_a_full_disk_ends_the_run_with_one_line_and_loses_no_checkpoint(
    tmp_path: Path, server: RunServer
) -> None:
    """The system lets no file of the process grow beyond half a checkpoint. The run ends with one
    line that says why and how to go on, leaves nothing half written, and goes on afterwards.
    """
    config = write_config(tmp_path, make_task(tmp_path), "noise", checkpoint_minutes=1e-9)
    whole, run = tmp_path / "whole", tmp_path / "run"
    start = ["distill", "--config", str(config), "--out-dir"]
    total = server.run(*start, str(whole)).events
    assert total is not None
    assert server.run(*start, str(run), kill=("training", total.training // 2)).code == KILLED
    last = run / "checkpoints" / "last.pt"
    before = last.read_bytes()
    resume = ["distill", "--resume", "--out-dir", str(run)]
    assert server.run(*resume, limit_file_size=len(before) // 2).code == 2
    said = (tmp_path / "output.txt").read_text().splitlines()[-1]
    assert said.startswith(f"error: cannot write {last}: File too large; the previous one is kept")
    assert said.endswith(f"go on with: kdci distill --resume --out-dir {run}")
    assert last.read_bytes() == before
    assert not list(run.rglob("*.tmp"))
    assert server.run(*resume).code == 0
    assert weights_of(run) == weights_of(whole)
    assert metrics_of(run) == metrics_of(whole)
