# SPDX-License-Identifier: Apache-2.0
"""Independent named random streams from one seed.

Everything that draws at random in a run has a stream of its own. So a KDCI run draws the same
images as its vanilla twin, and saving the streams is enough to resume exactly.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from python_models.errors import UserError


class Randomness:
    """Random streams, each seeded by the run's seed and the stream's name.

    Args:
        seed: The run's seed.
        device: Where the streams of `on_device` draw.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed = seed
        self.device = device
        self._streams: dict[str, torch.Generator] = {}
        # User modules, such as dropout in a student, draw from the global streams.
        torch.manual_seed(seed)
        random.seed(seed)

    def stream_seed(self, name: str) -> int:
        """Return the seed of a stream."""
        return zlib.crc32(f"{self.seed}/{name}".encode())

    def on_device(self, name: str) -> torch.Generator:
        """Return the stream of this name on the run's device."""
        return self._stream(name, self.device)

    def on_cpu(self, name: str) -> torch.Generator:
        """Return the stream of this name on the CPU."""
        return self._stream(name, torch.device("cpu"))

    def _stream(self, name: str, device: torch.device) -> torch.Generator:
        if name not in self._streams:
            self._streams[name] = torch.Generator(device).manual_seed(self.stream_seed(name))
        return self._streams[name]

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Restore torch's global streams after the block, whatever is drawn in it."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            yield

    @contextmanager
    def initialising(self, name: str) -> Iterator[None]:
        """Within the block, torch's global streams are ones of this name; restored after it."""
        with self.untouched():
            torch.manual_seed(self.stream_seed(name))
            yield

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every stream, the global ones of torch and Python among them."""
        version, words, gauss = random.getstate()
        state: dict[str, Any] = {
            "streams": {
                name: {"on_cpu": stream.device.type == "cpu", "state": stream.get_state()}
                for name, stream in self._streams.items()
            },
            "torch": torch.get_rng_state(),
            "python": [version, list(words), gauss],
        }
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            UserError: If it was saved on another kind of device, whose streams differ.
        """
        for name, saved in state["streams"].items():
            stream = self.on_cpu(name) if saved["on_cpu"] else self.on_device(name)
            if saved["on_cpu"] != (stream.device.type == "cpu"):
                raise UserError(
                    f"device={self.device} is of another kind than the one that the run began on, "
                    "and draws other random numbers: resume on the same kind"
                )
            stream.set_state(saved["state"].cpu())
        torch.set_rng_state(state["torch"].cpu())
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"].cpu(), self.device)
