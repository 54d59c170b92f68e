# SPDX-License-Identifier: Apache-2.0
"""One number of threads for every library that is measured.

Each library brings a thread pool of its own: libgomp comes three times (torch, scikit-learn,
faiss), beside MKL, OpenBLAS and oneTBB. Most read the environment when they are loaded, so it is
set before; what is loaded already is told at run time as well.
"""

from __future__ import annotations

import os

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def set_environment(threads: int) -> None:
    """Tell the pools that are loaded later; call it before torch or NumPy is imported."""
    for name in VARIABLES:
        os.environ[name] = str(threads)
    os.environ["OMP_DYNAMIC"] = "FALSE"
    os.environ["MKL_DYNAMIC"] = "FALSE"
    # Idle threads should sleep, not spin beside the contender whose turn it is.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def limit(threads: int) -> None:
    """Tell the pools that are loaded, each by its own means."""
    import torch

    torch.set_num_threads(threads)
    try:
        from threadpoolctl import threadpool_limits  # OpenMP and BLAS of NumPy and scikit-learn

        threadpool_limits(threads)
    except ModuleNotFoundError:
        pass
    try:
        import faiss

        faiss.omp_set_num_threads(threads)
    except ModuleNotFoundError:
        pass
    try:
        import daal4py  # oneTBB of scikit-learn-intelex, which no variable reaches

        daal4py.daalinit(threads)
    except ModuleNotFoundError:
        pass
