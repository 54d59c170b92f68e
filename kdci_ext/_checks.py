# SPDX-License-Identifier: Apache-2.0
"""Checks of users' arguments; each message names the argument, what was expected and got."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Tuples, not unions, which would be made anew in each of these frequent calls.
_INTEGERS = (int, torch.SymInt)
_NUMBERS = (float, int)


def tensor(name: str, value: object, shape: tuple[str, ...]) -> Tensor:
    """Check for a floating tensor with the number of dimensions that ``shape`` names."""
    text = f"[{', '.join(shape)}]"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {text}, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(
            f"{name} must be float32, float64, bfloat16 or float16, got {value.dtype}: "
            f"convert it with {name}.float()"
        )
    if value.dim() != len(shape):
        raise ValueError(f"{name} must have shape {text}, got {list(value.shape)}")
    return value


def size(name: str, value: Tensor, dim: int, expected: int, of: str) -> None:
    """Check one dimension against another tensor's."""
    if value.shape[dim] != expected:
        raise ValueError(
            f"{name} has shape {list(value.shape)}, but dimension {dim} must be {expected}, "
            f"the {of}"
        )


def not_empty(name: str, value: Tensor) -> None:
    """Check that no dimension is 0."""
    if 0 in value.shape:
        raise ValueError(f"{name} must not be empty, got shape {list(value.shape)}")


def same_device(tensors: dict[str, Tensor]) -> None:
    """Check that all tensors are on the device of the first."""
    first, *others = tensors
    device = tensors[first].device
    for name in others:
        if tensors[name].device != device:
            raise ValueError(
                f"{name} is on {tensors[name].device}, but {first} is on {device}: "
                f"move one of them with .to({str(device)!r})"
            )


def attention(
    logits_name: str,
    logits: Tensor,
    prototypes: Tensor,
    proportions: Tensor,
    w_query: Tensor,
    w_key: Tensor,
    w_score: Tensor,
) -> None:
    """Check the types, shapes and devices that all attention functions share."""
    tensors = {
        logits_name: tensor(logits_name, logits, ("B", "d")),
        "prototypes": tensor("prototypes", prototypes, ("K", "d")),
        "proportions": tensor("proportions", proportions, ("K",)),
        "w_query": tensor("w_query", w_query, ("H", "d")),
        "w_key": tensor("w_key", w_key, ("H", "d")),
        "w_score": tensor("w_score", w_score, ("H",)),
    }
    for name, value in tensors.items():
        not_empty(name, value)
    d, num_prototypes, hidden = logits.shape[1], prototypes.shape[0], w_query.shape[0]
    columns = f"number of columns of {logits_name}"
    size("prototypes", prototypes, 1, d, columns)
    size("proportions", proportions, 0, num_prototypes, "number of prototypes")
    size("w_query", w_query, 1, d, columns)
    size("w_key", w_key, 1, d, columns)
    size("w_key", w_key, 0, hidden, "number of rows of w_query")
    size("w_score", w_score, 0, hidden, "number of rows of w_query")
    same_device(tensors)


def logits_like(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """Check for logits of the shape and device of ones that are known to be logits."""
    tensor(name, value, ("B", "d"))
    if value.shape != like.shape:
        raise ValueError(
            f"{name} has shape {list(value.shape)}, but must have that of {like_name}, "
            f"{list(like.shape)}"
        )
    same_device({like_name: like, name: value})


def constant(name: str, value: Tensor) -> None:
    """Check for a tensor that no gradients are wanted of."""
    if torch.is_grad_enabled() and value.requires_grad:
        raise ValueError(
            f"{name} requires gradients, but the loss takes it as a constant: compute it under "
            f"torch.no_grad() or pass {name}.detach()"
        )


def positive_int(name: str, value: object) -> int:
    """Check for an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, _INTEGERS):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")
    return value  # type: ignore[return-value]  # a SymInt serves as an int under torch.compile


def finite_float(name: str, value: object, *, above: float | None = None) -> float:
    """Check for a finite number, greater than ``above`` where that is given."""
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    # Comparisons rather than math.isfinite, which torch.compile cannot trace for changing numbers.
    if not (-math.inf if above is None else above) < value < math.inf:
        condition = "finite" if above is None else f"finite and > {above:g}"
        raise ValueError(f"{name}={value} must be {condition}")
    return float(value)


def generator(value: object) -> None:
    """Check for a source of random numbers, or None."""
    if not isinstance(value, torch.Generator | None):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {type(value).__name__}: make one "
            "with torch.Generator().manual_seed(0)"
        )


def choice(name: str, value: object, choices: Collection[str]) -> str:
    """Check for one of a few words."""
    if value not in choices:
        known = list(choices)
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, known))}{hint}")
    return str(value)
