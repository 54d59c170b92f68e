# SPDX-License-Identifier: Apache-2.0
"""Python processes beside each other that share the CPU cores and stop together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence

POLL_S = 0.05


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_beside(
    commands: Mapping[str, Sequence[str]], jobs: int, shows: Callable[[str], bool]
) -> list[str]:
    """Run Python modules in processes of their own and wait for them.

    Each gets the cores divided by `jobs` as threads, however few they are. Ctrl-C or SIGTERM is
    passed on to them once, so that they can save and end by themselves; a second one as well. Where
    one fails, those that have not begun are left out.

    Args:
        commands: By name, a module for ``python -m`` and its arguments.
        jobs: Processes at a time.
        shows: Says which of their lines are printed.

    Returns:
        Names of the processes that failed.

    Raises:
        KeyboardInterrupt: After they have ended, if they were stopped.
    """
    threads = str(max(1, cores() // jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
    waiting = list(commands.items())
    running: dict[str, subprocess.Popen[str]] = {}
    readers: list[threading.Thread] = []
    failed: list[str] = []
    stops = 0

    def stop(*_: object) -> None:
        nonlocal stops
        stops += 1
        for process in running.values():
            process.terminate()

    try:
        with _Handling(stop):
            while running or (waiting and not failed and not stops):
                while waiting and len(running) < jobs and not failed and not stops:
                    name, words = waiting.pop(0)
                    running[name] = _start(words, environment)
                    readers.append(_pass_on(running[name], shows))
                time.sleep(POLL_S)
                for name, process in list(running.items()):
                    if process.poll() is not None:
                        del running[name]
                        if process.returncode:
                            failed.append(name)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    for reader in readers:
        reader.join()
    if stops:
        raise KeyboardInterrupt
    return failed


class _Handling:
    """Within the block Ctrl-C and SIGTERM call a function; in the main thread alone."""

    def __init__(self, handler: Callable[..., None]) -> None:
        self._handler = handler
        self._previous: dict[int, object] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handler)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def _start(words: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,  # Ctrl-C in a terminal reaches it through this process alone
    )


def _pass_on(process: subprocess.Popen[str], shows: Callable[[str], bool]) -> threading.Thread:
    """Start a thread that prints a process's lines."""

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if shows(line):
                print(line, end="", flush=True)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread
