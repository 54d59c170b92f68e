# SPDX-License-Identifier: Apache-2.0
"""How a loss is minimised, whichever method has it: looked at, differentiated, stepped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from python_models.distributed import ALONE, World
from python_models.methods.base import backward_into, total
from python_models.precision import Precision


class Descent:
    """Steps of one loss, scaled where the precision is float16.

    Args:
        name: Of the loss; each has a scale of its own.
        precision: Of the run.
        watch: Is shown the terms of every step, to stop the run where one is not finite.
        world: The processes, which get the mean of their gradients.

    Example:
        >>> descent = Descent("generator", context.precision, context.watch, context.world)
        >>> for _ in range(steps):
        ...     loss = descent.backward(terms(), [optimizer], generator)
        ...     descent.step()
    """

    def __init__(
        self,
        name: str,
        precision: Precision,
        watch: Callable[[Mapping[str, Tensor]], None] | None = None,
        world: World = ALONE,
    ) -> None:
        self._scaler = precision.scaler(name)
        self._watch = watch
        self._world = world
        self._optimizers: Sequence[torch.optim.Optimizer] = ()

    def backward(
        self,
        terms: Mapping[str, Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
        *targets: nn.Module | Tensor,
    ) -> Tensor:
        """Replace the gradients of what these optimisers train by those of a sum of terms.

        Args:
            terms: Weighted terms of the loss, by name.
            optimizers: Those that `step` lets step.
            *targets: What gradients are computed for; by default, all that the terms depend on.

        Returns:
            The loss, detached.
        """
        if self._watch is not None:
            self._watch(terms)
        loss = total(terms)
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaled = loss if self._scaler is None else self._scaler.scale(loss)
        if targets:
            backward_into(scaled, *targets, world=self._world)
        else:
            torch.autograd.backward(scaled)
            self._world.average_gradients(_trained_by(optimizers))
        if self._scaler is not None:
            for optimizer in optimizers:
                self._scaler.unscale_(optimizer)
        self._optimizers = optimizers
        return loss.detach()

    def gradients(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Return the gradients of the last loss; zeros where float16 overflowed, so no step is.

        Args:
            parameters: All that the optimisers train.
        """
        gradients = []
        for parameter in parameters:
            assert parameter.grad is not None
            gradients.append(parameter.grad)
        if self._scaler is None:
            return gradients
        finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
        return [torch.where(finite, gradient, 0.0) for gradient in gradients]

    def step(self) -> None:
        """Let the optimisers step, but those whose gradients overflowed in float16."""
        if self._scaler is None:
            for optimizer in self._optimizers:
                optimizer.step()
            return
        for optimizer in self._optimizers:
            self._scaler.step(optimizer)
        self._scaler.update()


def _trained_by(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[Tensor]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from group["params"]
