# SPDX-License-Identifier: Apache-2.0
"""DAFL: both forms by hand, and the generator of its released code."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_task import CLASSES, in_double, make_task, resumed, start
from torch import Tensor, nn

from python_models.config import distill_config
from python_models.networks import Classifier, build_generator, count_parameters

WEIGHTS = {"oh": 0.5, "act": 0.1, "ie": 5.0}
JOINT = {
    "form": "joint",
    "entropy_base": "10",
    "generator": "generator_dafl",
    "kd_steps": 1,
    **WEIGHTS,
}


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    return make_task(tmp_path)


def generator_terms(teacher: Classifier, x: Tensor, log: Any) -> dict[str, Tensor]:
    """0.5 CE(t, argmax t), -0.1 |f| and 5 sum m log m for images in [0, 1], by hand."""
    features, t = teacher.features(x), teacher(x)
    p = t.softmax(1)
    mean = p.sum(0) / len(x)
    return {
        "oh": -0.5 * p[torch.arange(len(x)), t.argmax(1)].log().sum() / len(x),
        "act": -0.1 * features.abs().sum() / features.numel(),
        "ie": 5.0 * (mean * log(mean)).sum(),
    }


def copied(stream: torch.Generator) -> torch.Generator:
    return torch.Generator().set_state(stream.get_state())


def assert_gradients(loss: Tensor, of: nn.Module, found: nn.Module) -> None:
    gradients = torch.autograd.grad(loss, list(of.parameters()), retain_graph=True)
    for gradient, parameter in zip(gradients, found.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("base", "log"), [("e", torch.log), ("10", torch.log10)])
def test_every_term_of_the_alternating_generator_step(
    base: str, log: Any, task: dict[str, Any]
) -> None:
    run = in_double(start(task, "dafl", kdci=False, entropy_base=base, **WEIGHTS))
    method: Any = run.method
    generator, stream = copy.deepcopy(method.generator).train(), copied(method._latents)
    assert method.optimizer.defaults["betas"] == (0.5, 0.999)
    found = method.begin_round(0).losses
    x = generator(torch.randn(10, 8, generator=stream, dtype=torch.float64))
    expected = generator_terms(run.teacher, x, log)
    assert set(found) == set(expected)
    for name, term in expected.items():
        assert found[name].item() == pytest.approx(term.item(), rel=1e-6), name
    assert_gradients(sum(expected.values()), generator, method.generator)  # type: ignore[arg-type]
    # The student's images come from the generator as it is now, in eval mode.
    batch = method.next_batch()
    latents = torch.randn(12, 8, generator=stream, dtype=torch.float64)
    torch.testing.assert_close(batch.images, copy.deepcopy(method.generator).eval()(latents))


def test_every_term_of_the_joint_step(task: dict[str, Any]) -> None:
    """One batch of normalised images, one backward pass, generator and student at once."""
    run = in_double(start(task, "dafl", kdci=False, temperature=1.0, **JOINT))
    method: Any = run.method
    generator, student = copy.deepcopy(method.generator).train(), copy.deepcopy(run.student).train()
    stream = copied(method._latents)
    assert method.optimizer.defaults["betas"] == (0.9, 0.999)
    assert list(method.optimizers()) == [method.optimizer]
    logged: list[dict[str, Tensor]] = []
    run.log.add = lambda step, losses: logged.append(losses)  # type: ignore[method-assign, assignment]
    before = [
        p.detach().clone() for p in (*method.generator.parameters(), *run.student.parameters())
    ]
    run.advance()
    after = [*method.generator.parameters(), *run.student.parameters()]

    normalised = generator(torch.randn(12, 8, generator=stream, dtype=torch.float64))
    x = normalised * 0.5 + 0.5  # the teacher's mean and deviation
    expected = generator_terms(run.teacher, x, torch.log10)
    p = run.teacher.network(normalised.detach()).softmax(1)
    q = student.network(normalised.detach()).softmax(1)
    kd = (p.detach() * (p.log() - q.log())).sum() / 12
    assert logged[0] == {}  # no separate generator phase
    found = logged[1]
    assert set(found) == {"kd", *expected}
    for name, term in {"kd": kd, **expected}.items():
        assert found[name].item() == pytest.approx(term.item(), rel=1e-6), name
    total = kd + sum(expected.values())
    assert_gradients(total, generator, method.generator)
    assert_gradients(total, student, run.student)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True) if b.grad.any())


def test_the_joint_dictionary_is_that_of_the_steps_own_images(
    task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(task, "dafl", **JOINT)
    assert run.kdci is not None
    features: list[Tensor] = []
    learned: list[Tensor] = []
    update, loss = run.kdci.update, run.kdci.loss
    monkeypatch.setattr(
        run.kdci, "update", lambda x, **options: (features.append(x), update(x, **options))
    )
    monkeypatch.setattr(
        run.kdci, "loss", lambda s, t, *rest: (learned.append(t), loss(s, t, *rest))[1]
    )
    for _ in range(3):
        run.advance()
    assert len(features) == len(learned) == 3
    assert all(torch.equal(a, b) for a, b in zip(features, learned, strict=True))
    assert features[0].shape == (12, CLASSES)
    assert not features[0].requires_grad


def test_a_joint_run_goes_on_alike(task: dict[str, Any]) -> None:
    """Also with several joint steps to a dictionary, stopped between them."""
    settings = {**JOINT, "kd_steps": 2}
    whole = start(task, "dafl", **settings)
    while whole.step < 3:
        whole.advance()
    again = resumed(whole, start(task, "dafl", **settings))
    for run in (whole, again):
        while run.step < 7:
            run.advance()
    for part in ("student", "generator"):
        one, other = (
            {**run.student.state_dict(), **run.method.generator.state_dict()}  # type: ignore[attr-defined]
            for run in (whole, again)
        )
        assert all(torch.equal(one[name], other[name]) for name in one), part


def test_kdci_sees_the_images_of_its_twin_in_the_first_joint_step(task: dict[str, Any]) -> None:
    batches = []
    for kdci in (True, False):
        run = start(task, "dafl", kdci=kdci, **JOINT)
        run.method.begin_round(0)
        batches.append(run.method.next_batch().images)
    assert torch.equal(*batches)


def test_the_released_settings() -> None:
    """Weights of the three tasks, and the batch and schedule of each."""
    table = {
        "mnist": (1.0, 5.0, 0.1, 100, 512, 200, 0.2, 2e-3),
        "cifar10": (0.05, 5.0, 0.01, 1000, 1024, 2000, 0.02, 0.1),
        "cifar100": (0.5, 20.0, 0.1, 1000, 1024, 2000, 0.02, 0.1),
    }
    for name, expected in table.items():
        config = distill_config(preset=f"dafl-official-{name}")
        s, t = config.settings, config.training
        assert (s.oh, s.ie, s.act, s.latent_dim) == expected[:4]
        assert (t.batch_size, t.epochs, s.lr_g, t.lr) == expected[4:]
        assert (s.form, s.entropy_base, s.generator) == ("joint", "10", "generator_dafl")
        assert (t.ep_steps, t.kd_steps, t.temperature) == (120, 1, 1.0)


# -- the generator of the released code --------------------------------------


def test_its_generator() -> None:
    for latent_dim, channels, count in ((1000, 3, 8_423_939), (100, 1, 1_049_985)):
        with torch.device("meta"):
            generator = build_generator("generator_dafl", latent_dim, 32, channels)
        assert count_parameters(generator) == count
    norms = [layer for layer in generator.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert [layer.eps for layer in norms] == [1e-5, 0.8, 0.8, 1e-5]
    assert [layer.affine for layer in norms] == [True, True, True, False]


@pytest.mark.parametrize(
    ("mean", "std"), [((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)), ((0.3,), (0.4,)), ((0.0,), (1.0,))]
)
def test_the_classifier_undoes_its_normalisation(
    mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    classifier, normalised = Classifier(nn.Identity(), mean, std), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(classifier(classifier.denormalise(normalised)), normalised)
