# SPDX-License-Identifier: Apache-2.0
"""The `kdci` command: what it prints, its exit codes and its errors of one line."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_task import METHOD_SETTINGS, make_task

from python_models.cli import main
from python_models.config import preset_paths, read_settings, read_yaml
from python_models.methods import METHODS
from python_models.networks import build_network


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    return make_task(tmp_path)


def flags(settings: dict[str, Any]) -> list[str]:
    words = []
    for name, value in settings.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def distill_words(task: dict[str, Any], out: Path, *more: str) -> list[str]:
    settings = {**task, **METHOD_SETTINGS["noise"], "method": "noise", "out_dir": out}
    return ["distill", *flags(settings), *more]


def error_of(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Run a command that must fail, and return its one line."""
    capsys.readouterr()
    assert main(words) == code
    found = capsys.readouterr().err.strip()
    assert found.startswith("error: ")
    assert "Traceback" not in found
    return found


def test_importing_the_command_line_is_quick() -> None:
    script = (
        "import sys, python_models.cli; "
        "heavy = {'torch', 'torchvision', 'numpy', 'matplotlib', 'tyro', 'yaml', 'sklearn'}; "
        "sys.exit(sorted(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "train-teacher" in capsys.readouterr().out
    for command, expected in (
        ("distill", ["--kdci, --no-kdci", "--g-steps", "--lr-g", "--kd-steps", "--temperature"]),
        ("train-teacher", ["--network", "--dataset", "--data-root"]),
        ("evaluate", ["--weights", "--split"]),
        ("demo", ["--quick", "--data-root"]),
        ("report", ["--out-dir", "--data-root", "--teacher", "--images"]),
    ):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert not [word for word in expected if word not in text]


def test_help_lists_the_options_of_the_chosen_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["distill", "--method", "dfnd", "--help"])
    text = capsys.readouterr().out
    assert "--select" in text
    assert "--lr-noise" in text
    assert "--lr-g" not in text


@pytest.mark.parametrize(
    "kind", ["methods", "networks", "generators", "discriminators", "datasets", "presets"]
)
def test_list(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", kind]) == 0
    one = capsys.readouterr().out
    assert main(["list"]) == 0
    everything = capsys.readouterr().out
    assert one in everything
    known = {
        "methods": "dafl",
        "networks": "wrn40_2",
        "generators": "generator_large",
        "discriminators": "discriminator_patch",
        "datasets": "fashion-mnist",
        "presets": "demo-fashion",
    }
    assert known[kind] in one


def test_the_list_of_presets_says_where_each_is_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "presets"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(lines) == set(preset_paths())
    for name, line in lines.items():
        described = read_yaml(preset_paths()[name])
        assert described["source"]
        assert line.endswith(f"{described['about']} [{described['source']}]")


def test_the_list_of_methods_says_what_each_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "methods"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(lines) == set(METHODS)
    for name, line in lines.items():
        method = METHODS.get(name)
        assert ("BatchNorm in the teacher" in line) == method.needs_batch_norm
        assert ("unlabelled images]" in line) == method.needs_unlabelled
        assert ("labelled images]" in line) == (method.needs_unlabelled or method.needs_labels)
        assert ("before the last layer" in line) == bool(method.needs_features)


def test_distill_then_evaluate(
    task: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(distill_words(task, out, "--no-kdci", "--seed", "4")) == 0
    text = capsys.readouterr().out
    assert "noise without KDCI: epoch 2/2" in text
    assert "(last step, without compensation)" in text
    accuracy = next(line.split()[1] for line in text.splitlines() if line.startswith("student:"))
    saved = read_settings(out / "config.yaml")
    assert (saved["kdci"], saved["seed"], saved["lr"]) == (False, 4, task["lr"])
    words = ["evaluate", "--network", str(out), "--data-root", str(task["data_root"])]
    assert main(words) == 0
    assert capsys.readouterr().out == f"accuracy: {accuracy} %\n"


def test_a_run_is_repeated_from_its_config_file(task: dict[str, Any], tmp_path: Path) -> None:
    assert main(distill_words(task, tmp_path / "a")) == 0
    config = str(tmp_path / "a" / "config.yaml")
    assert main(["distill", "--config", config, "--out-dir", str(tmp_path / "b")]) == 0
    assert main(["distill", f"--config={config}", f"--out-dir={tmp_path / 'c'}", "--seed=7"]) == 0
    a, b, c = ((tmp_path / n / "student.safetensors").read_bytes() for n in "abc")
    assert a == b
    assert a != c


def test_resume_needs_the_folder_alone(
    task: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(distill_words(task, out)) == 0
    student = (out / "student.safetensors").read_bytes()
    assert main(["distill", "--resume", "--out-dir", str(out)]) == 0
    assert (out / "student.safetensors").read_bytes() == student
    error = error_of(["distill", "--resume", "--out-dir", str(out), "--lr", "9"], capsys)
    assert "lr was 0.05 and is 9.0 now" in error


def test_user_mistakes_end_with_one_line(
    task: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"

    def fails(*more: str) -> str:
        return error_of(distill_words(task, out, *more), capsys)

    assert "did you mean 'distill'" in error_of(["distil"], capsys)
    assert "did you mean 'dafl'" in fails("--method", "dalf")
    assert "did you mean 'lenet5_half'" in fails("--student", "lenet5_halff")
    assert "did you mean 'presets'" in error_of(["list", "preset"], capsys)
    assert "unknown preset 'demo': did you mean" in fails("--preset", "demo")
    assert "teacher is required" in error_of(["distill"], capsys)
    assert "unknown network 'nowhere'" in fails("--teacher", "nowhere")
    assert "resnet18 is a network's name: give its weights" in fails("--teacher", "resnet18")
    assert "is a folder without student.safetensors" in fails("--teacher", str(task["data_root"]))
    assert "teacher=runs/nowhere is not there" in fails("--teacher", "runs/nowhere")
    assert "leave one out" in fails("--teacher-weights", "weights.pt")
    assert "no weights at" in fails("--teacher", "gone.safetensors")
    assert "temperature=0.0 must be > 0" in fails("--temperature", "0")
    assert "device=warp cannot be used" in fails("--device", "warp")
    assert "tiny_test.npz" in fails("--data-root", str(tmp_path))
    assert "dataset digits has 10 classes" in fails("--dataset", "digits")
    assert not out.exists()


def test_flags_that_do_not_exist_are_refused(
    task: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in (["--g-stepz", "3"], ["--epochs", "many"]):
        with pytest.raises(SystemExit) as stop:
            main(distill_words(task, tmp_path / "run", *more))
        assert stop.value.code == 2
        assert more[0] in capsys.readouterr().err


def test_damaged_and_foreign_weights(
    task: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "weights.pt"

    def fails(network: str) -> str:
        task["teacher"] = network
        words = ["--teacher-weights", str(weights), "--dataset", "tiny.npz"]
        return error_of(distill_words(task, tmp_path / "run", *words), capsys)

    torch.save(build_network("lenet5_bn", 4, 1).state_dict(), weights)
    error = fails("lenet5_half_bn")
    assert "do not fit lenet5_half_bn (bn1" in error or "do not fit lenet5_half_bn (conv1" in error
    assert "has shape" in error
    torch.save(build_network("lenet5", 4, 1).state_dict(), weights)
    assert "is missing" in fails("lenet5_bn")
    weights.write_bytes(b"\x80nonsense")
    assert "cannot be loaded" in (text := fails("lenet5_bn")) or "damaged" in text
    torch.save([1, 2], weights)
    assert "must hold a dict" in fails("lenet5_bn")
    weights.unlink()
    assert "no weights file at" in fails("lenet5_bn")
    (tmp_path / "teacher.safetensors").write_bytes(b"short")
    task["teacher"] = str(tmp_path / "teacher.safetensors")
    assert "is damaged" in error_of(distill_words(task, tmp_path / "run"), capsys)


def test_a_teacher_by_name_and_weights(task: dict[str, Any], tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    torch.save({"state_dict": build_network("lenet5_bn", 4, 1).state_dict()}, weights)
    task["teacher"] = "lenet5_bn"
    words = ["--teacher-weights", str(weights), "--dataset", "tiny.npz"]
    assert main(distill_words(task, tmp_path / "run", *words)) == 0


def test_train_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_task(tmp_path)
    random = np.random.default_rng(1)
    data = tmp_path / "data"
    images = random.integers(0, 256, (30, 32, 32), dtype=np.uint8)
    np.savez(data / "tiny_train.npz", images=images, labels=np.arange(30) % 4)
    out = tmp_path / "teacher"
    file = tmp_path / "teacher.yaml"
    file.write_text("network: lenet5_half_bn\nbatch_size: 10\nepochs: 5\n")
    words = ["train-teacher", "--config", str(file), "--dataset", "tiny.npz", "--device", "cpu"]
    words += ["--data-root", str(data), "--epochs", "2", "--out-dir", str(out)]
    assert main(words) == 0
    assert "epoch 2/2" in capsys.readouterr().out
    assert read_settings(out / "config.yaml")["batch_size"] == 10
    assert main(["evaluate", "--network", str(out), "--data-root", str(data)]) == 0
    assert "already holds a run" in error_of(words, capsys)
    assert "dataset is required" in error_of(["train-teacher"], capsys)
    assert "network is required" in error_of(["evaluate"], capsys)


def test_missing_packages_are_named(
    task: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    error = error_of(distill_words(task, tmp_path / "run"), capsys)
    assert error == 'error: the package tyro is needed: pip install "kdci_ext[zoo]"'


def test_ctrl_c_ends_with_130(
    task: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from python_models.engine import Distillation

    def interrupted(self: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Distillation, "advance", interrupted)
    assert main(distill_words(task, tmp_path / "run")) == 130
    assert capsys.readouterr().err == "stopped\n"
