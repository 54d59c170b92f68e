# SPDX-License-Identifier: Apache-2.0
"""Loss terms once more, in plain loops and float64, for the tests of methods that use them."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdci_ext import KDCI
from python_models.engine import Distillation


def probabilities(row: Tensor | Sequence[float], temperature: float = 1.0) -> list[float]:
    """Softmax of one row of logits."""
    values = row.tolist() if isinstance(row, Tensor) else row
    weights = [math.exp(x / temperature) for x in values]
    return [w / sum(weights) for w in weights]


def dot(x: Sequence[float], y: Sequence[float]) -> float:
    """Inner product."""
    return sum(i * j for i, j in zip(x, y, strict=True))


def cross_entropy(logits: Tensor, targets: Tensor) -> float:
    """Mean negative logarithm of the targets' probabilities."""
    terms = [-math.log(probabilities(t)[int(y)]) for t, y in zip(logits, targets, strict=True)]
    return sum(terms) / len(terms)


def norm(values: Tensor) -> float:
    """Euclidean norm of all values."""
    return math.sqrt(float((values.double() ** 2).sum()))


def in_float64(run: Distillation) -> None:
    """Make a run's networks float64, with BatchNorm statistics that no fresh network has."""
    for module in [*run.teacher.modules(), *run.student.modules()]:
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2)
    run.teacher.double()
    run.student.double()
    run.student.eval()


def inputs_of_norms(run: Distillation, images: Tensor) -> list[tuple[nn.BatchNorm2d, Tensor]]:
    """BatchNorm layers of a LeNet teacher and what enters them, images being in [0, 1]."""
    net, found = run.teacher.network, []
    x = (images - 0.5) / 0.5
    for conv, bn, pool in (
        (net.conv1, net.bn1, 2),
        (net.conv2, net.bn2, 2),
        (net.conv3, net.bn3, 1),
    ):
        x = conv(x)
        found.append((bn, x))
        x = F.relu(F.max_pool2d(bn(x), pool))
    return found


def batch_norm_distances(run: Distillation, images: Tensor) -> list[float]:
    """Distance of a batch's statistics from the stored ones, for each layer of the teacher."""
    distances = []
    for layer, inputs in inputs_of_norms(run, images):
        rows = inputs.detach().transpose(0, 1).flatten(1)
        mean = rows.sum(1) / rows.shape[1]
        variance = ((rows - mean[:, None]) ** 2).sum(1) / rows.shape[1]
        assert isinstance(layer.running_mean, Tensor)
        assert isinstance(layer.running_var, Tensor)
        distances.append(norm(layer.running_mean - mean) + norm(layer.running_var - variance))
    return distances


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """KL_T(T || S) of logits: the divergences of the images, their mean, times T squared."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        p, q = probabilities(t, temperature), probabilities(s, temperature)
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(student)


@torch.no_grad()
def compensated(kdci: KDCI, student: Tensor) -> Tensor:
    """S + sum_i lambda_i P(z_i) z_i, with lambda = softmax_i(w_t tanh(W_q s + W_k z_i))."""
    attention = kdci.compensation
    rows = []
    for s in student:
        prior = torch.zeros_like(s)
        scores = [
            attention.w_score @ torch.tanh(attention.w_query @ s + attention.w_key @ z)
            for z in kdci.prototypes
        ]
        shares = probabilities(torch.stack(scores))
        for share, z, proportion in zip(shares, kdci.prototypes, kdci.proportions, strict=True):
            prior += share * proportion * z
        rows.append(s + prior)
    return torch.stack(rows)


@torch.no_grad()
def let_half_agree(run: Distillation, images: Tensor) -> None:
    """Shift the student's bias so that about half of the images get a class of the teacher's."""
    common = run.teacher(images)[0].argmax()
    logits = run.student(images)
    others = logits.index_fill(1, common, -torch.inf).amax(1)
    margins = (logits[:, common] - others).sort()[0]
    middle = len(images) // 2
    bias = run.student.network.fc.bias  # type: ignore[union-attr]
    assert isinstance(bias, Tensor)
    bias[common] -= margins[middle - 1 : middle + 1].mean()
