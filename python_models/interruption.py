# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C within a long generator phase: the round is given up, and made anew on resume."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

LONG_ROUND = 5.0
"""Seconds of a call of the loop that Ctrl-C may wait for; after longer ones it does not."""


class RoundAbandoned(Exception):
    """A generator phase was left in the middle: the run's memory is of no more use."""


class RoundStart:
    """Keeps the state at the beginning of a round while the round is made, if it may take long.

    The first round is taken to be long, then each that follows a long one. Times decide only what
    is kept, never what is computed.

    Args:
        state_dict: Returns the state.
        is_kept: False where nothing is to be kept: one of several processes cannot give a round up
            that the others go on with.
    """

    def __init__(self, state_dict: Callable[[], Mapping[str, Any]], is_kept: bool = True) -> None:
        self._state_dict = state_dict
        self._is_kept = is_kept
        self._seconds = LONG_ROUND
        self.state: dict[str, Any] | None = None

    @contextmanager
    def making(self, is_round_due: bool) -> Iterator[None]:
        """Within the block, which makes a round if one is due, `state` is that from before."""
        begin = time.monotonic()
        if self._is_kept and is_round_due and self._seconds >= LONG_ROUND:
            self.state = _copy(self._state_dict())
        yield
        self.state = None
        if is_round_due:
            self._seconds = time.monotonic() - begin


def _copy(value: Any) -> Any:
    """Return a state whose tensors are copies on the CPU, where they take no GPU's memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(item) for item in value)
    return value
