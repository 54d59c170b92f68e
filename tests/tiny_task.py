# SPDX-License-Identifier: Apache-2.0
"""A task so small that a whole run takes a moment: 4 classes of grey images, LeNet teachers."""

import importlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from python_models.checkpoint import NetworkInfo, export_network, read_info
from python_models.config import DistillConfig, distill_config
from python_models.engine import Distillation
from python_models.networks import Classifier, build_network
from python_models.teacher import load_network

CLASSES = 4


def make_task(folder: Path, network: str = "lenet5_half_bn", size: int = 32) -> dict[str, Any]:
    """Write a teacher, test images and unlabelled images, but no training data of its own.

    Images are of this size; only 32 suits the student, a LeNet.

    Methods that need labels find both splits as the dataset ``labelled.npz``.

    Returns:
        Settings of `distill_config` that name them.
    """
    random = np.random.default_rng(0)
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    np.savez(
        data / "tiny_test.npz",
        images=random.integers(0, 256, (40, size, size), dtype=np.uint8),
        labels=np.arange(40) % CLASSES,
    )
    np.savez(
        data / "wild.npz",
        images=random.integers(0, 256, (50, 24, 24, 3), dtype=np.uint8),
        labels=np.zeros(50, dtype=np.int64),
    )
    for split in ("train", "test"):
        np.savez(
            data / f"labelled_{split}.npz",
            images=random.integers(0, 256, (40, size, size), dtype=np.uint8),
            labels=np.arange(40) % CLASSES,
        )
    torch.manual_seed(1)
    info = NetworkInfo(network, CLASSES, (1, size, size), (0.5,), (0.5,), "tiny.npz")
    export_network(folder / "teacher.safetensors", build_network(network, CLASSES, 1), info)
    return {
        "teacher": str(folder / "teacher.safetensors"),
        "student": "lenet5_half_bn",
        "data_root": data,
        "device": "cpu",
        "batch_size": 12,
        "epochs": 2,
        "lr": 0.05,
        "kdci_hidden_dim": 8,
        "kdci_prototypes": 3,
    }


METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "cmi": {
        "generator": "generator_tiny",
        "latent_dim": 8,
        "synthesis_batch_size": 10,
        "g_steps": 2,
        "head_dim": 8,
        "bank_size": 25,
        "bank_sample_size": 15,
        "pool_size": 25,
        "ep_steps": 4,
        "kd_steps": 2,
    },
    "dafl": {
        "generator": "generator_tiny",
        "latent_dim": 8,
        "synthesis_batch_size": 10,
        "ep_steps": 4,
        "kd_steps": 2,
    },
    "deepinversion": {
        "synthesis_batch_size": 10,
        "g_steps": 3,
        "pool_size": 25,
        "ep_steps": 4,
        "kd_steps": 2,
    },
    "fast": {
        "generator": "generator_tiny",
        "latent_dim": 8,
        "synthesis_batch_size": 10,
        "g_steps": 2,
        "warmup": 2,
        "reset_after": 1,
        "pool_size": 25,
        "ep_steps": 4,
        "kd_steps": 2,
    },
    "mosaickd": {
        "unlabelled": "wild.npz",
        "select": 30,
        "generator": "generator_tiny",
        "latent_dim": 8,
        "discriminator": "discriminator_tiny",
        "kd_steps": 2,
    },
    "cid": {"dataset": "labelled.npz", "init_epochs": 1, "sr": 0.1, "epochs": 3},
    "kd3": {"unlabelled": "wild.npz", "kd_weight": 1.0, "epochs": 3, "embedding_dim": 6},
    "dfnd": {"unlabelled": "wild.npz", "select": 30, "epochs": 3},
    "noise": {"ep_steps": 4, "kd_steps": 2},
}
"""Settings that make each method quick."""


def rebuild(run: Path) -> Classifier:
    """Return the network of a run's exported file, built from what the file says of itself."""
    path = run / "student.safetensors"
    info = read_info(path)
    assert info is not None
    module, _, factory = info.network.partition(":")
    if factory:
        build = getattr(importlib.import_module(module), factory)
        network = build(info.num_classes, info.image_shape[0], **info.arguments)
    else:
        network = build_network(info.network, info.num_classes, info.image_shape[0])
    network.load_state_dict(load_file(path))
    return Classifier(network, info.mean, info.std).eval()


def tiny_config(task: dict[str, Any], method: str, **values: Any) -> DistillConfig[Any]:
    """Return the config of a quick run."""
    return distill_config(method=method, **{**task, **METHOD_SETTINGS[method], **values})


def write_config(folder: Path, task: dict[str, Any], method: str, **values: Any) -> Path:
    """Write the settings of a quick run as a file for ``--config``."""
    settings = {**task, **METHOD_SETTINGS[method], **values, "method": method}
    path = folder / "settings.yaml"
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
    path.write_text(yaml.safe_dump(plain))
    return path


def start(task: dict[str, Any], method: str, **values: Any) -> Distillation:
    """Return a quick run before its first step."""
    config = tiny_config(task, method, **values)
    assert config.task.teacher is not None
    teacher = load_network(config.task.teacher, None, None)
    return Distillation(config, teacher, torch.device("cpu"))


def in_double(run: Distillation) -> Distillation:
    """Bring a run's networks and its method's tensors to float64; images and losses follow."""
    held = [run.teacher, run.student, run.deployed, run.kdci, *vars(run.method).values()]
    for each in held:
        if isinstance(each, nn.Module):
            each.double()
        elif isinstance(each, torch.Tensor) and each.is_floating_point():
            each.data = each.data.double()
    return run


def resumed(run: Distillation, again: Distillation) -> Distillation:
    """Give a run's state to another one, by way of a file that holds no code."""
    file = io.BytesIO()
    torch.save(run.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    return again
