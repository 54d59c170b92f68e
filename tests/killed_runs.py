# SPDX-License-Identifier: Apache-2.0
"""Whole `kdci` processes that die by SIGKILL at an exact instant.

They are forked from one process that has imported everything (multiprocessing's forkserver), so
that each begins at once. An instant is a number of Python events (calls of functions and returns
from them), counted while the run trains, while it writes checkpoints, or all the time: as fine as
the interpreter can tell, and the same in every repetition.
"""

import importlib
import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

PRELOADED = [
    *("torch", "tyro", "matplotlib.figure", "matplotlib.image", "matplotlib.backends.backend_agg"),
    *("python_models.cli", "python_models.distill"),
    "torch._dynamo",  # which torch imports when the first optimiser is made
]


@dataclass(frozen=True)
class Events:
    """Numbers of events: in the training loop, in the writing of checkpoints in it, in `main`."""

    training: int
    writing: int
    process: int


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, negative for a signal, and what it counted."""

    code: int
    events: Events | None


class RunServer:
    """Starts `kdci` processes on one thread, quickly.

    Args:
        folder: Working directory of the processes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def run(
        self,
        *words: str,
        kill: tuple[str, int] | None = None,
        limit_file_size: int | None = None,
        count_all: bool = False,
    ) -> Ended:
        """Run ``kdci`` with these words to its end.

        Args:
            *words: Of the command line.
            kill: What is counted, a field of `Events`, and the event to die at.
            limit_file_size: Bytes that no file of the process can exceed, as on a full disk.
            count_all: Count events outside the training loop too, which takes longer.
        """
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_child, args=(sender, str(self._folder), words, kill, limit_file_size, count_all)
        )
        process.start()
        sender.close()
        process.join()
        assert process.exitcode is not None
        events = None
        if process.exitcode == 0:
            events = Events(*receiver.recv())
        return Ended(process.exitcode, events)


def _child(
    connection: Connection,
    folder: str,
    words: tuple[str, ...],
    kill: tuple[str, int] | None,
    limit_file_size: int | None,
    count_all: bool,
) -> None:
    import resource

    import torch

    from python_models.cli import main

    torch.set_num_threads(1)
    # What pytest captures is not this process's; the file tells what went wrong.
    output = os.open(Path(folder) / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if limit_file_size is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_file_size, hard))
    counted = _count(kill, count_all)
    code = main(list(words))
    sys.setprofile(None)
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 0:
        connection.send((counted["training"], counted["writing"], counted["process"]))
    os._exit(code)


def _count(kill: tuple[str, int] | None, count_all: bool) -> dict[str, int]:
    """Count events, and die at the one asked for."""
    distill: Any = importlib.import_module("python_models.distill")
    counted = {"training": 0, "writing": 0, "process": 0}
    active = {"process"}

    def on_event(_: FrameType, __: str, ___: Any) -> None:
        for name in active:
            counted[name] += 1
            if kill == (name, counted[name]):
                os.kill(os.getpid(), signal.SIGKILL)

    def save_checkpoint(*arguments: Any) -> None:
        active.add("writing")
        save(*arguments)
        active.discard("writing")

    def train(run: Any) -> Any:
        active.add("training")
        sys.setprofile(on_event)
        return advance(run)

    def write_results(session: Any) -> Any:
        active.discard("training")
        if not count_all:
            sys.setprofile(None)
        return finish(session)

    save, distill.save_checkpoint = distill.save_checkpoint, save_checkpoint
    advance, distill.Distillation.advance = distill.Distillation.advance, train
    finish, distill._Session._write_results = distill._Session._write_results, write_results
    if count_all:
        sys.setprofile(on_event)
    return counted
