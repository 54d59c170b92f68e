# SPDX-License-Identifier: Apache-2.0
"""Accuracy on labelled images."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from python_models.config import EvaluateConfig
from python_models.data import LabelledImages, load_labelled
from python_models.errors import UserError

LogitsFunction = Callable[[Tensor], Tensor]


@torch.no_grad()
def accuracies(
    network: nn.Module,
    data: LabelledImages,
    device: torch.device,
    *,
    heads: Mapping[str, LogitsFunction] | None = None,
    batch_size: int = 500,
) -> dict[str, float]:
    """Measure a network's accuracy, and that of functions of its logits.

    Args:
        network: Images in [0, 1] to logits; evaluated in eval mode, its mode is restored.
        data: Images and labels.
        device: Where the network is.
        heads: Functions of the logits, such as KDCI's compensation, by name.
        batch_size: Images in a forward pass.

    Returns:
        Percentages by name; ``"plain"`` is the network's own.
    """
    heads = {"plain": lambda logits: logits, **(heads or {})}
    correct = {name: torch.zeros((), dtype=torch.int64, device=device) for name in heads}
    training = network.training
    network.eval()
    total = 0
    for images, labels in data.batches(batch_size, device=device):
        logits = network(images)
        for name, head in heads.items():
            correct[name] += (head(logits).argmax(1) == labels).sum()
        total += len(labels)
    network.train(training)
    return {name: 100.0 * count.item() / total for name, count in correct.items()}


def accuracy(network: nn.Module, data: LabelledImages, device: torch.device) -> float:
    """Return a network's accuracy in percent."""
    return accuracies(network, data, device)["plain"]


def evaluate(config: EvaluateConfig) -> float:
    """Run ``kdci evaluate``.

    Returns:
        Accuracy in percent.

    Raises:
        UserError: If the network or the data cannot be loaded, or do not fit each other.
    """
    from python_models.teacher import load_network, resolve_device

    if config.network is None:
        raise UserError(
            "network is required: --network RUN_FOLDER, FILE.safetensors, or with --weights the "
            "name of a network or package.module:callable"
        )
    device = resolve_device(config.device)
    loaded = load_network(
        config.network,
        config.weights,
        config.dataset,
        "network",
        "weights",
        config.data_root,
        network_args=config.network_args,
        given=config.input,
        may_open_train=config.split == "train",
    )
    dataset = config.dataset or loaded.info.dataset
    if dataset is None:
        raise UserError("dataset is required: the network's file does not name one")
    data = load_labelled(
        dataset, config.split, config.data_root, image_shape=loaded.info.image_shape
    )
    loaded.require_fit(data, dataset)
    return accuracies(loaded.classifier.to(device), data, device, batch_size=config.batch_size)[
        "plain"
    ]
