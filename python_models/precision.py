# SPDX-License-Identifier: Apache-2.0
"""Mixed precision: networks compute under autocast, all else in float32.

A network's pass runs under torch.autocast and its result returns to float32, so that losses,
statistics of BatchNorm layers, KDCI, optimisers and images are in float32 without a word in the
methods. Weights are float32 throughout, and so are the passes outside of training: those that
select unlabelled images or measure accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from python_models.errors import UserError

PrecisionName = Literal["float32", "bf16", "fp16"]

_DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """How the networks of a run compute.

    Args:
        name: ``float32``, ``bf16`` or ``fp16``. The last scales losses, as small gradients would
            underflow; see `scaler`.
        device: Where the networks are.

    Raises:
        UserError: If the device cannot compute so.

    Example:
        >>> precision = Precision("bf16", torch.device("cpu"))
        >>> layer = torch.nn.Linear(8, 4)
        >>> with precision.active():
        ...     logits = precision.run(layer, torch.randn(2, 8))
        >>> logits.dtype
        torch.float32
    """

    def __init__(self, name: PrecisionName = "float32", device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._dtype = _DTYPES[name]
        self._is_active = False
        self._scalers: dict[str, torch.amp.GradScaler] = {}
        if self._dtype is None:
            return
        if self.device.type == "cuda" and name == "bf16" and not torch.cuda.is_bf16_supported():
            raise UserError(
                f"precision=bf16 is not supported by {torch.cuda.get_device_name(self.device)}: "
                "use --precision fp16"
            )
        if not torch.amp.is_autocast_available(self.device.type):
            raise UserError(
                f"precision={name} is not available on device={self.device}: use --precision "
                "float32"
            )

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the block, `run` computes in this precision; elsewhere in float32."""
        before, self._is_active = self._is_active, True
        try:
            yield
        finally:
            self._is_active = before

    def run(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """Return a network's result for these arguments, in float32 (float64 stays)."""
        if self._dtype is None or not self._is_active:
            return function(*arguments)
        with torch.autocast(self.device.type, self._dtype):
            result = function(*arguments)
        return at_least_float32(result)

    def scaler(self, name: str) -> torch.amp.GradScaler | None:
        """Return the scaler of the loss of this name, or None where no loss is scaled.

        Each loss has one of its own, as their gradients differ in size.
        """
        if self._dtype != torch.float16:
            return None
        if name not in self._scalers:
            self._scalers[name] = torch.amp.GradScaler(self.device.type)
        return self._scalers[name]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all scalers."""
        return {name: scaler.state_dict() for name, scaler in self._scalers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, scaler in self._scalers.items():
            scaler.load_state_dict(state[name])


def at_least_float32(values: Tensor) -> Tensor:
    """Return values in float32, or as they are if their type is no smaller one."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
