# SPDX-License-Identifier: Apache-2.0
"""Python side of the operators: fake kernels and autograd.

LibTorch's stable ABI has no C++ autograd, so the formulas are registered here; the arithmetic is
in operators of its own, ``compensate_backward`` and ``compensated_kd_loss``, which computes its
gradients together with the loss. The operators take mixed floating types, compute in float32 or
better and return the type of the logits, which is what autocast would have to arrange: under
autocast they are simply called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kdci_ext import _checks, _load
from kdci_ext.reference import accumulate_dtype

Grads = tuple[Tensor | None, ...]

_operators = torch.ops.kdci_ext


def _direct(name: str) -> Any:
    """Return an operator without the Python around it, or None where the library is not loaded."""
    return getattr(_operators, name).default._op if _load.native_available() else None


_direct_compensate = _direct("compensate")
_direct_compensate_backward_ = _direct("compensate_backward_")
_direct_compensated_kd_loss = _direct("compensated_kd_loss")


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _fake_confounder_dictionary(
    features: Tensor,
    uniforms: Tensor,
    initial_prototypes: Tensor | None,
    num_components: int,
    max_iter: int,
    tol: float,
    momentum: float,
) -> tuple[Tensor, ...]:
    num_prototypes = uniforms.shape[0]
    dtype = accumulate_dtype(features)
    return (
        features.new_empty((num_prototypes, features.shape[1]), dtype=dtype),
        features.new_empty(num_prototypes, dtype=dtype),
        features.new_empty(features.shape[0], dtype=torch.int64),
        features.new_empty((), dtype=torch.float64),
        features.new_empty((), dtype=torch.int64),
    )


def _fake_assign_rows(
    features: Tensor, mean: Tensor, basis: Tensor | None, centers: Tensor
) -> tuple[Tensor, ...]:
    rows, columns = features.shape
    return (
        features.new_empty(rows, dtype=torch.int64),
        features.new_empty(rows, dtype=torch.float64),
        features.new_empty((centers.shape[0], columns), dtype=torch.float64),
    )


def _fake_compensate(
    logits: Tensor,
    prototypes: Tensor,
    proportions: Tensor,
    w_query: Tensor,
    w_key: Tensor,
    w_score: Tensor,
    posterior: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    tensors = (logits, prototypes, proportions, w_query, w_key, w_score)
    _checks.attention("logits", *tensors)
    dtype = accumulate_dtype(*tensors)
    batch, num_prototypes, hidden = logits.shape[0], prototypes.shape[0], w_query.shape[0]
    num_saved = (batch + num_prototypes) * hidden + batch * num_prototypes
    return logits.new_empty(logits.shape), logits.new_empty((num_saved,), dtype=dtype)


def _fake_compensate_backward(
    grad: Tensor,
    logits: Tensor,
    prototypes: Tensor,
    proportions: Tensor,
    w_query: Tensor,
    w_key: Tensor,
    w_score: Tensor,
    saved: Tensor,
    posterior: bool,
    scale: float,
    dictionary_grad: bool,
) -> tuple[Tensor, ...]:
    return _fake_grads(
        logits, prototypes, proportions, w_query, w_key, w_score, True, dictionary_grad
    )


def _fake_compensate_backward_(
    grad: Tensor,
    logits: Tensor,
    prototypes: Tensor,
    proportions: Tensor,
    w_query: Tensor,
    w_key: Tensor,
    w_score: Tensor,
    saved: Tensor,
    posterior: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    return tuple(each.new_empty(each.shape) for each in (logits, w_query, w_key, w_score))


def _fake_compensated_kd_loss(
    student: Tensor,
    teacher: Tensor,
    prototypes: Tensor,
    proportions: Tensor,
    w_query: Tensor,
    w_key: Tensor,
    w_score: Tensor,
    temperature: float,
    posterior: bool,
    scale: float,
    need_grad: bool,
    dictionary_grad: bool,
) -> tuple[Tensor, ...]:
    prior = (prototypes, proportions, w_query, w_key, w_score)
    _checks.attention("student", student, *prior)
    _checks.logits_like("teacher", teacher, "student", student)
    dtype = accumulate_dtype(student, teacher, *prior)
    grads = _fake_grads(student, *prior, need_grad, dictionary_grad)
    return (student.new_empty((), dtype=dtype), *grads)


def _fake_grads(
    logits: Tensor,
    prototypes: Tensor,
    proportions: Tensor,
    w_query: Tensor,
    w_key: Tensor,
    w_score: Tensor,
    need_grad: bool,
    dictionary_grad: bool,
) -> tuple[Tensor, ...]:
    """Gradients in the order of the inputs; those not asked for are of shape [0]."""

    def grad_of(value: Tensor, wanted: bool) -> Tensor:
        return value.new_empty(value.shape) if wanted else _empty(value)

    return (
        grad_of(logits, need_grad),
        grad_of(prototypes, need_grad and dictionary_grad),
        grad_of(proportions, need_grad and dictionary_grad),
        grad_of(w_query, need_grad),
        grad_of(w_key, need_grad),
        grad_of(w_score, need_grad),
    )


def _save_compensate(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[6:]
    needs_grad = ctx.needs_input_grad
    ctx.dictionary_grad = needs_grad[1] or needs_grad[2]
    ctx.save_for_backward(*inputs[:6], *output[1:])
    ctx.set_materialize_grads(False)


def _compensate_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save_compensate(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[1:])


def _compensate_backward(ctx: Any, grad: Tensor | None, *unused: Tensor | None) -> Grads:
    if grad is None:
        return (None,) * 8
    grads = _operators.compensate_backward.default(
        grad, *ctx.saved_tensors, *ctx.options, ctx.dictionary_grad
    )
    if ctx.dictionary_grad:
        return (*grads, None, None)
    return (grads[0], None, None, *grads[3:], None, None)  # of the dictionary they are empty


def _save_kd_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.need_grad, ctx.dictionary_grad = inputs[-2:]
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _kd_loss_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save_kd_loss(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[1:])


def _kd_loss_backward(ctx: Any, grad: Tensor | None, *unused: Tensor | None) -> Grads:
    if grad is None:
        return (None,) * 12
    if not ctx.need_grad:
        raise RuntimeError(
            "kdci_ext::compensated_kd_loss was called with need_grad=False and kept no gradients"
        )
    # The gradients were made with the loss: as constants they would drop out of a second
    # derivative without a word.
    if torch.is_grad_enabled():
        raise RuntimeError(_NO_DOUBLE_BACKWARD.format("compensated_kd_loss"))
    saved = ctx.saved_tensors
    wanted = saved if ctx.dictionary_grad else (saved[0], *saved[3:])
    if not _is_batched(grad) and all(each.dtype == grad.dtype for each in wanted):
        student, *weights = torch._foreach_mul(wanted, grad)  # one call for all
    else:
        student, *weights = (each * grad.to(each.dtype) for each in wanted)
    dictionary = () if ctx.dictionary_grad else (None, None)
    return (student, None, *dictionary, *weights, None, None, None, None, None)


def _is_batched(grad: Tensor) -> bool:
    """Whether a gradient stands for several: within vmap, or for ``is_grads_batched=True``."""
    active: bool = torch._C._are_functorch_transforms_active()
    return active or torch._C._functorch.is_legacy_batchedtensor(grad)


_NO_DOUBLE_BACKWARD = (
    "kdci_ext::{} has no second derivative (create_graph=True): use backend='reference' for it"
)


def _no_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _no_double_backward(ctx: Any, *grads: Tensor | None) -> Grads:
    raise RuntimeError(_NO_DOUBLE_BACKWARD.format("compensate"))


class _Compensate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            output = _direct_compensate(*inputs)
        _save_compensate(ctx, inputs, output)
        return output[0]  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Grads:
        if torch.is_grad_enabled():  # for a second derivative, which is refused in time
            return _compensate_backward(ctx, grad)
        with torch._C._AutoDispatchBelowAutograd():
            if ctx.dictionary_grad or not _may_overwrite(grad):
                return _compensate_backward(ctx, grad)
            student, *weights = _direct_compensate_backward_(grad, *ctx.saved_tensors, *ctx.options)
            return (student, None, None, *weights, None, None)


def _may_overwrite(grad: Tensor | None) -> bool:
    """Whether the backward pass that runs is the last one to need what was saved."""
    return (
        type(grad) is Tensor
        and grad.is_cpu
        and not torch.compiler.is_compiling()
        and not _is_batched(grad)
        and not torch._C._autograd._get_current_graph_task_keep_graph()
    )


class _CompensatedKDLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            output = _direct_compensated_kd_loss(*inputs)
        _save_kd_loss(ctx, inputs, output)
        return output[0]  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Grads:
        return _kd_loss_backward(ctx, grad)


def _loop(
    function: Any, info: Any, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The rule of torch.vmap: one call after the other."""
    results = [
        function(
            *(
                value if dim is None else value.select(dim, i)
                for value, dim in zip(inputs, in_dims, strict=True)
            )
        )
        for i in range(info.batch_size)
    ]
    outputs = tuple(torch.stack(each) for each in zip(*results, strict=True))
    return outputs, (0,) * len(outputs)


# torch.func wants functions whose context is set up apart, and refuses what register_autograd
# makes. Transforms nest: what is called within a forward or backward pass may again be transformed.


class _FunctionalBackward(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _call("compensate_backward", _FunctionalBackward, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        return _no_double_backward(ctx, *grads)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _loop(_FunctionalBackward.forward, info, in_dims, inputs)


class _FunctionalCompensate(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _call("compensate", _FunctionalCompensate, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _compensate_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: Tensor | None) -> Grads:
        if grad is None:
            return (None,) * 8
        grads = _call(
            *("compensate_backward", _FunctionalBackward, grad, *ctx.saved_tensors),
            *(*ctx.options, True),
        )
        return (*grads, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _loop(_FunctionalCompensate.forward, info, in_dims, inputs)


class _FunctionalKDLoss(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _call("compensated_kd_loss", _FunctionalKDLoss, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save_kd_loss(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *of_gradients: Tensor | None) -> Grads:
        # The gradients are outputs that may be differentiated, so that this can be refused.
        if any(each is not None for each in of_gradients):
            raise RuntimeError(_NO_DOUBLE_BACKWARD.format("compensated_kd_loss"))
        if grad is None:
            return (None,) * 12
        student, *rest = (saved * grad.to(saved.dtype) for saved in ctx.saved_tensors)
        return (student, None, *rest, None, None, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _loop(_FunctionalKDLoss.forward, info, in_dims, inputs)


def _call(name: str, functional: Any, *inputs: Any) -> tuple[Tensor, ...]:
    """Call an operator, by way of ``functional`` within transforms of torch.func."""
    if torch._C._are_functorch_transforms_active():
        return functional.apply(*inputs)  # type: ignore[no-any-return]
    return getattr(_operators, name).default(*inputs)  # type: ignore[no-any-return]


# In eager mode gradients come by these functions: what register_autograd makes costs four times as
# much, as long as the kernels at the smallest shapes, but is what torch.compile sees. This is what
# Function.apply calls in the end; it first looks for transforms and for a setup_context, and the
# callers know that there are none.
_apply_compensate: Any = super(torch.autograd.Function, _Compensate).apply
_apply_kd_loss: Any = super(torch.autograd.Function, _CompensatedKDLoss).apply


def compensate(*inputs: Any) -> Tensor:
    """Call the operator for its first output."""
    if not torch.compiler.is_compiling():
        _refuse_forward_mode("compensate", inputs[:6])
        if torch._C._are_functorch_transforms_active():
            return _call("compensate", _FunctionalCompensate, *inputs)[0]
        if torch.is_grad_enabled():
            return _apply_compensate(*inputs)  # type: ignore[no-any-return]
        with torch._C._AutoDispatchBelowAutograd():
            return _direct_compensate(*inputs)[0]  # type: ignore[no-any-return]
    return _operators.compensate.default(*inputs)[0]  # type: ignore[no-any-return]


def compensated_kd_loss(*inputs: Any) -> Tensor:
    """Call the operator for its first output, with the gradients that autograd will want."""
    tensors = inputs[:7]
    need_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    dictionary_grad = need_grad and (tensors[2].requires_grad or tensors[3].requires_grad)
    if not torch.compiler.is_compiling():
        _refuse_forward_mode("compensated_kd_loss", tensors)
        if torch._C._are_functorch_transforms_active():
            # An outer transform may take gradients of what needs none here.
            all_grads = torch.is_grad_enabled()
            return _call(
                *("compensated_kd_loss", _FunctionalKDLoss, *inputs, all_grads, all_grads)
            )[0]
        if need_grad:
            return _apply_kd_loss(*inputs, need_grad, dictionary_grad)  # type: ignore[no-any-return]
        with torch._C._AutoDispatchBelowAutograd():
            loss = _direct_compensated_kd_loss(*inputs, False, False)
        return loss[0]  # type: ignore[no-any-return]
    loss = _operators.compensated_kd_loss.default(*inputs, need_grad, dictionary_grad)
    return loss[0]  # type: ignore[no-any-return]


def _refuse_forward_mode(name: str, tensors: tuple[Tensor, ...]) -> None:
    """Refuse tangents, which the operators would drop without a word."""
    if forward_ad._current_level < 0:
        return
    unpack: Any = forward_ad.unpack_dual  # annotated in some versions of PyTorch only
    if any(unpack(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            f"kdci_ext::{name} has no forward-mode derivative (jvp): use backend='reference' for it"
        )


if _load.native_available():
    _register_fake = torch.library.register_fake
    _register_fake("kdci_ext::confounder_dictionary", _fake_confounder_dictionary)
    _register_fake("kdci_ext::assign_rows", _fake_assign_rows)
    _register_fake("kdci_ext::compensate", _fake_compensate)
    _register_fake("kdci_ext::compensate_backward", _fake_compensate_backward)
    _register_fake("kdci_ext::compensate_backward_", _fake_compensate_backward_)
    _register_fake("kdci_ext::compensated_kd_loss", _fake_compensated_kd_loss)
    torch.library.register_autograd(
        "kdci_ext::compensate", _compensate_backward, setup_context=_compensate_context
    )
    torch.library.register_autograd(
        "kdci_ext::compensate_backward", _no_double_backward, setup_context=_no_context
    )
    torch.library.register_autograd(
        "kdci_ext::compensated_kd_loss", _kd_loss_backward, setup_context=_kd_loss_context
    )
