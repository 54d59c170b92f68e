# SPDX-License-Identifier: Apache-2.0
"""Fast: its generator's loss by hand, momentum of statistics, meta-learning, latents and pool."""

from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import pytest
import torch
from tiny_task import in_double, make_task, resumed, start
from torch import Tensor, nn

from python_models.config import distill_config, flatten
from python_models.data import RandomCropFlip, RandomResizedCropFlip, load_unlabelled
from python_models.errors import UserError


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    return make_task(tmp_path)


def batch_norm_inputs(network: nn.Module, images: Tensor) -> list[tuple[nn.BatchNorm2d, Tensor]]:
    seen: list[tuple[nn.BatchNorm2d, Tensor]] = []
    handles = [
        layer.register_forward_pre_hook(lambda m, x: seen.append((m, x[0])))
        for layer in network.modules()
        if isinstance(layer, nn.BatchNorm2d)
    ]
    network(images)
    for handle in handles:
        handle.remove()
    return seen


def test_every_term_of_two_rounds(task: dict[str, Any]) -> None:
    """Sampled classes, augmented images, statistics averaged over rounds from the second one on,
    and an adversarial term only after warm-up; float64, by hand.
    """
    settings = {"bn": 3.0, "oh": 0.5, "adv": 2.0, "bn_momentum": 0.9, "warmup": 1, "g_steps": 2}
    run = in_double(start(task, "fast", kdci=False, **settings))
    method: Any = run.method
    calls: list[tuple[Tensor, Tensor, Tensor, bool, dict[str, Tensor]]] = []
    original = method.generator_losses

    def record(images: Tensor, targets: Tensor, *, adversarial: bool) -> dict[str, Tensor]:
        if adversarial:
            by_hand.let_half_agree(run, images)  # the term is of some of the images, not of all
        logits = run.student(images)
        terms = original(images, targets, adversarial=adversarial)
        calls.append((images, targets, logits, adversarial, terms))
        return terms

    method.generator_losses = record
    for index in range(2):
        run.student.train()
        method.begin_round(index)
        assert not run.student.training
    assert [adversarial for *_, adversarial, _ in calls] == [False, False, True, True]

    average: list[tuple[Tensor, Tensor]] = []
    for call, (x, y, s, adversarial, found) in enumerate(calls):
        t = run.teacher(x)
        p = t.softmax(1)
        expected = {"oh": -0.5 * p[torch.arange(10), y].log().sum() / 10}
        bn = torch.zeros((), dtype=torch.float64)
        inputs = batch_norm_inputs(run.teacher, x)
        assert len(inputs) == 3
        moments = [(h.mean((0, 2, 3)), h.var((0, 2, 3), correction=0)) for _, h in inputs]
        for layer, (norm, _) in enumerate(inputs):
            u, v = moments[layer]
            if call >= 2:  # the first round's last batch is the average so far
                u, v = 0.1 * u + 0.9 * average[layer][0], 0.1 * v + 0.9 * average[layer][1]
            bn = bn + (norm.running_mean - u).square().sum().sqrt()
            bn = bn + (norm.running_var - v).square().sum().sqrt()
        expected["bn"] = 3.0 * bn
        if adversarial:
            agree = (t.argmax(1) == s.argmax(1)).double()
            assert 0 < agree.sum() < 10
            kl = (p * (p.log() - s.softmax(1).log())).sum(1)
            expected["adv"] = -2.0 * (agree * kl).sum() / 10
        assert set(found) == set(expected)
        for name, term in expected.items():
            assert found[name].item() == pytest.approx(term.item(), rel=1e-11), (call, name)
        if call == 1:
            average = moments
    # The same classes and latents within a round, others in the next.
    assert torch.equal(calls[0][1], calls[1][1])
    assert not torch.equal(calls[1][1], calls[2][1])


def test_the_running_averages_are_of_the_last_inner_steps(task: dict[str, Any]) -> None:
    """They become ``a u' + (1 - a) u``, once a round."""
    run = in_double(start(task, "fast", kdci=False, bn_momentum=0.9))
    method: Any = run.method
    lasts: list[Tensor] = []
    original = method.generator_losses
    method.generator_losses = lambda x, *a, **k: (lasts.append(x), original(x, *a, **k))[1]
    expected = None
    for index in range(3):
        method.begin_round(index)
        mean = batch_norm_inputs(run.teacher, lasts[-1])[0][1].mean((0, 2, 3))
        expected = mean if expected is None else 0.9 * expected + 0.1 * mean
        found = method.statistics.state_dict()["mean"][0]
        torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("meta", ["fomaml", "reptile", "none"])
def test_meta_step(meta: str, task: dict[str, Any]) -> None:
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


def test_the_pool_keeps_the_images_of_the_lowest_loss(
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


def test_the_first_layers_are_reset_once(task: dict[str, Any]) -> None:
    """Weights of the first linear and the first BatchNorm layer from N(0, 0.02), biases 0."""
    run = start(
        *(task, "fast"),
        **{"generator": "generator_small", "warmup": 0, "reset_after": 1},
        **{"meta": "reptile", "lr_g": 1e-9},  # which leaves what was drawn
    )
    method: Any = run.method
    norms = [m for m in method.generator.modules() if isinstance(m, nn.BatchNorm2d)]
    first = (method.generator.stem, norms[0])
    rounds = []
    for index in range(3):
        if index == 1:
            with torch.no_grad():
                for layer in (*first, norms[1]):
                    layer.bias.fill_(0.5)
        method.begin_round(index)
        rounds.append([layer.weight.detach().clone() for layer in (*first, norms[1])])
    for layer, before, drawn, after in zip(
        first, *(weights[:2] for weights in rounds), strict=True
    ):
        count = drawn.numel()
        assert (drawn - before).abs().max() > 0.01
        # Four standard errors of the mean and of the deviation.
        assert drawn.mean().item() == pytest.approx(0, abs=4 * 0.02 / count**0.5)
        assert drawn.std().item() == pytest.approx(0.02, rel=4 / (2 * count) ** 0.5)
        torch.testing.assert_close(drawn, after, atol=1e-6, rtol=0)
        assert layer.bias.abs().max() < 1e-6
    # No other layer is touched.
    torch.testing.assert_close(rounds[0][2], rounds[1][2], atol=1e-6, rtol=0)
    torch.testing.assert_close(norms[1].bias, torch.full_like(norms[1].bias, 0.5))


# -- latents that rounds share -----------------------------------------------

SHARED = {"redraw_z_every": 3, "warmup": 0, "g_steps": 3, "lr_g_meta": 1e-4, "lr_z_meta": 5e-3}


def latents_of_round(method: Any, index: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return a round's latents before it, their inner gradients, and the latents after it."""
    begun: list[Tensor] = []
    gradients: list[Tensor] = []
    ended: list[Tensor] = []
    original = torch.optim.Adam.step

    def step(self: torch.optim.Adam, *args: Any) -> Any:
        if self is not method.optimizer:
            (latents,) = self.param_groups[1]["params"]
            begun.append(latents.detach().clone())
            gradients.append(latents.grad.clone())
        result = original(self, *args)
        if self is not method.optimizer:
            ended.append(latents.detach().clone())
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", step)
        method.begin_round(index)
    return begun[0], gradients, ended[-1]


@pytest.mark.parametrize("meta", ["fomaml", "reptile"])
def test_shared_latents_are_learned_as_the_generator_is(meta: str, task: dict[str, Any]) -> None:
    """Each round begins with the method's latents; Adam moves those along the sum of the inner
    gradients or towards the inner result; a redraw forgets them and Adam's moments of them.
    """
    run = start(task, "fast", meta=meta, **SHARED)
    method: Any = run.method
    assert [group["lr"] for group in method.optimizer.param_groups] == [1e-4, 5e-3]
    starts, stepped = [], []
    for index in range(4):
        begun, gradients, ended = latents_of_round(method, index)
        starts.append(begun)
        stepped.append(method.latents.detach().clone())
        expected = sum(gradients) if meta == "fomaml" else 67.0 * (begun - ended)
        torch.testing.assert_close(method.latents.grad, expected)
        assert not torch.equal(begun, stepped[-1])
        assert method.optimizer.state[method.latents]["step"].item() == (index % 3) + 1
    assert torch.equal(starts[1], stepped[0])
    assert torch.equal(starts[2], stepped[1])
    # Adam's steps are of about its learning rate; a redraw is not.
    assert (starts[2] - starts[1]).abs().max() < 0.02
    assert (starts[3] - stepped[2]).abs().max() > 0.5


def test_shared_latents_without_meta_learning_are_trained_on(task: dict[str, Any]) -> None:
    run = start(task, "fast", meta="none", **SHARED)
    method: Any = run.method
    method.begin_round(0)
    after = method.latents.detach().clone()
    begun, *_ = latents_of_round(method, 1)
    assert torch.equal(begun, after)
    assert not torch.equal(method.latents, after)


def test_latents_of_its_own_for_each_round_by_default(task: dict[str, Any]) -> None:
    run = start(task, "fast")
    method: Any = run.method
    assert method.latents is None
    first, second = (latents_of_round(method, index)[0] for index in range(2))
    assert (first - second).abs().max() > 0.5


@pytest.mark.parametrize("meta", ["fomaml", "reptile", "none"])
def test_a_run_with_shared_latents_goes_on_alike(meta: str, task: dict[str, Any]) -> None:
    settings = {**SHARED, "meta": meta, "kd_steps": 1}
    whole = start(task, "fast", **settings)
    while whole.step < 2:
        whole.advance()
    again = resumed(whole, start(task, "fast", **settings))
    for run in (whole, again):
        while run.step < 6:
            run.advance()
    for one, other in zip(whole.student.parameters(), again.student.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_released_settings() -> None:
    """Inner steps and their learning rates, and the weights of each pair of networks."""
    table = {"g2": (2, 5e-3, 0.015), "g5": (5, 3e-3, 0.01), "g10": (10, 2e-3, 0.01)}
    for name, expected in table.items():
        config = distill_config(preset=f"fast-official-{name}")
        s, t = config.settings, config.training
        assert (s.g_steps, s.lr_g, s.lr_z) == expected
        assert (s.meta, s.bn_momentum, s.warmup, s.reset_l0, s.reset_after) == (
            *("fomaml", 0.9, 20, True, 120),
        )
        assert (t.lr, t.lr_min, t.weight_decay, t.momentum) == (0.2, 2e-4, 1e-4, 0.9)
        assert (t.temperature, t.batch_size, t.epochs, t.ep_steps) == (20.0, 256, 200, 400)


# -- random resized crops, and images to begin with --------------------------


def test_generated_and_pooled_images_are_cropped_as_asked_for(task: dict[str, Any]) -> None:
    """Resized crops of the shares asked for, each from its stream, in place of padded ones."""
    settings = {"crop_scale": 0.3, "synthesis_crop_scale": 0.75, "pool_storage": "float"}
    method: Any = start(task, "fast", **settings, g_steps=1, flip=False).method
    seen: list[Tensor] = []
    original = method.generator_losses
    method.generator_losses = lambda x, *a, **k: (seen.append(x), original(x, *a, **k))[1]
    stream = torch.Generator()
    stream.set_state(method._synthesis_stream.get_state())
    images = method.begin_round(0).batch.images
    method.generator.sample_latents(10, stream)
    torch.randint(4, (10,), generator=stream)
    expected = RandomResizedCropFlip((0.75, 1.0), flip=False)(images, stream)
    torch.testing.assert_close(seen[0], expected)

    stream.set_state(method._pool_stream.get_state())
    found = method.next_batch().images
    expected = RandomResizedCropFlip((0.3, 1.0), flip=False)(method.pool.sample(12, stream), stream)
    torch.testing.assert_close(found, expected)


def test_padded_crops_are_the_default(task: dict[str, Any]) -> None:
    """And generated images are cropped as pooled ones are, where nothing else is asked for."""
    method: Any = start(task, "fast", crop=3).method
    assert method.synthesis_augment is method.augment
    assert isinstance(method.augment, RandomCropFlip)
    assert (method.augment.padding, method.augment.flip) == (3, True)
    method = start(task, "fast", crop_scale=0.5).method
    assert method.synthesis_augment is method.augment
    assert (method.augment.scale, method.augment.flip) == ((0.5, 1.0), True)


@pytest.mark.parametrize("name", ["crop_scale", "synthesis_crop_scale"])
@pytest.mark.parametrize("scale", [0.0, -0.5, 1.5, float("nan")])
def test_impossible_shares_of_the_area(name: str, scale: float, task: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"{name}={scale} must lie in \(0, 1\]"):
        start(task, "fast", **{name: scale})


def test_the_pool_begins_with_the_initial_images_which_count(task: dict[str, Any]) -> None:
    """They are brought to the task's size and colours, and are the first to leave a full pool."""
    run = start(task, "fast", initial_pool="wild.npz", pool_size=55)
    method: Any = run.method
    wild = load_unlabelled("wild.npz", task["data_root"], 32, 1)
    assert len(method.pool) == 0
    run.prepare()
    assert len(method.pool) == len(wild) == 50
    assert torch.equal(method.pool.state_dict()["images"], wild)
    method.begin_round(0)
    held = method.pool.state_dict()["images"]
    assert len(held) == 55
    assert torch.equal(held[5:50], wild[5:])
    assert not torch.equal(held[:5], wild[:5])


def test_a_resumed_run_has_the_initial_images_from_its_checkpoint(task: dict[str, Any]) -> None:
    """It goes on alike, though their source holds others by now."""
    settings = {"initial_pool": "wild.npz", "pool_size": 60, "warmup": 1, "kd_steps": 1}
    whole = start(task, "fast", **settings)
    whole.prepare()
    while whole.step < 2:
        whole.advance()
    others = np.zeros((50, 24, 24, 3), dtype=np.uint8)
    np.savez(task["data_root"] / "wild.npz", images=others, labels=np.zeros(50, dtype=np.int64))
    again = resumed(whole, start(task, "fast", **settings))
    for run in (whole, again):
        while run.step < 4:
            run.advance()
    one, other = (run.method.state_dict()["pool"]["images"] for run in (whole, again))
    assert torch.equal(one, other)
    for mine, its in zip(whole.student.parameters(), again.student.parameters(), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pool_size": 49}, "wild.npz holds 50 images, which are more than pool_size=49"),
        ({"initial_pool": "nowhere"}, "initial_pool: unlabelled source 'nowhere' is neither"),
    ],
)
def test_impossible_initial_pools(
    values: dict[str, Any], message: str, task: dict[str, Any]
) -> None:
    """Refused before anything is computed or written."""
    with pytest.raises(UserError, match=message):
        start(task, "fast", **{"initial_pool": "wild.npz", **values})


IMAGENET = {
    "kdci": False,
    # The student, on random images of 224 pixels.
    **{"student": "imagenet_resnet18", "epochs": 400, "ep_steps": 1000, "kd_steps": 100},
    **{"batch_size": 100, "temperature": 5.0, "lr": 0.1, "lr_min": 0.0, "schedule": "cosine"},
    # The meta-generator and the latents that 50 rounds share.
    **{"synthesis_batch_size": 100, "generator": "generator_imagenet", "latent_dim": 256},
    **{"g_steps": 50, "lr_g": 2e-4, "lr_z": 0.01, "lr_g_meta": 1e-4, "lr_z_meta": 5e-3},
    **{"meta": "reptile", "redraw_z_every": 50, "warmup": 0, "reset_l0": False},
    # Weights.
    **{"bn": 0.1, "oh": 0.1, "adv": 1.0, "bn_momentum": 0.9},
    **{"crop_scale": 0.08, "synthesis_crop_scale": 0.75, "flip": True},
}
"""What Fast's code and logs for ImageNet have."""


def test_the_released_settings_for_imagenet(task: dict[str, Any]) -> None:
    """They are the code's, and a run of them at a smaller size goes through two rounds."""
    found = flatten(distill_config(preset="fast-official-imagenet"))
    assert {name: found[name] for name in IMAGENET} == IMAGENET
    assert found["pool_policy"] == "reservoir"
    small = {
        **{name: found[name] for name in IMAGENET},
        **{name: task[name] for name in ("student", "batch_size")},
        **{"epochs": 1, "ep_steps": 2, "kd_steps": 1, "g_steps": 2, "latent_dim": 4},
        **{"synthesis_batch_size": 6, "pool_size": 56, "pool_policy": "reservoir"},
    }
    run = start(task, "fast", **small, initial_pool="wild.npz")
    run.prepare()
    while run.step < run.total_steps:
        run.advance()
    method: Any = run.method
    assert (run.round, method.pool.seen, len(method.pool)) == (2, 50 + 12, 56)
    assert method.latents.shape == (6, 4, 2, 2)
