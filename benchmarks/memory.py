# SPDX-License-Identifier: Apache-2.0
"""Peak memory of some work beyond its input, in a fresh process for each.

The child prepares: it makes the input and runs the work once on a tiny one, so that libraries and
thread pools are resident. It hands freed memory back to the system and resets the kernel's
high-water mark of its resident set (``/proc/self/clear_refs``). After the work the mark, less what
was resident before, is what the work needed on top: its working memory and its result. Where the
mark cannot be reset there is no figure.

Where a resident set would drown the work, as for operators that need some hundred kilobytes, the
allocations of PyTorch alone are added up: :func:`allocated_peak`.
"""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import re
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import threads as pools


def peak_mib(peer: str, n: int, d: int, k: int, q: int, threads: int) -> float:
    """Measure a peer on teacher-like rows [n, d]; two iterations, as more need no more memory.

    Returns:
        MiB, or NaN where it cannot be measured.

    Raises:
        RuntimeError: If the peer fails.
    """
    return growth_mib(_prepare_peer, peer, n, d, k, q, threads, threads=threads)[0]


def allocated_peak(work: Callable[[], Any], device: str = "cpu") -> int:
    """Return the largest number of bytes that PyTorch had allocated at once during some work.

    Counted from its beginning, results included, and released when they are dropped; what libraries
    take from the system by themselves is not seen. The work should have run before.

    Args:
        work: What to do.
        device: Whose memory.
    """
    # Not above: a fresh process sets its threads before it imports PyTorch.
    import torch
    from torch.autograd.profiler import profile

    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()  # what is freed meanwhile must have been allocated meanwhile
    gc.disable()
    try:
        with profile(use_cpu=True, profile_memory=True) as profiler:
            result = work()  # kept, so that what it holds counts until the end
        del result
    finally:
        gc.enable()
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def growth_mib(
    prepare: Callable[..., Callable[[], Any]], *arguments: Any, threads: int
) -> tuple[float, Any]:
    """Measure how much the resident set of a fresh process grows at most during some work.

    Args:
        prepare: An importable function, called in the process; it returns the work.
        *arguments: Its arguments.
        threads: Threads of the process.

    Returns:
        MiB, or NaN where it cannot be measured, and what the work returned.

    Raises:
        RuntimeError: If the process fails.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_child, args=(theirs, prepare, arguments, threads))
    child.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        found = "its process died"
    child.join()
    if isinstance(found, str):
        what = ", ".join(map(str, arguments))
        raise RuntimeError(f"measuring the memory of {what} failed: {found}")
    mib, result = found
    return float(mib), result


def _child(
    pipe: Connection,
    prepare: Callable[..., Callable[[], Any]],
    arguments: tuple[Any, ...],
    threads: int,
) -> None:
    pools.set_environment(threads)
    warnings.simplefilter("ignore")
    try:
        work = prepare(*arguments)
        gc.collect()
        _return_freed_memory()
        can_measure = _reset_peak()
        before = _status("VmRSS")
        result = work()
        growth = (_status("VmHWM") - before) / 1024 if can_measure else math.nan
        pipe.send((growth, result))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def _prepare_peer(name: str, n: int, d: int, k: int, q: int, threads: int) -> Callable[[], None]:
    from benchmarks.data import teacher_like_logits
    from benchmarks.peers import PEERS, Problem

    peer = next(p for p in PEERS if p.name == name)
    reason = peer.absent()  # imports what it needs
    if reason:
        raise RuntimeError(reason)
    pools.limit(threads)
    peer.solve(Problem(teacher_like_logits(512, 16), 8, 8), 0)
    problem = Problem(teacher_like_logits(n, d), k, q, max_iter=2)

    def work() -> None:
        peer.solve(problem, 0)

    return work


def _return_freed_memory() -> None:
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    # Some sandboxes take the write and do nothing.
    return _status("VmHWM") <= _status("VmRSS") * 1.01 + 1024


def _status(key: str) -> int:
    """Return a field of /proc/self/status in KiB."""
    found = re.search(rf"^{key}:\s+(\d+)", Path("/proc/self/status").read_text(), re.M)
    return int(found[1]) if found else 0
