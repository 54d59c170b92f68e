# SPDX-License-Identifier: Apache-2.0
"""Independent named random streams from one seed.

Everything that draws at random in a run has a stream of its own. So a KDCI run draws the same
images as its vanilla twin, and saving the streams is enough to resume exactly.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from python_models.errors import UserError


class Randomness:
    """Random streams, each seeded by the run's seed and the stream's name.

    Args:
        seed: The run's seed.
        device: Where the streams of `on_device` draw.
        rank: Number of this process, of several that share all but torch's global streams: what
            modules such as dropout draw is for a process's own rows.
    """

    def __init__(self, seed: int, device: torch.device, rank: int = 0) -> None:
        self.seed = seed
        self.device = device
        self.rank = rank
        self._streams: dict[str, torch.Generator] = {}
        # User modules, such as dropout in a student, draw from the global streams.
        torch.manual_seed(self._global_seed)
        random.seed(seed)

    @property
    def _global_seed(self) -> int:
        return self.stream_seed(f"process {self.rank}") if self.rank else self.seed

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
            "python": [version, list(words), gauss],
            **self.global_state(),
        }
        return state

    def global_state(self) -> dict[str, Tensor]:
        """Return the state of torch's global streams, which of several processes each has."""
        state = {"torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _load_global_state(self, state: Mapping[str, Any]) -> None:
        torch.set_rng_state(state["torch"].cpu())
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"].cpu(), self.device)

    def load_state_dict(
        self, state: dict[str, Any], others: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Restore what `state_dict` returned.

        Args:
            state: That of the first process.
            others: The `global_state` of those after it. A process that was not there then draws
                from its seed.

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
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        if self.rank <= len(others):
            self._load_global_state([state, *others][self.rank])
        else:
            torch.manual_seed(self._global_seed)
