# SPDX-License-Identifier: Apache-2.0
"""torch.compile for the networks of a run."""

from __future__ import annotations

import torch
from torch import nn

from python_models.errors import UserError
from python_models.networks import Classifier, ImageNetwork


def compiled_networks(
    teacher: Classifier, student: Classifier, device: torch.device, *, reads_features: bool
) -> Classifier:
    """Compile a student in place, and a teacher's pass without hooks.

    The student's names and weights stay as they are. The teacher itself stays uncompiled: methods
    read its layers by hooks that come and go, which compiled code may pass over.

    Args:
        teacher: Teacher.
        student: Student.
        device: Where both are.
        reads_features: Whether the method reads the vector before the student's last layer.

    Returns:
        A teacher to compute logits alone, compiled.

    Raises:
        UserError: If there is no compiler, or the student's features are read by a hook.
    """
    _require_compiler(device)
    network = student.network
    if isinstance(network, ImageNetwork):
        # All its results come by way of the one of these that it defines.
        own_map = type(network).feature_map is not ImageNetwork.feature_map
        name = "feature_map" if own_map else "features"
        setattr(network, name, torch.compile(getattr(network, name)))
    elif reads_features:
        raise UserError(
            f"compile=True cannot be used with a student {type(network).__name__} whose features "
            "the method reads by a hook: derive it from python_models.networks.ImageNetwork, or "
            "give --no-compile"
        )
    else:
        network.compile()
    compiled: nn.Module = torch.compile(teacher.network)  # type: ignore[assignment]
    seen = Classifier(compiled, teacher.mean.flatten().tolist(), teacher.std.flatten().tolist())
    seen.precision = teacher.precision
    return seen.to(device).eval()


def _require_compiler(device: torch.device) -> None:
    try:
        torch.compile(torch.sin)(torch.ones(2, device=device))
    except Exception as error:  # the compiler's own errors are of many kinds
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"compile=True: torch.compile does not work here ({reason}): install a C++ compiler, "
            "or give --no-compile"
        ) from error
