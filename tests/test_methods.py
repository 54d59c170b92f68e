# SPDX-License-Identifier: Apache-2.0
"""Every method runs, with and without KDCI, on what it may open and nothing else."""

import builtins
import copy
import csv
import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_task import (
    CLASSES,
    METHOD_SETTINGS,
    in_double,
    make_task,
    rebuild,
    start,
    tiny_config,
)
from torch import Tensor

import python_models.data.labelled
from python_models import losses
from python_models.checkpoint import read_info
from python_models.config import distill_config
from python_models.data import to_float
from python_models.distill import distill
from python_models.engine import Distillation
from python_models.errors import DivergenceError, UserError
from python_models.methods import METHODS
from python_models.methods.base import Batch, Divergence, Method
from python_models.methods.kd3 import Views
from python_models.networks import build_network
from python_models.teacher import load_network

GENERATING = [
    name
    for name in METHODS
    if not (METHODS.get(name).needs_unlabelled or METHODS.get(name).needs_labels)
]
DEPLOYING = ("cid", "kd3")
"""Methods that deploy more than the student."""


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    return make_task(tmp_path)


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
    if method in DEPLOYING:
        rebuild(out)
        return
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


DESCRIBED = {"num_classes": CLASSES, "channels": 1, "image_size": 32, "normalisation": "none"}
"""What the dataset of the tiny task would say of it."""


@pytest.fixture
def named(task: dict[str, Any]) -> dict[str, Any]:
    """The task with a teacher that no file describes, so that the dataset must, or the user."""
    weights = task["data_root"] / "teacher.pt"
    torch.save(load_file(task["teacher"]), weights)
    return task | {"teacher": "lenet5_half_bn", "teacher_weights": weights, "evaluate": False}


@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS.get(name).needs_labels])
def test_the_train_split_does_not_describe_the_task_of_a_data_free_method(
    method: str, named: dict[str, Any], tmp_path: Path
) -> None:
    """Where there is no test split, a readable train split beside it is no help; flags are."""
    (named["data_root"] / "labelled_test.npz").unlink()
    train = named["data_root"] / "labelled_train.npz"
    config = tiny_config(named | {"dataset": "labelled.npz"}, method, out_dir=tmp_path / "run")
    with pytest.raises(UserError) as caught:
        distill(config)
    message = str(caught.value)
    assert f"labelled_test.npz, is not there, and its train split, {train}, is not" in message
    assert "--num-classes, --channels, --image-size, and --normalisation" in message
    train.write_bytes(b"not to be opened")
    settings = {**named, **METHOD_SETTINGS[method], **DESCRIBED, "dataset": "labelled.npz"}
    distill(distill_config(method=method, **settings, out_dir=tmp_path / "run"))


def test_the_train_split_describes_the_task_of_a_method_that_trains_on_it(
    named: dict[str, Any], tmp_path: Path
) -> None:
    (named["data_root"] / "labelled_test.npz").unlink()
    result = distill(tiny_config(named, "cid", out_dir=tmp_path / "run"))
    assert Path(result.student).is_file()


@pytest.mark.parametrize("size", [30, 50])
@pytest.mark.parametrize("method", [*GENERATING, "mosaickd"])
def test_images_may_have_any_size(method: str, size: int, tmp_path: Path) -> None:
    """Also one that no number of upsamplings makes, as 30 and 50, and of which the half is odd."""
    task = make_task(tmp_path, "resnet8", size) | {"student": "resnet8", "epochs": 1}
    extra = {"g_steps_half": 1} if method == "deepinversion" else {}
    config = tiny_config(task, method, **extra, ep_steps=2, kd_steps=1, out_dir=tmp_path / "run")
    result = distill(config)
    info = read_info(Path(result.student))
    assert info is not None
    assert info.image_shape == (1, size, size)
    assert result.accuracy is not None


def test_without_evaluation_no_original_data_is_needed_at_all(
    task: dict[str, Any], tmp_path: Path
) -> None:
    (task["data_root"] / "tiny_test.npz").unlink()
    result = distill(tiny_config(task, "dafl", evaluate=False, out_dir=tmp_path / "run"))
    assert result.accuracy is None
    assert Path(result.student).is_file()


@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_kdci_changes_nothing_but_the_compensation(method: str, task: dict[str, Any]) -> None:
    """Of the same seed, a run with KDCI and its vanilla twin start from the same student, see the
    same images with the same teacher's logits in all steps of the first round, and differ after the
    first step, which compensates.
    """
    seen: dict[bool, list[Batch]] = {}
    students: dict[bool, list[list[Tensor]]] = {}
    for kdci in (True, False):
        run = start(task, method, kdci=kdci, kd_steps=2, ep_steps=4)
        run.prepare()
        students[kdci] = [[p.detach().clone() for p in run.student.parameters()]]
        batches = seen[kdci] = []
        next_batch = run.method.next_batch

        def record(batches: list[Batch] = batches, draw: Any = next_batch) -> Batch:
            batch: Batch = draw()
            batches.append(batch)
            return batch

        run.method.next_batch = record  # type: ignore[method-assign]
        while run.step < 2:
            run.advance()
        students[kdci].append([p.detach().clone() for p in run.student.parameters()])
        assert run.round == run.warmup_rounds + 1
    assert len(seen[True]) == len(seen[False]) == 2
    for ours, vanilla in zip(seen[True], seen[False], strict=True):
        assert torch.equal(ours.images, vanilla.images)
        assert ours.teacher_logits is not None
        assert vanilla.teacher_logits is not None
        assert torch.equal(ours.teacher_logits, vanilla.teacher_logits)
    before, after = (zip(students[True][i], students[False][i], strict=True) for i in (0, 1))
    assert all(torch.equal(a, b) for a, b in before)
    assert not all(torch.equal(a, b) for a, b in after)


@pytest.mark.parametrize("method", GENERATING)
def test_the_dictionary_is_rebuilt_in_each_round_from_its_one_mini_batch(
    method: str, task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(task, method)
    assert run.kdci is not None
    features: list[Tensor] = []
    original = run.kdci.update
    monkeypatch.setattr(
        run.kdci, "update", lambda x, **options: (features.append(x), original(x, **options))
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
        run.kdci, "update", lambda x, **options: (features.append(x), original(x, **options))
    )
    run.prepare()
    while run.step < 4:
        run.advance()
    assert [len(found) for found in features] == [30]
    with torch.no_grad():
        expected = run.teacher(to_float(run.method.images))  # type: ignore[attr-defined]
    torch.testing.assert_close(features[0], expected)


@pytest.mark.parametrize("kdci", [True, False], ids=["kdci", "vanilla"])
@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_the_distillation_term_of_the_first_step_by_hand(
    method: str, kdci: bool, task: dict[str, Any]
) -> None:
    """9 KL_3(T || S), or of S + sum_i lambda_i P(z_i) z_i, in float64, with the teacher in eval and
    the student in train mode; KD3's student has the perturbed images in its batch.
    """
    run = in_double(start(task, method, kdci=kdci, temperature=3.0))
    run.warmup_rounds = 0
    run.prepare()
    student_losses = run.method.student_losses
    found: list[float] = []
    expected: list[float] = []

    @torch.no_grad()
    def logits(batch: Batch) -> Tensor:
        if not isinstance(batch, Views):
            student: Tensor = copy.deepcopy(run.student)(batch.images)
            return student
        network: Any = copy.deepcopy(run.deployed.network)
        features = network.feature_map(batch.normalised).mean((2, 3))
        return network.classifier(features[: len(batch.images)])  # type: ignore[no-any-return]

    def watched(batch: Batch, divergence: Divergence) -> dict[str, Tensor]:
        s, t = logits(batch), run.teacher(batch.images)
        expected.append(by_hand.distillation(s, t, 3.0))
        if run.kdci is not None:
            expected.append(by_hand.distillation(by_hand.compensated(run.kdci, s), t, 3.0))
        terms = student_losses(batch, divergence)
        assert terms["kd"].dtype == torch.float64
        found.append(terms["kd"].item())
        return terms

    run.method.student_losses = watched  # type: ignore[method-assign]
    run.advance()
    assert found[0] == pytest.approx(expected[-1], rel=1e-6)
    if kdci:
        assert found[0] != pytest.approx(expected[0], rel=1e-3)


ABLATIONS: tuple[dict[str, Any], ...] = (
    {"kdci_attention": "uniform"},
    {"kdci_attention": "random"},
    {"kdci_dictionary": "random"},
    {"kdci_dictionary": "shuffled"},
    {"kdci_dictionary": "classes"},
    {"kdci_proportions": "none"},
    {"kdci_weighting": "posterior"},
    {"kdci_prototypes": 5},
)


def first_step(run: Distillation) -> tuple[Tensor, Tensor, Tensor, float]:
    """Make the first student step; return both networks' logits, the prior and the divergence."""
    seen: list[tuple[Tensor, Tensor, Tensor, float]] = []
    divergence = run._divergence

    def watched(student: Tensor, teacher: Tensor) -> Tensor:
        assert run.kdci is not None
        with torch.random.fork_rng(devices=[]), torch.no_grad():  # random attention draws again
            prior = run.kdci(student) - student
        value = divergence(student, teacher)
        seen.append((student.detach(), teacher, prior, value.item()))
        return value

    run._divergence = watched  # type: ignore[method-assign]
    run.warmup_rounds = 0
    run.prepare()
    run.advance()
    assert all(map(math.isfinite, run.log.averages().values()))
    return seen[0]


@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_every_ablation_is_an_option_of_every_method(method: str, task: dict[str, Any]) -> None:
    """From the same logits of student and teacher in the first step, each adds a prior of its own
    to the student's, and the divergence is that of the sum, not the vanilla one.
    """
    settings = ({}, *ABLATIONS)
    runs = [in_double(start(task, method, kdci=True, **options)) for options in settings]
    temperature = runs[0].config.training.temperature
    steps = [first_step(run) for run in runs]
    for options, (student, teacher, prior, found) in zip(settings, steps, strict=True):
        assert torch.equal(student, steps[0][0])
        assert torch.equal(teacher, steps[0][1])
        expected = losses.kd_divergence(student + prior, teacher, temperature).item()
        assert found == pytest.approx(expected, rel=1e-9), options
        vanilla = losses.kd_divergence(student, teacher, temperature).item()
        assert found != pytest.approx(vanilla, rel=1e-5), options
    # Fresh networks say much the same of all images, which makes some priors nearly alike.
    for (*_, one, _), (*_, other, _) in itertools.combinations(steps, 2):
        assert (one - other).abs().max() > 1e-6 * one.abs().max()


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
        if len(calls) == 3:  # the second checkpoint: the first state is that before a round
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
