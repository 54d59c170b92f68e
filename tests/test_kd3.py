# SPDX-License-Identifier: Apache-2.0
"""KD3: its loss and selection by hand, its perturbed images, and the shared classifier."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import dot, probabilities
from tiny_task import CLASSES, make_task, rebuild, tiny_config
from tiny_task import start as start_run
from torch import Tensor, nn

from python_models.data import load_labelled, to_float
from python_models.data.unlabelled import ImageArray
from python_models.distill import distill
from python_models.engine import Distillation
from python_models.errors import UserError
from python_models.evaluate import accuracy
from python_models.losses import alignment_weights, kd_divergence
from python_models.methods import sampling
from python_models.methods.kd3 import KD3, Form, Views, combine, mix_distribution, select
from python_models.methods.kd3 import student_share as share_of
from python_models.networks import build_network, count_parameters
from python_models.networks.lenet import LeNet
from python_models.networks.shared_classifier import SharedClassifier, classifier_of, pool_to
from python_models.teacher import load_network

FORMS: list[Form] = ["paper", "code"]
STILL: dict[str, Any] = {"crop_scale": 1.0, "flip": False}
"""Settings with which images are not transformed."""


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    return make_task(tmp_path)


@pytest.fixture
def convolutional(tmp_path: Path) -> dict[str, Any]:
    """A task whose networks have feature maps of 8x8."""
    return {**make_task(tmp_path, network="wrn16_1"), "student": "wrn16_1"}


def start(task: dict[str, Any], **values: Any) -> tuple[Distillation, KD3]:
    """Return a run with its method."""
    run = start_run(task, "kd3", **{"kdci": False, **values})
    assert isinstance(run.method, KD3)
    return run, run.method


# --- the loss -------------------------------------------------------------------------------------


def contrast(layer: Any, vectors: list[list[float]], form: str) -> float:
    """The contrast of vectors of images, then of their perturbed versions, temperature 0.3."""
    z = []
    for vector in vectors:
        rows, bias = layer.weight.tolist(), layer.bias.tolist()
        image = [dot(row, vector) + b for row, b in zip(rows, bias, strict=True)]
        z.append([x / math.sqrt(dot(image, image)) for x in image])
    b = len(z) // 2
    total = 0.0
    for i in range(b if form == "paper" else 2 * b):
        partner = (i + b) % (2 * b)
        if form == "paper":
            others = [j for j in range(b, 2 * b) if j != partner]
        else:
            others = [j for j in range(2 * b) if j != i]
        among = sum(math.exp(dot(z[i], z[j]) / 0.3) for j in others)
        total += math.log(among) - dot(z[i], z[partner]) / 0.3
    return total if form == "paper" else total / (2 * b)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("student", ["wrn16_1", "lenet5_half_bn"])
def test_every_term_of_a_step(form: Form, student: str, convolutional: dict[str, Any]) -> None:
    """A student whose map is 1x1 meets the mean of the teacher's; both see 5 images twice."""
    task = {**convolutional, "student": student}
    run, method = start(task, form=form, mix=0.2, kd_weight=0.6)
    for module in (run.teacher, run.deployed, method.embeddings):
        module.double()
    run.deployed.eval()
    normalised = torch.randn(10, 1, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        maps = run.teacher.network.feature_map(normalised)  # type: ignore[operator, union-attr]
        logits = run.teacher.network(normalised[:5])  # type: ignore[operator]
        projected = method.network.feature_map(normalised)
    views = Views(normalised[:5], logits, normalised=normalised, teacher_map=maps)
    found = method.student_losses(views, lambda s, t: kd_divergence(s, t, 4.0))
    classifier = run.teacher.network.fc  # type: ignore[union-attr]
    rows, bias = classifier.weight.tolist(), classifier.bias.tolist()
    # The mean over the places of each channel.
    ours = [[sum(c) / len(c) for c in image.flatten(1).tolist()] for image in projected]
    theirs = [[sum(c) / len(c) for c in image.flatten(1).tolist()] for image in maps]
    align = kd = 0.0
    for i in range(5):
        s = [dot(row, ours[i]) + c for row, c in zip(rows, bias, strict=True)]
        t = logits[i].tolist()
        if form == "paper":
            distance = sum(
                abs(x - y) for x, y in zip(probabilities(s), probabilities(t), strict=True)
            )
            weight = 1 - 1 / (1 + math.exp(-distance))
        else:
            distance = math.sqrt(sum((x - y) ** 2 for x, y in zip(s, t, strict=True)))
            weight = 1 / (1 + math.exp(-distance))
        pairs = list(zip(ours[i], theirs[i], strict=True))
        if form == "code" and student == "wrn16_1":
            f, g = projected[i].flatten().tolist(), maps[i].flatten().tolist()
            pairs = list(zip(f, g, strict=True))
        align += weight * sum((x - y) ** 2 for x, y in pairs) / len(pairs) / 5
        q, r = probabilities(t, 4), probabilities(s, 4)
        kd += 16 / 5 * sum(x * math.log(x / y) for x, y in zip(q, r, strict=True))
    both = contrast(method.embeddings["student"], ours, form)
    both += contrast(method.embeddings["teacher"], theirs, form)
    expected = {"align": align, "mix": 0.2 * both, "kd": 0.6 * kd}
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-6), name


def test_the_weights_of_images_have_no_gradient() -> None:
    for form in FORMS:
        s = torch.randn(3, CLASSES, requires_grad=True)
        assert not alignment_weights(s, torch.randn(3, CLASSES), form).requires_grad


def test_the_shared_classifier_stays_the_teachers(task: dict[str, Any]) -> None:
    """Not even weight decay touches it, while projector and both embeddings learn."""
    run, method = start(task, weight_decay=0.1)
    run.prepare()
    learning = [*method.network.projector.parameters(), *method.embeddings.parameters()]
    before = [p.clone() for p in learning]
    while run.step < 3:
        run.advance()
    teacher: Any = run.teacher.network
    assert torch.equal(method.network.classifier.weight, teacher.fc.weight)
    assert torch.equal(method.network.classifier.bias, teacher.fc.bias)
    assert not any(map(torch.equal, before, learning))


def test_without_a_weight_there_is_no_divergence_to_compensate(task: dict[str, Any]) -> None:
    run, method = start(task, kd_weight=0.0)
    run.prepare()
    terms = method.student_losses(method.next_batch(), kd_divergence)
    assert set(terms) == {"align", "mix"}
    with pytest.raises(UserError, match="give --kd-weight 1, or --no-kdci"):
        start(task, kd_weight=0.0, kdci=True)


def test_images_that_no_memory_holds_are_refused_before_they_are_read(
    task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 images of 1,024 bytes: 50 pages of 1,000 are too few, 52 of them enough."""
    read: list[int] = []
    load = ImageArray.load
    monkeypatch.setattr(ImageArray, "load", lambda self: (read.append(len(self)), load(self))[1])
    pages = {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": 50}
    monkeypatch.setattr(sampling.os, "sysconf", pages.get)
    message = r"unlabelled: 50 images of \[1, 32, 32\] take .* GiB, .*: KD3 holds them all; give"
    with pytest.raises(UserError, match=message):
        start(task)
    assert not read
    pages["SC_PHYS_PAGES"] = 52
    start(task)
    assert read == [50]


# --- the selection --------------------------------------------------------------------------------


def test_the_students_share_grows_from_almost_none_to_one() -> None:
    """Of 240 epochs: the paper's parabola around epoch 120, the code's around 160, cut at 120."""
    assert share_of(0, 240) == pytest.approx(math.exp(-5), rel=1e-12)
    assert share_of(60, 240) == pytest.approx(math.exp(-1.25), rel=1e-12)
    assert [share_of(index, 240) for index in (120, 121, 239)] == [1, 1, 1]
    assert share_of(0, 240, "code") == pytest.approx(math.exp(-5 * (159 / 160) ** 2), rel=1e-12)
    assert share_of(119, 240, "code") == pytest.approx(math.exp(-5 / 16), rel=1e-12)
    assert [share_of(index, 240, "code") for index in (120, 239)] == [1, 1]


def test_probabilities_are_mixed_in_the_paper_and_logits_in_the_code() -> None:
    t, s = [2.0, -1.0, 0.5], [0.0, 3.0, -2.0]
    tensors = [torch.tensor([row], dtype=torch.float64) for row in (t, s)]
    mixed = [0.7 * p + 0.3 * q for p, q in zip(probabilities(t), probabilities(s), strict=True)]
    assert combine(*tensors, 0.3)[0].tolist() == pytest.approx(mixed, rel=1e-12)
    mixed = probabilities([0.7 * p + 0.3 * q for p, q in zip(t, s, strict=True)])
    assert combine(*tensors, 0.3, "code")[0].tolist() == pytest.approx(mixed, rel=1e-12)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        # Classes 0, 1, 2 have 4, 2 and 1 images: thresholds 0.8, 0.4, 0.2.
        ("paper", [0, 3, 5, 6]),
        # r / (2 - r) is 1, 1/3, 1/7: thresholds 0.8, 0.2667, 0.1143.
        ("code", [0, 3, 4, 5, 6]),
    ],
)
def test_thresholds_by_hand(form: Form, expected: list[int]) -> None:
    predicted = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    confidence = torch.tensor([0.9, 0.79, 0.5, 0.81, 0.35, 0.41, 0.21])
    assert select(confidence, predicted, 4, 0.8, form=form).tolist() == expected


def test_too_few_images_are_filled_up_with_the_most_confident() -> None:
    """Of equals the earlier one; what is not a number comes last."""
    predicted = torch.zeros(5, dtype=torch.int64)
    confidence = torch.tensor([0.3, math.nan, 0.9, 0.3, 0.2])
    assert select(confidence, predicted, 2, 0.8).tolist() == [2]
    assert select(confidence, predicted, 2, 0.8, least=3).tolist() == [2, 0, 3]
    assert select(confidence, predicted, 2, 0.8, least=9).tolist() == [2, 0, 3, 4, 1]


@pytest.mark.parametrize("form", FORMS)
def test_an_epochs_selection_in_a_plain_loop(form: Form, task: dict[str, Any]) -> None:
    """Both networks in eval mode judge all images, here without a random transform.

    Fresh networks say nearly the same of all images: their logits are centred and enlarged.
    """
    run, method = start(task, form=form, epochs=6, cutoff=0.9, **STILL)
    run.deployed.eval()
    networks: tuple[Any, ...] = (run.teacher.network, method.network)
    layers = (networks[0].fc, networks[1].classifier)
    with torch.no_grad():
        normalised = run.teacher.normalise(to_float(method.images))
        for network, layer in zip(networks, layers, strict=True):
            features = network.features(normalised)
            layer.weight.mul_(2 / (features @ layer.weight.T).std(0)[:, None])
            layer.bias.copy_(-layer.weight @ features.mean(0))
    run.deployed.train()
    method.begin_epoch(2)
    run.deployed.eval()
    with torch.no_grad():
        images = to_float(method.images)
        teacher, student = run.teacher(images).tolist(), run.deployed(images).tolist()
    exponent = (2 / 3 - 1) ** 2 if form == "paper" else (3 / 4 - 1) ** 2
    share = math.exp(-5 * exponent)
    judged = []
    for t, s in zip(teacher, student, strict=True):
        if form == "paper":
            pairs = zip(probabilities(t), probabilities(s), strict=True)
            c = [(1 - share) * p + share * q for p, q in pairs]
        else:
            c = probabilities([(1 - share) * p + share * q for p, q in zip(t, s, strict=True)])
        judged.append((max(c), c.index(max(c))))
    counts = [sum(y == k for _, y in judged) for k in range(CLASSES)]
    expected = []
    for row, (p, y) in enumerate(judged):
        r = counts[y] / max(counts)
        if p > 0.9 * (r if form == "paper" else r / (2 - r)):
            expected.append(row)
    assert sum(count > 0 for count in counts) >= 3
    assert 12 <= len(expected) < len(judged)
    assert method.selected.tolist() == expected


def test_batches_are_of_selected_images_with_their_perturbed_versions(
    task: dict[str, Any],
) -> None:
    run, method = start(task, **STILL)
    run.prepare()
    method.selected = torch.tensor([7, 11, 30])
    method.order.reset(3)
    batch = method.next_batch()
    known = to_float(method.images[method.selected])
    for image in batch.images:
        assert min((image - other).abs().max().item() for other in known) < 1e-6
    assert batch.normalised is not None
    assert batch.teacher_map is not None
    torch.testing.assert_close(batch.normalised[:12], run.teacher.normalise(batch.images))
    assert not torch.equal(batch.normalised[12:], batch.normalised[:12])
    torch.testing.assert_close(batch.teacher_logits, run.teacher(batch.images))
    assert len(batch.teacher_map) == 24


# --- the perturbed images -------------------------------------------------------------------------


def moments(plane: Tensor) -> tuple[float, float]:
    """Mean and deviation, the latter with the reference's epsilon in the root."""
    values = plane.flatten().tolist()
    mean = sum(values) / len(values)
    variance = sum((x - mean) ** 2 for x in values) / (len(values) - 1)
    return mean, math.sqrt(variance + 1e-6)


def test_an_image_gets_statistics_between_its_own_and_anothers() -> None:
    """One weight for all channels, means and deviations; the image is otherwise the same."""
    images = torch.randn(6, 3, 8, 8, dtype=torch.float64) * torch.rand(6, 3, 1, 1) * 3 + 1
    images[0, 0] *= 1e-3  # whose deviation the epsilon changes visibly
    mixed = mix_distribution(images, 0.5, torch.Generator().manual_seed(3))
    other = torch.randperm(6, generator=torch.Generator().manual_seed(3)).tolist()
    assert any(other[i] != i for i in range(6))
    for i in range(6):
        own = [moments(images[i, c]) for c in range(3)]
        target = [moments(images[other[i], c]) for c in range(3)]
        u = 1.0
        if other[i] != i:
            u = (mixed[i, 0].mean().item() - target[0][0]) / (own[0][0] - target[0][0])
        assert 0 <= u <= 1
        for c in range(3):
            mean, deviation = (u * x + (1 - u) * y for x, y in zip(own[c], target[c], strict=True))
            expected = deviation * (images[i, c] - own[c][0]) / own[c][1] + mean
            torch.testing.assert_close(mixed[i, c], expected, rtol=1e-6, atol=1e-9)


def test_a_flat_image_and_a_tiny_beta_stay_finite() -> None:
    images = torch.zeros(4, 1, 8, 8)
    images[1] = torch.randn(1, 8, 8)
    assert mix_distribution(images, 1e-3, torch.Generator().manual_seed(0)).isfinite().all()


def test_the_weights_are_of_the_beta_distribution() -> None:
    """Beta(0.1, 0.1) has mean 1/2 and variance 1 / (4 * 1.2): almost all is own or other."""
    levels = torch.tensor([0.0, 1.0]).repeat(4000)[:, None, None, None]
    images = levels + torch.tensor([-1e-3, 1e-3]).expand(8000, 1, 1, 2)
    other = levels[torch.randperm(8000, generator=torch.Generator().manual_seed(0))].flatten()
    means = mix_distribution(images, 0.1, torch.Generator().manual_seed(0)).mean((1, 2, 3))
    own = levels.flatten()
    u = ((means - other) / (own - other))[own != other]
    assert len(u) > 3500
    # Four standard errors of the mean.
    assert u.mean().item() == pytest.approx(0.5, abs=4 * 0.456 / math.sqrt(len(u)))
    assert u.var().item() == pytest.approx(1 / 4.8, rel=0.05)


def test_the_dictionary_is_built_from_the_first_selection(
    task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, method = start(task, kdci=True)
    assert run.kdci is not None
    features: list[Tensor] = []
    original = run.kdci.update
    monkeypatch.setattr(
        run.kdci, "update", lambda x, **options: (features.append(x), original(x, **options))
    )
    run.prepare()
    expected = run.teacher(to_float(method.images[method.selected]))
    for _ in range(6):  # into the second epoch
        run.advance()
    assert len(features) == 1
    torch.testing.assert_close(features[0], expected)


# --- the network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_the_exported_file_predicts_with_projector_and_shared_classifier(
    form: Form, task: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = distill(tiny_config(task, "kd3", form=form, out_dir=out))
    network: Any = rebuild(out)
    teacher: Any = load_network(task["teacher"], None, None).classifier.network
    assert torch.equal(network.network.classifier.weight, teacher.fc.weight)
    assert torch.equal(network.network.classifier.bias, teacher.fc.bias)
    test = load_labelled("tiny.npz", "test", task["data_root"])
    assert accuracy(network, test, torch.device("cpu")) == result.accuracy


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 1}, "batch_size=1 must be >= 2"),
        ({"beta": 0.0}, "beta=0.0 must be > 0"),
        ({"contrast_temperature": math.nan}, "contrast_temperature=nan must be > 0"),
        ({"cutoff": 1.5}, "cutoff=1.5 must lie in"),
        ({"crop_scale": 0.0}, "crop_scale=0.0 must lie in"),
        ({"mix": -1.0}, "mix=-1.0 must be >= 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    values: dict[str, Any], message: str, task: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=message):
        start(task, **values)


def test_the_projector_has_the_size_of_the_released_one() -> None:
    with torch.device("meta"):
        network = SharedClassifier(build_network("resnet18", 10), nn.Linear(512, 10), (4, 4))
    assert count_parameters(network.projector) == 854_016


def test_a_larger_map_is_averaged_and_a_smaller_one_is_left() -> None:
    x = torch.rand(2, 3, 8, 8)
    pooled = pool_to(x, (4, 4))
    assert pooled.shape == (2, 3, 4, 4)
    assert pooled[0, 1, 2, 3].item() == pytest.approx(x[0, 1, 4:6, 6:8].mean().item())
    assert torch.equal(pool_to(x, (16, 16)), x)


def test_a_teacher_that_does_not_end_in_one_linear_layer_is_refused() -> None:
    network = LeNet((6, 16, 120, 84), 3, 1)
    assert torch.equal(classifier_of(network).weight, network.fc.weight)

    class Clipped(LeNet):
        def classify(self, features: Tensor) -> Tensor:
            return super().classify(features).relu()

    with pytest.raises(ValueError, match="Clipped does not classify by one linear layer"):
        classifier_of(Clipped((6, 16, 120, 84), 3, 1))
