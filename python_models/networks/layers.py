# SPDX-License-Identifier: Apache-2.0
"""Layers and initialisations that several networks share."""

from torch import nn


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without bias that keeps the size at stride 1."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


def init_convolutions_(module: nn.Module) -> None:
    """Draws the weights of all convolutions from He's normal distribution for ReLU (fan-out)."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def init_normal_(module: nn.Module, std: float = 0.02) -> None:
    """Re-initialises a generator in place, as CMI and Fast do before each synthesis.

    Weights of linear layers and convolutions become N(0, std), scales of BatchNorm N(1, std),
    all biases 0. Running statistics stay as they are.

    Example:
        >>> init_normal_(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)))
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.normal_(layer.weight, 0.0, std)
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.affine:
            nn.init.normal_(layer.weight, 1.0, std)
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
