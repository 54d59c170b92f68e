# SPDX-License-Identifier: Apache-2.0
"""Every loss term against a computation of a few lines by hand, in float64."""

import math

import pytest
import torch
from torch import Tensor, nn

from python_models import losses


@pytest.fixture
def student() -> Tensor:
    return torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3


@pytest.fixture
def teacher() -> Tensor:
    return torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3


def probabilities(row: Tensor, temperature: float = 1.0) -> list[float]:
    weights = [math.exp(float(x) / temperature) for x in row]
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_kd_divergence(student: Tensor, teacher: Tensor, temperature: float) -> None:
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        p, q = probabilities(t, temperature), probabilities(s, temperature)
        expected += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    expected *= temperature**2 / len(student)
    assert losses.kd_divergence(student, teacher, temperature).item() == pytest.approx(expected)


def test_kd_divergence_is_zero_for_equal_logits_and_sends_no_gradient_to_the_teacher(
    student: Tensor,
) -> None:
    teacher = student.clone().requires_grad_()
    student.requires_grad_()
    loss = losses.kd_divergence(student, teacher, 4.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    assert teacher.grad is None


def test_kd_divergence_refuses_a_temperature_that_is_not_positive(student: Tensor) -> None:
    with pytest.raises(ValueError, match="temperature=0 must be > 0"):
        losses.kd_divergence(student, student, 0)


def test_one_hot_loss(teacher: Tensor) -> None:
    own = [-math.log(max(probabilities(t))) for t in teacher]
    assert losses.one_hot_loss(teacher).item() == pytest.approx(sum(own) / 6)
    targets = [0, 1, 2, 3, 0, 1]
    given = [-math.log(probabilities(t)[y]) for t, y in zip(teacher, targets, strict=True)]
    found = losses.one_hot_loss(teacher, torch.tensor(targets))
    assert found.item() == pytest.approx(sum(given) / 6)


def test_activation_loss() -> None:
    features = torch.tensor([[1.0, -2.0], [3.0, 0.0]])
    assert losses.activation_loss(features).item() == pytest.approx(-(1 + 2 + 3 + 0) / 4)


@pytest.mark.parametrize(("base", "number"), [("e", math.e), ("10", 10.0)])
def test_information_entropy_loss(teacher: Tensor, base: str, number: float) -> None:
    rows = [probabilities(t) for t in teacher]
    mean = [sum(column) / 6 for column in zip(*rows, strict=True)]
    expected = sum(m * math.log(m, number) for m in mean)
    found = losses.information_entropy_loss(teacher, base)  # type: ignore[arg-type]
    assert found.item() == pytest.approx(expected)


def test_information_entropy_loss_is_least_if_balanced_and_finite_without_a_class() -> None:
    balanced = 50 * torch.eye(4, dtype=torch.float64)
    assert losses.information_entropy_loss(balanced).item() == pytest.approx(-math.log(4))
    one_class = torch.tensor([[2000.0, 0.0]], requires_grad=True)
    loss = losses.information_entropy_loss(one_class)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-30)
    assert one_class.grad is not None
    assert one_class.grad.isfinite().all()


def test_masked_adversarial_loss(student: Tensor, teacher: Tensor) -> None:
    student[:3] = teacher[:3] + 0.1 * student[:3]  # these agree on the class
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        p, q = probabilities(t), probabilities(s)
        if p.index(max(p)) == q.index(max(q)):
            expected -= sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 6
    assert losses.masked_adversarial_loss(student, teacher).item() == pytest.approx(expected)


def test_masked_adversarial_gradient_is_finite_for_a_certain_teacher() -> None:
    """A probability that underflows to 0 must not turn the generator into NaN."""
    teacher = torch.tensor([[300.0, 0.0, -50.0]], requires_grad=True)
    student = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
    losses.masked_adversarial_loss(student, teacher).backward()
    assert teacher.grad is not None
    assert bool(torch.isfinite(teacher.grad).all())


class TwoNorms(nn.Module):
    """Two BatchNorm layers with known statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 2, 1)
        self.second = nn.BatchNorm2d(2)
        generator = torch.Generator().manual_seed(3)
        for layer in (self.first, self.second):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_(generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
        self.double().eval()

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.second(self.conv(self.first(images)))
        return result


def inputs_of_norms(network: TwoNorms, images: Tensor) -> list[tuple[nn.BatchNorm2d, Tensor]]:
    hidden = network.conv(network.first(images))
    return [(network.first, images), (network.second, hidden)]


def hand_statistics(inputs: Tensor) -> tuple[Tensor, Tensor]:
    rows = inputs.transpose(0, 1).flatten(1)
    mean = rows.sum(1) / rows.shape[1]
    return mean, ((rows - mean[:, None]) ** 2).sum(1) / rows.shape[1]


def distance(a: Tensor, b: Tensor) -> float:
    return math.sqrt(float(((a - b) ** 2).sum()))


def test_batch_norm_statistics() -> None:
    network = TwoNorms()
    images = torch.randn(5, 3, 4, 4, dtype=torch.float64).requires_grad_()
    statistics = losses.BatchNormStatistics(network)
    with statistics:
        network(images)
    expected = 0.0
    for layer, inputs in inputs_of_norms(network, images):
        mean, variance = hand_statistics(inputs.detach())
        assert layer.running_mean is not None
        assert layer.running_var is not None
        expected += distance(layer.running_mean, mean) + distance(layer.running_var, variance)
    loss = statistics.loss()
    assert loss.item() == pytest.approx(expected, rel=1e-11)
    loss.backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_batch_norm_statistics_read_nothing_outside_the_block() -> None:
    network = TwoNorms()
    statistics = losses.BatchNormStatistics(network)
    with statistics:
        network(torch.randn(5, 3, 4, 4, dtype=torch.float64))
    before = statistics.loss().item()
    network(torch.randn(5, 3, 4, 4, dtype=torch.float64))
    assert statistics.loss().item() == before


def test_batch_norm_momentum_averages_over_rounds() -> None:
    network, a = TwoNorms(), 0.9
    batches = [torch.randn(5, 3, 4, 4, dtype=torch.float64) for _ in range(3)]
    statistics = losses.BatchNormStatistics(network, momentum=a)
    found = []
    for images in batches:
        with statistics:
            network(images)
        found.append(statistics.loss().item())
        statistics.update_average()
    means: list[Tensor | None] = [None, None]
    variances: list[Tensor | None] = [None, None]
    for images, value in zip(batches, found, strict=True):
        expected = 0.0
        for i, (layer, inputs) in enumerate(inputs_of_norms(network, images)):
            mean, variance = (x.detach() for x in hand_statistics(inputs))
            old_mean, old_variance = means[i], variances[i]
            if old_mean is None or old_variance is None:
                mixed_mean, mixed_variance = mean, variance
                means[i], variances[i] = mean, variance
            else:
                mixed_mean = (1 - a) * mean + a * old_mean
                mixed_variance = (1 - a) * variance + a * old_variance
                means[i] = a * old_mean + (1 - a) * mean
                variances[i] = a * old_variance + (1 - a) * variance
            assert layer.running_mean is not None
            assert layer.running_var is not None
            expected += distance(layer.running_mean, mixed_mean)
            expected += distance(layer.running_var, mixed_variance)
        assert value == pytest.approx(expected, rel=1e-11)


def test_batch_norm_statistics_need_batch_norm() -> None:
    with pytest.raises(ValueError, match="no BatchNorm layer"):
        losses.BatchNormStatistics(nn.Linear(2, 2))


def transition(theta: list[list[float]], diagonal: float) -> list[list[float]]:
    """Q, entry by entry."""
    matrix = []
    for i, row in enumerate(theta):
        shares = [(1 - diagonal) * p for p in probabilities(torch.tensor(row))]
        matrix.append([*shares[:i], diagonal, *shares[i:]])
    return matrix


def test_noise_transition() -> None:
    theta = torch.randn(4, 3, dtype=torch.float64)
    found = losses.log_noise_transition(theta, 0.9).exp()
    expected = torch.tensor(transition(theta.tolist(), 0.9), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.sum(1), torch.ones(4, dtype=torch.float64))
    start = losses.log_noise_transition(torch.zeros(4, 3), 0.7).exp()
    torch.testing.assert_close(start, 0.1 * torch.ones(4, 4) + 0.6 * torch.eye(4))


def test_noise_adaptation_loss(student: Tensor) -> None:
    theta = torch.randn(4, 3, dtype=torch.float64)
    matrix, labels = transition(theta.tolist(), 0.9), [0, 1, 2, 3, 2, 1]
    expected = 0.0
    for row, label in zip(student, labels, strict=True):
        adapted = sum(p * matrix[i][label] for i, p in enumerate(probabilities(row)))
        expected -= math.log(adapted) / 6
    log_transition = losses.log_noise_transition(theta, 0.9)
    found = losses.noise_adaptation_loss(student, torch.tensor(labels), log_transition)
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_noise_adaptation_loss_does_not_underflow() -> None:
    student = torch.tensor([[0.0, 3000.0]], requires_grad=True)
    log_transition = losses.log_noise_transition(torch.zeros(2, 1), 1 - 1e-3)
    loss = losses.noise_adaptation_loss(student, torch.tensor([0]), log_transition)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-3), rel=1e-4)
    assert student.grad is not None
    assert student.grad.isfinite().all()
