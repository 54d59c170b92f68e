# SPDX-License-Identifier: Apache-2.0
"""Processes that tests give work to, and the work; they start quickly, as forks of one server."""

from __future__ import annotations

import copy
import datetime
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from killed_runs import PRELOADED
from tiny_task import in_double, tiny_config
from torch import Tensor, distributed, nn

import kdci_ext
from python_models import cli
from python_models import distill as distilling
from python_models import distributed as processes
from python_models.data import unlabelled
from python_models.distill import distill
from python_models.distributed import World
from python_models.engine import Distillation
from python_models.errors import PeerError, UserError
from python_models.methods import cid, kd3
from python_models.teacher import load_network

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(PRELOADED)

SMALL_PIECES = [
    (unlabelled, "READ_SIZE", 8),
    (kd3, "SELECTION_BATCH", 16),
    (cid, "FEATURE_BATCH", 16),
]
"""Constants by which tiny sets of images too are read in pieces, some in each process."""

PATIENCE = datetime.timedelta(seconds=20)
"""How long a process of a team waits for one that failed."""


class Team:
    """Processes that do one piece of work after the other, some or all of them, by gloo.

    Args:
        size: Number of processes.
        folder: Where they meet.
    """

    def __init__(self, size: int, folder: Path) -> None:
        self._pipes, self._processes = [], []
        self._connected, self._meetings = 0, 0
        for rank in range(size):
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(rank, str(folder), theirs))
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def __call__(self, size: int, work: Any, *arguments: Any) -> list[Any]:
        """Let ``size`` processes call ``work(rank, *arguments)``; return the results by rank."""
        if size != self._connected:
            self._connected = size
            self._meetings += 1
        for pipe in self._pipes[:size]:
            pipe.send((size, self._meetings, work, arguments))
        answers = [pipe.recv() for pipe in self._pipes[:size]]
        errors = [answer for failed, answer in answers if failed]
        assert not errors, errors
        return [answer for _, answer in answers]

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(20)
            process.kill()


def _serve(rank: int, folder: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    for module, name, value in SMALL_PIECES:
        setattr(module, name, value)
    connected = 0
    while (order := pipe.recv()) is not None:
        size, meeting, work, arguments = order
        if meeting != connected:
            if connected:
                distributed.destroy_process_group()
            place = f"file://{folder}/meeting{meeting}"
            distributed.init_process_group(
                *("gloo", place), timeout=PATIENCE, rank=rank, world_size=size
            )
            connected = meeting
        try:
            pipe.send((False, work(rank, *arguments)))
        except Exception as error:
            pipe.send((True, f"process {rank}: {type(error).__name__}: {error}"))
    if connected:
        distributed.destroy_process_group()


# --- work -----------------------------------------------------------------------------------------


def refusal(rank: int, work: Any, *arguments: Any) -> str:
    """Return the message of the error that other work must end with: of one or of a peer."""
    try:
        work(rank, *arguments)
    except (ValueError, PeerError) as error:
        return str(error)
    raise AssertionError("no error")


def run(rank: int, task: dict[str, Any], method: str, values: dict[str, Any]) -> float | None:
    """Distil; return the accuracy."""
    return distill(tiny_config(task, method, **values)).accuracy


def losses_in_double(
    rank: int, task: dict[str, Any], method: str, values: dict[str, Any], steps: int = 5
) -> list[dict[str, float]]:
    """Make some steps in float64; return the loss terms after each call of the loop."""
    size = distributed.get_world_size() if distributed.is_initialized() else 1
    config = tiny_config(task, method, **values)
    assert config.task.teacher is not None
    teacher = load_network(config.task.teacher, None, None)
    run = in_double(Distillation(config, teacher, torch.device("cpu"), World(rank, size)))
    run.deployed.double()
    for value in vars(run.method).values():
        if isinstance(value, nn.Parameter):
            value.data = value.data.double()
    run.prepare()
    found = []
    while run.step < min(steps, run.total_steps):
        run.advance()
        found.append(dict(run.log.last))
    return found


def run_interrupted(
    rank: int, task: dict[str, Any], method: str, values: dict[str, Any], at: int
) -> str:
    """Distil, with Ctrl-C for the last process alone before call number ``at`` of the loop."""
    original, count = Distillation.advance, 0

    def advance(self: Distillation) -> None:
        nonlocal count
        count += 1
        if count == at and rank == distributed.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGINT)
        original(self)

    Distillation.advance = advance  # type: ignore[method-assign]
    try:
        run(rank, task, method, values)
    except KeyboardInterrupt as error:
        return str(error)
    finally:
        Distillation.advance = original  # type: ignore[method-assign]
    raise AssertionError("not stopped")


class _Clock:
    """Stands for the module ``time``, with a clock of so many seconds between two looks at it."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._now = 0.0

    def monotonic(self) -> float:
        self._now += self._seconds
        return self._now


def run_by_clocks(rank: int, task: dict[str, Any], method: str, values: dict[str, Any]) -> None:
    """Distil, with a clock that goes a minute a step in the last process alone."""
    original = distilling.time
    is_last = rank == distributed.get_world_size() - 1
    distilling.time = _Clock(60.0 if is_last else 1e-3)  # type: ignore[assignment]
    try:
        run(rank, task, method, values)
    finally:
        distilling.time = original


def cluster(rank: int, shards: list[Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """Make the dictionary of all shards, from random numbers that only the first process has."""
    generator = torch.Generator().manual_seed(0 if rank == 0 else 1000 + rank)
    shard = shards[rank]
    return vars(kdci_ext.distributed_confounder_dictionary(shard, generator=generator, **options))


def update(rank: int, shards: list[Tensor], options: dict[str, Any], gathered: int) -> list[Tensor]:
    """Update a KDCI module by all shards; return its dictionary and this process's labels."""
    kdci = kdci_ext.KDCI(shards[0].shape[1], 5, 8, **options)
    generator = torch.Generator().manual_seed(0 if rank == 0 else 1000 + rank)
    with mock.patch.object(kdci_ext.modules, "GATHERED_ROWS", gathered):
        found = kdci.update(shards[rank], generator, group=distributed.group.WORLD)
    return [kdci.prototypes, kdci.proportions, found.labels]


def run_spoilt(rank: int, task: dict[str, Any], values: dict[str, Any]) -> str:
    """Distil, with a NaN in the last process's weights alone; return how it ends."""
    original = Distillation.advance

    def advance(self: Distillation) -> None:
        if self.step == 2 and rank == distributed.get_world_size() - 1:
            next(iter(self.student.parameters())).data.fill_(torch.nan)
        original(self)

    Distillation.advance = advance  # type: ignore[method-assign]
    try:
        run(rank, task, "noise", values)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        Distillation.advance = original  # type: ignore[method-assign]
    raise AssertionError("not stopped")


def batch_norm(rank: int, layer: nn.Module, rows: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Train a BatchNorm layer on this process's rows; return what comes of it."""
    world = World(rank, distributed.get_world_size())
    # Processes share the memory of the tensors that they are sent.
    layer = world.synchronised(nn.Sequential(copy.deepcopy(layer)))
    own = world.share(rows).clone().requires_grad_()
    out = layer(own)
    # The mean of the processes' losses is that of one process.
    (out * world.share(weights)).sum().mul(world.size).backward()
    world.average_gradients(layer.parameters())
    assert own.grad is not None
    return {
        "out": out.detach(),
        "grad": own.grad / world.size,
        **{f"grad of {name}": p.grad for name, p in layer.named_parameters()},
        **layer.state_dict(),
    }


def batch_norm_alone(layer: nn.Module, rows: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Do the same in this process, with torch's own layer."""
    layer = nn.Sequential(copy.deepcopy(layer))
    rows = rows.clone().requires_grad_()
    out = layer(rows)
    (out * weights).sum().backward()
    assert rows.grad is not None
    gradients = {f"grad of {name}": p.grad for name, p in layer.named_parameters()}
    return {"out": out.detach(), "grad": rows.grad, **gradients, **layer.state_dict()}


# --- processes that fail --------------------------------------------------------------------------


def command(rank: int, size: int, port: int, words: list[str], failure: str, folder: str) -> None:
    """Be one of the processes that torchrun starts for a command; the last one fails."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)},
    )
    torch.set_num_threads(1)
    processes._REASON_SECONDS = 0.5
    log = open(f"{folder}/log{rank}.txt", "w")
    sys.stdout = sys.stderr = log
    original = Distillation.advance

    def advance(self: Distillation) -> None:
        if self.step == 2 and rank == size - 1:
            if failure == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise UserError("something is wrong here")
        original(self)

    Distillation.advance = advance  # type: ignore[method-assign]
    code = cli.main(words)
    log.flush()
    os._exit(code)


def failing(size: int, words: list[str], failure: str, folder: Path) -> tuple[list[int], list[str]]:
    """Run a command in several processes; return exit codes and what each printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        _CONTEXT.Process(target=command, args=(rank, size, port, words, failure, str(folder)))
        for rank in range(size)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
        alive = process.is_alive()
        process.kill()
        assert not alive, "a process hangs"
    logs = [(folder / f"log{rank}.txt").read_text() for rank in range(size)]
    return [process.exitcode for process in started], logs
