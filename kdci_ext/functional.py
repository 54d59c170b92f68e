# SPDX-License-Identifier: Apache-2.0
"""Typed functions: they check their arguments, draw random numbers and call an operator.

Each takes ``backend``: ``"native"`` is the C++/CUDA operator, ``"reference"`` the plain PyTorch of
:mod:`kdci_ext.reference`, and ``"auto"`` the native one where it exists, else the reference with
one warning for each kind of device that says why.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
from torch import Tensor

from kdci_ext import _checks, _load, _ops, reference
from kdci_ext.dictionary import ConfounderDictionary

__all__ = ["Backend", "Weighting", "compensate", "compensated_kd_loss", "confounder_dictionary"]

Backend = Literal["auto", "native", "reference"]
Weighting = Literal["paper", "posterior"]
Seeding = Literal["greedy", "plain"]
# Logits, prototypes, proportions and the three weights of attention.
Attended = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
# Those with the teacher's logits after the student's.
Distilled = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

_CPU = torch.device("cpu")
_warned_devices: set[str] = set()


def _why_not_native(device: torch.device) -> str | None:
    """Say why there is no native kernel for ``device``, or None where there is one."""
    if not _load.native_available():
        return f"the native library is not loaded ({_load.load_error})"
    if device == _CPU:  # in a tenth of the time that its type takes
        return None
    if device.type == "cpu" or (device.type == "cuda" and _load.build_info()["cuda"]):
        return None
    if device.type == "cuda":
        return "the native library was built without CUDA (no nvcc was found)"
    return f"there are no native kernels for {device.type} tensors"


def _use_native(backend: str, device: torch.device) -> bool:
    _checks.choice("backend", backend, ("auto", "native", "reference"))
    if backend == "reference":
        return False
    reason = _why_not_native(device)
    if reason is None:
        return True
    if backend == "native":
        raise RuntimeError(f"backend='native' cannot be used: {reason}")
    if device.type not in _warned_devices:
        _warned_devices.add(device.type)
        warnings.warn(
            f"kdci_ext falls back to plain PyTorch for {device.type} tensors: {reason}",
            RuntimeWarning,
            stacklevel=3,
        )
    return False


def confounder_dictionary(
    features: Tensor,
    num_prototypes: int,
    pca_components: int | Literal["auto"] = "auto",
    *,
    generator: torch.Generator | None = None,
    init: Seeding = "greedy",
    initial_prototypes: Tensor | None = None,
    max_iter: int = 50,
    tol: float = 2e-4,
    momentum: float = 0.9,
    check_finite: bool | None = None,
    backend: Backend = "auto",
) -> ConfounderDictionary:
    r"""Cluster a model's predictions into prototypes and proportions (KDCI, section 3.3).

    The rows are centred, projected on their leading principal directions, seeded by k-means++ and
    clustered by Lloyd's iterations. The projection serves the assignment alone: prototype
    :math:`z_i` is the mean of the *original* rows of cluster i, and :math:`P(z_i) = n_i / n`.
    The same seed gives bitwise the same result on one device, for any number of threads.

    Up to 256 dimensions (the smaller of n and d) the subspace is exact but for rounding, which may
    cost some ten-thousandths of the variance that the best one captures; beyond, it misses some
    thousandths, and some hundredths where no direction stands out, as in noise.
    With n >= 2 m rows, m = max(8192, 64 K), k-means++ looks at m of them, one of each equal
    stretch; Lloyd's iterations always use all. With momentum they end after fewer iterations and,
    on average over seeds, with a lower inertia than without.

    Args:
        features: Predictions (teacher logits) M, [n, d], float32, float64, bfloat16 or float16.
        num_prototypes: K, 1 <= K <= n (the paper's N: 8, 32 or 128).
        pca_components: q, 1 <= q <= d; ``"auto"`` takes min(d, K - 1), the dimension of the space
            that K centres span, and at least 1. With q = d no projection is made: it would be a
            rotation.
        generator: Source of the k-means++ draws; by default PyTorch's for the device.
        init: ``"greedy"`` draws 2 + ln K candidates for each centre and keeps the best, as
            scikit-learn does; ``"plain"`` draws one.
        initial_prototypes: Start from these [K, d] instead of k-means++.
        max_iter: Lloyd iterations at most.
        tol: Stop once an iteration lowers the inertia by at most ``tol`` times the inertia; 0
            iterates until no label changes.
        momentum: Where iteration t found the means m_t, the next one starts from m_t +
            ``momentum`` (m_t - m_(t-1)); 0 <= ``momentum`` < 1, and 0 is Lloyd's method as it is.
            Where that raised the inertia, the next one starts from the last means: the result is
            never worse for it.
        check_finite: Raise on NaN or Inf in ``features``. By default on for CPU tensors, where it
            costs nothing, and off elsewhere, where it would stall the stream, and under
            ``torch.compile``. Where it is off, the dictionary of such features holds NaN.
        backend: See the module.

    Returns:
        The dictionary. Clusters that run empty are re-seeded at the rows farthest from their
        centres; with fewer distinct rows than K the surplus prototypes have proportion 0.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For a wrong shape, device or range, and for features that are not finite where
            ``check_finite`` looks for them.
        RuntimeError: With ``backend="native"`` where there is no native kernel.

    Example:
        >>> logits = torch.randn(256, 10)
        >>> d = confounder_dictionary(logits, num_prototypes=8)
        >>> d.prototypes.shape, float(d.proportions.sum())
        (torch.Size([8, 10]), 1.0)
    """
    _checks.tensor("features", features, ("n", "d"))
    _checks.not_empty("features", features)
    n, d = features.shape
    _checks.positive_int("num_prototypes", num_prototypes)
    if num_prototypes > n:
        raise ValueError(
            f"num_prototypes={num_prototypes} must be <= the number of feature rows, {n}"
        )
    num_components = _num_components(pca_components, num_prototypes, d)
    _checks.choice("init", init, ("greedy", "plain"))
    _check_stopping(max_iter, tol, momentum)
    _checks.generator(generator)
    if features.requires_grad:
        features = features.detach()
    if initial_prototypes is not None:
        _checks.tensor("initial_prototypes", initial_prototypes, ("K", "d"))
        _checks.size("initial_prototypes", initial_prototypes, 0, num_prototypes, "num_prototypes")
        _checks.size("initial_prototypes", initial_prototypes, 1, d, "number of feature columns")
        _checks.same_device({"features": features, "initial_prototypes": initial_prototypes})
        initial_prototypes = initial_prototypes.detach()

    candidates = 1 if init == "plain" else 2 + int(math.log(num_prototypes))
    drawn_on = features.device if generator is None else generator.device
    uniforms = torch.rand(
        num_prototypes, candidates, dtype=torch.float64, generator=generator, device=drawn_on
    )
    if drawn_on != features.device:
        uniforms = uniforms.to(features.device, non_blocking=True)
    operator = (
        torch.ops.kdci_ext.confounder_dictionary.default
        if _use_native(backend, features.device)
        else reference.confounder_dictionary
    )
    dictionary = ConfounderDictionary(
        *operator(
            *(features, uniforms, initial_prototypes, num_components),
            *(max_iter, float(tol), float(momentum)),
        )
    )
    if _looks_for_nan(check_finite, features.device):
        _check_found(dictionary, "features", features, "initial_prototypes", initial_prototypes)
    return dictionary


def _looks_for_nan(check_finite: bool | None, device: torch.device) -> bool:
    """Resolve ``check_finite``."""
    if check_finite is None:
        return device.type == "cpu" and not torch.compiler.is_compiling()
    return check_finite


def _check_found(
    found: ConfounderDictionary, name: str, features: Tensor, start_name: str, start: Tensor | None
) -> None:
    """Refuse a dictionary of NaN, which the operators return for inputs that are not finite."""
    if not math.isnan(found.inertia.item()):
        return
    if start is not None and not bool(torch.isfinite(start).all()):
        raise ValueError(f"{start_name} must be finite, but hold NaN or Inf")
    bad = (~torch.isfinite(features)).any(1).nonzero()
    if len(bad) > 0:
        raise ValueError(
            f"{name} must be finite: {len(bad)} of {features.shape[0]} rows hold NaN or Inf, "
            f"first row {int(bad[0])}; drop these rows or find out where they arise"
        )
    raise ValueError(f"{name} are too large: sums over their rows overflow float64")


def _check_stopping(max_iter: int, tol: float, momentum: float = 0.0) -> None:
    _checks.positive_int("max_iter", max_iter)
    if _checks.finite_float("tol", tol) < 0:
        raise ValueError(f"tol={tol} must be >= 0")
    if not 0 <= _checks.finite_float("momentum", momentum) < 1:
        raise ValueError(f"momentum={momentum} must be >= 0 and < 1")


def _num_components(pca_components: int | Literal["auto"], num_prototypes: int, d: int) -> int:
    """Resolve ``pca_components`` for rows of width d."""
    if pca_components == "auto":
        return min(d, max(1, num_prototypes - 1))
    return _components("pca_components", pca_components, d)


def _components(name: str, value: int, d: int) -> int:
    """Check for a number of principal components of rows of width d."""
    if _checks.positive_int(name, value) > d:
        raise ValueError(f"{name}={value} must be <= the number of feature columns, {d}")
    return value


def compensate(
    logits: Tensor,
    prototypes: Tensor,
    proportions: Tensor,
    w_query: Tensor,
    w_key: Tensor,
    w_score: Tensor,
    *,
    weighting: Weighting = "paper",
    scale: float = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    r"""Add the attention-weighted prior to the student's logits (KDCI, equations 3 to 5).

    .. math::
        \lambda_{bi} = \mathrm{softmax}_i(w_t \cdot \tanh(W_q s_b + W_k z_i)), \quad
        s'_b = s_b + \textstyle\sum_i \lambda_{bi} P(z_i) z_i

    No tensor of size B x K x H is ever made. Gradients reach the logits both directly and through
    the weights; prototypes and proportions get theirs if they require it. A second derivative
    needs ``backend="reference"``.

    Args:
        logits: Student logits S, [B, d], any floating type.
        prototypes: z, [K, d].
        proportions: P(z), [K].
        w_query: W_q, [H, d].
        w_key: W_k, [H, d].
        w_score: w_t, [H].
        weighting: ``"paper"`` is the formula above. ``"posterior"``, our variant, normalises both
            factors together, :math:`\sum_i \mathrm{softmax}_i(score + \log P(z_i)) z_i`, so that
            the prior is a convex combination of prototypes.
        scale: Factor on the prior; 1 is the paper.
        backend: See the module.

    Returns:
        S', [B, d], in the type of ``logits``; computed in float32, or float64 if an input is.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For a wrong shape, device or value, and for an empty batch.
        RuntimeError: With ``backend="native"`` where there is no native kernel; of the native one
            also in a second derivative.
        NotImplementedError: In forward-mode differentiation of the native kernel.

    Example:
        >>> d = confounder_dictionary(torch.randn(64, 10), 8)
        >>> w_query, w_key, w_score = torch.randn(16, 10), torch.randn(16, 10), torch.randn(16)
        >>> s = torch.randn(4, 10)
        >>> compensate(s, d.prototypes, d.proportions, w_query, w_key, w_score).shape
        torch.Size([4, 10])
    """
    posterior = _checks.choice("weighting", weighting, ("paper", "posterior")) == "posterior"
    scale = _checks.finite_float("scale", scale)
    tensors = (logits, prototypes, proportions, w_query, w_key, w_score)
    objection: Exception | None = None
    if _operator_checks(backend, logits):
        try:
            return _ops.compensate(*tensors, posterior, scale)
        except Exception as error:
            objection = error
    _checks.attention("logits", *tensors)
    if objection is not None:
        raise objection
    return _compensated(tensors, posterior, scale, backend)


def _operator_checks(backend: Backend, logits: Tensor) -> bool:
    """Whether a call may go to an operator unchecked.

    The operators check their arguments too, in fewer words, but in a tenth of the time, which small
    problems feel: once one has objected there is time to look for the words.
    """
    return (
        isinstance(logits, Tensor)
        and not torch.compiler.is_compiling()
        and _use_native(backend, logits.device)
    )


def _compensated(tensors: Attended, posterior: bool, scale: float, backend: Backend) -> Tensor:
    """Do what `compensate` says, of arguments that are checked."""
    if _use_native(backend, tensors[0].device):
        return _ops.compensate(*tensors, posterior, scale)
    return reference.compensate(*tensors, posterior, scale)[0]


def compensated_kd_loss(
    student: Tensor,
    teacher: Tensor,
    prototypes: Tensor,
    proportions: Tensor,
    w_query: Tensor,
    w_key: Tensor,
    w_score: Tensor,
    temperature: float = 1.0,
    *,
    weighting: Weighting = "paper",
    scale: float = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    r"""Distillation loss of the compensated student, with its gradients from the same pass.

    .. math::
        L = \frac{T^2}{B} \sum_b \mathrm{KL}\big(\mathrm{softmax}(t_b / T) \,\|\,
            \mathrm{softmax}(s'_b / T)\big)

    Args:
        student: Student logits S, [B, d], any floating type.
        teacher: Teacher logits, [B, d]; a constant: it must not require gradients.
        prototypes: z, [K, d].
        proportions: P(z), [K].
        w_query: W_q, [H, d].
        w_key: W_k, [H, d].
        w_score: w_t, [H].
        temperature: T > 0.
        weighting: See :func:`compensate`.
        scale: See :func:`compensate`.
        backend: See the module.

    Returns:
        The loss, [] float32, or float64 if an input is.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For a wrong shape, device or value, an empty batch, and a teacher that
            requires gradients.
        RuntimeError: With ``backend="native"`` where there is no native kernel; of the native one
            also in a second derivative.
        NotImplementedError: In forward-mode differentiation of the native kernel.

    Example:
        >>> d = confounder_dictionary(torch.randn(64, 10), 8)
        >>> w_query, w_key, w_score = torch.randn(16, 10), torch.randn(16, 10), torch.randn(16)
        >>> s, t = torch.randn(4, 10, requires_grad=True), torch.randn(4, 10)
        >>> loss = compensated_kd_loss(
        ...     s, t, d.prototypes, d.proportions, w_query, w_key, w_score, temperature=4.0
        ... )
        >>> loss.backward()
    """
    temperature = _checks.finite_float("temperature", temperature, above=0)
    posterior = _checks.choice("weighting", weighting, ("paper", "posterior")) == "posterior"
    scale = _checks.finite_float("scale", scale)
    prior = (prototypes, proportions, w_query, w_key, w_score)
    objection: Exception | None = None
    if _operator_checks(backend, student):
        try:
            _checks.constant("teacher", teacher)
            return _ops.compensated_kd_loss(student, teacher, *prior, temperature, posterior, scale)
        except Exception as error:
            objection = error
    _checks.attention("student", student, *prior)
    _checks.logits_like("teacher", teacher, "student", student)
    _checks.constant("teacher", teacher)
    if objection is not None:
        raise objection
    return _kd_loss((student, teacher, *prior), temperature, posterior, scale, backend)


def _kd_loss(
    tensors: Distilled, temperature: float, posterior: bool, scale: float, backend: Backend
) -> Tensor:
    """Do what `compensated_kd_loss` says, of arguments that are checked."""
    if _use_native(backend, tensors[0].device):
        return _ops.compensated_kd_loss(*tensors, temperature, posterior, scale)
    return reference.compensated_kd_loss(*tensors, temperature, posterior, scale)
