# SPDX-License-Identifier: Apache-2.0
"""One run in several processes, started by ``torchrun``, each with a device of its own.

All processes hold the same networks, pools and banks, and each works on its rows of every batch:

- Random draws are shared. Every process draws the numbers of the whole batch from the same streams
  and takes its rows of them, so that a run does not depend on the number of processes. Only the
  global streams of torch, from which modules such as dropout draw, differ between processes.
- A process's loss is what it would be if all rows were like its own; the run's loss is the mean of
  these. What concerns the whole batch (BatchNorm statistics, mean predictions, contrasts) is made
  of all rows by `World.mean`, `World.gather` and `World.pooled_moments`, which gradients flow
  through to all processes. Then every gradient is the mean of the processes' gradients.
- Gradients are exchanged after the backward pass as one flat tensor, not by
  DistributedDataParallel: that hooks the forward pass of one module, but here the losses go through
  parts of networks (features, feature maps), several networks and single tensors at once, and
  generators learn by `torch.autograd.backward(inputs=...)`, which it does not support.
- What all processes then do, they do alike, bit for bit; the first one alone writes and prints.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed, nn

from kdci_ext.distributed import gathered_rows
from python_models.errors import DivergenceError, Interrupted, PeerError, UserError

ModuleT = TypeVar("ModuleT", bound=nn.Module)

TIMEOUT = datetime.timedelta(minutes=30)
"""How long a process waits for the others: longer than any of them works alone."""

_REASON_SECONDS = 3.0
"""How long a process whose peer is gone waits for the reason."""


class Part(NamedTuple):
    """Which rows of a whole batch some rows are.

    Attributes:
        start: The first.
        stop: The one after the last.
        total: Rows of the whole batch.
    """

    start: int
    stop: int
    total: int

    @property
    def rows(self) -> slice:
        """The rows as an index."""
        return slice(self.start, self.stop)


class World:
    """The processes of a run.

    Args:
        rank: Number of this process, from 0.
        size: Number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    def __deepcopy__(self, memo: dict[int, Any]) -> World:
        return self

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    @property
    def group(self) -> distributed.ProcessGroup | None:
        """The processes as torch knows them; None where there is one."""
        return None if self.size == 1 else distributed.group.WORLD

    # --- rows -------------------------------------------------------------------------------------

    def require_even(self, name: str, count: int) -> None:
        """Refuse a batch that cannot be shared out.

        Raises:
            UserError: If ``count`` is no multiple of the number of processes.
        """
        if count % self.size:
            below = count // self.size * self.size
            near = [str(value) for value in (below, below + self.size) if value]
            raise UserError(
                f"{name}={count} is shared out over {self.size} processes, which it must be a "
                f"multiple of: give {' or '.join(near)}, or start another number of processes"
            )

    def part(self, total: int) -> Part:
        """Return this process's rows of a batch; processes have equally many where they can."""
        return Part(self.rank * total // self.size, (self.rank + 1) * total // self.size, total)

    def share(self, rows: Tensor) -> Tensor:
        """Return this process's part of the rows of a whole batch."""
        return rows if self.size == 1 else rows[self.part(len(rows)).rows]

    # --- sums that gradients flow through ---------------------------------------------------------

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of the processes' values, of any shape; differentiable."""
        if self.size == 1:
            return value
        mean: Tensor = _Mean.apply(value, self)
        return mean

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, equally many of each, by rank; differentiable."""
        if self.size == 1:
            return rows
        gathered: Tensor = _Gather.apply(rows, self)
        return gathered

    def gather_uneven(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, perhaps none of some, by rank; without gradients."""
        return rows if self.size == 1 else gathered_rows(rows)

    def pooled_moments(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and biased variance of all processes' rows; differentiable.

        Args:
            mean: Of this process's rows, equally many as the others have, ``[c]``.
            variance: Theirs, biased, ``[c]``.
        """
        if self.size == 1:
            return mean, variance
        means, variances = self.gather(torch.stack([mean, variance])[None]).unbind(1)
        pooled = means.mean(0)
        return pooled, (variances + (means - pooled).square()).mean(0)

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace the gradients of these tensors by the means over all processes.

        Those without a gradient stay without: the same ones on all processes.
        """
        if self.size == 1:
            return
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                kinds.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in kinds.values():
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            distributed.all_reduce(flat)
            flat /= self.size
            parts = torch.split(flat, [gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view(gradient.shape))

    # --- agreement --------------------------------------------------------------------------------

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of the processes' values; without gradients."""
        value = value.detach()
        if self.size > 1:
            value = value.clone()
            distributed.all_reduce(value)
        return value

    def any(self, *values: bool) -> list[bool]:
        """Return for each value whether it is true of any process. No device is waited for."""
        if self.size == 1:
            return list(values)
        flags = torch.tensor(values, dtype=torch.uint8)
        distributed.all_reduce(flags, op=distributed.ReduceOp.MAX)
        return [bool(flag) for flag in flags.tolist()]

    def objects(self, value: Any) -> list[Any]:
        """Return the processes' values, plain Python ones, by rank."""
        values: list[Any] = [value]
        if self.size > 1:
            values *= self.size
            distributed.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """Return the first process's value, a plain Python one."""
        if self.size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values)
        return values[0]

    def bytes_from_first(self, contents: bytes | None) -> bytes | None:
        """Return the first process's bytes, which may be many, or None."""
        if self.size == 1:
            return contents
        length = self.from_first(None if contents is None else len(contents))
        if length is None:
            return None
        buffer = torch.empty(length, dtype=torch.uint8)
        if contents is not None:
            buffer = torch.frombuffer(bytearray(contents), dtype=torch.uint8)
        distributed.broadcast(buffer, 0)
        return buffer.numpy().tobytes()

    def require_equal(self, name: str, value: str) -> None:
        """Notice processes that have drifted apart.

        Raises:
            DivergenceError: If their values differ; on all processes.
        """
        if len(set(self.objects(value))) > 1:
            raise DivergenceError(
                f"{name} differs between the processes, which must compute alike: start them on "
                "devices of one kind, with the same versions of all libraries"
            )

    def synchronised(self, module: ModuleT) -> ModuleT:
        """Let a module's BatchNorm layers take the statistics of all processes' rows.

        The names in its ``state_dict`` stay. On GPUs the layers become torch's SyncBatchNorm, which
        knows no CPU; there they become `SynchronisedBatchNorm`.
        """
        if self.size == 1:
            return module
        if any(p.device.type == "cuda" for p in [*module.parameters(), *module.buffers()]):
            on_gpus: Any = nn.SyncBatchNorm  # Any: its method has no types
            converted: ModuleT = on_gpus.convert_sync_batchnorm(module)
            return converted
        return _with_synchronised_layers(module, self)  # type: ignore[return-value]


ALONE = World()
"""A run of one process."""


class _Mean(torch.autograd.Function):
    """Mean over the processes. Its gradient is that of the sum of their losses: again the mean."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, world: World) -> Tensor:
        ctx.world = world
        return world.sum(value.contiguous()) / world.size

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.world.mean(grad), None


class _Gather(torch.autograd.Function):
    """Concatenation over the processes; the gradient of a row is the sum of theirs for it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, world: World) -> Tensor:
        ctx.world = world
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(world.size)]
        distributed.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        world: World = ctx.world
        return world.share(world.sum(grad.contiguous())), None


class SynchronisedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the rows of all processes, on any device, in training; equally many of each.

    In eval mode it exchanges nothing, so that one process may evaluate.
    """

    world: World = ALONE

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``[b, c, ...]``."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        dims = [d for d in range(x.dim()) if d != 1]
        variance, mean = torch.var_mean(x, dim=dims, correction=0)
        mean, variance = self.world.pooled_moments(mean, variance)
        count = x.numel() // x.shape[1] * self.world.size
        self._track(mean.detach(), variance.detach() * (count / max(count - 1, 1)))
        scale = torch.rsqrt(variance + self.eps)
        shift = -mean * scale
        if self.affine:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        shape = (1, -1, *(1 for _ in dims[1:]))
        return torch.addcmul(shift.view(shape), x, scale.view(shape)).to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = self.momentum
        if momentum is None:
            momentum = 1.0 / int(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


def _with_synchronised_layers(module: nn.Module, world: World) -> nn.Module:
    if isinstance(module, SynchronisedBatchNorm):
        return module
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        layer = SynchronisedBatchNorm(
            module.num_features,
            module.eps,
            module.momentum,
            module.affine,
            module.track_running_stats,
        )
        layer.world = world
        layer.training = module.training
        # The same tensors, which optimisers and others may hold already.
        layer._parameters, layer._buffers = module._parameters, module._buffers
        return layer
    for name, child in module.named_children():
        converted = _with_synchronised_layers(child, world)
        if converted is not child:
            setattr(module, name, converted)
    return module


# --- start and end --------------------------------------------------------------------------------


def is_first_process() -> bool:
    """Whether this is the process that prints, where ``torchrun`` started several."""
    return os.environ.get("RANK", "0") == "0"


def local_device(name: str) -> str:
    """Return the device of this process: for ``auto`` and ``cuda`` the GPU of its number.

    Raises:
        UserError: If there are fewer GPUs on this machine than processes.
    """
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name not in ("auto", "cuda") or _launched_size() == 1 or (name == "auto" and not count):
        return name
    if rank >= count:
        raise UserError(
            f"device={name} gives each process a GPU, but process {rank} of this machine finds "
            f"{count}: start torchrun with --nproc-per-node {max(count, 1)}, or give --device cpu"
        )
    return f"cuda:{rank}"


def _launched_size() -> int:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def connect(device: str) -> Iterator[World]:
    """Join the processes that ``torchrun`` started, for the time of a ``with`` block.

    Where the caller made a default process group already, that one is used. An error of one process
    ends all: the others raise `PeerError`, and only the first to fail says why.

    Args:
        device: The run's device, as configured: it decides how the processes talk.

    Yields:
        The processes; `ALONE` where there is one.
    """
    if _launched_size() == 1:
        yield ALONE
        return
    is_ours = not distributed.is_initialized()
    if is_ours:
        has_own_gpu = device in ("auto", "cuda") and torch.cuda.is_available()
        if has_own_gpu:
            torch.cuda.set_device(local_device(device))
        # Two processes on one GPU, which NCCL refuses, get on with gloo.
        try:
            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if has_own_gpu else "gloo", timeout=TIMEOUT
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"the processes cannot be connected ({_first_line(error)}): start them with "
                "torchrun, or unset WORLD_SIZE"
            ) from error
    elif device != "cpu" and "gloo" not in str(distributed.get_backend_config()):
        raise UserError(
            "the process group serves GPUs alone, but the processes exchange tensors of the CPU "
            'too: init_process_group("cpu:gloo,cuda:nccl")'
        )
    world = World(distributed.get_rank(), distributed.get_world_size())
    # Counted where all that compute together count alike, whatever else each did before.
    count = distributed.distributed_c10d._get_default_store().add(f"kdci/runs of {world.rank}", 1)
    run = f"kdci/{count}"
    try:
        yield world
        if world.size > 1:
            distributed.barrier()  # a process that leaves early would look like a failed one
    except BaseException as error:
        raise _agreed(error, world, run) from error
    finally:
        if is_ours:
            distributed.destroy_process_group()


def _agreed(error: BaseException, world: World, run: str) -> BaseException:
    """Return what this process raises when an error ends its part of a run.

    The store that connected the processes tells who was first to fail, and why.
    """
    # These all raise at the same step; the first one knows the run folder.
    if world.is_first and isinstance(error, Interrupted | DivergenceError):
        return error
    if isinstance(error, Interrupted):
        return Interrupted("")
    if isinstance(error, DivergenceError):
        return PeerError(_first_line(error))
    try:
        store = distributed.distributed_c10d._get_default_store()
        if _is_of_connection(error):
            reason = _reason_of_peer(store, run)
            if reason is not None:
                return PeerError(reason)
            error = PeerError(
                "another process of the run ended without a word or did not answer within "
                f"{TIMEOUT.total_seconds() / 60:.0f} minutes ({_first_line(error)})"
            )
            error.is_unexplained = True
        if store.add(f"{run}/failed", 1) > 1:
            return PeerError(_reason_of_peer(store, run) or "another process of the run failed")
        store.set(f"{run}/reason", _first_line(error))
    except RuntimeError:  # the store went with the process that kept it
        return error if not _is_of_connection(error) else PeerError("another process failed")
    return error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _is_of_connection(error: BaseException) -> bool:
    """Whether an error is that of an exchange whose other side is gone."""
    if isinstance(error, distributed.DistBackendError | distributed.DistNetworkError):
        return True
    words = ("gloo", "Connection closed", "Connection reset", "Broken pipe", "imed out")
    return type(error) is RuntimeError and any(word in str(error) for word in words)


def _reason_of_peer(store: Any, run: str) -> str | None:
    end = time.monotonic() + _REASON_SECONDS
    while time.monotonic() < end:
        if store.check([f"{run}/reason"]):
            reason: str = store.get(f"{run}/reason").decode()
            return reason
        time.sleep(0.05)
    return None


def shared_chunks(chunks: Sequence[Tensor], world: World) -> Sequence[Tensor]:
    """Return this process's chunks of many, contiguous, so that `gather_uneven` keeps the order."""
    return chunks[world.part(len(chunks)).rows]
