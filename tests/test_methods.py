# SPDX-License-Identifier: Apache-2.0
"""Every method runs, with and without KDCI, on what it may open and nothing else."""

import builtins
import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_task import CLASSES, METHOD_SETTINGS, make_task, tiny_config
from torch import Tensor

import python_models.data.labelled
from python_models import losses
from python_models.data import to_float
from python_models.engine import Distillation, distill
from python_models.errors import DivergenceError, UserError
from python_models.methods import METHODS
from python_models.methods.base import Method
from python_models.networks import build_network
from python_models.teacher import load_network

GENERATING = [name for name in METHODS if not METHODS.get(name).needs_unlabelled]


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    return make_task(tmp_path)


def start(task: dict[str, Any], method: str, **values: Any) -> Distillation:
    config = tiny_config(task, method, **values)
    assert config.task.teacher is not None
    teacher = load_network(config.task.teacher, None, None)
    return Distillation(config, teacher, torch.device("cpu"))


def test_every_method_is_tested_here() -> None:
    assert set(METHODS.names()) == set(METHOD_SETTINGS)


@pytest.mark.parametrize("kdci", [True, False], ids=["kdci", "vanilla"])
@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_a_run_leaves_all_its_files(
    method: str, kdci: bool, task: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = distill(tiny_config(task, method, kdci=kdci, out_dir=out))
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.yaml",
        "metrics.csv",
        "summary.json",
        "checkpoints",
        "student.safetensors",
        "images.png",
        "class_proportions.png",
    }
    for picture in ("images.png", "class_proportions.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(io.StringIO((out / "metrics.csv").read_text())))
    epochs = METHOD_SETTINGS[method].get("epochs", task["epochs"])
    assert [int(row["epoch"]) for row in rows] == list(range(1, epochs + 1))
    assert ("accuracy_compensated" in rows[0]) == kdci
    assert float(rows[-1]["accuracy"]) == pytest.approx(result.accuracy)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["accuracy"] == result.accuracy
    # What is exported is the bare student, which its own network loads.
    network = build_network("lenet5_half_bn", CLASSES, 1)
    network.load_state_dict(load_file(out / "student.safetensors"))
    assert load_network(str(out), None, None).info.network == "lenet5_half_bn"


@pytest.mark.parametrize("method", GENERATING)
def test_the_training_data_of_a_generator_method_is_never_opened(
    method: str, task: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = task["data_root"] / "tiny_train.npz"
    poison.write_bytes(b"not to be opened")
    opened: list[str] = []
    original = builtins.open

    def watched(file: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(str(file))
        return original(file, *args, **kwargs)

    def read_split(spec: Any, split: str, *args: Any, **kwargs: Any) -> Any:
        assert split == "test"
        return original_read(spec, split, *args, **kwargs)

    original_read = python_models.data.labelled.read_split
    monkeypatch.setattr(builtins, "open", watched)
    monkeypatch.setattr(io, "open", watched)
    monkeypatch.setattr(python_models.data.labelled, "read_split", read_split)
    distill(tiny_config(task, method, out_dir=tmp_path / "run"))
    assert not [name for name in opened if "train" in Path(name).name]


def test_without_evaluation_no_original_data_is_needed_at_all(
    task: dict[str, Any], tmp_path: Path
) -> None:
    (task["data_root"] / "tiny_test.npz").unlink()
    result = distill(tiny_config(task, "dafl", evaluate=False, out_dir=tmp_path / "run"))
    assert result.accuracy is None
    assert Path(result.student).is_file()


@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_kdci_changes_nothing_but_the_loss_before_the_first_student_step(
    method: str, task: dict[str, Any]
) -> None:
    first_images = []
    weights = []
    for kdci in (True, False):
        run = start(task, method, kdci=kdci)
        run.prepare()
        weights.append([p.clone() for p in run.student.parameters()])
        next_batch = run.method.next_batch
        seen: list[Tensor] = []

        def record(seen: list[Tensor] = seen, draw: Any = next_batch) -> Any:
            batch = draw()
            seen.append(batch.images.clone())
            return batch

        run.method.next_batch = record  # type: ignore[method-assign]
        while run.step < 2:
            run.advance()
        first_images.append(seen[0])
    assert torch.equal(*first_images)
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("method", GENERATING)
def test_the_dictionary_is_rebuilt_in_each_round_from_its_one_mini_batch(
    method: str, task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(task, method)
    assert run.kdci is not None
    features: list[Tensor] = []
    original = run.kdci.update
    monkeypatch.setattr(
        run.kdci, "update", lambda x, generator: (features.append(x), original(x, generator))
    )
    run.prepare()
    while run.step < 4:
        run.advance()
    assert len(features) == 2  # 4 steps, 2 of them a round; warm-up rounds have none
    for found in features:
        assert len(found) in (10, 12)


def test_the_dictionary_of_a_sampling_method_is_built_once_from_all_samples(
    task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(task, "dfnd")
    assert run.kdci is not None
    features: list[Tensor] = []
    original = run.kdci.update
    monkeypatch.setattr(
        run.kdci, "update", lambda x, generator: (features.append(x), original(x, generator))
    )
    run.prepare()
    while run.step < 4:
        run.advance()
    assert [len(found) for found in features] == [30]
    with torch.no_grad():
        expected = run.teacher(to_float(run.method.images))  # type: ignore[attr-defined]
    torch.testing.assert_close(features[0], expected)


def test_kdci_enters_the_divergence_and_nothing_else(task: dict[str, Any]) -> None:
    run = start(task, "dafl", temperature=3.0)
    assert run.kdci is not None
    run.advance()
    student, teacher = torch.randn(12, CLASSES), torch.randn(12, CLASSES)
    with_kdci = run._divergence(student, teacher)
    by_hand = losses.kd_divergence(run.kdci(student), teacher, 3.0)
    torch.testing.assert_close(with_kdci, by_hand)
    vanilla = start(task, "dafl", temperature=3.0, kdci=False)
    assert torch.equal(
        vanilla._divergence(student, teacher), losses.kd_divergence(student, teacher, 3.0)
    )


def test_kdci_weights_learn_with_the_student(task: dict[str, Any]) -> None:
    run = start(task, "dafl")
    assert run.kdci is not None
    before = [p.clone() for p in run.kdci.parameters()]
    for _ in range(4):
        run.advance()
    assert all(not torch.equal(a, b) for a, b in zip(before, run.kdci.parameters(), strict=True))
    assert len(run.optimizer.param_groups) == 1


@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_neither_the_teacher_nor_anything_it_holds_changes(
    method: str, task: dict[str, Any]
) -> None:
    run = start(task, method)
    before = {name: value.clone() for name, value in run.teacher.state_dict().items()}
    run.prepare()
    while run.step < 3:
        run.advance()
    assert all(torch.equal(value, before[name]) for name, value in run.teacher.state_dict().items())
    assert all(p.grad is None for p in run.teacher.parameters())
    assert not any(m._forward_pre_hooks for m in run.teacher.modules())


def test_dafl_generator_losses(task: dict[str, Any]) -> None:
    run = start(task, "dafl", oh=0.5, act=0.1, ie=5.0, entropy_base="10")
    images = torch.rand(10, 1, 32, 32)
    found = run.method.generator_losses(images)  # type: ignore[attr-defined]
    features = run.teacher.features(images)
    p = run.teacher(images).softmax(1)
    mean = p.mean(0)
    assert found["oh"].item() == pytest.approx(-0.5 * p.amax(1).log().mean().item(), rel=1e-5)
    assert found["act"].item() == pytest.approx(-0.1 * features.abs().mean().item(), rel=1e-5)
    expected = 5.0 * (mean * mean.log10()).sum().item()
    assert found["ie"].item() == pytest.approx(expected, rel=1e-5)


def test_fast_generator_losses(task: dict[str, Any]) -> None:
    run = start(task, "fast", bn=3.0, oh=0.5, adv=2.0)
    run.student.eval()
    images, targets = torch.rand(10, 1, 32, 32), torch.arange(10) % CLASSES
    method: Any = run.method
    found = method.generator_losses(images, targets, adversarial=True)
    t, s = run.teacher(images), run.student(images)
    expected_oh = -0.5 * t.log_softmax(1)[torch.arange(10), targets].mean().item()
    agree = (t.argmax(1) == s.argmax(1)).float()
    kl = (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1)
    assert found["oh"].item() == pytest.approx(expected_oh, rel=1e-5)
    assert found["adv"].item() == pytest.approx(-2.0 * (agree * kl).mean().item(), rel=1e-5)
    statistics = losses.BatchNormStatistics(run.teacher)
    with statistics:
        run.teacher(images)
    assert found["bn"].item() == pytest.approx(3.0 * statistics.loss().item(), rel=1e-5)
    assert "adv" not in method.generator_losses(images, targets, adversarial=False)


@pytest.mark.parametrize("meta", ["fomaml", "reptile", "none"])
def test_fast_meta_step(meta: str, task: dict[str, Any]) -> None:
    run = start(task, "fast", meta=meta, g_steps=3)
    method: Any = run.method
    before = [p.detach().clone() for p in method.generator.parameters()]
    inner_gradients: list[list[Tensor]] = []
    inner_weights: list[Tensor] = []
    original_step = torch.optim.Adam.step

    def step(self: torch.optim.Adam, *args: Any) -> Any:
        if self is not method.optimizer:
            group = self.param_groups[0]["params"]
            inner_gradients.append([p.grad.clone() for p in group])
        result = original_step(self, *args)
        if self is not method.optimizer:
            inner_weights[:] = [p.detach().clone() for p in self.param_groups[0]["params"]]
        return result

    torch.optim.Adam.step = step  # type: ignore[method-assign, assignment]
    try:
        method.begin_round(0)
    finally:
        torch.optim.Adam.step = original_step  # type: ignore[method-assign]
    after = list(method.generator.parameters())
    if meta == "none":
        assert all(torch.equal(a, b) for a, b in zip(after, inner_weights, strict=True))
        return
    assert method.optimizer.param_groups[0]["lr"] == pytest.approx(2e-3 * 3)
    for i, parameter in enumerate(after):
        if meta == "fomaml":
            expected = sum(gradients[i] for gradients in inner_gradients)
        else:
            expected = 67.0 * (before[i] - inner_weights[i])
        torch.testing.assert_close(parameter.grad, expected)
        assert not torch.equal(parameter, before[i])


def test_fast_keeps_the_images_of_the_lowest_loss(
    task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(task, "fast", g_steps=4, lr_g=0.5, lr_z=5.0, crop=0, flip=False)
    method: Any = run.method
    tried: list[tuple[float, Tensor]] = []
    original = method.generator_losses

    def record(images: Tensor, *args: Any, **kwargs: Any) -> Any:
        terms = original(images, *args, **kwargs)
        tried.append((sum(term.item() for term in terms.values()), images.detach().clone()))
        return terms

    monkeypatch.setattr(method, "generator_losses", record)
    synthesis = method.begin_round(0)
    best = min(tried, key=lambda pair: pair[0])[1]
    assert torch.equal(synthesis.batch.images, best)
    assert len(method.pool) == 10


def test_fast_resets_the_first_layers_once(task: dict[str, Any]) -> None:
    run = start(task, "fast", warmup=0, reset_after=1, meta="reptile", lr_g=1e-9)
    method: Any = run.method
    stems = []
    for index in range(3):
        method.begin_round(index)
        stems.append(method.generator.stem.weight.detach().clone())
    assert (stems[1] - stems[0]).abs().max() > 0.01
    assert stems[1].std().item() == pytest.approx(0.02, rel=0.1)
    torch.testing.assert_close(stems[1], stems[2], atol=1e-4, rtol=0)


def test_methods_that_need_batch_norm_say_so(tmp_path: Path) -> None:
    task = make_task(tmp_path, network="lenet5_half")
    with pytest.raises(ValueError, match="no BatchNorm layer with running statistics"):
        start(task, "fast")


def test_generator_methods_have_no_pass_over_images(task: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="ep_steps=0 needs a sampling method"):
        start(task, "dafl", ep_steps=0)


def test_a_nan_stops_the_run_and_names_step_and_term(
    task: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Method.student_losses

    def poisoned(self: Method[Any], *args: Any) -> dict[str, Tensor]:
        terms = original(self, *args)
        calls.append(1)
        if len(calls) == 6:
            terms["kd"] = terms["kd"] * float("nan")
        return terms

    calls: list[int] = []
    monkeypatch.setattr(Method, "student_losses", poisoned)
    expected = r"the loss term 'kd' became nan at step 5; the last checkpoint, .*last.pt"
    with pytest.raises(DivergenceError, match=expected):
        distill(tiny_config(task, "dafl", out_dir=tmp_path / "run"))


def test_spoilt_weights_are_not_saved(
    task: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step may spoil the generator after its losses were still finite."""
    original = Method.state_dict

    def spoilt(self: Method[Any]) -> dict[str, Any]:
        state = original(self)
        calls.append(1)
        if len(calls) == 2:
            next(iter(state["generator"].values())).fill_(torch.nan)
        return state

    calls: list[int] = []
    monkeypatch.setattr(Method, "state_dict", spoilt)
    expected = r"method.generator.* became nan or infinite .*; the last checkpoint, .*last.pt"
    with pytest.raises(DivergenceError, match=expected):
        distill(tiny_config(task, "dafl", out_dir=tmp_path / "run"))
    distill(tiny_config(task, "dafl", out_dir=tmp_path / "run", resume=True))


def test_a_dictionary_larger_than_its_batch_is_refused(task: dict[str, Any]) -> None:
    run = start(task, "dafl", kdci_prototypes=13)
    with pytest.raises(UserError, match="kdci_prototypes=13 must be <= the 12 images"):
        run.advance()


def test_the_learning_rate_follows_the_epochs(task: dict[str, Any]) -> None:
    run = start(task, "noise", epochs=4, lr=1.0, lr_min=0.1)
    rates = []
    while run.step < run.total_steps:
        run.advance()
        rates.append(round(run.optimizer.param_groups[0]["lr"], 4))
    half = [1 + np.cos(np.pi * e / 4) for e in range(4)]
    assert rates == [round(0.1 + 0.9 * h / 2, 4) for h in half for _ in range(4)]
