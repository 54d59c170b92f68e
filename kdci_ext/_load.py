# SPDX-License-Identifier: Apache-2.0
"""Loads the native library once and remembers why, where it cannot."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch  # noqa: F401  (the library's symbols are resolved against torch's)

_C: ModuleType | None
load_error: str | None = None
try:
    _C = importlib.import_module("kdci_ext._C")
except ImportError as error:
    _C = None
    load_error = str(error)


def native_available() -> bool:
    """Whether the C++ operators are loaded."""
    return _C is not None


def build_info() -> dict[str, str]:
    """Describe the native library.

    Returns:
        A dictionary of strings: ``version``, ``compiler``, ``torch_target`` (the oldest PyTorch
        the binary serves), ``torch_headers`` (what it was compiled against), ``cuda`` (toolkit
        version, empty without), ``cuda_archs``, ``build_type``, ``sanitizers``, and ``simd``
        (the instruction set in use on this processor: baseline, avx2, avx512 or avx512vnni).

    Raises:
        RuntimeError: If the native library could not be loaded; the message says why.

    Example:
        >>> build_info()["torch_target"]
        '2.10'
    """
    if _C is None:
        raise RuntimeError(
            f"the native library of kdci_ext is not loaded ({load_error}): reinstall with "
            "'pip install .' beside PyTorch 2.10 or newer"
        )
    info: dict[str, str] = _C.build_info()
    return info
