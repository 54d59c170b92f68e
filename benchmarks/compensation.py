# SPDX-License-Identifier: Apache-2.0
"""Compensation and the distillation loss beside the formula in PyTorch, eager and compiled.

Three passes are measured: the forward pass of ``compensate``, that with its backward pass, and the
whole distillation loss with its gradients. Gradients are those of the student's logits and of the
three weights, as training takes them; the dictionary is a constant.

For each: time, error against float64, peak memory, and the time that the arithmetic alone would
take at the measured rate of multiply-adds (the floor).
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.data import teacher_like_logits
from benchmarks.harness import Contender, Timer, measure
from benchmarks.memory import allocated_peak
from kdci_ext import reference
from kdci_ext.functional import compensate, compensated_kd_loss, confounder_dictionary

TEMPERATURE = 4.0
PASSES = ("forward", "forward+backward", "loss+gradients")
NATIVE, COMPILED, REFERENCE = "native", "torch.compile", "reference"
EAGER = ("eager, broadcast", "eager, einsum")
TANH_FORWARD, TANH_BACKWARD, EXP = 3, 6, 12
"""Multiply-adds, each the slot of two operations, that a term of the score and an exponential
count; see :func:`floor_gflop`."""
EXACT_ROWS = 32
"""Rows that the float64 results are made from at a time."""


@dataclass(frozen=True)
class Shape:
    """B student logits of width d, K prototypes, H hidden units; and the ratios that we want.

    ``want_eager`` is the time of the faster eager form by ours, ``want_compiled`` that of
    torch.compile, forward and backward on one thread; ``want_floor`` the floor by our time.
    """

    batch: int
    d: int
    k: int
    hidden: int
    want_eager: float
    want_compiled: float
    want_floor: float = 0.0

    @property
    def label(self) -> str:
        """Such as 256x10x8x256."""
        return f"{self.batch}x{self.d}x{self.k}x{self.hidden}"

    @property
    def allowance(self) -> int:
        """Bytes that forward and backward may take: inputs, gradients, B K + (B + K) H floats."""
        weights = self.hidden * (2 * self.d + 1)
        inputs = self.batch * self.d + self.k * (self.d + 1) + weights
        gradients = self.batch * self.d + weights
        return 4 * (inputs + gradients + self.batch * self.k + (self.batch + self.k) * self.hidden)


SHAPES = (
    Shape(256, 10, 8, 256, 12, 10, 0.5),
    Shape(256, 100, 32, 256, 18, 15),
    Shape(512, 100, 128, 256, 80, 50, 0.75),
    Shape(256, 1000, 32, 256, 6, 5),
    Shape(256, 1000, 512, 256, 35, 24, 0.75),
)
QUICK = SHAPES[:2]


@dataclass(frozen=True)
class Row:
    """A line of the result file: a contender in a pass on a shape. NaN is what is not known.

    Attributes:
        step: One of ``PASSES``.
        median_ms: Time, with its 20th and 80th percentile; ``rounds``, ``rejected``, ``noisy`` and
            ``cores`` are those of :class:`benchmarks.harness.Timing`.
        x_native: The contender's time by the native one's.
        output_error: Largest error of the output by its largest value; in the forward pass of all
            rows, in the loss of the loss itself.
        gradient_error: The same of the gradients, the worst of them.
        memory_mib: Largest number of bytes allocated at once beyond the inputs, results included.
        allowance_mib: See :attr:`Shape.allowance`.
        floor_ms: See :func:`floor_gflop`; ``floor_share`` is the floor by the time.
        note: Why there is no figure.
    """

    shape: str
    step: str
    contender: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int
    rejected: int
    noisy: int
    cores: float
    x_native: float
    output_error: float
    gradient_error: float
    memory_mib: float
    allowance_mib: float
    floor_ms: float
    floor_share: float
    note: str


@dataclass(frozen=True)
class Inputs:
    """A problem: everything but the teacher and ``grad`` is an operand of ``compensate``."""

    logits: Tensor
    teacher: Tensor
    prototypes: Tensor
    proportions: Tensor
    w_query: Tensor
    w_key: Tensor
    w_score: Tensor
    grad: Tensor

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """Of ``compensate``, in its order."""
        return (
            *(self.logits, self.prototypes, self.proportions),
            *(self.w_query, self.w_key, self.w_score),
        )

    @property
    def trained(self) -> tuple[Tensor, ...]:
        """What gradients are taken of."""
        return self.logits, self.w_query, self.w_key, self.w_score


def make_inputs(shape: Shape, device: str = "cpu") -> Inputs:
    """Make a problem as it occurs in training: teacher-like logits and their dictionary."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = teacher_like_logits(shape.batch, shape.d)
        rows = teacher_like_logits(max(shape.batch, 2 * shape.k), shape.d, seed=1)
        dictionary = confounder_dictionary(rows, shape.k)
        logits = teacher + torch.randn(shape.batch, shape.d)
        weights = [
            (2 * torch.rand(*size) - 1) / size[-1] ** 0.5
            for size in ((shape.hidden, shape.d), (shape.hidden, shape.d), (shape.hidden,))
        ]
        grad = torch.randn(shape.batch, shape.d)
    made = (logits, teacher, dictionary.prototypes, dictionary.proportions, *weights, grad)
    inputs = Inputs(*(value.to(device) for value in made))
    for value in inputs.trained:
        value.requires_grad_()
    return inputs


Compensate = Callable[..., Tensor]
"""From the operands of ``compensate`` to the compensated logits."""


def _broadcast(s: Tensor, z: Tensor, p: Tensor, wq: Tensor, wk: Tensor, wt: Tensor) -> Tensor:
    score = (torch.tanh((s @ wq.T)[:, None] + (z @ wk.T)[None]) * wt).sum(-1)
    return s + torch.softmax(score, 1) @ (p[:, None] * z)


def _einsum(s: Tensor, z: Tensor, p: Tensor, wq: Tensor, wk: Tensor, wt: Tensor) -> Tensor:
    query, key = torch.einsum("bd,hd->bh", s, wq), torch.einsum("kd,hd->kh", z, wk)
    score = torch.einsum("bkh,h->bk", torch.tanh(query.unsqueeze(1) + key), wt)
    return s + torch.einsum("bk,k,kd->bd", torch.softmax(score, 1), p, z)


def _kd_loss(compensated: Tensor, teacher: Tensor) -> Tensor:
    student, target = (F.log_softmax(x / TEMPERATURE, 1) for x in (compensated, teacher))
    loss = F.kl_div(student, target, reduction="batchmean", log_target=True)
    return loss * TEMPERATURE**2


Result = tuple[Tensor, ...]
"""Output, and in the passes that make them the gradients of `Inputs.trained`."""


def _in_pass(step: str, inputs: Inputs, function: Callable[..., Tensor]) -> Callable[[], Result]:
    """Return a call of ``function`` in a pass; in the last one it returns the loss."""
    if step == "forward":

        def forward() -> Result:
            with torch.no_grad():
                return (function(*inputs.operands),)

        return forward
    if step == "forward+backward":

        def both() -> Result:
            output = function(*inputs.operands)
            return output, *torch.autograd.grad(output, inputs.trained, inputs.grad)

        return both

    def loss() -> Result:
        value = function(*inputs.operands)
        return value, *torch.autograd.grad(value, inputs.trained)

    return loss


def make_calls(step: str, inputs: Inputs) -> dict[str, Callable[[], Result]]:
    """Return the contenders' calls in a pass, by name."""
    teacher = inputs.teacher

    def with_loss(function: Compensate) -> Compensate:
        if step != "loss+gradients":
            return function
        return lambda *operands: _kd_loss(function(*operands), teacher)

    def native(s: Tensor, *rest: Tensor) -> Tensor:
        if step != "loss+gradients":
            return compensate(s, *rest, backend="native")
        return compensated_kd_loss(s, teacher, *rest, TEMPERATURE, backend="native")

    def plain(s: Tensor, *rest: Tensor) -> Tensor:
        if step != "loss+gradients":
            return reference.compensate(s, *rest, False, 1.0)[0]
        return reference.compensated_kd_loss(s, teacher, *rest, TEMPERATURE, False, 1.0)

    functions: dict[str, Compensate] = {
        NATIVE: native,
        EAGER[0]: with_loss(_broadcast),
        EAGER[1]: with_loss(_einsum),
        COMPILED: torch.compile(with_loss(_broadcast), fullgraph=True, dynamic=False),
        REFERENCE: plain,
    }
    return {name: _in_pass(step, inputs, function) for name, function in functions.items()}


def exact(step: str, inputs: Inputs) -> Result:
    """Return what a pass should, in float64 and a few rows at a time."""
    wide = [value.detach().double() for value in vars(inputs).values()]
    output: list[Tensor] = []
    logit_grads: list[Tensor] = []
    sums: list[Tensor] = []
    batch = len(inputs.logits)
    for begin in range(0, batch, EXACT_ROWS):
        part = slice(begin, begin + EXACT_ROWS)
        s, t, z, p, *weights, grad = wide
        rows = Inputs(s[part].clone(), t[part], z, p, *weights, grad[part])
        for value in rows.trained:
            value.requires_grad_()
        found = _broadcast(*rows.operands)
        if step == "forward":
            output.append(found.detach())
            continue
        if step == "forward+backward":
            output.append(found.detach())
            grads = torch.autograd.grad(found, rows.trained, rows.grad)
        else:
            loss = _kd_loss(found, rows.teacher) * (len(rows.logits) / batch)
            output.append(loss.detach()[None])
            grads = torch.autograd.grad(loss, rows.trained)
        logit_grads.append(grads[0])
        sums = [a + b for a, b in zip(sums, grads[1:], strict=True)] if sums else [*grads[1:]]
    result = torch.cat(output)
    if step == "loss+gradients":
        result = result.sum()
    return (result, torch.cat(logit_grads), *sums) if logit_grads else (result,)


def errors(found: Result, truth: Result) -> tuple[float, float]:
    """Return the relative errors of the output and of the worst gradient, NaN without gradients."""
    each = [
        float((a.detach().double() - b).abs().max() / b.abs().max())
        for a, b in zip(found, truth, strict=True)
    ]
    return each[0], max(each[1:], default=math.nan)


def floor_gflop(shape: Shape, step: str) -> float:
    """Count the operations of a pass, in units of 1e9, a multiply-add as two.

    The matrix products: forward Q = S W_q^T, K = Z W_k^T and lambda Z; backward dS, dW_q, dW_k and
    the gradient of lambda. With tanh(a + b) = 1 - 2 / (1 + e^2a e^2b), as it is written there, a
    term of the score takes 3 multiply-adds forward and 6 backward, its half of a division being
    hidden behind them, and the (B + K) H exponentials 12 each: 2 for the range, 6 for a polynomial
    of degree 7 and 4 around it. The kernels rewrite the terms and make do with some fewer, but the
    count stays, for comparison. The KL is not counted.
    """
    b, d, k, h = shape.batch, shape.d, shape.k, shape.hidden
    products = 2 * b * d * h + 2 * k * d * h + 2 * b * k * d
    slots = TANH_FORWARD * b * k * h + EXP * (b + k) * h
    if step != "forward":
        products += 4 * b * d * h + 2 * k * d * h + 2 * b * k * d
        slots += TANH_BACKWARD * b * k * h
    return (products + 2 * slots) / 1e9


def bench_shape(
    shape: Shape,
    timer: Timer,
    peak_gflops: float,
    seconds: float,
    *,
    min_rounds: int = 3,
    device: str = "cpu",
) -> list[Row]:
    """Measure all passes of all contenders on a shape."""
    torch._dynamo.reset()
    inputs = make_inputs(shape, device)
    return [
        row
        for step in PASSES
        for row in _bench_pass(shape, step, inputs, timer, peak_gflops, seconds, min_rounds)
    ]


def _bench_pass(
    shape: Shape,
    step: str,
    inputs: Inputs,
    timer: Timer,
    peak_gflops: float,
    seconds: float,
    min_rounds: int,
) -> list[Row]:
    truth = exact(step, inputs)
    calls = make_calls(step, inputs)
    notes: dict[str, str] = {}
    judged: dict[str, tuple[float, float]] = {}
    memories: dict[str, float] = {}
    for name, call in calls.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                judged[name] = errors(call(), truth)
        except Exception as error:  # torch.compile without a compiler, for one
            if name == NATIVE:
                raise
            notes[name] = " ".join(f"failed: {type(error).__name__}: {error}".split())[:120]
            continue
        memories[name] = allocated_peak(call, inputs.logits.device.type) / 2**20
    running = [name for name in calls if name not in notes]
    timings = measure(
        [Contender(name, lambda _, call=calls[name]: call()) for name in running],  # type: ignore[misc]
        timer,
        seconds=seconds,
        min_rounds=min_rounds,
    )
    floor_ms = floor_gflop(shape, step) / peak_gflops * 1e3
    native_ms, nan = timings[NATIVE].median_ms, math.nan
    rows = []
    for name in calls:
        allowance = shape.allowance / 2**20 if step != "forward" else nan
        if name in notes:
            empty = (nan, nan, nan, 0, 0, 0, nan, nan, nan, nan, nan)
            rows.append(Row(shape.label, step, name, *empty, allowance, floor_ms, nan, notes[name]))
            continue
        timing = timings[name]
        rows.append(
            Row(
                *(shape.label, step, name),
                *vars(timing).values(),
                timing.median_ms / native_ms,
                *judged[name],
                *(memories[name], allowance),
                *(floor_ms, floor_ms / timing.median_ms),
                "",
            )
        )
    return rows


def print_rows(rows: Sequence[Row]) -> None:
    """Print the table of a shape."""
    print(f"\nB x d x K x H = {rows[0].shape}")
    for step in dict.fromkeys(row.step for row in rows):
        here = [row for row in rows if row.step == step]
        allowed = "" if step == "forward" else f", {here[0].allowance_mib:.3g} MiB allowed"
        print(f" {step}: floor {here[0].floor_ms:.4g} ms{allowed}")
        print(f"  {'contender':18} {'median ms':>10} {'p20-p80':>17} {'x native':>8} "
              f"{'of floor':>8} {'error':>9} {'gradients':>9} {'MiB':>7} "
              f"{'rounds':>10}")  # fmt: skip
        for row in here:
            if row.rounds == 0:
                print(f"  {row.contender:18} {row.note}")
                continue
            spread = f"{row.p20_ms:.4g}-{row.p80_ms:.4g}"
            rounds = f"{row.rounds}" + (f" -{row.rejected}" if row.rejected else "")
            rounds += f" !{row.noisy}" if row.noisy else ""
            print(f"  {row.contender:18} {row.median_ms:10.4g} {spread:>17} {row.x_native:8.2f} "
                  f"{row.floor_share:8.2f} {row.output_error:9.2g} {row.gradient_error:9.2g} "
                  f"{row.memory_mib:7.3g} {rounds:>10}")  # fmt: skip
    sys.stdout.flush()


def find_best(rows: Sequence[Row], names: Sequence[str]) -> Row | None:
    """Return the fastest of some contenders, or None where none ran."""
    ran = [row for row in rows if row.contender in names and row.rounds > 0]
    return min(ran, key=lambda row: row.median_ms, default=None)


def summarize(rows: Sequence[Row]) -> list[str]:
    """Say for each shape what was wanted of forward and backward and what was found."""
    lines = []
    for shape in SHAPES:
        here = [r for r in rows if r.shape == shape.label and r.step == "forward+backward"]
        native = find_best(here, [NATIVE])
        if native is None:
            continue
        parts = []
        for row, wanted in (
            (find_best(here, EAGER), shape.want_eager),
            (find_best(here, [COMPILED]), shape.want_compiled),
        ):
            if row is not None:
                found = f"{row.contender} x{row.x_native:.1f} (>= {wanted:g})"
                parts.append(f"{found} {verdict(row.x_native >= wanted)}")
        if shape.want_floor:
            reached = native.floor_share >= shape.want_floor
            parts.append(
                f"{native.floor_share:.2f} of the floor (>= {shape.want_floor:g}) "
                f"{verdict(reached)}"
            )
        for step in PASSES[1:]:
            row = next(r for r in rows if (r.shape, r.step, r.contender)
                       == (shape.label, step, NATIVE))  # fmt: skip
            share = row.memory_mib / row.allowance_mib
            parts.append(f"memory of {step} x{share:.2f} (<= 1) {verdict(share <= 1)}")
        ratios = [_error_ratios([r for r in rows if (r.shape, r.step) == (shape.label, step)])
                  for step in PASSES]  # fmt: skip
        output = max(ratio for ratio, _ in ratios)
        gradients = max(ratio for _, ratio in ratios[1:])
        parts.append(
            f"error by plain PyTorch's x{output:.2f} (<= 2) {verdict(output <= 2)}, of gradients "
            f"x{gradients:.2f} (<= 3) {verdict(gradients <= 3)}"
        )
        lines.append(f"{shape.label:16} " + "; ".join(parts))
    return lines


def _error_ratios(rows: Sequence[Row]) -> tuple[float, float]:
    """Return native's errors by the largest of plain PyTorch's, of one shape and pass.

    An error below the rounding of the result itself, which a single number may have by chance,
    counts as that.
    """
    rounding = torch.finfo(torch.float32).eps / 2
    native = next(row for row in rows if row.contender == NATIVE)
    plain = [row for row in rows if row.contender in (*EAGER, REFERENCE) and row.rounds > 0]
    if not plain:
        return math.nan, math.nan
    return (
        native.output_error / max(rounding, *(row.output_error for row in plain)),
        native.gradient_error / max(rounding, *(row.gradient_error for row in plain)),
    )


def verdict(reached: bool) -> str:
    """Return how a wish is marked."""
    return "[yes]" if reached else "[no]"


def find_shapes(names: Sequence[str]) -> list[Shape]:
    """Return shapes by their labels.

    Raises:
        ValueError: If there is none of a name.
    """
    known = {shape.label: shape for shape in SHAPES}
    for name in names:
        if name not in known:
            raise ValueError(f"unknown shape {name!r}: expected some of {', '.join(known)}")
    return [known[name] for name in names]
