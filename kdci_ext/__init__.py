# SPDX-License-Identifier: Apache-2.0
"""Data-free knowledge distillation with KDCI, native and differentiable.

KDCI ("De-confounded Data-free Knowledge Distillation for Handling Distribution Shifts", CVPR 2024)
clusters a teacher's predictions into a *confounder dictionary* and adds an attention-weighted
prior from it to the student's logits during distillation:

>>> import torch, kdci_ext
>>> kdci = kdci_ext.KDCI(num_classes=10, num_prototypes=8)
>>> _ = kdci.update(torch.randn(256, 10))
>>> loss = kdci.loss(torch.randn(32, 10), torch.randn(32, 10), temperature=20.0)
"""

import pkgutil
from importlib.metadata import PackageNotFoundError, version

# In the root of a checkout Python finds these sources before the installed package; the native
# library, which only the latter has, is then found here.
__path__ = pkgutil.extend_path(__path__, __name__)

from kdci_ext import _ops as _ops  # registers the fake kernels and autograd
from kdci_ext import distributed, functional, reference, streaming, sums
from kdci_ext._load import build_info
from kdci_ext.dictionary import ConfounderDictionary
from kdci_ext.distributed import distributed_confounder_dictionary
from kdci_ext.functional import confounder_dictionary as build_confounder_dictionary
from kdci_ext.modules import KDCI, PriorCompensation
from kdci_ext.streaming import stream_confounder_dictionary

__all__ = [
    "KDCI",
    "ConfounderDictionary",
    "PriorCompensation",
    "build_confounder_dictionary",
    "build_info",
    "distributed",
    "distributed_confounder_dictionary",
    "functional",
    "reference",
    "stream_confounder_dictionary",
    "streaming",
    "sums",
]

try:
    __version__ = version("kdci_ext")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "0+unknown"
