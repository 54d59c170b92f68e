# SPDX-License-Identifier: Apache-2.0
"""Distillation methods by name; every module of this folder is imported for its registration."""

import importlib
import pkgutil

from python_models.methods.base import METHODS, Batch, Context, Divergence, Method, Synthesis

__all__ = ["METHODS", "Batch", "Context", "Divergence", "Method", "Synthesis"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
