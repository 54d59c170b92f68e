# SPDX-License-Identifier: Apache-2.0
"""MosaicKD: its game by hand, its mixed batches, selection, schedules and one dictionary."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_task import in_double, make_task, resumed, start
from torch import Tensor, nn

from python_models.data import to_float
from python_models.errors import UserError
from python_models.networks import DISCRIMINATORS, build_discriminator, count_parameters

WEIGHTS = {"local": 0.5, "align": 0.6, "balance": 3.0, "adv": 0.7}


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    return make_task(tmp_path)


def are_among(images: Tensor, known: Tensor) -> bool:
    equal = images.flatten(1)[:, None] == known.flatten(1)[None]
    return bool(equal.all(2).any(1).all())


def test_every_term_of_one_round_and_its_gradients(task: dict[str, Any]) -> None:
    """One discriminator step, then one generator step on the same images against the new
    discriminator, both with all networks in train mode but the teacher; float64, by hand.
    """
    run = in_double(start(task, "mosaickd", kdci=False, **WEIGHTS))
    run.prepare()
    method: Any = run.method
    generator, discriminator, student = (
        copy.deepcopy(m).train() for m in (method.generator, method.discriminator, run.student)
    )
    stream = torch.Generator()
    stream.set_state(method._latents.get_state())
    order = torch.Generator()
    order.set_state(run.randomness.on_cpu("order of patches").get_state())

    found = method.begin_round(0).losses

    x = generator(torch.randn(6, 8, generator=stream, dtype=torch.float64))
    real = to_float(method.images[torch.randperm(30, generator=order)[:6]]).double()
    fake_map = discriminator((x.detach() - 0.5) / 0.5)
    real_map = discriminator((real - 0.5) / 0.5)
    assert fake_map.shape == (6, 1, 8, 8)
    d_loss = 0.5 * ((1 + fake_map.exp()).log().sum() + (1 + (-real_map).exp()).log().sum()) / 12
    assert found["discriminator"].item() == pytest.approx(d_loss.item(), rel=1e-6)
    for gradient, parameter in zip(
        torch.autograd.grad(d_loss, list(discriminator.parameters())),
        method.discriminator.parameters(),
        strict=True,
    ):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-8)

    t, s = run.teacher(x), student(x)
    p, q = t.softmax(1), s.softmax(1)
    m = p.mean(0)
    stepped = copy.deepcopy(method.discriminator)
    expected = {
        "local": 0.5 * (1 + (-stepped((x - 0.5) / 0.5)).exp()).log().sum() / 6,
        "align": 0.6 * -(p * p.log()).sum() / 6,
        "balance": 3.0 * (m * m.log2()).sum(),
        "adv": -0.7 * (p * (p.log() - q.log())).sum() / 6,
    }
    assert set(found) == {*expected, "discriminator"}
    for name, term in expected.items():
        assert found[name].item() == pytest.approx(term.item(), rel=1e-6), name
    gradients = torch.autograd.grad(sum(expected.values()), list(generator.parameters()))
    for gradient, parameter in zip(gradients, method.generator.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-8)
    assert all(p.grad is None for p in run.student.parameters())


def test_half_of_the_students_images_are_generated_half_sampled(task: dict[str, Any]) -> None:
    run = in_double(start(task, "mosaickd", kdci=False, crop=0, flip=False))
    run.prepare()
    method: Any = run.method
    method.begin_round(0)
    stream = torch.Generator()
    stream.set_state(method._latents.get_state())
    generator = copy.deepcopy(method.generator).train()
    batch = method.next_batch()
    x = generator(torch.randn(6, 8, generator=stream, dtype=torch.float64))
    assert len(batch.images) == 12
    torch.testing.assert_close(batch.images[:6], x)
    assert are_among(batch.images[6:], to_float(method.images).double())


def test_sampled_images_are_augmented_for_the_student_alone(task: dict[str, Any]) -> None:
    run = start(task, "mosaickd", crop=4)
    run.prepare()
    method: Any = run.method
    known = to_float(method.images)
    assert are_among(method._sample(method._real_order), known)
    assert not are_among(method.next_batch().images[6:], known)


def test_the_student_is_in_train_mode_in_the_generators_step(task: dict[str, Any]) -> None:
    run = start(task, "mosaickd")
    run.prepare()
    run.student.eval()
    run.method.begin_round(0)
    norms = [m for m in run.student.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [int(norm.num_batches_tracked) for norm in norms] == [1] * len(norms)


def test_one_dictionary_of_all_selected_images_compensates_the_whole_batch(
    task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(task, "mosaickd")
    assert run.kdci is not None
    features: list[Tensor] = []
    compensated: list[int] = []
    update, loss = run.kdci.update, run.kdci.loss
    monkeypatch.setattr(
        run.kdci, "update", lambda x, **options: (features.append(x), update(x, **options))
    )
    monkeypatch.setattr(
        run.kdci, "loss", lambda s, *rest: (compensated.append(len(s)), loss(s, *rest))[1]
    )
    run.prepare()
    while run.step < 6:
        run.advance()
    assert compensated == [12] * 6
    assert [len(x) for x in features] == [30]
    method: Any = run.method
    torch.testing.assert_close(features[0], run.teacher(to_float(method.images)))
    # By default it holds 128 prototypes.
    assert start(task, "mosaickd", kdci_prototypes=None).kdci.num_prototypes == 128  # type: ignore[union-attr]


def test_all_three_learning_rates_follow_one_cosine_by_rounds(task: dict[str, Any]) -> None:
    run = start(task, "mosaickd", lr=0.1, lr_g=0.02, lr_d=0.03, epochs=2, kd_steps=2)
    method: Any = run.method
    assert run.steps_per_epoch == 5 * 2  # 30 images, 6 a round
    assert method.optimizer_g.defaults["betas"] == method.optimizer_d.defaults["betas"]
    assert method.optimizer_g.defaults["betas"] == (0.5, 0.999)
    run.prepare()
    while run.step < run.total_steps:
        done = run.step // 2 / 10
        run.advance()
        factor = 0.5 * (1 + math.cos(math.pi * done))
        for optimizer, base in (
            (run.optimizer, 0.1),
            (method.optimizer_g, 0.02),
            (method.optimizer_d, 0.03),
        ):
            assert optimizer.param_groups[0]["lr"] == pytest.approx(base * factor)


def test_a_run_stopped_within_a_round_goes_on_alike(task: dict[str, Any]) -> None:
    """Also the orders of both passes over the unlabelled images and the generator's mode."""
    whole = start(task, "mosaickd", kd_steps=3)
    whole.prepare()
    while whole.step < 4:
        whole.advance()
    again = resumed(whole, start(task, "mosaickd", kd_steps=3))
    for run in (whole, again):
        while run.step < 12:
            run.advance()
    for one, other in zip(whole.student.parameters(), again.student.parameters(), strict=True):
        assert torch.equal(one, other)


def test_resuming_with_other_unlabelled_images_is_refused(task: dict[str, Any]) -> None:
    run = start(task, "mosaickd")
    run.prepare()
    for count, message in ((9, "holds 9 images, but 50"), (50, "holds other images")):
        images = np.zeros((count, 24, 24), dtype=np.uint8)
        labels = np.zeros(count, dtype=np.int64)
        np.savez(task["data_root"] / "wild.npz", images=images, labels=labels)
        with pytest.raises(UserError, match=f"unlabelled {message}"):
            resumed(run, start(task, "mosaickd"))


# -- selection ---------------------------------------------------------------


@pytest.mark.parametrize("by", ["entropy", "confidence"])
def test_the_images_the_teacher_is_least_certain_of_are_kept(by: Any, task: dict[str, Any]) -> None:
    """30 of 50 by the highest entropy or the lowest confidence, which do not rank alike."""
    run = start(task, "mosaickd", select_by=by)
    with torch.no_grad():
        run.teacher.network.fc.weight.mul_(40)
    candidates = to_float(run._open_unlabelled().load())
    p = run.teacher(candidates).softmax(1)
    doubt = {"entropy": -(p * p.log()).sum(1), "confidence": -p.amax(1)}
    assert doubt["entropy"].argsort().tolist() != doubt["confidence"].argsort().tolist()
    logits = run.method.prepare()
    method: Any = run.method
    assert method.indices.tolist() == doubt[by].argsort(descending=True)[:30].tolist()
    assert torch.equal(to_float(method.images), candidates[method.indices])
    assert logits is not None
    torch.testing.assert_close(logits.softmax(1), p[method.indices], atol=1e-5, rtol=1e-4)


def test_by_default_all_unlabelled_images_are_used(task: dict[str, Any]) -> None:
    run = start(task, "mosaickd", select=None)
    run.prepare()
    assert len(run.method.images) == 50
    assert run.steps_per_epoch == 50 // 6 * 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"select": 0}, "select=0 must be >= 1"),
        ({"batch_size": 1}, "batch_size=1 must be >= 2"),
        ({"discriminator": "discriminator_pach"}, "did you mean 'discriminator_patch'"),
        ({"unlabelled": None}, "--unlabelled"),
    ],
)
def test_impossible_settings_are_refused(
    values: dict[str, Any], message: str, task: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        start(task, "mosaickd", **values)


# -- the discriminator -------------------------------------------------------


def test_the_patch_discriminator() -> None:
    """531,328 parameters; each logit depends on the 10x10 pixels around it and no others."""
    with torch.device("meta"):
        assert count_parameters(build_discriminator("discriminator_patch")) == 531_328
    for name in DISCRIMINATORS:
        discriminator = build_discriminator(name, 1).eval()
        images = torch.rand(2, 1, 32, 32, requires_grad=True)
        logits = discriminator(images)
        assert logits.shape == (2, 1, 8, 8)
        (gradient,) = torch.autograd.grad(logits[0, 0, 3, 4], images)
        rows, columns = gradient[0, 0].nonzero().unbind(1)
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (9, 18, 13, 22)
        assert not gradient[1].any()
    with pytest.raises(ValueError, match="channels=0 must be at least 1"):
        build_discriminator("discriminator_patch", 0)
