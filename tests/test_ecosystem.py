# SPDX-License-Identifier: Apache-2.0
"""Compensation and loss within the framework: transforms, compilers, precision, processes, memory.

What the operators cannot do must say so; nothing may be silently wrong.
"""

from __future__ import annotations

import copy
import io
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import Attention, make_attention, max_error
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap

from benchmarks.memory import allocated_peak
from kdci_ext import KDCI, PriorCompensation, build_confounder_dictionary
from kdci_ext.functional import compensate, compensated_kd_loss

FUNCTIONS = ("compensate", "loss")


def scalar(function: str, inputs: Attention, backend: str = "native") -> Callable[..., Tensor]:
    """Return a scalar function of the operands of `compensate`."""

    def call(*operands: Tensor) -> Tensor:
        if function == "compensate":
            return compensate(*operands, backend=backend).square().sum()
        student, *rest = operands
        return compensated_kd_loss(student, inputs.teacher, *rest, 4.0, backend=backend)

    return call


# -- torch.func --------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functional_gradients_are_those_of_autograd(function):
    """torch.func.grad of any argument is what backward() leaves there."""
    inputs = make_attention(5, 4, 3, 6)
    call = scalar(function, inputs)
    got = grad(call, argnums=tuple(range(6)))(*inputs.operands)
    inputs.requires_grad_()
    expected = torch.autograd.grad(call(*inputs.operands), inputs.operands)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_functional_call_trains_a_module_without_state():
    """Gradients of a module's parameters through functional_call, as meta-learning takes them."""
    d = build_confounder_dictionary(torch.randn(64, 10), 8)
    module, logits, teacher = PriorCompensation(10, 16), torch.randn(6, 10), torch.randn(6, 10)
    parameters = {name: value.detach() for name, value in module.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(module, parameters, (logits, d)).sub(teacher).square().sum()

    got = grad(loss)(parameters)
    loss(dict(module.named_parameters())).backward()
    assert got.keys() == parameters.keys() == {"w_query", "w_key", "w_score"}
    for name, value in module.named_parameters():
        torch.testing.assert_close(got[name], value.grad)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_vmap_is_a_loop_or_an_error(function):
    """Over problems, and over rows for gradients by example: each as if it was computed alone."""
    problems = [make_attention(5, 4, 3, 6, seed=seed) for seed in range(3)]
    stacked = [torch.stack(each) for each in zip(*(p.loss_operands for p in problems), strict=True)]

    def call(*operands: Tensor) -> Tensor:
        student, _, *rest = operands
        if function == "compensate":
            return compensate(student, *rest, backend="native").square().sum()
        return compensated_kd_loss(*operands, 4.0, backend="native")

    torch.testing.assert_close(
        vmap(call)(*stacked), torch.stack([call(*p.loss_operands) for p in problems])
    )
    got = vmap(grad(call))(*stacked)
    for one, problem in zip(got, problems, strict=True):
        torch.testing.assert_close(one, grad(call)(*problem.loss_operands))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_forward_mode_and_second_derivatives_are_refused(function):
    """No derivative is silently zero: each message names what to do, or what is missing."""
    inputs = make_attention(3, 4, 5, 6)
    call = scalar(function, inputs)
    first, *rest = inputs.operands

    def of_logits(logits: Tensor) -> Tensor:
        return call(logits, *rest)

    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad(lambda x: grad(of_logits)(x).square().sum())(first)
    with pytest.raises(NotImplementedError, match=r"forward-mode .*backend='reference'"):
        jvp(of_logits, (first,), (torch.ones_like(first),))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(first, torch.ones_like(first))
        with pytest.raises(NotImplementedError, match=r"forward-mode .*backend='reference'"):
            of_logits(dual)
    reference = scalar(function, inputs, "reference")
    hessian = jacrev(grad(lambda x: reference(x, *rest)))(first)
    assert float(hessian.abs().sum()) > 0


# -- double backward ---------------------------------------------------------


def test_create_graph_alone_is_harmless():
    """First derivatives are right with create_graph=True as long as nobody differentiates them; the
    loss, whose gradients were made with it, refuses at once.
    """
    inputs = make_attention(3, 4, 5, 6).requires_grad_()
    call = scalar("compensate", inputs)
    expected = torch.autograd.grad(call(*inputs.operands), inputs.operands)
    got = torch.autograd.grad(call(*inputs.operands), inputs.operands, create_graph=True)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
    loss = scalar("loss", inputs)(*inputs.operands)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.autograd.grad(loss, inputs.operands, create_graph=True)


# -- compilers and precision -------------------------------------------------


@pytest.mark.parametrize("weighting", ["paper", "posterior"])
def test_a_whole_kdci_step_compiles(weighting):
    """KDCI.loss with its student is one graph for any batch size, with the eager gradients."""
    torch.manual_seed(2)
    kdci, student = KDCI(10, 8, 16, weighting=weighting, scale=0.5), nn.Linear(6, 10)
    kdci.update(torch.randn(64, 10))
    modules = nn.ModuleList([kdci, student])

    def step(images: Tensor, teacher: Tensor) -> Tensor:
        return kdci.loss(student(images), teacher, 4.0)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (4, 7, 12):
        images, teacher = torch.randn(batch, 6), torch.randn(batch, 10)
        grads = []
        for function in (step, compiled):
            modules.zero_grad()
            function(images, teacher).backward()
            grads.append([parameter.grad.clone() for parameter in modules.parameters()])
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want)
    assert torch._dynamo.utils.counters["graph_break"] == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_as_without(dtype):
    """In an autocast region the student's logits are narrow; the loss is that of these logits in
    float32, and the weights' gradients are float32.
    """
    torch.manual_seed(2)
    kdci, student = KDCI(10, 8, 16), nn.Linear(6, 10)
    images, teacher = torch.randn(32, 6), torch.randn(32, 10)
    kdci.update(torch.randn(64, 10))
    with torch.autocast("cpu", dtype=dtype):
        logits = student(images)
        loss = kdci.loss(logits, teacher, 4.0)
    loss.backward()
    assert (logits.dtype, loss.dtype) == (dtype, torch.float32)
    got = [parameter.grad.clone() for parameter in kdci.parameters()]
    assert {value.dtype for value in got} == {torch.float32}
    kdci.zero_grad()
    expected = kdci.loss(logits.detach().float(), teacher, 4.0)
    expected.backward()
    assert torch.equal(loss, expected)
    for one, parameter in zip(got, kdci.parameters(), strict=True):
        assert torch.equal(one, parameter.grad)


# -- state and processes -----------------------------------------------------


def test_state_dict_restores_module_and_training():
    """Weights, optimiser and dictionary saved in the middle: both go on to the same bits; copies
    and files are alike.
    """
    torch.manual_seed(2)
    kdci = KDCI(10, 8, 16)
    optimizer = torch.optim.SGD(kdci.parameters(), lr=0.5, momentum=0.9)
    batches = [(torch.randn(12, 10), torch.randn(12, 10)) for _ in range(6)]

    def train(kdci: KDCI, optimizer: torch.optim.Optimizer, batches: list[Any]) -> None:
        for student, teacher in batches:
            optimizer.zero_grad()
            kdci.loss(student, teacher, 4.0).backward()
            optimizer.step()

    kdci.update(torch.randn(64, 10))
    train(kdci, optimizer, batches[:3])
    file = io.BytesIO()
    torch.save({"kdci": kdci.state_dict(), "optimizer": optimizer.state_dict()}, file)
    copied = copy.deepcopy(kdci)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = KDCI(10, 8, 16)
    again.load_state_dict(state["kdci"])
    other = torch.optim.SGD(again.parameters(), lr=0.5, momentum=0.9)
    other.load_state_dict(state["optimizer"])
    assert all(map(torch.equal, copied.state_dict().values(), again.state_dict().values()))
    train(kdci, optimizer, batches[3:])
    train(again, other, batches[3:])
    for name, value in kdci.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    with pytest.raises(RuntimeError, match="size mismatch for prototypes"):
        KDCI(10, 9, 16).load_state_dict(kdci.state_dict())


class Compensated(nn.Module):
    """A student and its compensation, wrapped together as DDP wants them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.student = nn.Linear(6, 10)
        self.compensation = PriorCompensation(10, 16)

    def forward(self, images: Tensor, teacher: Tensor, dictionary: Any) -> Tensor:
        return self.compensation.loss(self.student(images), teacher, dictionary, 4.0)


def make_shared_problem() -> tuple[Any, Tensor, Tensor]:
    torch.manual_seed(4)
    d = build_confounder_dictionary(torch.randn(64, 10), 8)
    return d, torch.randn(24, 6), torch.randn(24, 10)


def train_in_process(rank: int, world_size: int, folder: str) -> None:
    """Make three DDP steps on this rank's share of the batch and save the weights."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    try:
        d, images, teacher = make_shared_problem()
        module = nn.parallel.DistributedDataParallel(Compensated())
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        share = slice(rank, None, world_size)
        for _ in range(3):
            optimizer.zero_grad()
            module(images[share], teacher[share], d).backward()
            optimizer.step()
        torch.save(module.module.state_dict(), Path(folder) / f"{rank}.pt")
        torch.distributed.barrier()  # a group that one rank takes down may abort the other
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(os.name != "posix", reason="gloo by a file")
def test_two_processes_train_as_one(tmp_path):
    """DDP averages gradients of equal shares: that of the whole batch, on every rank."""
    torch.multiprocessing.spawn(train_in_process, (2, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    d, images, teacher = make_shared_problem()
    alone = Compensated()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        alone(images, teacher, d).backward()
        optimizer.step()
    start = Compensated().state_dict()
    for name, value in alone.state_dict().items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], value)
        assert not torch.equal(value, start[name])


# -- one path ----------------------------------------------------------------


def operators_called(work: Callable[[], Any]) -> list[str]:
    """Return the names of all operators that a piece of work calls, in their order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        work()
    return [event.name for event in profiler.events()]


@pytest.mark.parametrize("options", [{}, {"weighting": "posterior"}, {"scale": 0.5}])
@pytest.mark.parametrize(
    "ablation",
    [
        {},
        {"prototypes": "random"},
        {"prototypes": "shuffled"},
        {"prototypes": "classes"},
        {"proportions": "none"},
        {"dictionary_dim": 7},
        {"attention_temperature": 0.5},
    ],
)
def test_options_take_the_fused_path(options, ablation):
    """Whatever the option: one operator for loss and gradients, one each way for the logits, and no
    operator that forms a term of size B x K x H.
    """
    kdci = KDCI(10, 8, 16, **options, **ablation)
    kdci.update(torch.randn(64, ablation.get("dictionary_dim", 10)))
    student, teacher = torch.randn(12, 10, requires_grad=True), torch.randn(12, 10)
    names = operators_called(lambda: kdci.loss(student, teacher, 4.0).backward())
    assert [n for n in names if n.startswith("kdci_ext::")] == ["kdci_ext::compensated_kd_loss"]
    assert not {"aten::tanh", "aten::softmax", "aten::_softmax", "aten::log_softmax"} & {*names}
    names = operators_called(lambda: kdci(student).sum().backward())
    # Prototypes that are mapped from another width have gradients too.
    backward = "compensate_backward" if "dictionary_dim" in ablation else "compensate_backward_"
    assert [n for n in names if n.startswith("kdci_ext::")] == [
        "kdci_ext::compensate",
        f"kdci_ext::{backward}",
    ]


@pytest.mark.parametrize("retain_graph", [False, True])
@pytest.mark.parametrize("function", ["compensate", "loss"])
def test_gradients_in_batches(function, retain_graph):
    """``is_grads_batched`` is one backward pass for each gradient."""
    inputs = make_attention(4, 5, 3, 6).to(torch.float32)
    inputs.logits.requires_grad_()

    def run() -> torch.Tensor:
        if function == "loss":
            return compensated_kd_loss(*inputs.loss_operands, 4.0)
        return compensate(*inputs.operands)

    outer = torch.randn(3, *run().shape)
    (together,) = torch.autograd.grad(
        run(), inputs.logits, outer, is_grads_batched=True, retain_graph=retain_graph
    )
    for one, got in zip(outer, together, strict=True):
        (alone,) = torch.autograd.grad(run(), inputs.logits, one)
        torch.testing.assert_close(got, alone)


# -- memory ------------------------------------------------------------------

SIZES = [(256, 10, 8, 256), (256, 100, 32, 256), (512, 100, 128, 256), (64, 300, 200, 128)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("weighting", ["paper", "posterior"])
def test_memory_of_the_loss_and_its_gradients(sizes, weighting):
    """At no time is more allocated than inputs, gradients, B K + (B + K) H floats hold."""
    batch, _, k, hidden = sizes
    inputs = make_attention(*sizes).to(torch.float32)
    trained = (inputs.logits, inputs.w_query, inputs.w_key, inputs.w_score)
    for value in trained:
        value.requires_grad_()

    def work() -> Any:
        loss = compensated_kd_loss(*inputs.loss_operands, 4.0, weighting=weighting)
        return loss, torch.autograd.grad(loss, trained)

    work()
    gradients = sum(value.numel() for value in trained)
    everything = sum(value.numel() for value in inputs.operands)
    allowed = everything + gradients + batch * k + (batch + k) * hidden
    assert 4 * gradients < allocated_peak(work) <= 4 * allowed


@pytest.mark.parametrize("sizes", SIZES)
def test_memory_of_compensation_forward_and_backward(sizes):
    """The same limit, though what the forward pass keeps has to stay as it is."""
    batch, _, k, hidden = sizes
    inputs = make_attention(*sizes).to(torch.float32)
    trained = (inputs.logits, inputs.w_query, inputs.w_key, inputs.w_score)
    for value in trained:
        value.requires_grad_()
    grad_output = torch.randn(inputs.logits.shape)

    def work() -> Any:
        output = compensate(*inputs.operands)
        return output, torch.autograd.grad(output, trained, grad_output)

    work()
    everything = sum(value.numel() for value in (*inputs.operands, *trained))
    allowed = everything + batch * k + (batch + k) * hidden
    assert allocated_peak(work) <= 4 * allowed


# -- exactness at the ends of the scale --------------------------------------


@pytest.mark.parametrize("pre_activation", [1e-4, 1e-2, 1.0, 20.0, 25.0, 1e2, 1e4])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_error_law_at_any_pre_activation(pre_activation, function):
    """Outputs err at most twice, gradients at most three times what plain PyTorch errs in float32,
    from pre-activations whose tanh is their argument to those where it is a sign.
    """
    worst = {"native": torch.zeros(5), "reference": torch.zeros(5)}
    for seed in range(16):  # a single loss may come out exact by luck
        inputs = make_attention(24, 10, 8, 64, seed=seed)
        # Of the projections alone: the logits stay as they are.
        size = (inputs.logits @ inputs.w_query.T).abs().max()
        inputs.w_query *= pre_activation / size
        inputs.w_key *= pre_activation / (inputs.prototypes @ inputs.w_key.T).abs().max()
        narrow = inputs.to(torch.float32)
        wide = narrow.to(torch.float64)

        def run(x: Attention, backend: str) -> list[Tensor]:
            trained = (x.logits, x.w_query, x.w_key, x.w_score)
            for value in trained:
                value.requires_grad_()
            if function == "loss":
                out = compensated_kd_loss(*x.loss_operands, 4.0, backend=backend)
                return [out, *torch.autograd.grad(out, trained)]
            out = compensate(*x.operands, backend=backend)
            direction = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
            return [out, *torch.autograd.grad(out, trained, direction)]

        truth = run(wide, "reference")
        for backend, found in worst.items():
            each = [
                max_error(got.detach(), exact.detach()) / float(exact.detach().abs().max())
                for got, exact in zip(run(narrow, backend), truth, strict=True)
            ]
            assert all(map(math.isfinite, each))
            torch.maximum(found, torch.tensor(each), out=found)
    # An error below half a rounding of the largest value is luck.
    lucky = torch.finfo(torch.float32).eps / 2
    allowed = torch.tensor([2.0, 3.0, 3.0, 3.0, 3.0]) * worst["reference"].clamp(min=lucky)
    assert bool((worst["native"] <= allowed).all()), (worst["native"] / allowed).tolist()
