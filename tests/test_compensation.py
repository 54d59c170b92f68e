"""Compensation and distillation loss, forward and backward, against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    DTYPES,
    Attention,
    attentions,
    make_attention,
    max_error,
    term_bounds,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from kdci_ext import KDCI, PriorCompensation, build_confounder_dictionary
from kdci_ext.functional import compensate, compensated_kd_loss

WEIGHTINGS = ("paper", "posterior")
weightings = st.sampled_from(WEIGHTINGS)


def run_compensate(inputs: Attention, backend: str, grad, **options):
    """Return the output and the gradients of <output, grad> of one backend."""
    inputs = Attention(*(v.detach() for v in vars(inputs).values())).requires_grad_()
    output = compensate(*inputs.operands, backend=backend, **options)
    return output.detach(), torch.autograd.grad(output, inputs.operands, grad.to(output.dtype))


def run_loss(inputs: Attention, backend: str, temperature: float, **options):
    inputs = Attention(*(v.detach() for v in vars(inputs).values())).requires_grad_()
    loss = compensated_kd_loss(*inputs.loss_operands, temperature, backend=backend, **options)
    return loss.detach(), torch.autograd.grad(loss, inputs.operands)


# -- against the reference ---------------------------------------------------


def perturbed(inputs: Attention, eps: float, seed: int) -> Attention:
    """Inputs in float64 that are each off by one rounding."""
    generator = torch.Generator().manual_seed(seed)
    return Attention(
        *(
            v.double() * (1 + eps * torch.randn(v.shape, generator=generator, dtype=torch.float64))
            for v in vars(inputs).values()
        )
    )


def flat(result):
    output, grads = result
    return (output, *grads)


def assert_rounding_only(run, inputs: Attention, bounds) -> None:
    """Hold the native result to what rounding explains.

    That is: three times what plain PyTorch errs in the same precision, what one rounding of the
    inputs does to the exact result, and a few roundings of the largest terms. The inputs are
    rounded in several ways, since a result that hangs on few of them may be lucky in one.
    """
    eps = torch.finfo(torch.float64 if inputs.logits.dtype == torch.float64 else torch.float32).eps
    exact = flat(run(inputs.to(torch.float64), "reference"))
    plain = flat(run(inputs, "reference"))
    got = flat(run(inputs, "native"))
    moved = zip(
        *(flat(run(perturbed(inputs, eps, seed), "reference")) for seed in range(4)), strict=True
    )
    for one, other, truth, shifted, bound in zip(got, plain, exact, moved, bounds, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == truth.shape
        # A float16 gradient may truly lie beyond its type's range.
        within = truth.abs() < 0.99 * torch.finfo(one.dtype).max
        one, other, truth, *shifted = (value[within] for value in (one, other, truth, *shifted))
        assert bool(torch.isfinite(one).all())
        moves = max(max_error(shift, truth) for shift in shifted)
        allowed = 3 * (max_error(other, truth) + moves) + 4 * eps * float(bound)
        stored = torch.finfo(one.dtype)
        largest = float(truth.abs().max()) if truth.numel() else 0.0
        allowed += stored.eps * largest + stored.smallest_normal * stored.eps
        assert max_error(one, truth) <= allowed


@given(attentions(), weightings, st.sampled_from([1.0, -0.5, 40.0]))
def test_compensate_matches_the_reference(inputs, weighting, scale):
    """For all types, layouts and sizes, output and gradients are right to rounding."""
    grad = torch.randn(inputs.logits.shape, dtype=torch.float64)
    bounds = term_bounds(inputs, grad, posterior=weighting == "posterior", scale=abs(scale))
    assert_rounding_only(
        lambda x, backend: run_compensate(x, backend, grad, weighting=weighting, scale=scale),
        inputs,
        bounds,
    )


@given(attentions(), weightings, st.sampled_from([1.0, 4.0, 20.0]))
def test_kd_loss_matches_the_reference(inputs, weighting, temperature):
    # The gradient of the logits is T / B times a difference of two probabilities.
    batch = inputs.logits.shape[0]
    grad = torch.full(inputs.logits.shape, temperature / batch)
    bounds = term_bounds(inputs, grad, posterior=weighting == "posterior", scale=1.0)
    largest = max(float(inputs.logits.abs().max()), float(inputs.teacher.abs().max()), 1.0)
    assert_rounding_only(
        lambda x, backend: run_loss(x, backend, temperature, weighting=weighting),
        inputs,
        (temperature**2 + temperature * (largest + float(bounds[0])), *bounds[1:]),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", ["compensate", "loss"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("magnitude", [0.01, 1.0, 30.0])
def test_as_exact_as_pytorch(dtype, function, weighting, magnitude):
    """Outputs err at most twice, gradients three times what plain PyTorch errs in the same
    precision against float64: the largest errors over a few problems of each kind, since a
    single small one may come out exact by luck.
    """

    def run(inputs, backend):
        if function == "loss":
            return run_loss(inputs, backend, 4.0, weighting=weighting)
        grad = torch.ones(inputs.logits.shape, dtype=torch.float64)
        grad[::2] = -0.5
        return run_compensate(inputs, backend, grad, weighting=weighting)

    worst_native, worst_plain = torch.zeros(7), torch.zeros(7)
    for seed in range(6):
        inputs = make_attention(33, 20, 13, 100, seed=seed, scale=magnitude).to(dtype)
        exact = flat(run(inputs.to(torch.float64), "reference"))
        for backend, worst in (("native", worst_native), ("reference", worst_plain)):
            errors = [
                max_error(x, y) for x, y in zip(flat(run(inputs, backend)), exact, strict=True)
            ]
            torch.maximum(worst, torch.tensor(errors), out=worst)
    factors = torch.tensor([2.0] + [3.0] * 6)
    assert bool((worst_native <= factors * worst_plain).all()), (
        worst_native / worst_plain
    ).tolist()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_compensate_by_hand(weighting):
    """Two prototypes, one hidden unit: every step of equations 3 to 5 written out."""
    s, z, p = [0.5, -1.0], [[1.0, 2.0], [-3.0, 0.5]], [0.25, 0.75]
    w_query, w_key, w_score = [0.3, -0.2], [0.1, 0.4], 1.5
    hidden = [
        torch.tensor(sum(w * x for w, x in zip(w_query, s, strict=True)))
        + sum(w * x for w, x in zip(w_key, row, strict=True))
        for row in z
    ]
    score = w_score * torch.tanh(torch.stack(hidden))
    if weighting == "paper":
        weights = torch.softmax(score, 0) * torch.tensor(p)
    else:
        weights = torch.softmax(score + torch.tensor(p).log(), 0)
    expected = torch.tensor(s) + 2.0 * (weights @ torch.tensor(z))
    got = compensate(
        torch.tensor([s]),
        torch.tensor(z),
        torch.tensor(p),
        torch.tensor([w_query]),
        torch.tensor([w_key]),
        torch.tensor([w_score]),
        weighting=weighting,
        scale=2.0,
    )
    torch.testing.assert_close(got[0], expected)


def test_kd_loss_by_hand():
    """With a prior of 0 the loss is the field's KL_T: batch mean, times T squared."""
    inputs = make_attention(6, 10, 4, 8).to(torch.float32)
    inputs.proportions.zero_()
    for temperature in (1.0, 20.0):
        expected = (
            F.kl_div(
                F.log_softmax(inputs.logits / temperature, 1),
                F.softmax(inputs.teacher / temperature, 1),
                reduction="batchmean",
            )
            * temperature**2
        )
        got = compensated_kd_loss(*inputs.loss_operands, temperature)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_surplus_prototypes_carry_nothing(weighting):
    """A prototype of proportion 0 adds nothing in either form; in the posterior form it even
    takes no weight from the others.
    """
    inputs = make_attention(5, 7, 4, 16)
    inputs.proportions[0] = 0.0
    moved = make_attention(5, 7, 4, 16)
    moved.proportions[0] = 0.0
    moved.prototypes[0] = inputs.prototypes[0]
    if weighting == "posterior":
        moved.prototypes[0] = 1000.0
    one, other = (compensate(*x.operands, weighting=weighting) for x in (inputs, moved))
    torch.testing.assert_close(one, other)
    if weighting == "posterior":
        kept = Attention(**vars(inputs))
        kept.prototypes, kept.proportions = inputs.prototypes[1:], inputs.proportions[1:]
        torch.testing.assert_close(one, compensate(*kept.operands, weighting=weighting))


def test_posterior_prior_is_a_convex_combination():
    """Its prior lies within the range of the prototypes, class by class."""
    inputs = make_attention(30, 10, 8, 32, weight_scale=4.0)
    prior = compensate(*inputs.operands, weighting="posterior") - inputs.logits
    low, high = inputs.prototypes.min(0).values, inputs.prototypes.max(0).values
    assert bool(((prior >= low - 1e-12) & (prior <= high + 1e-12)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("magnitude", [1e4, 1e12, 1e18, 1e-12, 1e-18])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_extreme_logits(dtype, magnitude, weighting):
    """Saturated and vanishing pre-activations stay finite and exact."""
    inputs = make_attention(4, 10, 6, 64, scale=magnitude).to(dtype)
    grad = torch.randn(4, 10, dtype=torch.float64)
    assert_rounding_only(
        lambda x, backend: run_compensate(x, backend, grad, weighting=weighting),
        inputs,
        term_bounds(inputs, grad, posterior=weighting == "posterior", scale=1.0),
    )


def assert_compensate_is_right(inputs: Attention, weighting: str = "paper") -> None:
    inputs = inputs.to(torch.float32)
    grad = torch.randn(inputs.logits.shape, dtype=torch.float64)
    assert_rounding_only(
        lambda x, backend: run_compensate(x, backend, grad, weighting=weighting),
        inputs,
        term_bounds(inputs, grad, posterior=weighting == "posterior", scale=1.0),
    )


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(("keys", "queries"), [(1.0, 1e3), (1.0, 1e30), (0.2, 1e-3), (30.0, 1e-3)])
def test_rows_of_unlike_scale(weighting, keys, queries):
    """Rows whose queries are cut off since tanh is 1 at all keys, or for which tanh is computed
    directly, beside others in one batch: the forms of the kernel share its buffers.
    """
    inputs = make_attention(48, 10, 6, 64)
    inputs.prototypes.mul_(keys)
    inputs.logits[16:32] *= queries
    assert_compensate_is_right(inputs, weighting)


@pytest.mark.parametrize(
    "sizes",
    [(150, 10, 8, 64), (37, 10, 8, 64), (150, 40, 9, 33), (300, 100, 70, 40), (20, 12, 600, 48)],
)
def test_ends_of_the_kernels_blocks(sizes):
    """Several slabs of rows, blocks of keys and panels of units, whole ones and ends."""
    assert_compensate_is_right(make_attention(*sizes))


@pytest.mark.parametrize("prototypes", [8, 16, 32, 64])
@pytest.mark.parametrize("hidden", [32, 80])
def test_keys_computed_as_a_transpose(prototypes, hidden):
    """Few prototypes that fill whole panels, by a last panel that is full or is not."""
    assert_compensate_is_right(make_attention(20, 100, prototypes, hidden))


@pytest.mark.parametrize("classes", [1, 3, 4, 5, 8, 9, 11, 12, 13, 17, 28, 49])
@pytest.mark.parametrize("hidden", [72, 300])
def test_columns_that_fill_no_vector(classes, hidden):
    """The products' last columns, which are summed along rows or by dot products: of one depth
    that ends within a vector and of one that takes several blocks.
    """
    assert_compensate_is_right(make_attention(37, classes, 70, hidden))


@pytest.mark.parametrize("factor", [0.0, 1e-6, 1e-30])
def test_unequal_scores(factor):
    """Units whose w_score vanishes beside another's, which the kernel divides by."""
    inputs = make_attention(20, 10, 6, 64)
    inputs.w_score[1:] *= factor
    assert_compensate_is_right(inputs)


def test_saturated_units_pass_no_gradient():
    """Where tanh is 1 at all keys, the gradients of queries and keys are 0 as they are in PyTorch,
    and not small numbers that large logits would make large gradients of.
    """
    inputs = make_attention(20, 10, 6, 64)
    inputs.w_query.abs_()
    inputs.logits.abs_().mul_(1e30)
    _, grads = run_compensate(inputs.to(torch.float32), "native", torch.ones(20, 10))
    assert not bool(grads[3].any())
    assert float(grads[4].abs().max()) < 1e-20


def test_an_absent_key_does_not_hide_that_the_others_are_small():
    """What decides on the form of tanh leaves out keys that nothing attends to."""
    inputs = make_attention(20, 10, 6, 64, scale=1e-4, zero_proportion=True)
    inputs.prototypes[0] *= 1e5
    assert_compensate_is_right(inputs, "posterior")


@pytest.mark.parametrize("large", [1e20, 1e38])
def test_large_scores(large):
    """Units whose squares, or whose gradients' factors, lie beyond the range of float32."""
    inputs = make_attention(20, 10, 6, 64)
    inputs.w_score[3] = large
    assert_compensate_is_right(inputs)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7FFFFFFF, -1])
@pytest.mark.parametrize("name", ["logits", "w_query", "w_key", "w_score"])
def test_no_kind_of_nan_is_lost(bits, name):
    """NaN has many encodings, and conversions from float16 make unusual ones."""
    inputs = make_attention(3, 5, 2, 7).to(torch.float32)
    getattr(inputs, name).view(torch.int32).view(-1)[-1] = bits
    got, expected = (compensate(*inputs.operands, backend=b) for b in ("native", "reference"))
    assert torch.equal(got.isnan(), expected.isnan())
    assert bool(got.isnan().any())


def test_nan_gradients_are_not_cut_off_with_their_queries():
    inputs = make_attention(3, 5, 4, 6).to(torch.float32)
    inputs.logits[1, 2] = float("inf")
    _, got = run_loss(inputs, "native", 4.0)
    _, expected = run_loss(inputs, "reference", 4.0)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.isnan(), other.isnan())


def test_nan_logits_spread_no_further_than_their_row():
    inputs = make_attention(6, 10, 4, 32).to(torch.float32)
    clean = compensate(*inputs.operands)
    inputs.logits[2, 3] = float("nan")
    got = compensate(*inputs.operands)
    assert bool(got[2].isnan().any())
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(got[others], clean[others])


# -- autograd ----------------------------------------------------------------


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_gradcheck(weighting):
    inputs = make_attention(3, 4, 5, 6).requires_grad_()

    def call(*operands):
        return compensate(*operands, weighting=weighting, scale=1.5, backend="native")

    assert torch.autograd.gradcheck(call, inputs.operands)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_gradcheck_of_the_loss(weighting):
    inputs = make_attention(3, 4, 5, 6).requires_grad_()

    def call(student, *rest):
        return compensated_kd_loss(
            *(student, inputs.teacher, *rest, 3.0), weighting=weighting, backend="native"
        )

    assert torch.autograd.gradcheck(call, inputs.operands)


def test_loss_of_the_kernel_is_compensate_then_kl():
    """The one-pass loss and its gradients are those of the two steps."""
    inputs = make_attention(9, 10, 8, 32)
    loss, grads = run_loss(inputs, "native", 4.0)
    two_steps = Attention(*vars(inputs).values()).requires_grad_()
    compensated = compensate(*two_steps.operands, backend="native")
    expected = 16 * F.kl_div(
        F.log_softmax(compensated / 4, 1), F.softmax(inputs.teacher / 4, 1), reduction="batchmean"
    )
    torch.testing.assert_close(loss, expected.detach())
    for got, want in zip(grads, torch.autograd.grad(expected, two_steps.operands), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("function", ["compensate", "loss"])
def test_second_derivative_is_refused(function):
    """Not silently wrong: the message names the backend that has it."""
    inputs = make_attention(3, 4, 5, 6).requires_grad_()
    if function == "compensate":
        output = compensate(*inputs.operands, backend="native").square().sum()
    else:
        output = compensated_kd_loss(*inputs.loss_operands, backend="native")

    def differentiate_twice(output):
        (first,) = torch.autograd.grad(output, inputs.logits, create_graph=True)
        first.square().sum().backward()

    with pytest.raises(RuntimeError, match="backend='reference'"):
        differentiate_twice(output)
    reference = compensate(*inputs.operands, backend="reference").square().sum()
    differentiate_twice(reference)


@pytest.mark.parametrize("classes", [10, 40])
@pytest.mark.parametrize("function", ["compensate", "loss"])
def test_a_second_backward_pass_is_the_same(function, classes):
    """What the forward pass saved is not overwritten as long as the graph is retained, and whether
    it is makes no difference.
    """
    inputs = make_attention(70, classes, 6, 40).to(torch.float32).requires_grad_()
    if function == "loss":
        output = compensated_kd_loss(*inputs.loss_operands, 4.0, backend="native")
    else:
        output = compensate(*inputs.operands, backend="native").sum()
    first = torch.autograd.grad(output, inputs.operands, retain_graph=True)
    second = torch.autograd.grad(output, inputs.operands)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_wanted_gradients_are_made():
    inputs = make_attention(3, 4, 5, 6)
    inputs.w_query.requires_grad_()
    compensate(*inputs.operands).sum().backward()
    assert inputs.w_query.grad is not None
    assert inputs.prototypes.grad is None
    with torch.no_grad():
        assert not compensated_kd_loss(*inputs.loss_operands).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_returns_the_callers_type(dtype):
    """Under autocast narrow logits meet float32 weights: computed in float32, returned narrow."""
    inputs = make_attention(8, 10, 8, 32).to(torch.float32)
    narrow = inputs.logits.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        got = compensate(narrow, *inputs.operands[1:], backend="native")
        loss = compensated_kd_loss(narrow, inputs.teacher, *inputs.operands[1:], backend="native")
    assert got.dtype == dtype
    assert loss.dtype == torch.float32
    loss.backward()
    assert narrow.grad.dtype == dtype
    wide = compensate(narrow.float(), *inputs.operands[1:], backend="native")
    torch.testing.assert_close(got, wide.to(dtype))


# -- determinism -------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes", [(256, 10, 8, 256), (300, 100, 32, 100), (64, 33, 130, 70), (20, 100, 32, 256)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_and_repeats_change_no_bit(two_threads, sizes, dtype):
    inputs = make_attention(*sizes).to(dtype)
    grad = torch.randn(inputs.logits.shape, dtype=torch.float64)

    def everything():
        output, grads = run_compensate(inputs, "native", grad)
        loss, loss_grads = run_loss(inputs, "native", 4.0)
        return (output, *grads, loss, *loss_grads)

    one, two = two_threads(everything)
    for first, second, again in zip(one, two, everything(), strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, again)


# -- the framework -----------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_opcheck(dtype, requires_grad, weighting):
    inputs = make_attention(5, 4, 3, 6).to(dtype)
    if requires_grad:
        inputs.requires_grad_()
    operators = torch.ops.kdci_ext
    options = (weighting == "posterior", 1.0)
    torch.library.opcheck(operators.compensate.default, (*inputs.operands, *options))
    torch.library.opcheck(
        operators.compensated_kd_loss.default,
        (*inputs.loss_operands, 4.0, *options, requires_grad, requires_grad),
    )
    saved = operators.compensate(*inputs.operands, *options)
    arguments = (inputs.logits, *inputs.operands, *saved[1:], *options, True)
    detached = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
    torch.library.opcheck(operators.compensate_backward.default, detached)
    torch.library.opcheck(operators.compensate_backward_.default, detached[:-1])


@pytest.mark.parametrize("function", ["compensate", "loss"])
def test_compiles_without_graph_breaks(function):
    """One graph for forward and backward, for changing batch sizes."""

    def step(inputs: Attention):
        if function == "compensate":
            return compensate(*inputs.operands).square().mean()
        return compensated_kd_loss(*inputs.loss_operands, 4.0)

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for batch in (5, 9, 12):
        inputs = make_attention(batch, 10, 8, 16, seed=batch).to(torch.float32).requires_grad_()
        results = [function(inputs) for function in (step, compiled)]
        grads = [torch.autograd.grad(result, inputs.operands) for result in results]
        torch.testing.assert_close(results[1], results[0])
        for got, want in zip(grads[1], grads[0], strict=True):
            torch.testing.assert_close(got, want)


# -- modules -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "parameters"), [(10, 5_376), (100, 51_456), (200, 102_656), (1000, 512_256)]
)
def test_number_of_parameters(classes, parameters):
    """KDCI, supplement: 256 * 2C + 256."""
    assert sum(p.numel() for p in PriorCompensation(classes).parameters()) == parameters


def test_kdci_lowers_a_loss_in_a_hand_written_loop():
    """The drop-in form: update, loss, step, as in anyone's loop."""
    images = torch.randn(64, 12)
    teacher, student = torch.nn.Linear(12, 10), torch.nn.Linear(12, 10)
    kdci = KDCI(num_classes=10, num_prototypes=8)
    optimizer = torch.optim.SGD([*student.parameters(), *kdci.parameters()], lr=0.5)
    losses = []
    for _ in range(60):
        with torch.no_grad():
            teacher_logits = teacher(images)
        kdci.update(teacher_logits)
        loss = kdci.loss(student(images), teacher_logits, temperature=4.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_kdci_is_its_parts():
    teacher_logits, student_logits = torch.randn(64, 10), torch.randn(16, 10)
    kdci = KDCI(10, 8, weighting="posterior", scale=0.5)
    generator = torch.Generator().manual_seed(3)
    kdci.update(teacher_logits, generator=generator)
    d = build_confounder_dictionary(teacher_logits, 8, generator=generator.manual_seed(3))
    assert torch.equal(kdci.prototypes, d.prototypes)
    assert torch.equal(kdci(student_logits), kdci.compensation(student_logits, d))


def test_warm_start_goes_on_from_the_last_prototypes():
    """From logits that hardly changed it takes fewer iterations than k-means++ needs, and every
    prototype stays where it was in the dictionary.
    """
    torch.manual_seed(1)
    logits = torch.randn(400, 10)
    kdci = KDCI(10, 8, warm_start=True)
    first = kdci.update(logits)
    again = kdci.update(logits + 0.01 * torch.randn(400, 10))
    assert int(again.num_iter) <= 3 < int(first.num_iter)
    torch.testing.assert_close(again.prototypes, first.prototypes, rtol=0, atol=0.2)


def test_kdci_state_holds_the_dictionary():
    kdci = KDCI(10, 8)
    fresh = KDCI(10, 8)
    fresh.load_state_dict(kdci.state_dict())
    assert not fresh.is_ready
    kdci.update(torch.randn(64, 10))
    fresh.load_state_dict(kdci.state_dict())
    assert fresh.is_ready
    logits = torch.randn(5, 10)
    assert torch.equal(fresh(logits), kdci(logits))


def test_kdci_asks_for_a_dictionary_first():
    with pytest.raises(RuntimeError, match=r"call update\(teacher_logits\) first"):
        KDCI(10, 8).loss(torch.randn(4, 10), torch.randn(4, 10))


@pytest.mark.parametrize("attention", ["learned", "uniform", "random"])
@pytest.mark.parametrize("prototypes", ["kmeans", "random"])
@pytest.mark.parametrize("proportions", ["frequency", "none"])
def test_ablations(attention, prototypes, proportions):
    """Table 4: each part of the prior can be replaced, and the loss still trains the student."""
    options = {"attention": attention, "prototypes": prototypes, "proportions": proportions}
    kdci = KDCI(10, 8, **options)
    rows = torch.randn(64, 10)
    kdci.update(rows)
    assert (attention == "learned") == (len(list(kdci.parameters())) == 3)
    if proportions == "none":
        assert kdci.proportions.tolist() == [1.0] * 8
    student = torch.randn(16, 10, requires_grad=True)
    kdci.loss(student, torch.randn(16, 10), 4.0).backward()
    assert float(student.grad.abs().sum()) > 0
    if attention == "uniform":
        prior = (kdci.proportions[:, None] * kdci.prototypes).sum(0) / 8
        torch.testing.assert_close(kdci(student) - student, prior.expand(16, 10))


# -- bad input ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("replaced", "error", "message"),
    [
        (
            {"logits": torch.randn(0, 4)},
            ValueError,
            r"logits must not be empty, got shape \[0, 4\]",
        ),
        ({"logits": torch.randn(3, 5)}, ValueError, "prototypes has shape .* must be 5"),
        ({"logits": torch.randn(3, 4).long()}, TypeError, "logits must be float32"),
        ({"logits": torch.randn(4)}, ValueError, r"logits must have shape \[B, d\], got \[4\]"),
        ({"logits": [1.0]}, TypeError, "logits must be a tensor"),
        ({"proportions": torch.rand(6)}, ValueError, "proportions has shape .* must be 5"),
        ({"w_query": torch.randn(6, 3)}, ValueError, "w_query has shape .* must be 4"),
        ({"w_key": torch.randn(7, 4)}, ValueError, "w_key has shape .* must be 6"),
        ({"w_score": torch.randn(6, 1)}, ValueError, r"w_score must have shape \[H\]"),
        ({"w_score": torch.randn(5)}, ValueError, "w_score has shape .* must be 6"),
        ({"w_query": torch.randn(0, 4)}, ValueError, "w_query must not be empty"),
        ({"w_key": torch.randn(6, 4, device="meta")}, ValueError, "w_key is on meta, but logits"),
    ],
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_tensors_are_named(replaced, error, message, backend):
    """Whether the operator finds what is wrong or the Python around it."""
    inputs = Attention(**{**vars(make_attention(3, 4, 5, 6)), **replaced})
    with pytest.raises(error, match=message):
        compensate(*inputs.operands, backend=backend)
    with pytest.raises(error, match=message.replace("logits", "student")):
        compensated_kd_loss(*inputs.loss_operands, backend=backend)


@pytest.mark.parametrize(
    "replaced",
    [
        {"logits": torch.randn(0, 4)},
        {"logits": torch.ones(3, 4, dtype=torch.int64)},
        {"proportions": torch.ones(5, dtype=torch.bool)},
        {"w_key": torch.randn(6, 4, dtype=torch.complex64)},
        {"w_query": torch.randn(6, 3)},
        {"w_score": torch.randn(5)},
    ],
)
def test_operators_refuse_what_does_not_fit(replaced):
    """Called directly, with real tensors or fake ones."""
    inputs = Attention(**{**vars(make_attention(3, 4, 5, 6)), **replaced})
    operators = torch.ops.kdci_ext
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(each) for each in inputs.loss_operands]
    for student, teacher, *prior in (inputs.loss_operands, fakes):
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            operators.compensate(student, *prior, False, 1.0)
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            operators.compensated_kd_loss(student, teacher, *prior, 4.0, False, 1.0, True, False)


def test_an_objection_without_words_is_passed_on(monkeypatch):
    """Where the arguments are fine, what went wrong in the operator is not hidden."""

    def fail(*inputs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("kdci_ext._ops.compensate", fail)
    monkeypatch.setattr("kdci_ext._ops.compensated_kd_loss", fail)
    inputs = make_attention(3, 4, 5, 6)
    with pytest.raises(RuntimeError, match="out of memory"):
        compensate(*inputs.operands, backend="native")
    with pytest.raises(RuntimeError, match="out of memory"):
        compensated_kd_loss(*inputs.loss_operands, backend="native")


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_temperature(temperature):
    inputs = make_attention(3, 4, 5, 6)
    with pytest.raises(ValueError, match=r"temperature=.* must be finite and > 0"):
        compensated_kd_loss(*inputs.loss_operands, temperature)


def test_bad_options_and_teachers():
    inputs = make_attention(3, 4, 5, 6)
    with pytest.raises(ValueError, match="did you mean 'posterior'"):
        compensate(*inputs.operands, weighting="posteriori")
    with pytest.raises(ValueError, match="scale=nan must be finite"):
        compensate(*inputs.operands, scale=float("nan"))
    inputs.teacher.requires_grad_()
    with pytest.raises(ValueError, match="teacher requires gradients"):
        compensated_kd_loss(*inputs.loss_operands)
    inputs.teacher = torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"teacher has shape \[2, 4\]"):
        compensated_kd_loss(*inputs.loss_operands)


@pytest.mark.parametrize("arguments", [(0, 8), (10, 0), (10, 8, 0), (10, -2)])
def test_bad_sizes_of_kdci(arguments):
    with pytest.raises(ValueError, match="must be at least 1"):
        KDCI(*arguments)


def test_update_wants_enough_rows_of_the_right_width():
    kdci = KDCI(10, 8)
    with pytest.raises(ValueError, match=r"teacher_logits has 4 rows, .* least num_prototypes=8"):
        kdci.update(torch.randn(4, 10))
    with pytest.raises(ValueError, match="dimension 1 must be 10, the num_classes"):
        kdci.update(torch.randn(20, 9))
    with pytest.raises(ValueError, match="teacher_logits must be finite: 20 of 20 rows hold NaN"):
        kdci.update(torch.full((20, 10), float("nan")))
    assert not kdci.is_ready


def test_update_looks_for_nan_where_check_finite_says_so():
    """Switched off the dictionary is NaN, which a refused update never leaves behind."""
    bad = torch.randn(20, 4)
    bad[7, 2] = torch.inf
    unchecked = KDCI(4, 3, check_finite=False)
    assert unchecked.update(bad).prototypes.isnan().all()
    checked = KDCI(4, 3, check_finite=True)
    checked.update(torch.randn(20, 4))
    before = checked.prototypes.clone()
    with pytest.raises(ValueError, match=r"teacher_logits must be finite: 1 of 20 .* first row 7"):
        checked.update(bad)
    assert torch.equal(checked.prototypes, before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tol": -1}, ValueError, "tol=-1 must be >= 0"),
        ({"max_iter": 0}, ValueError, "max_iter=0 must be at least 1"),
        ({"pca_components": 99}, ValueError, "pca_components=99 must be <= .* 10"),
        ({"pca_components": 10, "dictionary_dim": 5}, ValueError, "pca_components=10 .* 5"),
        ({"pca_components": "all"}, TypeError, "pca_components must be an int"),
        ({"scale": float("inf")}, ValueError, "scale=inf must be finite"),
    ],
)
def test_options_are_checked_when_the_module_is_made(options, error, message):
    """Rather than in the loop, after the first images were made."""
    with pytest.raises(error, match=message):
        KDCI(10, 8, **options)
    KDCI(10, 8, tol=0, pca_components=10, scale=-1.0)


ROWS = torch.randn(20, 4)
MODULE_KINDS = [{}, {"attention": "uniform"}, {"attention": "random"}, {"projection": True}]


@pytest.mark.parametrize("options", MODULE_KINDS, ids=str)
@pytest.mark.parametrize(
    ("student", "teacher", "error", "message"),
    [
        (
            torch.randn(8, 4),
            torch.randn(1, 4),
            ValueError,
            "teacher_logits has shape .* of student_l",
        ),
        (
            torch.randn(8, 4),
            torch.randn(8, 3),
            ValueError,
            "teacher_logits has shape .* of student_l",
        ),
        (torch.randn(8, 4), torch.ones(8, 4).long(), TypeError, "teacher_logits must be float32"),
        (torch.randn(8, 4), [1.0], TypeError, "teacher_logits must be a tensor"),
        (
            torch.randn(8, 4),
            torch.randn(8, 4, requires_grad=True),
            ValueError,
            r"teacher_logits requires gradients.*teacher_logits\.detach",
        ),
        (
            torch.randn(8, 4),
            torch.randn(8, 4, device="meta"),
            ValueError,
            "teacher_logits is on meta, but student_logits is on cpu",
        ),
        (torch.randn(0, 4), torch.randn(0, 4), ValueError, "student_logits must not be empty"),
        (torch.randn(8, 3), torch.randn(8, 3), ValueError, "student_logits has shape .* be 4"),
    ],
)
def test_every_kind_of_module_checks_the_logits_of_its_loss(
    options, student, teacher, error, message
):
    """By the names that the caller gave them, whether an operator or PyTorch then computes."""
    kdci = KDCI(4, 3, 5, **options)
    kdci.update(torch.randn(20, 4))
    with pytest.raises(error, match=message):
        kdci.loss(student, teacher)
    assert kdci.loss(torch.randn(8, 4), torch.randn(8, 4)).isfinite()


@pytest.mark.parametrize("options", MODULE_KINDS, ids=str)
def test_modules_name_the_logits_and_the_dictionary_that_are_wrong(options):
    compensation, d = PriorCompensation(4, 5, **options), build_confounder_dictionary(ROWS, 3)
    wide = build_confounder_dictionary(torch.randn(20, 6), 3)
    kdci = KDCI(4, 3, 5, **options)
    kdci.update(ROWS)
    for call in (compensation, compensation.attention_weights):
        with pytest.raises(ValueError, match=r"^logits has shape \[8, 6\], .* 4, the num_classes"):
            call(torch.randn(8, 6), wide)
        with pytest.raises(ValueError, match=r"dictionary\.prototypes has shape \[3, 6\]"):
            call(torch.randn(8, 4), wide)
        with pytest.raises(
            TypeError, match="dictionary must be a ConfounderDictionary, got Tensor"
        ):
            call(torch.randn(8, 4), d.prototypes)
        with pytest.raises(ValueError, match="is on cpu"):
            call(torch.randn(8, 4, device="meta"), d)
    for call in (kdci, kdci.attention_weights):
        with pytest.raises(ValueError, match=r"^student_logits has shape \[8, 6\]"):
            call(torch.randn(8, 6))
        with pytest.raises(ValueError, match="student_logits is on meta, but kdci is on cpu"):
            call(torch.randn(8, 4, device="meta"))
