# SPDX-License-Identifier: Apache-2.0
"""What the examples share: a teacher of scikit-learn's 8x8 digits, and images of something else."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

NUM_CLASSES, SIZE = 10, 8
PIXELS = SIZE * SIZE


def network(width: int) -> nn.Module:
    """Return a classifier of images ``[n, 64]`` in [0, 1] with one hidden layer."""
    return nn.Sequential(nn.Linear(PIXELS, width), nn.ReLU(), nn.Linear(width, NUM_CLASSES))


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images and labels, which only the teacher may see, and test ones."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16).float(), torch.tensor(labels)
    return x[:1200], y[:1200], x[1200:], y[1200:]


def trained_teacher() -> nn.Module:
    """Return a teacher, trained with labels and then fixed."""
    images, labels, _, _ = data()
    teacher = network(width=128)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(teacher(images), labels).backward()
        optimizer.step()
    return teacher.eval().requires_grad_(False)


def strokes(count: int) -> Tensor:
    """Return images ``[count, 64]`` of three random strokes each: no digits, and no labels."""
    ends = torch.rand(count, 3, 2, 1, 2) * (SIZE - 1)
    begin, line = ends[:, :, 0], ends[:, :, 1] - ends[:, :, 0]
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    pixels = torch.stack([rows, columns], -1).reshape(PIXELS, 2)
    along = ((pixels - begin) * line).sum(-1, keepdim=True) / line.square().sum(-1, keepdim=True)
    squared_distance = (pixels - begin - along.clamp(0, 1) * line).square().sum(-1)
    return torch.exp(-squared_distance).amax(1)


@torch.no_grad()
def accuracy(network: nn.Module) -> float:
    """Return the accuracy on the test images, in percent."""
    _, _, images, labels = data()
    return float(100 * (network(images).argmax(1) == labels).float().mean())
