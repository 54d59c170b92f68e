"""Hypothesis strategies and comparisons for the operator tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "transposed", "sliced", "strided")


def with_layout(values: Tensor, layout: str) -> Tensor:
    """Return a tensor of equal values whose memory is laid out otherwise."""
    if layout == "transposed" and values.dim() == 2:
        return values.T.contiguous().T
    if layout == "sliced":
        padded = values.new_full([size + 3 for size in values.shape], float("nan"))
        view = padded[tuple(slice(1, size + 1) for size in values.shape)]
        return view.copy_(values)
    if layout == "strided":
        wide = torch.stack([values, torch.full_like(values, float("nan"))], -1)
        return wide[..., 0]
    return values.contiguous()


def max_error(got: Tensor, exact: Tensor) -> float:
    """Largest absolute difference to a float64 result."""
    return float((got.double() - exact).abs().max()) if exact.numel() else 0.0


@st.composite
def feature_rows(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Tensor:
    """Rows to cluster: clouds, duplicates, constant columns, low rank; any scale and layout."""
    n = draw(st.integers(1, 70))
    d = draw(st.sampled_from([1, 2, 3, 8, 10, 17, 33, 64]))
    kind = draw(st.sampled_from(["cloud", "clusters", "duplicates", "constant column", "rank 2"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = normal(n, d)
    if kind == "clusters":
        rows = 6 * normal(5, d)[torch.randint(5, (n,), generator=generator)] + 0.3 * rows
    elif kind == "duplicates":
        rows = rows[torch.randint((n + 3) // 4, (n,), generator=generator)]
    elif kind == "constant column":
        rows[:, 0] = 3.0
    elif kind == "rank 2":
        rows = normal(n, 2) @ normal(2, d)
    dtype = draw(st.sampled_from(dtypes))
    wide = dtype in (torch.float32, torch.float64)
    rows = rows * draw(st.sampled_from([1.0, 1e-20, 1e20] if wide else [1.0, 1e-2, 1e2]))
    return with_layout(rows.to(dtype), draw(st.sampled_from(LAYOUTS)))


@st.composite
def many_rows(draw: st.DrawFn) -> Tensor:
    """Rows of a size at which assignment skips rows, compares products and rounds to integers."""
    n = draw(st.sampled_from([3000, 4097, 6000]))
    d = draw(st.sampled_from([8, 13, 32]))
    kind = draw(st.sampled_from(["cloud", "clusters", "duplicates", "outlier", "far", "one line"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    if kind == "clusters":
        members = torch.randint(30, (n,), generator=generator)
        rows += 4 * torch.randn(30, d, generator=generator, dtype=torch.float64)[members]
    elif kind == "duplicates":
        rows = rows[torch.randint(60, (n,), generator=generator)]
    elif kind == "outlier":
        rows[0] *= 1e4
    elif kind == "far":
        rows += 1e3
    elif kind == "one line":
        rows = rows[:, :1] * torch.ones(d, dtype=torch.float64)
    rows *= draw(st.sampled_from([1.0, 1e-20, 1e20]))
    return rows.to(draw(st.sampled_from([torch.float32, torch.float64])))


@dataclass
class Attention:
    """Inputs of the compensation, in one bundle."""

    logits: Tensor
    teacher: Tensor
    prototypes: Tensor
    proportions: Tensor
    w_query: Tensor
    w_key: Tensor
    w_score: Tensor

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """The arguments of compensate."""
        return (
            *(self.logits, self.prototypes, self.proportions),
            *(self.w_query, self.w_key, self.w_score),
        )

    @property
    def loss_operands(self) -> tuple[Tensor, ...]:
        """The arguments of compensated_kd_loss."""
        logits, *rest = self.operands
        return (logits, self.teacher, *rest)

    def to(self, dtype: torch.dtype) -> Attention:
        """Return a copy in another type, detached."""
        return Attention(*(value.detach().to(dtype) for value in vars(self).values()))

    def requires_grad_(self) -> Attention:
        """Ask for the gradient of everything but the teacher."""
        for value in self.operands:
            value.requires_grad_()
        return self


def term_bounds(
    inputs: Attention, grad: Tensor, *, posterior: bool, scale: float
) -> tuple[Tensor, ...]:
    """Bounds on the size of the terms that output and gradients are sums of.

    Rounding is relative to these, not to the results, in which terms may cancel: a softmax's
    gradients sum to 0, a divergence's vanish where student and teacher agree. For the output and
    then the gradients of logits, prototypes, proportions, w_query, w_key and w_score.
    """
    s, z, p, w_query, w_key, w_score = (v.detach().double().abs() for v in inputs.operands)
    values = scale * (z if posterior else p[:, None] * z).amax(0)
    row_grads = grad.double().abs()
    score_grads = 2 * (row_grads * values).sum(1)
    total = score_grads.sum()
    direct = scale * row_grads.sum(0).max()
    smallest = p[p > 0].min() if bool((p > 0).any()) else 1.0
    return (
        s.max() + values.max(),
        row_grads.max() + score_grads.max() * (w_score @ w_query).max(),
        direct + total * (w_score @ w_key).max(),
        total / smallest if posterior else scale * (row_grads * z.amax(0)).sum(),
        w_score.max() * (score_grads @ s).max(),
        w_score.max() * total * z.max(),
        total,
    )


def make_attention(
    batch: int,
    classes: int,
    prototypes: int,
    hidden: int,
    *,
    seed: int = 0,
    scale: float = 1.0,
    weight_scale: float = 1.0,
    zero_proportion: bool = False,
) -> Attention:
    """Float64 inputs of the given sizes; ``scale`` is that of logits and prototypes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    proportions = torch.rand(prototypes, generator=generator, dtype=torch.float64) + 0.05
    if zero_proportion and prototypes > 1:
        proportions[0] = 0.0
    return Attention(
        logits=scale * normal(batch, classes),
        teacher=scale * normal(batch, classes),
        prototypes=scale * normal(prototypes, classes),
        proportions=proportions / proportions.sum(),
        w_query=weight_scale * normal(hidden, classes) / classes**0.5,
        w_key=weight_scale * normal(hidden, classes) / classes**0.5,
        w_score=weight_scale * normal(hidden) / hidden**0.5,
    )


@st.composite
def attentions(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Attention:
    """Inputs of the compensation over sizes, scales, types and layouts."""
    dtype = draw(st.sampled_from(dtypes))
    wide = dtype in (torch.float32, torch.float64)
    inputs = make_attention(
        batch=draw(st.sampled_from([1, 2, 5, 16, 33, 150])),
        classes=draw(st.sampled_from([1, 2, 7, 10, 16, 17, 40])),
        prototypes=draw(st.sampled_from([1, 2, 8, 13, 32, 70])),
        hidden=draw(st.sampled_from([1, 3, 16, 50, 256])),
        seed=draw(st.integers(0, 2**16)),
        scale=draw(st.sampled_from([1.0, 1e-3, 30.0, 1e4] if wide else [1.0, 10.0])),
        weight_scale=draw(st.sampled_from([0.3, 1.0, 5.0])),
        zero_proportion=draw(st.booleans()),
    ).to(dtype)
    layout = draw(st.sampled_from(LAYOUTS))
    return Attention(*(with_layout(value, layout) for value in vars(inputs).values()))
