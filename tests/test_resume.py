# SPDX-License-Identifier: Apache-2.0
"""Stopping and going on changes nothing; checkpoints are whole or absent."""

import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny_task import METHOD_SETTINGS, make_task, tiny_config

from python_models import checkpoint
from python_models import distill as distilling
from python_models.checkpoint import (
    StopRequest,
    load_checkpoint,
    previous_checkpoint,
    read_weights,
    resume_checkpoint,
    save_checkpoint,
    write_atomically,
)
from python_models.config import TrainTeacherConfig
from python_models.distill import distill
from python_models.engine import Distillation
from python_models.errors import Interrupted, UserError
from python_models.teacher import train_teacher


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    return make_task(tmp_path)


def stop_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Make Ctrl-C arrive while the loop makes its step number `calls`."""
    original = Distillation.advance
    count = 0

    def advance(self: Distillation) -> None:
        nonlocal count
        count += 1
        if count == calls:
            os.kill(os.getpid(), signal.SIGINT)
        original(self)

    monkeypatch.setattr(Distillation, "advance", advance)


def weights_of(run: Path) -> bytes:
    return (run / "student.safetensors").read_bytes()


def metrics_of(run: Path) -> list[list[str]]:
    """Return metrics.csv without its times and memory."""
    rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    kept = [i for i, name in enumerate(rows[0]) if "second" not in name and "memory" not in name]
    return [[row[i] for i in kept] for row in rows]


@pytest.mark.parametrize("kdci", [True, False], ids=["kdci", "vanilla"])
@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_a_resumed_run_ends_where_the_uninterrupted_one_ends(
    method: str,
    kdci: bool,
    task: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    distill(tiny_config(task, method, kdci=kdci, out_dir=whole))
    # Three calls of the loop: for Fast, whose warm-up counts two, after one student step.
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted, match="go on with: kdci distill --resume"):
            distill(tiny_config(task, method, kdci=kdci, out_dir=parts))
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Interrupted):
            distill(tiny_config(task, method, kdci=kdci, out_dir=parts, resume=True))
    assert not (parts / "student.safetensors").exists()
    torch.manual_seed(99)  # nothing may depend on the process's own random numbers
    distill(tiny_config(task, method, kdci=kdci, out_dir=parts, resume=True))
    assert weights_of(whole) == weights_of(parts)
    assert metrics_of(whole) == metrics_of(parts)


def test_a_run_stopped_in_warmup_resumes_too(
    task: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    distill(tiny_config(task, "fast", out_dir=whole))
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Interrupted, match="stopped after 0 of 8 steps"):
            distill(tiny_config(task, "fast", out_dir=parts))
    distill(tiny_config(task, "fast", out_dir=parts, resume=True))
    assert weights_of(whole) == weights_of(parts)


@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_the_same_seed_repeats_bitwise_and_another_does_not(
    method: str, task: dict[str, Any], tmp_path: Path
) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        distill(tiny_config(task, method, seed=seed, out_dir=tmp_path / name))
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")
    assert weights_of(tmp_path / "a") != weights_of(tmp_path / "c")


def test_resuming_a_finished_run_changes_nothing(task: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    distill(tiny_config(task, "noise", out_dir=out))
    before = weights_of(out), metrics_of(out)
    result = distill(tiny_config(task, "noise", out_dir=out, resume=True))
    assert (weights_of(out), metrics_of(out)) == before
    assert result.steps == 8


def test_a_run_killed_before_its_first_checkpoint_begins_anew(
    task: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    distill(tiny_config(task, "noise", out_dir=out))
    before = weights_of(out)
    (out / "checkpoints" / "last.pt").unlink()
    distill(tiny_config(task, "noise", out_dir=out, resume=True))
    assert weights_of(out) == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": 0.7}, "cannot be resumed with other settings: lr was 0.05 and is 0.7 now"),
        ({"kdci": False}, "kdci was True and is False now"),
    ],
)
def test_resuming_with_other_settings_is_refused(
    changed: dict[str, Any], message: str, task: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    distill(tiny_config(task, "noise", kdci=True, out_dir=out))
    with pytest.raises(UserError, match=message):
        distill(tiny_config(task, "noise", **{"kdci": True, **changed}, out_dir=out, resume=True))


def test_a_run_of_a_version_without_a_setting_goes_on_with_its_default(
    task: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    distill(tiny_config(task, "dafl", out_dir=out))
    settings = yaml.safe_load((out / "config.yaml").read_text())
    for name in ("kdci_batches", "ie"):
        del settings[name]
    (out / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match="kdci_batches was 1 and is 2 now"):
        distill(tiny_config(task, "dafl", kdci_batches=2, out_dir=out, resume=True))
    distill(tiny_config(task, "dafl", out_dir=out, resume=True))


def test_resuming_with_another_teacher_is_refused(task: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    distill(tiny_config(task, "noise", out_dir=out))
    weights = read_weights(tmp_path / "teacher.safetensors")
    info = checkpoint.read_info(tmp_path / "teacher.safetensors")
    assert info is not None
    network = checkpoint.nn.Module()
    network.state_dict = lambda: {k: v + 1 for k, v in weights.items()}  # type: ignore[assignment]
    checkpoint.export_network(tmp_path / "teacher.safetensors", network, info)
    with pytest.raises(UserError, match="resume needs the same teacher"):
        distill(tiny_config(task, "noise", out_dir=out, resume=True))


def test_resuming_with_other_unlabelled_images_is_refused(
    task: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    distill(tiny_config(task, "dfnd", out_dir=out))
    images = np.zeros((9, 24, 24), dtype=np.uint8)
    np.savez(task["data_root"] / "wild.npz", images=images, labels=np.zeros(9, dtype=np.int64))
    with pytest.raises(UserError, match="unlabelled holds 9 images, but 50"):
        distill(tiny_config(task, "dfnd", out_dir=out, resume=True))
    images = np.zeros((50, 24, 24), dtype=np.uint8)
    np.savez(task["data_root"] / "wild.npz", images=images, labels=np.zeros(50, dtype=np.int64))
    with pytest.raises(UserError, match="unlabelled holds other images"):
        distill(tiny_config(task, "dfnd", out_dir=out, resume=True))


def test_a_folder_with_a_run_is_kept_unless_told_otherwise(
    task: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    distill(tiny_config(task, "noise", out_dir=out))
    (out / "notes.txt").write_text("mine")
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(UserError, match="already holds a run: go on with --resume, replace it"):
        distill(tiny_config(task, "noise", out_dir=out))
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    distill(tiny_config(task, "noise", seed=3, out_dir=out, overwrite=True))
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match="holds no run to resume"):
        distill(tiny_config(task, "noise", out_dir=tmp_path / "none", resume=True))


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1})

    def disk_full(temporary: Path) -> None:
        temporary.write_bytes(b"half a check")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write .*: No space left on device; the previous"):
        write_atomically(path, disk_full)
    assert load_checkpoint(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def flip_a_bit(path: Path) -> None:
    """Change one weight in the last mantissa bit, which torch.load does not notice."""
    contents = bytearray(path.read_bytes())
    start = bytes(contents).index(torch.arange(1000.0).numpy().tobytes())
    contents[start + 400] ^= 1
    path.write_bytes(contents)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:700])


def test_the_last_two_checkpoints_are_kept_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    assert resume_checkpoint(path) is None
    for step in range(4):
        save_checkpoint(path, {"step": step})
    assert {file.name for file in tmp_path.iterdir()} == {"last.pt", "previous.pt"}
    assert resume_checkpoint(path) == {"step": 3}
    assert load_checkpoint(previous_checkpoint(path)) == {"step": 2}
    # As between the two renames of a save.
    path.unlink()
    assert resume_checkpoint(path) == {"step": 2}


@pytest.mark.parametrize("damage", [flip_a_bit, cut, Path.write_bytes])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage: Any, tmp_path: Path) -> None:
    """It is set aside, so that the next save cannot put it in the place of the good one."""
    path = tmp_path / "last.pt"
    for step in (1, 2):
        save_checkpoint(path, {"step": step, "weights": torch.arange(1000.0)})
    if damage is Path.write_bytes:
        path.write_bytes(b"half a check")
    else:
        damage(path)
    with pytest.warns(UserWarning, match=r"last\.pt is damaged.*; going on from the .* before it"):
        state = resume_checkpoint(path)
    assert state is not None
    assert state["step"] == 1
    assert {file.name for file in tmp_path.iterdir()} == {"last.pt", "damaged.pt"}
    save_checkpoint(path, {"step": 3})
    assert load_checkpoint(previous_checkpoint(path))["step"] == 1
    cut(path)
    cut(previous_checkpoint(path))
    with pytest.raises(UserError, match=r"previous\.pt is damaged"):
        resume_checkpoint(path)
    previous_checkpoint(path).unlink()
    with pytest.raises(UserError, match=r"no checkpoint before it: begin anew with --overwrite"):
        resume_checkpoint(path)
    assert path.exists()


def test_a_run_whose_last_checkpoint_is_damaged_ends_where_it_would_have(
    task: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    often = {"checkpoint_minutes": 1e-9}
    distill(tiny_config(task, "fast", out_dir=whole))
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Interrupted):
            distill(tiny_config(task, "fast", out_dir=parts, **often))
    cut(parts / "checkpoints" / "last.pt")
    # What a process that was killed while it wrote leaves; the user's own files stay.
    for name in (".metrics.csv.7.tmp", "checkpoints/.last.pt.7.tmp", ".mine.7.tmp"):
        (parts / name).write_bytes(b"half")
    with pytest.warns(UserWarning, match="going on from the checkpoint before it"):
        distill(tiny_config(task, "fast", out_dir=parts, resume=True))
    assert weights_of(whole) == weights_of(parts)
    assert metrics_of(whole) == metrics_of(parts)
    assert [path.name for path in parts.rglob("*.tmp")] == [".mine.7.tmp"]


@pytest.mark.parametrize(("minutes", "saves"), [(0.0, 2), (1e-9, 10), (1e9, 2)])
def test_checkpoints_are_made_at_the_ends_of_epochs_and_by_time(
    minutes: float,
    saves: int,
    task: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fast makes two rounds of warm-up and eight student steps, in two epochs. Saving changes
    nothing of the run.
    """
    distill(tiny_config(task, "fast", out_dir=tmp_path / "plain"))
    made = []
    original = distilling.save_checkpoint

    def save(path: Path, state: dict[str, Any]) -> None:
        made.append(state["run"]["step"])
        original(path, state)

    monkeypatch.setattr(distilling, "save_checkpoint", save)
    out = tmp_path / "run"
    distill(tiny_config(task, "fast", out_dir=out, checkpoint_minutes=minutes))
    assert len(made) == saves
    assert made == sorted(made)
    assert weights_of(out) == weights_of(tmp_path / "plain")
    for wrong in (-1.0, float("nan")):
        with pytest.raises(UserError, match=r"checkpoint_minutes=.* must be >= 0"):
            distill(tiny_config(task, "fast", out_dir=tmp_path / "x", checkpoint_minutes=wrong))


def test_a_full_disk_is_named_as_such(tmp_path: Path) -> None:
    """torch.save's own error on a full disk speaks of positions in its file alone."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"last\.pt: File too large; the previous one is kept$"):
            save_checkpoint(path, {"weights": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
    assert load_checkpoint(path) == {"step": 1}


def test_a_run_is_overwritten_from_its_checkpoints_to_its_settings(
    task: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the old run is removed, a folder never holds a checkpoint without the settings
    it belongs to, from which a new run there could go on.
    """
    out = tmp_path / "run"
    distill(tiny_config(task, "noise", out_dir=out))

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for removing in ("shutil.rmtree", "pathlib.Path.unlink"):
        with monkeypatch.context() as patch:
            patch.setattr(removing, killed)
            with pytest.raises(KeyboardInterrupt):
                distill(tiny_config(task, "noise", seed=1, out_dir=out, overwrite=True))
        assert (out / "config.yaml").exists()
    with pytest.raises(UserError, match="already holds a run"):
        distill(tiny_config(task, "noise", seed=1, out_dir=out))
    distill(tiny_config(task, "noise", seed=1, out_dir=out, overwrite=True))


def test_damaged_and_dangerous_checkpoints_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    with pytest.raises(UserError, match="no checkpoint at"):
        load_checkpoint(path)
    save_checkpoint(path, {"weights": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UserError, match="is damaged or no checkpoint"):
        load_checkpoint(path)
    for nonsense in (b"half a check", b"\x80", b"(dp0\n.", b"\x8c\x02\xff\xfe.", b""):
        path.write_bytes(nonsense)
        with pytest.raises(UserError, match=r"is damaged or no checkpoint|cannot be loaded safely"):
            load_checkpoint(path)

    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, ("true",)

    torch.save({"x": Harmful()}, path)
    with pytest.raises(UserError, match="cannot be loaded safely"):
        load_checkpoint(path)


def test_the_second_ctrl_c_stops_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_stop_request_works_outside_the_main_thread() -> None:
    seen = []

    def body() -> None:
        with StopRequest() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [False]


def test_a_resumed_teacher_ends_where_the_uninterrupted_one_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_task(tmp_path)
    random = np.random.default_rng(1)
    np.savez(
        tmp_path / "data" / "tiny_train.npz",
        images=random.integers(0, 256, (30, 32, 32), dtype=np.uint8),
        labels=np.arange(30) % 4,
    )
    settings: dict[str, Any] = {
        "network": "lenet5_half_bn",
        "dataset": "tiny.npz",
        "data_root": tmp_path / "data",
        "device": "cpu",
        "epochs": 3,
        "batch_size": 10,
        "flip": False,
    }
    train_teacher(TrainTeacherConfig(**settings, out_dir=tmp_path / "whole"))
    calls = 0
    original = torch.optim.SGD.step

    def step(self: torch.optim.SGD, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:  # in the second epoch
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", step)
        with pytest.raises(Interrupted, match="stopped with 1 of 3 epochs kept"):
            train_teacher(TrainTeacherConfig(**settings, out_dir=tmp_path / "parts"))
    train_teacher(TrainTeacherConfig(**settings, out_dir=tmp_path / "parts", resume=True))
    whole, parts = (tmp_path / name / "teacher.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
