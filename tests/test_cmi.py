# SPDX-License-Identifier: Apache-2.0
"""CMI: its loss by hand, views, memory bank, feature hooks, and what a round keeps."""

import itertools
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import by_hand
import pytest
import torch
import torch.nn.functional as F
from fake_data import random_images, save_image
from hypothesis import given
from hypothesis import strategies as st
from tiny_task import CLASSES, make_task, start, tiny_config
from torch import Tensor, nn

from python_models.config import distill_config, flatten
from python_models.data import FeatureBank, RandomResizedCropFlip
from python_models.distill import distill
from python_models.errors import UserError
from python_models.methods.cmi import InputMeans, hooked_modules
from python_models.networks import build_network

FEATURES = 3 + 8 + 60
"""Channels of the BatchNorm layers of the half LeNet."""

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    return make_task(tmp_path)


# --- the loss -------------------------------------------------------------------------------------


def features_by_hand(run: Any, images: Tensor) -> Tensor:
    return torch.cat([x.mean(dim=(2, 3)) for _, x in by_hand.inputs_of_norms(run, images)], dim=1)


def project_by_hand(head: nn.Module, features: Tensor) -> list[list[float]]:
    w1, b1, w2, b2 = (parameter.detach() for parameter in head.parameters())
    hidden = (features @ w1.T + b1).clamp(min=0)
    out = hidden @ w2.T + b2
    return [[float(x) / by_hand.norm(row) for x in row] for row in out]


def contrast_by_hand(rows: list[list[float]], columns: list[list[float]], t: float) -> list[float]:
    """-log of the softmax over all columns at the row's own one."""
    terms = []
    for i, u in enumerate(rows):
        similar = [sum(a * b for a, b in zip(u, v, strict=True)) / t for v in columns]
        terms.append(math.log(sum(math.exp(s) for s in similar)) - similar[i])
    return terms


@pytest.mark.parametrize("num_cached", [0, 7])
def test_every_term_of_a_step(num_cached: int, task: dict[str, Any]) -> None:
    """The contrast is the mean of current rows plus that of cached ones, if there are any."""
    run = start(task, "cmi", kdci=False, bn=2.0, oh=0.5, adv=3.0, cr=0.7, cr_temperature=0.2)
    by_hand.in_float64(run)
    method: Any = run.method
    method.head.double()
    views = torch.rand(2, 10, 1, 32, 32, dtype=torch.float64)
    by_hand.let_half_agree(run, views[0])
    targets = torch.arange(10) % CLASSES
    cached = torch.randn(num_cached, 2 * FEATURES, dtype=torch.float64)
    found, features = method.generator_losses(*views, targets, cached)

    local, global_ = (features_by_hand(run, view).detach() for view in reversed(views))
    torch.testing.assert_close(features, torch.cat([local, global_], 1), rtol=0, atol=1e-12)
    rows = project_by_hand(method.head, torch.cat([local, cached[:, :FEATURES]]))
    columns = project_by_hand(method.head, torch.cat([global_, cached[:, FEATURES:]]))
    terms = contrast_by_hand(rows, columns, 0.2)
    contrast = sum(terms[:10]) / 10
    if num_cached:
        contrast += sum(terms[10:]) / num_cached

    teacher, student = run.teacher(views[0]), run.student(views[0])
    adversarial, agreeing = 0.0, 0
    for t, s in zip(teacher, student, strict=True):
        p, q = by_hand.probabilities(t), by_hand.probabilities(s)
        if p.index(max(p)) == q.index(max(q)):
            agreeing += 1
            adversarial -= sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 10
    assert 0 < agreeing < 10
    expected = {
        "bn": 2.0 * sum(by_hand.batch_norm_distances(run, views[0])),
        "oh": 0.5 * by_hand.cross_entropy(teacher, targets),
        "cr": 0.7 * contrast,
        "adv": 3.0 * adversarial,
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-11), name


def test_the_contrast_reaches_the_local_view_and_the_head_but_not_the_global_view(
    task: dict[str, Any],
) -> None:
    """The columns are constants: images move towards their own global view, not it to them."""
    method: Any = start(task, "cmi").method
    views = torch.rand(2, 6, 1, 32, 32)
    global_view, local_view = (view.clone().requires_grad_() for view in views)
    cached = torch.randn(5, 2 * FEATURES)
    found, _ = method.generator_losses(global_view, local_view, torch.zeros(6).long(), cached)
    found["cr"].backward()
    assert local_view.grad is not None
    assert local_view.grad.abs().sum() > 0
    assert global_view.grad is None or not global_view.grad.any()
    assert all(p.grad is not None and p.grad.any() for p in method.head.parameters())


def test_without_weight_the_student_is_not_asked(task: dict[str, Any]) -> None:
    method: Any = start(task, "cmi", adv=0.0).method
    found, _ = method.generator_losses(
        *torch.rand(2, 4, 1, 32, 32), torch.arange(4), torch.empty(0, 2 * FEATURES)
    )
    assert set(found) == {"bn", "oh", "cr"}


# --- a round --------------------------------------------------------------------------------------


def test_images_and_features_of_the_lowest_loss_are_kept(
    task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    method: Any = start(task, "cmi", g_steps=5, lr_g=0.5, pool_storage="float").method
    seen: list[tuple[float, Tensor, Tensor]] = []
    images: list[Tensor] = []
    global_view, generator_losses = method.global_view, method.generator_losses

    def view(x: Tensor, *options: Any) -> Tensor:
        images.append(x.detach().clone())
        return global_view(x, *options)

    def record(*args: Any) -> Any:
        terms, features = generator_losses(*args)
        loss = sum(term.item() for term in terms.values())
        seen.append((loss, images[-1], features.detach().clone()))
        return terms, features

    monkeypatch.setattr(method, "global_view", view)
    monkeypatch.setattr(method, "generator_losses", record)
    synthesis = method.begin_round(0)
    best = min(seen, key=lambda each: each[0])
    assert best[0] < seen[-1][0]
    assert torch.equal(synthesis.batch.images, best[1])
    # Of 10 rows each, in orders of their own.
    kept = method.bank.sample(10, seeded())
    assert torch.equal(kept.unique(dim=0), best[2].unique(dim=0))
    pooled = method.pool.sample(10, seeded()).flatten(1)
    assert torch.equal(pooled.unique(dim=0), best[1].flatten(1).unique(dim=0))


def test_generator_and_latents_are_drawn_anew_and_the_head_lives_on(task: dict[str, Any]) -> None:
    """At a rate of nothing, each round shows its generator's first weights."""
    method: Any = start(task, "cmi", g_steps=3, lr_g=1e-12).method
    weights, heads = [], []
    for index in range(2):
        heads.append([p.detach().clone() for p in method.head.parameters()])
        method.begin_round(index)
        weights.append([p.detach().clone() for p in method.generator.parameters()])
    stems = [parameters[0] for parameters in weights]
    for stem in stems:
        assert stem.std().item() == pytest.approx(0.02, rel=0.1)
    assert abs(torch.corrcoef(torch.stack([s.flatten() for s in stems]))[0, 1]) < 0.1
    assert all(not torch.equal(a, b) for a, b in zip(*heads, strict=True))
    steps = [state["step"].item() for state in method.head_optimizer.state.values()]
    assert steps == [6.0] * 4


def test_latents_learn_with_the_generator(
    task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    method: Any = start(task, "cmi", g_steps=3, lr_g=0.01).method
    seen: list[Tensor] = []
    method.generator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    method.begin_round(0)
    moves = [(after - before).abs() for before, after in itertools.pairwise(seen)]
    # A step of Adam, its first exactly, goes by the rate in each coordinate.
    torch.testing.assert_close(moves[0], torch.full_like(moves[0], 0.01), rtol=0.01, atol=0)
    assert moves[1].any()


def test_each_step_contrasts_with_other_images_of_the_bank(
    task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds add 10 rows to a bank of 25; a step draws 15 of them, or as many as there are."""
    run = start(task, "cmi")
    method: Any = run.method
    sizes: list[int] = []
    cached: list[Tensor] = []
    original = method.generator_losses

    def record(*args: Any) -> Any:
        sizes.append(len(args[3]))
        cached.append(args[3])
        return original(*args)

    monkeypatch.setattr(method, "generator_losses", record)
    for index in range(4):
        method.begin_round(index)
    assert sizes == [0, 0, 10, 10, 15, 15, 15, 15]
    assert len(method.bank) == 25
    assert not torch.equal(cached[-1], cached[-2])


def test_the_student_is_in_eval_mode_while_images_are_made(
    task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(task, "cmi")
    method: Any = run.method
    modes: list[bool] = []
    original = method.generator_losses

    def record(*args: Any) -> Any:
        modes.append(run.student.training)
        return original(*args)

    monkeypatch.setattr(method, "generator_losses", record)
    while run.step < 3:
        run.advance()
    assert modes == [False] * 4  # two rounds of two steps
    assert run.student.training


# --- feature hooks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hooks", "channels"),
    [
        ("wrn40_2", "auto", 2704),
        ("resnet34", "auto", 64 + 64 + 128 + 256),
        ("resnet18", "stages", 64 + 64 + 128 + 256),
        ("resnet18", "batchnorm", 4800),
        ("wrn16_1", "stages", 16 + 16 + 32),
        ("lenet5_half_bn", "auto", FEATURES),
        ("vgg11_bn", "auto", 64 + 128 + 2 * 256 + 4 * 512),
        ("imagenet_resnet18", "auto", 64 + 64 + 128 + 256),
        ("imagenet_resnet50", "auto", 64 + 256 + 512 + 1024),
        ("imagenet_resnet18", "batchnorm", 4800),
    ],
)
def test_features_are_read_where_the_released_code_reads_them(
    name: str, hooks: Any, channels: int
) -> None:
    """Every BatchNorm layer's input, but for ResNets the inputs of their four stages, also of those
    that torchvision makes and a module here wraps.
    """
    if name.startswith("imagenet"):
        pytest.importorskip("torchvision")
    network = build_network(name, CLASSES, 3).eval()
    with torch.no_grad(), InputMeans(hooked_modules(network, hooks)) as features:
        network(torch.rand(2, 3, 32, 32))
    assert features.read().shape == (2, channels)
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_stages_are_refused_where_there_are_none(task: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"stages named layer1, layer2, ..., and LeNet has none"):
        start(task, "cmi", feature_hooks="stages")


def test_layers_of_blocks_are_no_stages_of_the_network() -> None:
    """Of two modules alike with layer1 to layer4, neither holds the network's stages."""

    def block() -> nn.Module:
        layers = {f"layer{i}": nn.Conv2d(3, 3, 1) for i in range(1, 5)}
        return nn.Sequential(OrderedDict(layers))

    network = nn.Sequential(block(), nn.BatchNorm2d(3), block())
    assert hooked_modules(network, "auto") == [network[1]]
    with pytest.raises(UserError, match="Sequential has none"):
        hooked_modules(network, "stages")
    wrapped = block()
    network = nn.Sequential(nn.Sequential(wrapped), nn.BatchNorm2d(3))
    assert hooked_modules(network, "auto") == list(wrapped.children())


def test_inputs_without_space_are_features_themselves() -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    x = torch.rand(5, 4)
    with InputMeans(hooked_modules(network, "auto")) as features:
        network(x)
    torch.testing.assert_close(features.read(), network[0](x))


# --- the bank -------------------------------------------------------------------------------------


@given(capacity=st.integers(1, 12), sizes=st.lists(st.integers(0, 15), max_size=6))
def test_the_bank_holds_the_newest_rows(capacity: int, sizes: list[int]) -> None:
    bank, seen = FeatureBank(capacity, 2), 0
    for size in sizes:
        numbers = torch.arange(seen, seen + size, dtype=torch.float32)
        bank.add(torch.stack([numbers, -numbers], dim=1))
        seen += size
    assert len(bank) == min(seen, capacity)
    rows = bank.sample(capacity + 5, seeded())
    assert rows.shape == (len(bank), 2)
    assert sorted(rows[:, 0].tolist()) == list(range(max(seen - capacity, 0), seen))
    assert torch.equal(rows[:, 0], -rows[:, 1])


def test_the_bank_draws_different_rows_evenly() -> None:
    bank = FeatureBank(20, 1)
    bank.add(torch.arange(20.0)[:, None])
    stream, counts = seeded(), torch.zeros(20)
    for _ in range(500):
        drawn = bank.sample(8, stream)[:, 0].long()
        assert len(drawn.unique()) == 8
        counts[drawn] += 1
    assert counts.min() > 150  # of 200 each, with a deviation of 11
    assert counts.max() < 250


def test_the_bank_keeps_copies_and_no_graph() -> None:
    bank = FeatureBank(4, 3)
    rows = torch.rand(2, 3, requires_grad=True)
    bank.add(rows)
    with torch.no_grad():
        rows.zero_()
    found = bank.sample(2, seeded())
    assert found.any()
    assert not found.requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_a_restored_bank_goes_on_alike(device: str) -> None:
    bank, other = (FeatureBank(5, 2, device) for _ in range(2))
    for count in (3, 4):
        bank.add(torch.rand(count, 2, device=device))
    other.load_state_dict(bank.state_dict())
    for each in (bank, other):
        each.add(torch.ones(2, 2, device=device))
    assert torch.equal(bank.sample(5, seeded()), other.sample(5, seeded()))
    assert bank.sample(1, seeded()).device.type == device


def test_the_bank_refuses_other_rows() -> None:
    with pytest.raises(ValueError, match=r"rows must have shape \[n, 3\], got \[2, 4\]"):
        FeatureBank(5, 3).add(torch.rand(2, 4))
    with pytest.raises(ValueError, match="capacity=0 must be at least 1"):
        FeatureBank(0, 3)


# --- the local view -------------------------------------------------------------------------------


@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    low=st.floats(0.01, 1),
    flip=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_each_local_view_is_a_part_of_its_image_resized(
    height: int, width: int, low: float, flip: bool, seed: int
) -> None:
    """It is what interpolation gives for its rectangle, which lies inside the image."""
    images = torch.rand(5, 2, height, width, dtype=torch.float64, generator=seeded(seed))
    augment = RandomResizedCropFlip((low, 1.0), flip=flip)
    found = augment(images, seeded(seed))
    boxes, flips = augment._draw(5, height, width, seeded(seed))
    assert flip or not flips.any()
    for image, view, box, flipped in zip(images, found, boxes.T, flips, strict=True):
        top, left, h, w = (int(x) for x in box)
        assert 0 <= top <= top + h <= height
        assert 0 <= left <= left + w <= width
        assert min(h, w) >= 1
        part = image[None, :, top : top + h, left : left + w]
        expected = F.interpolate(part, (height, width), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(view, expected.flip(2) if flipped else expected)


def test_local_views_have_the_sizes_and_places_asked_for() -> None:
    boxes, flips = RandomResizedCropFlip((0.25, 1.0))._draw(4000, 64, 64, seeded())
    top, left, height, width = boxes
    share, ratio = height * width / 64**2, width / height
    # Near 1 a rectangle rarely fits, so that shares are not quite uniform.
    assert 0.24 < share.min() < 0.26
    assert share.max() <= 1
    assert 0.55 < share.mean() < 0.65
    assert 0.72 < ratio.min() < 0.78
    assert 1.28 < ratio.max() < 1.38
    assert abs(ratio.log().mean()) < 0.01
    for start_, size in ((top, height), (left, width)):
        place = (start_ / (64 - size))[size < 64]
        assert place.min() == 0
        assert place.max() == 1
        assert place.mean().item() == pytest.approx(0.5, abs=0.02)
    assert flips.float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_images_of_a_batch_have_views_of_their_own() -> None:
    images = torch.rand(1, 1, 16, 16).expand(20, -1, -1, -1)
    views = RandomResizedCropFlip()(images, seeded())
    assert len(views.flatten(1).unique(dim=0)) == 20


def test_the_whole_image_is_a_view_of_itself() -> None:
    """Also where no rectangle of the ratio asked for fits."""
    images = torch.rand(3, 2, 8, 8)
    same = RandomResizedCropFlip((1.0, 1.0), (1.0, 1.0), flip=False)
    torch.testing.assert_close(same(images, seeded()), images)
    impossible = RandomResizedCropFlip((1.0, 1.0), (3.0, 4.0), flip=False)
    torch.testing.assert_close(impossible(images, seeded()), images)


def test_a_local_view_is_differentiable_and_leaves_its_input() -> None:
    images = torch.rand(3, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    before = images.detach().clone()
    augment = RandomResizedCropFlip((0.25, 1.0))
    assert torch.autograd.gradcheck(lambda x: augment(x, seeded(4)), images)
    assert torch.equal(images, before)


@pytest.mark.parametrize("device", DEVICES)
def test_local_views_are_the_same_on_every_device(device: str) -> None:
    images = torch.rand(4, 3, 8, 8)
    augment = RandomResizedCropFlip()
    found = augment(images.to(device), seeded()).cpu()
    torch.testing.assert_close(found, augment(images, seeded()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": (0.0, 1.0)}, "scale="),
        ({"scale": (0.5, 1.5)}, "scale="),
        ({"ratio": (2.0, 1.0)}, "ratio="),
        ({"ratio": (0.0, 1.0)}, "ratio="),
    ],
)
def test_impossible_ranges(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomResizedCropFlip(**arguments)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cr_temperature": 0.0}, "cr_temperature=0.0 must be > 0"),
        ({"local_scale": 0.0}, r"local_scale=0.0 must lie in \(0, 1\]"),
        ({"local_scale": 1.5}, r"local_scale=1.5 must lie in \(0, 1\]"),
    ],
)
def test_impossible_settings(values: dict[str, Any], message: str, task: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=message):
        start(task, "cmi", **values)


def test_a_teacher_without_batch_norm(tmp_path: Path) -> None:
    task = make_task(tmp_path, network="lenet5_half")
    with pytest.raises(ValueError, match="no BatchNorm layer with running statistics"):
        start(task, "cmi")


# --- released settings, and images to begin with --------------------------------------------------


def test_the_released_settings() -> None:
    """Three scripts for one pair of networks, which differ in few settings."""
    names = (
        *("batch_size", "epochs", "ep_steps", "kd_steps", "oh", "cr_temperature"),
        *("g_steps", "bn", "adv", "cr", "temperature", "lr", "weight_decay", "bank_size", "kdci"),
    )
    same = (200, 1.0, 0.5, 0.8, 20.0, 0.1, 1e-4, 40960, False)
    table = {
        "cmi-official": (128, 200, 400, 400, 1.0, 0.1),
        "cmi-official-adv": (128, 40, 2000, 2000, 0.5, 0.1),
        "cmi-official-cifar10": (256, 200, 400, 400, 1.0, 0.2),
    }
    for preset, expected in table.items():
        found = flatten(distill_config(preset=preset))
        assert tuple(found[name] for name in names) == (*expected, *same), preset
    # There is room for 50,000 images made beforehand and for those of all rounds.
    assert flatten(distill_config(preset="cmi-official-adv"))["pool_size"] > 50_000 + 40 * 256


def test_a_run_with_a_folder_of_initial_images(tmp_path: Path) -> None:
    """The student learns from them too; one that cannot be read is left out and named."""
    task = make_task(tmp_path)
    folder = tmp_path / "inverted"
    for i in range(12):
        save_image(folder / f"{i:02}.png", random_images(32, 32, seed=i))
    (folder / "broken.png").write_bytes(b"no image")
    settings = {"initial_pool": str(folder), "pool_size": 40, "epochs": 1, "kd_steps": 4}
    out = tmp_path / "run"
    with pytest.warns(UserWarning, match="left out 1 of 13"):
        distill(tiny_config(task, "cmi", **settings, out_dir=out))
    assert "broken.png" in (out / "skipped.txt").read_text()
    state = torch.load(next(out.glob("checkpoints/*")), weights_only=True)
    pool = state["run"]["method"]["pool"]
    assert pool["seen"] == 12 + 10
    for i in range(12):
        assert torch.equal(pool["images"][i, 0], torch.from_numpy(random_images(32, 32, seed=i)))
