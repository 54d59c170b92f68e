# SPDX-License-Identifier: Apache-2.0
"""torch.compile for the networks of a run."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from python_models.errors import UserError
from python_models.networks import Classifier, ImageNetwork


def compiled_networks(
    teacher: Classifier,
    student: Classifier,
    device: torch.device,
    *,
    reads_features: bool,
    cuda_graphs: bool = False,
) -> Classifier:
    """Compile a student in place, and a teacher's pass without hooks.

    The student's names and weights stay as they are. The teacher itself stays uncompiled: methods
    read its layers by hooks that come and go, which compiled code may pass over.

    Args:
        teacher: Teacher.
        student: Student.
        device: Where both are.
        reads_features: Whether the method reads the vector before the student's last layer.
        cuda_graphs: Whether passes are replayed as CUDA graphs. What one returns then lasts until
            the next call of `begin_step`.

    Returns:
        A teacher to compute logits alone, compiled.

    Raises:
        UserError: If there is no compiler, no GPU for CUDA graphs, or the student's features are
            read by a hook.
    """
    if cuda_graphs and device.type != "cuda":
        raise UserError(f"cuda_graphs=True needs a GPU, but device={device}: give --no-cuda-graphs")
    _require_compiler(device)
    mode = "reduce-overhead" if cuda_graphs else None
    compile_ = partial(torch.compile, mode=mode)
    network = student.network
    if isinstance(network, ImageNetwork):
        # All its results come by way of the one of these that it defines.
        own_map = type(network).feature_map is not ImageNetwork.feature_map
        name = "feature_map" if own_map else "features"
        setattr(network, name, compile_(getattr(network, name)))
    elif reads_features:
        raise UserError(
            f"compile=True cannot be used with a student {type(network).__name__} whose features "
            "the method reads by a hook: derive it from python_models.networks.ImageNetwork, or "
            "give --no-compile"
        )
    else:
        network.compile(mode=mode)
    compiled: nn.Module = compile_(teacher.network)  # type: ignore[assignment]
    seen = Classifier(compiled, teacher.mean.flatten().tolist(), teacher.std.flatten().tolist())
    seen.precision = teacher.precision
    return seen.to(device).eval()


def begin_step() -> None:
    """Let CUDA graphs overwrite what they returned in the last step."""
    mark: Any = torch.compiler.cudagraph_mark_step_begin  # Any: it has no types
    mark()


def _require_compiler(device: torch.device) -> None:
    try:
        torch.compile(torch.sin)(torch.ones(2, device=device))
    except Exception as error:  # the compiler's own errors are of many kinds
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"compile=True: torch.compile does not work here ({reason}): install a C++ compiler, "
            "or give --no-compile"
        ) from error
