# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can mend, told apart from faults of the program."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave is wrong; the message says what, and how to mend it."""


class DivergenceError(RuntimeError):
    """A loss became NaN or infinite."""


class StudyError(RuntimeError):
    """A study has no complete result, or one below a stated floor."""


class PeerError(RuntimeError):
    """Another process of the run failed, which says why.

    Attributes:
        is_unexplained: Whether no process said why, so that this one must speak.
    """

    is_unexplained = False


class Interrupted(KeyboardInterrupt):
    """The run was stopped by Ctrl-C after its state was saved; the message says how to resume."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Return the error for an unknown name, with the nearest known ones."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return UserError(f"unknown {kind} {name!r}: {hint}available: {', '.join(known)}")
