# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a peer beyond its input, in a fresh process for each.

The child makes the rows, runs the peer once on a tiny problem, so that its libraries and thread
pools are resident, hands freed memory back to the system, and resets the kernel's high-water mark
of its resident set (``/proc/self/clear_refs``). After one run on the rows the mark, less what was
resident before, is what the run needed on top: its working memory and its result. Where the mark
cannot be reset there is no figure. Two iterations are run: more need no more memory.
"""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import re
from multiprocessing.connection import Connection
from pathlib import Path


def peak_mib(peer: str, n: int, d: int, k: int, q: int, threads: int) -> float:
    """Measure a peer on teacher-like rows [n, d].

    Returns:
        MiB, or NaN where it cannot be measured.

    Raises:
        RuntimeError: If the peer fails.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_child, args=(theirs, peer, n, d, k, q, threads))
    child.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        found = "its process died"
    child.join()
    if isinstance(found, str):
        raise RuntimeError(f"{peer} failed when its memory was measured: {found}")
    return float(found)


def _child(pipe: Connection, name: str, n: int, d: int, k: int, q: int, threads: int) -> None:
    from benchmarks import threads as pools

    pools.set_environment(threads)
    import warnings

    warnings.simplefilter("ignore")
    try:
        from benchmarks.data import teacher_like_logits
        from benchmarks.peers import PEERS, Problem

        peer = next(p for p in PEERS if p.name == name)
        reason = peer.absent()  # imports what it needs
        if reason:
            raise RuntimeError(reason)
        pools.limit(threads)
        peer.solve(Problem(teacher_like_logits(512, 16), 8, 8), 0)
        problem = Problem(teacher_like_logits(n, d), k, q, max_iter=2)
        gc.collect()
        _return_freed_memory()
        if not _reset_peak():
            pipe.send(math.nan)
            return
        before = _status("VmRSS")
        solution = peer.solve(problem, 0)
        pipe.send((_status("VmHWM") - before) / 1024)
        del solution
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


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
