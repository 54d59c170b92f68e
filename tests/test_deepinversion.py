# SPDX-License-Identifier: Apache-2.0
"""DeepInversion: its loss by hand, its forms as settings, and which images it keeps."""

import math
from pathlib import Path
from typing import Any

import by_hand
import pytest
import torch
from tiny_task import CLASSES, make_task, start
from torch import Tensor

import python_models.methods.deepinversion as module
from python_models import losses
from python_models.data import RandomRollFlip
from python_models.errors import UserError

STILL: dict[str, Any] = {"jitter": 0, "mirror": False}
"""Settings with which the teacher sees the images as they are."""


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    return make_task(tmp_path)


def method_of(task: dict[str, Any], **values: Any) -> Any:
    return start(task, "deepinversion", **values).method


def record_inputs(method: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, Tensor]]:
    """Return a list that fills with each step's loss and normalised images."""
    seen: list[tuple[float, Tensor]] = []
    original = method.image_losses

    def record(inputs: Tensor, targets: Tensor) -> Any:
        terms = original(inputs, targets)
        seen.append((sum(term.item() for term in terms.values()), inputs.detach().clone()))
        return terms

    monkeypatch.setattr(method, "image_losses", record)
    return seen


# --- the loss -------------------------------------------------------------------------------------


def competition(student: Tensor, teacher: Tensor) -> float:
    """J of Adaptive DeepInversion, in loops."""

    def clamp(x: float) -> float:
        return min(max(x, 0.01), 0.99)

    result = 0.0
    for s, t in zip(student, teacher, strict=True):
        p, q = by_hand.probabilities(s, 3), by_hand.probabilities(t, 3)
        for a, b in zip(p, q, strict=True):
            m = clamp((a + b) / 2)
            result += 0.5 * m * (math.log(m / clamp(a)) + math.log(m / clamp(b))) / len(student)
    return result


def neighbours(images: Tensor) -> list[list[float]]:
    """Differences to the right, lower and both diagonal neighbours, pixel by pixel."""
    found: list[list[float]] = [[], [], [], []]
    height, width = images.shape[-2:]
    for plane in images.reshape(-1, height, width).tolist():
        for i in range(height):
            for j in range(width):
                for kind, (di, dj) in enumerate([(0, 1), (1, 0), (1, 1), (1, -1)]):
                    if i + di < height and 0 <= j + dj < width:
                        found[kind].append(plane[i][j] - plane[i + di][j + dj])
    return found


@pytest.mark.parametrize("form", ["clamped", "plain"])
@pytest.mark.parametrize("over", ["batch", "image"])
def test_every_term_of_a_step(form: str, over: str, task: dict[str, Any]) -> None:
    """Smoothness and norm are of the normalised images, the rest is as the networks see them."""
    weights = {"oh": 0.5, "bn": 2.0, "tv_l2": 0.3, "tv_l1": 0.7, "l2": 0.2, "adi": 1.5}
    run = start(
        task, "deepinversion", kdci=False, first_bn=10.0, l2_over=over, adi_form=form, **weights
    )
    by_hand.in_float64(run)
    images, targets = torch.rand(10, 1, 32, 32, dtype=torch.float64), torch.arange(10) % CLASSES
    inputs = (images - 0.5) / 0.5
    found = run.method.image_losses(inputs, targets)  # type: ignore[attr-defined]
    teacher, student = run.teacher(images), run.student(images)
    first, *others = by_hand.batch_norm_distances(run, images)
    j = competition(student, teacher)
    assert 0 < j < 1
    differences = neighbours(inputs)
    norms = [by_hand.norm(image) for image in inputs]
    expected = {
        "oh": by_hand.cross_entropy(teacher, targets),
        "bn": 10 * first + sum(others),
        "tv_l2": sum(math.sqrt(sum(d * d for d in kind)) for kind in differences),
        "tv_l1": sum(sum(abs(d) for d in kind) / len(kind) for kind in differences),
        "l2": math.sqrt(sum(n * n for n in norms)) if over == "batch" else sum(norms) / 10,
        "adi": 1 - j if form == "clamped" else -j,
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(weights[name] * value, rel=1e-11), name


def test_terms_without_weight_are_left_out(task: dict[str, Any]) -> None:
    method = method_of(task, tv_l1=0.0, adi=0.0)
    assert set(method.image_losses(torch.randn(4, 1, 32, 32), torch.arange(4))) == {"oh", "bn"}


def test_the_competition_knows_no_less_than_agreement_and_no_more_than_one() -> None:
    """Equal logits give 1 and 0; certain, opposite ones pass the upper end, where it is flat."""
    certain = torch.tensor([[60.0, 0.0], [60.0, 0.0]])
    assert losses.competition_loss(certain, certain).item() == 1
    assert losses.competition_loss(certain, certain, clamped=False).item() == 0
    opposite = certain.flip(1).requires_grad_()
    j = -losses.competition_loss(opposite, certain, clamped=False)
    # M = (1/2, 1/2), P and Q clamped to 0.99 and 0.01.
    expected = 0.5 * math.log(0.5 / 0.99) + 0.5 * math.log(0.5 / 0.01)
    assert j.item() == pytest.approx(expected, rel=1e-5)
    assert expected > 1
    clamped = losses.competition_loss(opposite, certain)
    clamped.backward()
    assert clamped.item() == 0
    assert opposite.grad is not None
    assert not opposite.grad.any()


@pytest.mark.parametrize("term", [losses.total_variation_l2, losses.image_norm])
def test_the_gradient_of_a_norm_is_finite_at_zero(term: Any) -> None:
    flat = torch.zeros(2, 1, 4, 4, requires_grad=True)
    term(flat).backward()
    assert flat.grad is not None
    assert flat.grad.isfinite().all()


# --- a round --------------------------------------------------------------------------------------


def test_the_images_of_the_lowest_loss_are_kept(
    task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As copies: at a rate that spoils the images, the steps after the best one change nothing."""
    method = method_of(task, g_steps=6, lr_image=30.0, clip=False, **STILL)
    seen = record_inputs(method, monkeypatch)
    synthesis = method.begin_round(0)
    best = min(range(6), key=lambda i: seen[i][0])
    assert best < 5
    expected = (seen[best][1] * 0.5 + 0.5).clamp(0, 1)
    torch.testing.assert_close(synthesis.batch.images, expected, rtol=0, atol=1e-6)
    assert len(method.pool) == 10


def test_the_last_images_are_kept_if_asked_for(
    task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are those that one step more would begin with."""
    more = method_of(task, g_steps=4, **STILL)
    seen = record_inputs(more, monkeypatch)
    more.begin_round(0)
    last = method_of(task, g_steps=3, keep="last", **STILL).begin_round(0)
    expected = (seen[3][1] * 0.5 + 0.5).clamp(0, 1)
    torch.testing.assert_close(last.batch.images, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("clip", [True, False])
def test_clipping_is_to_valid_pixels_after_each_step(
    clip: bool, task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Normalised by 0.5 and 0.5, valid pixels lie in [-1, 1]; the start does not."""
    method = method_of(task, g_steps=3, clip=clip, lr_image=0.01, **STILL)
    seen = record_inputs(method, monkeypatch)
    images = method.begin_round(0).batch.images
    within = [bool((inputs.abs() <= 1).all()) for _, inputs in seen]
    assert within == [False, clip, clip]
    assert 0 <= images.min() < images.max() <= 1


def test_the_student_is_in_eval_mode_while_images_are_made(
    task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(task, "deepinversion")
    method: Any = run.method
    modes: list[bool] = []
    original = method.image_losses
    monkeypatch.setattr(
        method,
        "image_losses",
        lambda *args: (modes.append(run.student.training), original(*args))[1],
    )
    while run.step < 3:
        run.advance()
    assert modes == [False] * 6  # two rounds of three steps
    assert run.student.training


def test_the_pool_grows_until_it_is_full(task: dict[str, Any]) -> None:
    method = method_of(task)
    sizes = []
    for index in range(4):
        method.begin_round(index)
        sizes.append(len(method.pool))
    assert sizes == [10, 20, 25, 25]


def test_cycled_targets_go_on_where_the_last_round_ended(task: dict[str, Any]) -> None:
    method = method_of(task, targets="cycled", synthesis_batch_size=6)
    drawn = torch.cat([method._draw_targets(index) for index in range(3)])
    assert drawn.tolist() == [i % CLASSES for i in range(18)]


def test_random_targets_are_of_every_class(task: dict[str, Any]) -> None:
    drawn = method_of(task, targets="random", synthesis_batch_size=400)._draw_targets(0)
    assert drawn.bincount(minlength=CLASSES).min() > 60
    assert int(drawn.max()) == CLASSES - 1


# --- the ImageNet form ----------------------------------------------------------------------------


def test_both_sizes_have_their_own_rates_and_the_second_its_own_best_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A linear warm-up and a half cosine to zero each; losses at two sizes do not compare."""
    task = {**make_task(tmp_path, network="wrn16_1"), "adi": 0.0, **STILL}
    method = method_of(
        task,
        g_steps_half=6,
        g_steps=5,
        image_schedule="cosine",
        image_warmup=2,
        lr_image=0.2,
        synthesis_batch_size=3,
    )
    seen = record_inputs(method, monkeypatch)
    rates: list[float] = []
    monkeypatch.setattr(module, "set_learning_rate", lambda _, rate: rates.append(rate))
    images = method.begin_round(0).batch.images
    assert [inputs.shape[-1] for _, inputs in seen] == [16] * 6 + [32] * 5

    def stage(steps: int) -> list[float]:
        rest = [0.1 * (1 + math.cos(math.pi * i / (steps - 2))) for i in range(steps - 2)]
        return [0.1, 0.2, *rest]

    assert rates == pytest.approx([*stage(6), *stage(5)])
    best = min(seen[6:], key=lambda pair: pair[0])[1]
    torch.testing.assert_close(images, (best * 0.5 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)


def test_half_size_shows_means_of_four_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first whole images are the half-sized stage's, so their means were seen before."""
    task = {**make_task(tmp_path, network="wrn16_1"), "adi": 0.0, **STILL}
    method = method_of(task, g_steps_half=2, g_steps=1, synthesis_batch_size=3, lr_image=1e-9)
    seen = record_inputs(method, monkeypatch)
    method.begin_round(0)
    half, whole = seen[1][1], seen[2][1]
    means = whole.unflatten(2, (16, 2)).unflatten(4, (16, 2)).mean(dim=(3, 5))
    torch.testing.assert_close(half, means, rtol=0, atol=1e-5)


def test_jitter_shrinks_with_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = {**make_task(tmp_path, network="wrn16_1"), "adi": 0.0, "synthesis_batch_size": 3}
    method = method_of(task, g_steps_half=1, g_steps=1, jitter=5, mirror=False)
    rolls: list[RandomRollFlip] = []

    def build(*arguments: Any) -> RandomRollFlip:
        rolls.append(RandomRollFlip(*arguments))
        return rolls[-1]

    monkeypatch.setattr(module, "RandomRollFlip", build)
    method.begin_round(0)
    assert [(roll.reach, roll.flip) for roll in rolls] == [(2, False), (5, False)]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"betas": [0.5]}, r"betas=\[0.5\] must be two numbers in \[0, 1\)"),
        ({"betas": [0.5, 1.0]}, r"betas=\[0.5, 1.0\] must be two numbers"),
        ({"jitter": -1}, "jitter=-1 must be >= 0"),
        ({"image_warmup": -1}, "image_warmup=-1 must be >= 0"),
        ({"g_steps_half": -1}, "g_steps_half=-1 must be >= 0"),
        (
            {"g_steps_half": 5},
            r"g_steps_half=5 needs networks that take images of half the size, 16x16: set it to 0",
        ),
    ],
)
def test_impossible_settings(values: dict[str, Any], message: str, task: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=message):
        start(task, "deepinversion", **values)


def test_a_teacher_without_batch_norm(tmp_path: Path) -> None:
    task = make_task(tmp_path, network="lenet5_half")
    with pytest.raises(ValueError, match="no BatchNorm layer with running statistics"):
        start(task, "deepinversion")


# --- the roll -------------------------------------------------------------------------------------


def test_a_roll_moves_the_whole_batch_alike_and_loses_nothing() -> None:
    """Every result is one of the (2 r + 1)^2 rolls, mirrored or not, and all of them occur."""
    images = torch.rand(3, 2, 5, 4)
    candidates = {
        (i, j, flipped): (
            images.roll((i, j), (2, 3)).flip(3) if flipped else images.roll((i, j), (2, 3))
        )
        for i in (-1, 0, 1)
        for j in (-1, 0, 1)
        for flipped in (False, True)
    }
    roll, stream = RandomRollFlip(1), torch.Generator().manual_seed(0)
    found = set()
    for _ in range(200):
        moved = roll(images, stream)
        found |= {key for key, value in candidates.items() if torch.equal(value, moved)}
    assert found == set(candidates)
    unflipped = RandomRollFlip(1, flip=False)
    for _ in range(20):
        moved = unflipped(images, stream)
        assert any(torch.equal(v, moved) for (_, _, flip), v in candidates.items() if not flip)
    assert torch.equal(RandomRollFlip(0, flip=False)(images, stream), images)


def test_a_roll_is_differentiable() -> None:
    images = torch.rand(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    roll = RandomRollFlip(2)
    assert torch.autograd.gradcheck(lambda x: roll(x, torch.Generator().manual_seed(3)), images)


def test_a_roll_needs_a_reach_that_is_not_negative() -> None:
    with pytest.raises(ValueError, match="reach=-1 must not be negative"):
        RandomRollFlip(-1)
