# SPDX-License-Identifier: Apache-2.0
"""CID: its loss by hand, its context matrix, and the head that is evaluated and exported."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from by_hand import dot, probabilities
from tiny_task import CLASSES, in_double, make_task, rebuild, tiny_config
from tiny_task import start as start_run
from torch import Tensor

from python_models.data import load_labelled, to_float
from python_models.distill import distill
from python_models.engine import Distillation
from python_models.errors import UserError
from python_models.evaluate import accuracy
from python_models.losses import class_representation_loss, kd_divergence, normalised_mse_loss
from python_models.methods.cid import CID, LabelledBatch

FORMS = ["code", "paper"]
LABELS = torch.tensor([0, 1, 0, 2, 2, 0, 1, 3])
"""Classes of a batch; class 3 has a single image, so no relations."""


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    return make_task(tmp_path)


def start(task: dict[str, Any], **values: Any) -> tuple[Distillation, CID]:
    """Return a run in float64, with its method."""
    run = start_run(task, "cid", **{"kdci": False, **values})
    method = run.method
    assert isinstance(method, CID)
    in_double(run)
    run.deployed.eval()
    return run, method


def random_batch(run: Distillation, labels: Tensor, seed: int = 0) -> LabelledBatch:
    images = torch.rand(
        len(labels),
        *(1, 32, 32),
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
    )
    with torch.no_grad():
        features = run.teacher.features(images)
        # Larger logits than a fresh teacher's, so that its certainty differs between images.
        logits = 20 * run.teacher.classify(features)
    return LabelledBatch(images, logits, labels, features)


def cosine(a: list[float], b: list[float]) -> float:
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def class_term(student: Tensor, teacher: Tensor, form: str) -> float:
    """Differences of the cosines of all pairs, class by class."""
    f, g = student.tolist(), teacher.tolist()
    terms = []
    for k in range(CLASSES):
        rows = [b for b in range(len(LABELS)) if LABELS[b] == k]
        if len(rows) >= 2:
            squared = sum(
                (cosine(f[i], f[j]) - cosine(g[i], g[j])) ** 2 for i in rows for j in rows
            )
            terms.append(squared / len(rows) ** 2 if form == "code" else math.sqrt(squared))
    assert len(terms) == 3
    return sum(terms) / len(terms) if form == "code" else sum(terms)


@pytest.mark.parametrize("form", FORMS)
def test_every_term_of_a_step(form: str, task: dict[str, Any]) -> None:
    """The divergence is of the student's own logits, the cross-entropy of the head's."""
    run, method = start(task, form=form, sr=0.3, cr=0.7, context_temperature=3.0)
    context = torch.randn(CLASSES, 42, dtype=torch.float64)
    method.network.set_context(context)
    method.is_intervening = True
    batch = random_batch(run, LABELS)
    assert batch.teacher_logits is not None
    assert batch.teacher_features is not None
    found = method.student_losses(batch, lambda s, t: kd_divergence(s, t, 4.0))
    with torch.no_grad():
        features = run.student.features(batch.images)
        logits = run.student.classify(features)
        mapped = method.transform(features)
    b = len(LABELS)
    expected = {
        "kd": 0.0,
        "sr": 0.0,
        "cr": 0.7 * class_term(features, batch.teacher_features, form),
    }
    expected["inv"] = 0.0
    weight, bias = method.network.head.weight.tolist(), method.network.head.bias.tolist()
    for i in range(b):
        q, r = probabilities(batch.teacher_logits[i], 4), probabilities(logits[i], 4)
        expected["kd"] += 16 / b * sum(x * math.log(x / y) for x, y in zip(q, r, strict=True))
        g = batch.teacher_features[i].tolist()
        distance = sum((x - y) ** 2 for x, y in zip(mapped[i].tolist(), g, strict=True))
        expected["sr"] += 0.3 / b * distance / sum(y * y for y in g)
        a = probabilities(logits[i], 3)
        mean = [sum(a[k] * context[k, d].item() for k in range(CLASSES)) for d in range(42)]
        both = features[i].tolist() + mean
        scores = [dot(weight[k], both) + bias[k] for k in range(CLASSES)]
        certainty = probabilities(scores)
        expected["inv"] -= math.log(certainty[int(LABELS[i])]) / b
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("form", FORMS)
def test_the_context_is_a_constant_in_the_form_of_the_code_alone(
    form: str, task: dict[str, Any]
) -> None:
    """The student's classifier is in the intervention by the coefficients and nowhere else."""
    run, method = start(task, form=form)
    method.network.set_context(torch.randn(CLASSES, 42, dtype=torch.float64))
    method.is_intervening = True
    terms = method.student_losses(random_batch(run, LABELS), kd_divergence)
    terms["inv"].backward()
    gradient = run.student.network.fc.weight.grad  # type: ignore[union-attr]
    assert (gradient is None) == (form == "code")
    assert gradient is None or gradient.abs().sum() > 0


@pytest.mark.parametrize("form", FORMS)
def test_the_context_matrix_in_a_plain_loop(form: str, task: dict[str, Any]) -> None:
    """Means of the epoch before, weighted by the teacher's certainty of the true class.

    In the second epoch class 3 does not occur and keeps its row; the first epoch is forgotten.
    """
    run, method = start(task, form=form, init_epochs=1, epochs=4, context_temperature=3.0)
    expected = [[0.0] * 42 for _ in range(CLASSES)]
    epochs = [[LABELS, LABELS.flip(0)], [LABELS % 3, (LABELS + 1) % 3]]
    for index, epoch in enumerate(epochs):
        method.begin_epoch(index)
        sums = [[0.0] * 42 for _ in range(CLASSES)]
        weights = [0.0] * CLASSES
        for number, labels in enumerate(epoch):
            batch = random_batch(run, labels, seed=10 * index + number)
            assert batch.teacher_logits is not None
            method.student_losses(batch, kd_divergence)
            features = run.student.features(batch.images).tolist()
            for f, t, y in zip(features, batch.teacher_logits, labels.tolist(), strict=True):
                w = probabilities(t, 3.0 if form == "code" else 1.0)[y]
                weights[y] += w
                sums[y] = [s + w * x for s, x in zip(sums[y], f, strict=True)]
        method.begin_epoch(index + 1)
        for k in range(CLASSES):
            # A quarter of the training images are of each class.
            share = 0.25 if form == "paper" else 1.0
            if weights[k] > 0:
                expected[k] = [share * s / weights[k] for s in sums[k]]
        torch.testing.assert_close(
            method.network.context,
            torch.tensor(expected, dtype=torch.float64),
            rtol=1e-6,
            atol=1e-9,
        )


def test_the_intervention_waits_for_the_initial_epochs(task: dict[str, Any]) -> None:
    """Until then the student's own logits are what is evaluated."""
    run, method = start(task, init_epochs=2, epochs=4)
    batch = random_batch(run, LABELS)
    for index in range(4):
        method.begin_epoch(index)
        terms = method.student_losses(batch, kd_divergence)
        assert ("inv" in terms) == (index >= 2)
        deployed, own = run.deployed(batch.images), run.student(batch.images)
        # Not bitwise: the head's input, which holds the features, is strided otherwise.
        assert torch.allclose(deployed, own, rtol=1e-9, atol=1e-12) == (index < 2)


def test_the_map_of_features_is_not_decayed(task: dict[str, Any]) -> None:
    run, method = start(task, weight_decay=0.1, nesterov=True)
    assert all(group["nesterov"] for group in run.optimizer.param_groups)
    decay = {
        id(parameter): group["weight_decay"]
        for group in run.optimizer.param_groups
        for parameter in group["params"]
    }
    assert {decay[id(p)] for p in method.transform.parameters()} == {0.0}
    others = [*run.student.parameters(), *method.network.head.parameters()]
    assert {decay[id(p)] for p in others} == {0.1}


@pytest.mark.parametrize("form", FORMS)
def test_the_exported_file_predicts_with_head_and_context(
    form: str, task: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = distill(tiny_config(task, "cid", form=form, out_dir=out))
    network = rebuild(out)
    assert bool(network.network.is_ready)
    assert network.network.context.abs().sum() > 0  # type: ignore[operator, union-attr]
    test = load_labelled("labelled.npz", "test", task["data_root"])
    assert accuracy(network, test, torch.device("cpu")) == result.accuracy


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init_epochs": 0}, "init_epochs=0"),
        ({"init_epochs": 3}, "below epochs=3"),
        ({"context_temperature": 0.0}, "context_temperature=0.0 must be > 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    values: dict[str, Any], message: str, task: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=message):
        start(task, **values)


def test_momentum_of_nesterov_needs_momentum(task: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"nesterov=True needs a momentum above 0, got 0\.0"):
        distill(tiny_config(task, "cid", nesterov=True, momentum=0.0))


def test_kdci_compensates_the_students_own_logits(task: dict[str, Any]) -> None:
    """The divergence takes S + F; all other terms are those of the vanilla twin."""
    terms = {}
    for kdci in (True, False):
        run = start_run(task, "cid", kdci=kdci, temperature=2.5)
        run.prepare()
        method = run.method
        assert isinstance(method, CID)
        method.network.set_context(torch.ones(CLASSES, 42))
        method.is_intervening = True
        run.deployed.eval()
        batch = method.next_batch()
        terms[kdci] = method.student_losses(batch, run._divergence)
        if run.kdci is not None:
            assert batch.teacher_logits is not None
            compensated = run.kdci(run.student(batch.images))
            by_hand = kd_divergence(compensated, batch.teacher_logits, 2.5)
            assert terms[kdci]["kd"].item() == pytest.approx(by_hand.item(), rel=1e-4)
    assert not torch.equal(terms[True]["kd"], terms[False]["kd"])
    for name in ("sr", "cr", "inv"):
        assert torch.equal(terms[True][name], terms[False][name])


def test_the_dictionary_is_built_from_all_training_images(task: dict[str, Any]) -> None:
    run = start_run(task, "cid")
    features = run.method.prepare()
    images = load_labelled("labelled.npz", "train", task["data_root"]).images
    torch.testing.assert_close(features, run.teacher(to_float(images)))


@pytest.mark.parametrize("form", FORMS)
def test_equal_relations_have_a_finite_gradient(form: Any) -> None:
    """The root of 0 has an infinite derivative, which must not become NaN."""
    f = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1, 2])
    loss = class_representation_loss(f, f.detach().clone(), labels, 4, form)
    (gradient,) = torch.autograd.grad(loss, f)
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    assert gradient.isfinite().all()
    alone = class_representation_loss(f, torch.randn(5, 2).double(), torch.arange(5), 5, form)
    assert alone.item() == 0.0


def test_a_target_of_zeros_counts_nothing() -> None:
    f = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    g = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]], dtype=torch.float64)
    loss = normalised_mse_loss(f, g)
    (gradient,) = torch.autograd.grad(loss, f)
    assert loss.item() == pytest.approx((1 + 1 + 1) / 4 / 2)
    assert gradient[0].tolist() == [0, 0, 0]
    assert gradient[1].isfinite().all()


def test_labelled_images_of_another_shape_are_refused(task: dict[str, Any]) -> None:
    images = np.zeros((9, 16, 16), dtype=np.uint8)
    np.savez(task["data_root"] / "small_train.npz", images=images, labels=np.arange(9) % 4)
    with pytest.raises(UserError, match=r"dataset small\.npz has 4 classes of images"):
        start(task, dataset="small.npz")


def test_resuming_with_other_labels_is_refused(task: dict[str, Any], tmp_path: Path) -> None:
    distill(tiny_config(task, "cid", out_dir=tmp_path / "run"))
    path = task["data_root"] / "labelled_train.npz"
    images = np.load(path)["images"]
    np.savez(path, images=images, labels=np.arange(40)[::-1] % CLASSES)
    with pytest.raises(UserError, match="dataset holds other images than when the run began"):
        distill(tiny_config(task, "cid", out_dir=tmp_path / "run", resume=True))
