# SPDX-License-Identifier: Apache-2.0
"""Lower precision, memory formats and compilation change how fast a run is, not what it does."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_task import METHOD_SETTINGS, make_task, resumed, start, tiny_config
from torch import Tensor, nn

from python_models import compiling
from python_models.config import EvaluateConfig, check
from python_models.distill import distill
from python_models.engine import Distillation
from python_models.errors import UserError
from python_models.evaluate import evaluate
from python_models.losses import BatchNormStatistics
from python_models.methods.descent import Descent
from python_models.networks import Classifier
from python_models.precision import Precision, at_least_float32

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    return make_task(tmp_path)


def advance(run: Distillation, steps: int) -> Distillation:
    run.prepare()
    while run.step < steps:
        run.advance()
    return run


def weights(run: Distillation) -> list[Tensor]:
    return list(run.deployed.network.state_dict().values())


def seen_dtypes(run: Distillation) -> set[torch.dtype]:
    """Return the types of what the run's convolutions make from now on."""
    found: set[torch.dtype] = set()
    modules = [run.teacher, run.deployed, *run.method.parts.values()]
    for module in modules:
        for layer in module.modules() if isinstance(module, nn.Module) else ():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(lambda _, inputs, out: found.add(out.dtype))
    return found


def two_rounds(method: str) -> int:
    """Return the student steps of two rounds, or where those are single steps of three."""
    return max(3, 2 * METHOD_SETTINGS[method].get("kd_steps", 1))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, float]]:
    """Return a method's loss terms in float32, averaged over two rounds."""
    task = make_task(tmp_path_factory.mktemp("full"))

    @functools.cache
    def averages(method: str) -> dict[str, float]:
        run = start(task, method, kdci=True, lr=1e-3)
        dtypes = seen_dtypes(run)
        advance(run, two_rounds(method))
        assert dtypes == {torch.float32}
        return run.log.averages()

    return averages


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_every_method_computes_networks_alone_in_low_precision(
    method: str,
    precision: str,
    task: dict[str, Any],
    full: Callable[[str], dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two rounds: convolutions are in the low type; KDCI is given float32 outside of autocast and
    its dictionary is one of float32; weights stay float32; loss terms are those of float32 to the
    low type's rounding. A run that goes on from a checkpoint between ends bitwise where this ends.
    """
    original = Distillation._divergence

    def divergence(self: Distillation, student: Tensor, teacher: Tensor) -> Tensor:
        assert not torch.is_autocast_enabled("cpu")
        assert self.kdci is not None
        assert {student.dtype, teacher.dtype, self.kdci.prototypes.dtype} == {torch.float32}
        return original(self, student, teacher)

    monkeypatch.setattr(Distillation, "_divergence", divergence)
    settings = {"precision": precision, "kdci": True, "lr": 1e-3}
    run = start(task, method, **settings)
    run.prepare()
    dtypes = seen_dtypes(run)
    while run.step < 1:
        run.advance()
    again = resumed(run, start(task, method, **settings))
    for each in (run, again):
        while each.step < two_rounds(method):
            each.advance()
    assert dtypes == {LOW[precision]}
    floating = [value for value in weights(run) if value.is_floating_point()]
    assert {value.dtype for value in floating} == {torch.float32}
    expected, found = full(method), run.log.averages()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        # Images of a generator move by rounding too, by more than one step's rounding.
        assert value == pytest.approx(expected[name], rel=0.1, abs=0.05), name
    assert all(torch.equal(a, b) for a, b in zip(weights(run), weights(again), strict=True))
    assert run.precision.state_dict() == again.precision.state_dict()
    assert bool(run.precision.state_dict()) == (precision == "fp16")


def test_accuracy_is_that_of_the_exported_float32_network(
    task: dict[str, Any], tmp_path: Path
) -> None:
    """What `kdci evaluate` finds in the run folder is what the run reported."""
    out = tmp_path / "run"
    result = distill(tiny_config(task, "noise", precision="bf16", out_dir=out))
    found = evaluate(EvaluateConfig(network=str(out), data_root=task["data_root"], device="cpu"))
    assert found == result.accuracy


def test_networks_compute_in_float32_outside_of_training(task: dict[str, Any]) -> None:
    run = start(task, "dafl", precision="bf16")
    images = torch.rand(3, 1, 32, 32)
    plain = start(task, "dafl")
    assert torch.equal(run.teacher(images), plain.teacher(images))
    with run.precision.active():
        low = run.teacher(images)
    assert low.dtype == torch.float32
    assert not torch.equal(low, plain.teacher(images))
    assert torch.equal(low, low.bfloat16().float())  # it came from there
    torch.testing.assert_close(low, plain.teacher(images), rtol=0.05, atol=0.05)


def test_statistics_of_batches_are_taken_in_float32() -> None:
    """Of activations in float16 whose squares overflow it, the variance is still right."""
    layer = nn.BatchNorm2d(1)
    network = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), layer).eval()
    nn.init.ones_(network[0].weight)  # type: ignore[arg-type]
    classifier = Classifier(nn.Sequential(network, nn.Flatten()), (0.0,), (1.0,))
    classifier.precision = precision = Precision("fp16", "cpu")
    images = torch.full((2, 1, 2, 2), 1000.0)
    images[1] = -1000.0
    with precision.active(), BatchNormStatistics(classifier) as statistics:
        classifier(images)
    assert statistics.loss().item() == pytest.approx(1000.0**2 - 1)


@given(
    value=st.floats(-1e4, 1e4),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_no_type_gets_smaller(value: float, dtype: torch.dtype) -> None:
    before = torch.tensor(value).to(dtype)
    after = at_least_float32(before)
    assert after.dtype in (torch.float32, torch.float64)
    assert after.item() == before.item()


def parameter_with_loss(value: float) -> tuple[nn.Parameter, dict[str, Tensor]]:
    """Return a parameter at 1 and a loss whose gradient is a constant, through float16."""
    parameter = nn.Parameter(torch.ones(()))
    return parameter, {"loss": (parameter * value).half().float()}


def test_the_scale_saves_small_gradients_that_float16_would_lose() -> None:
    """The gradient 1e-8 is below float16's smallest number, 6e-8."""
    for name, expected in (("float32", 0.0), ("fp16", 1e-8)):
        descent = Descent("loss", Precision(name, "cpu"))  # type: ignore[arg-type]
        parameter = nn.Parameter(torch.ones((), dtype=torch.float16).float())
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        loss = parameter.half() * 1.0  # gradients of this product are float16
        descent.backward({"loss": loss.float() * 1e-8}, [optimizer], parameter)
        assert parameter.grad is not None
        assert parameter.grad.item() == pytest.approx(expected, rel=1e-2)


def test_an_overflow_in_float16_skips_the_step_and_lowers_the_scale() -> None:
    precision = Precision("fp16", "cpu")
    descent = Descent("loss", precision)
    parameter = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler = precision.scaler("loss")
    assert scaler is not None
    before = scaler.get_scale()
    descent.backward({"loss": parameter.half().float() * 2.0}, [optimizer], parameter)
    assert [g.item() for g in descent.gradients([parameter])] == [0.0]
    descent.step()
    assert parameter.item() == 1.0
    assert scaler.get_scale() == before / 2
    # In time it fits.
    descent.backward({"loss": parameter.half().float() * 0.5}, [optimizer], parameter)
    assert [g.item() for g in descent.gradients([parameter])] == [0.5]
    descent.step()
    assert parameter.item() == 0.5


def test_each_loss_has_a_scale_of_its_own(task: dict[str, Any]) -> None:
    run = start(task, "mosaickd", precision="fp16")
    assert set(run.precision.state_dict()) == {"generator", "discriminator", "student"}


# --- memory format and compilation ----------------------------------------------------------------


@pytest.mark.parametrize("method", ["dafl", "kd3", "dfnd"])
def test_channels_last_changes_rounding_alone(method: str, task: dict[str, Any]) -> None:
    plain = advance(start(task, method, lr=1e-2), 3)
    last = advance(start(task, method, lr=1e-2, channels_last=True), 3)
    convolutions = [m for m in last.student.modules() if isinstance(m, nn.Conv2d)]
    # Of a single channel, both formats are the same.
    assert all(
        m.weight.is_contiguous(memory_format=torch.channels_last)
        for m in convolutions
        if m.in_channels > 1
    )
    for a, b in zip(weights(plain), weights(last), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.fixture
def frames(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let torch.compile trace, but compute by the traced graph itself; collect what it traces."""
    graphs: list[str] = []
    original = torch.compile

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph.forward

    def compile_(*arguments: Any, **options: Any) -> Any:
        return original(*arguments, **options, backend=backend)

    monkeypatch.setattr(torch, "compile", compile_)
    torch._dynamo.reset()
    return graphs


@pytest.mark.parametrize("method", ["fast", "kd3"])
def test_a_compiled_run_is_the_same_run(
    method: str, task: dict[str, Any], frames: list[str]
) -> None:
    """Hooks on the teacher's layers, which are there in generator phases alone, keep their effect,
    and so do train and eval mode of the student.
    """
    plain = advance(start(task, method), 3)
    assert not frames
    compiled = advance(start(task, method, compile=True), 3)
    assert any("conv" in graph for graph in frames)
    for a, b in zip(weights(plain), weights(compiled), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert [*plain.student.network.state_dict()] == [*compiled.student.network.state_dict()]
    ours, theirs = plain.log.averages(), compiled.log.averages()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert theirs[name] == pytest.approx(ours[name], rel=1e-3, abs=1e-6), name


def test_without_a_compiler_there_is_one_line(
    task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UserError, match=r"compile=True: .*\(no C\+\+ compiler found\): install"):
        start(task, "noise", compile=True)


def test_cuda_graphs_are_those_of_the_compiler(
    task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused without --compile and without a GPU; on one, all compiled passes are of this mode."""
    with pytest.raises(UserError, match="give --compile as well"):
        check(tiny_config(task, "noise", cuda_graphs=True))
    with pytest.raises(UserError, match="cuda_graphs=True needs a GPU, but device=cpu"):
        start(task, "noise", compile=True, cuda_graphs=True)
    modes: list[str | None] = []

    def compile_(function: Any, mode: str | None = None, **_: Any) -> Any:
        modes.append(mode)
        return function

    run = start(task, "noise")
    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(compiling, "_require_compiler", lambda device: None)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_: module)
    for wanted in (True, False):
        networks = (run.teacher, run.student, torch.device("cuda"))
        compiling.compiled_networks(*networks, reads_features=False, cuda_graphs=wanted)
    assert modes == ["reduce-overhead", "reduce-overhead", None, None]


# --- image pool -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["cmi", "deepinversion", "fast"])
def test_a_reservoir_is_a_choice_of_every_pool(method: str, task: dict[str, Any]) -> None:
    """Of 25 places: with more images than these, it is not the newest that are kept; and the
    choice of what is kept is part of the state.
    """
    settings = {"pool_policy": "reservoir", "kdci": False}
    run = advance(start(task, method, **settings), 5)
    again = resumed(run, start(task, method, **settings))
    newest = advance(start(task, method, kdci=False), 5)
    for each in (run, again, newest):
        while each.step < 8:
            each.advance()
    pools = [each.method.parts["pool"].state_dict() for each in (run, again, newest)]
    assert [pool["seen"] for pool in pools] == [pools[0]["seen"]] * 3
    assert pools[0]["seen"] > 25 == len(pools[0]["images"])
    assert torch.equal(pools[0]["images"], pools[1]["images"])
    assert not torch.equal(pools[0]["images"], pools[2]["images"])
