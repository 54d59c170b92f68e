# SPDX-License-Identifier: Apache-2.0
"""A student of one's own, for ``kdci distill --student own_student:Student``; see README.md.

Any `torch.nn.Module` will do. ``num_classes`` is passed because the signature has the name;
``width`` is an argument of this network alone, given as ``--student-args width=16``.
"""

from torch import Tensor, nn


def block(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    """Return a convolution with BatchNorm and ReLU."""
    convolution = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU())


class Student(nn.Module):
    """Five convolutions, the mean over all places, one linear layer: images to logits."""

    def __init__(self, width: int = 16, num_classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(
            block(3, width, 1),
            block(width, 2 * width, 2),
            block(2 * width, 2 * width, 1),
            block(2 * width, 4 * width, 2),
            block(4 * width, 4 * width, 1),
        )
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [b, num_classes] of images [b, 3, h, w]."""
        logits: Tensor = self.fc(self.body(images).mean((2, 3)))
        return logits
