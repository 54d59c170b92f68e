# SPDX-License-Identifier: Apache-2.0
"""Teachers and students of the user's own: any importable module, any weights, any images."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_cli import error_of, flags
from tiny_task import METHOD_SETTINGS, make_task, tiny_config
from torch import nn

from python_models.checkpoint import (
    NetworkInfo,
    export_network,
    load_weights,
    read_info,
    read_weights,
)
from python_models.cli import main
from python_models.config import InputConfig, distill_config, read_arguments
from python_models.data import load_labelled
from python_models.distill import distill
from python_models.engine import Distillation
from python_models.errors import UserError
from python_models.evaluate import accuracy
from python_models.methods import METHODS
from python_models.networks import Classifier, build_network, names_from
from python_models.report import ReportConfig, report
from python_models.teacher import load_network

SOURCE = '''
import torch
from torch import nn


class Net(nn.Module):
    """Knows nothing of this package: own names of parts, keys and arguments."""

    def __init__(self, n_classes=4, planes=1, width=6, norm=True, head="linear"):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(planes, width, 5, stride=4),
            nn.BatchNorm2d(width) if norm else nn.Identity(),
            nn.ReLU(),
        )
        conv = head == "conv"
        self.head = nn.Conv2d(width, n_classes, 1) if conv else nn.Linear(width, n_classes)
        self.kind = head

    def forward(self, x):
        x = self.body(x)
        if self.kind == "conv":
            return self.head(x).mean((2, 3))
        logits = self.head(x.mean((2, 3)))
        return {"linear": logits, "tuple": (logits, x)}.get(self.kind, 2 * logits)


def make(n_classes=4, planes=1, width=6, norm=True, head="linear"):
    return Net(n_classes, planes, width, norm, head)


def declared(num_classes: int, in_channels: int, width: int = 6) -> nn.Module:
    return Net(num_classes, in_channels, width)


class Lazy(nn.Module):
    """Its layer has no shape before the first image, and the two heads are one."""

    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.LazyLinear(num_classes)
        self.same = self.head

    def forward(self, x):
        return self.head(x.flatten(1))


def broken():
    raise RuntimeError("no luck")


def nothing():
    return 3


number = 3
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the user's module `own_nets`, importable as `python -m` has it."""
    (tmp_path / "own_nets.py").write_text(SOURCE)
    (tmp_path / "raises.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    importlib.invalidate_caches()
    yield tmp_path
    for name in ("own_nets", "raises"):
        sys.modules.pop(name, None)


@pytest.fixture
def own(here: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module itself."""
    monkeypatch.syspath_prepend(str(here))
    return importlib.import_module("own_nets")


@pytest.fixture
def task(here: Path) -> dict[str, Any]:
    """A task whose teacher is of the user's own."""
    return {**make_task(here), "dataset": "tiny.npz", "normalisation": "none"}


def save_teacher(task: dict[str, Any], network: nn.Module) -> None:
    """Save weights as training on several GPUs does, and make them those of the task's teacher."""
    state = {f"module.{key}": value for key, value in network.state_dict().items()}
    torch.save({"net": state, "epoch": 3}, "weights.pth")
    task |= {"teacher": "own_nets:make", "teacher_weights": "weights.pth"}


# --- the whole path -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fast", "deepinversion", "dfnd"])
def test_a_teacher_and_a_student_of_ones_own(
    method: str, task: dict[str, Any], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line: `evaluate` gives the accuracy that plain PyTorch gives, the student
    learns and is exported, and its run folder alone is enough to evaluate it and to go on.
    """
    torch.manual_seed(3)
    exec(SOURCE, names := {})
    network = names["Net"](width=5).eval()
    save_teacher(task, network)
    words = ["--dataset", "tiny.npz", "--data-root", str(task["data_root"]), "--device", "cpu"]
    named = ["--network", "own_nets:make", "--network-args", "width=5", "--weights", "weights.pth"]
    assert main(["evaluate", *named, "--normalisation", "none", *words]) == 0
    test = load_labelled("tiny.npz", "test", task["data_root"])
    right = network(test.images / 255).argmax(1) == test.labels
    expected = f"{100 * right.float().mean():.2f} %"
    assert capsys.readouterr().out == f"accuracy: {expected}\n"

    out = here / "run"
    run = flags({**task, **METHOD_SETTINGS[method], "method": method, "out_dir": out})
    run += ["--teacher-args", "width=5", "--student", "own_nets:declared", "--student-args"]
    assert main(["distill", *run, "width=3"]) == 0
    text = capsys.readouterr().out
    assert f"teacher: {expected}" in text
    student = next(line.split()[1] for line in text.splitlines() if line.startswith("student:"))
    info = read_info(out / "student.safetensors")
    assert info is not None
    assert (info.network, info.arguments) == ("own_nets:declared", {"width": 3})
    assert (info.mean, info.std) == ((0.0,), (1.0,))
    assert main(["evaluate", "--network", str(out), "--data-root", str(task["data_root"])]) == 0
    assert capsys.readouterr().out == f"accuracy: {student} %\n"
    weights = (out / "student.safetensors").read_bytes()
    assert main(["distill", "--resume", "--out-dir", str(out)]) == 0
    assert (out / "student.safetensors").read_bytes() == weights
    error = error_of(["distill", "--resume", "--out-dir", str(out), "--student-args"], capsys)
    assert "student_args was {'width': 3} and is {} now" in error
    page = report(ReportConfig(runs=(out,), out_dir=here / "report", device="cpu", images=10))
    assert page.left_out == ()


def test_a_teacher_of_ones_own_is_trained_too(
    here: Path, task: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    data = np.load(task["data_root"] / "tiny_test.npz")
    np.savez(task["data_root"] / "tiny_train.npz", **data)
    words = ["--data-root", str(task["data_root"]), "--device", "cpu", "--dataset", "tiny.npz"]
    train = ["train-teacher", "--network", "own_nets:Net", "--network-args", "width=3", *words]
    assert main([*train, "--epochs", "1", "--batch-size", "20"]) == 0
    assert main(["evaluate", "--network", "runs/teacher-Net-tiny-seed0", *words[:4]]) == 0


def test_a_train_split_alone_is_enough_to_be_evaluated_on(
    task: dict[str, Any], own: Any, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_teacher(task, own.Net())
    (task["data_root"] / "labelled_test.npz").unlink()
    words = [
        "evaluate",
        "--network",
        "own_nets:make",
        "--weights",
        "weights.pth",
        "--device",
        "cpu",
    ]
    words += ["--dataset", "labelled.npz", "--data-root", str(task["data_root"])]
    assert main([*words, "--split", "train"]) == 0
    capsys.readouterr()
    assert "labelled_test.npz, is not there, and its train split, " in error_of(words, capsys)


def test_other_images_without_any_dataset(task: dict[str, Any], own: Any, here: Path) -> None:
    """Two channels, 24 pixels, three classes: nothing is tied to the images of a known dataset."""
    save_teacher(task, own.Net(3, 2, width=5))
    del task["dataset"], task["normalisation"]
    shape = {"num_classes": 3, "channels": 2, "image_size": 24, "evaluate": False}
    arguments = {"width": 5, "planes": 2, "n_classes": 3}
    settings = {**task, **METHOD_SETTINGS["fast"], "method": "fast", "out_dir": here / "run"}
    settings |= {"teacher_args": arguments, "student": "own_nets:declared"}
    config = distill_config(**settings, **shape, mean=[0.5, 0.25], std=[1, 2])
    result = distill(config)
    assert result.accuracy is None
    info = read_info(Path(result.student))
    assert info is not None
    assert (info.num_classes, info.image_shape) == (3, (2, 24, 24))
    assert (info.mean, info.std, info.dataset) == ((0.5, 0.25), (1.0, 2.0), None)
    del shape["image_size"]
    with pytest.raises(
        UserError, match=r"dataset is required .* or else --num-classes, --channels"
    ):
        distill(distill_config(**settings, **shape, normalisation="none"))


def test_run_folders_have_plain_names(task: dict[str, Any], own: Any) -> None:
    save_teacher(task, own.Net())
    values = {**task, **METHOD_SETTINGS["noise"], "student": "own_nets:declared"}
    result = distill(distill_config(method="noise", **values))
    assert Path(result.student).parent.name == "noise-make-declared-kdci-seed0"


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["plain", "state_dict", "model", "net", "nested", "safetensors"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_forms_of_weights_files(form: str, prefix: str, tmp_path: Path) -> None:
    network = build_network("lenet5_half_bn", 4, 1)
    state = {f"{prefix}{key}": value for key, value in network.state_dict().items()}
    path = tmp_path / f"weights.{'safetensors' if form == 'safetensors' else 'pth'}"
    if form == "safetensors":
        save_file(state, path)
    elif form == "plain":
        torch.save(state, path)
    elif form == "nested":
        torch.save({"model": {"state_dict": state}, "epoch": 3}, path)
    else:
        torch.save({form: state, "optimizer": {"lr": 0.1}}, path)
    other = build_network("lenet5_half_bn", 4, 1)
    load_weights(other, read_weights(path), "lenet5_half_bn", path)
    for key, value in network.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_old_weights_lack_the_counts_of_batches(tmp_path: Path) -> None:
    network = build_network("lenet5_half_bn", 4, 1)
    state = {k: v for k, v in network.state_dict().items() if "num_batches" not in k}
    load_weights(network, state, "lenet5_half_bn", tmp_path)
    del state["bn1.running_mean"]
    with pytest.raises(UserError, match=r"do not fit lenet5_half_bn \(bn1.running_mean is missing"):
        load_weights(network, state, "lenet5_half_bn", tmp_path)


@pytest.mark.parametrize("content", [{}, {"net": {}}, {"net": 3}, {"a": torch.zeros(1), "b": 2}])
def test_files_without_a_state_dict(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="must hold a state dict"):
        read_weights(tmp_path / "weights.pt")


def test_lazy_and_shared_layers(task: dict[str, Any], own: Any, here: Path) -> None:
    save_teacher(task, own.Net())
    config = tiny_config(task, "noise", student="own_nets:Lazy", out_dir=here / "run")
    result = distill(config)
    again = load_network(result.student, None, None)
    assert accuracy(
        again.classifier,
        load_labelled("tiny.npz", "test", task["data_root"]),
        torch.device("cpu"),
    ) == pytest.approx(result.accuracy)


# --- what a network was made for ------------------------------------------------------------------


def load(task: dict[str, Any], **given: Any) -> NetworkInfo:
    """Describe the task's teacher with other flags."""
    return load_network(task["teacher"], None, None, given=InputConfig(**given)).info


def test_what_is_given_wins_over_the_file(task: dict[str, Any]) -> None:
    assert load(task).mean == (0.5,)
    assert load(task, normalisation="none").std == (1.0,)
    info = load(task, mean=(0.1,), std=(0.2,))
    assert (info.mean, info.std) == ((0.1,), (0.2,))
    with pytest.raises(UserError, match=r"do not fit lenet5_half_bn \(fc"):
        load(task, num_classes=7)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"normalisation": "cifr10"}, "unknown normalisation 'cifr10': did you mean 'cifar10'"),
        ({"normalisation": "none", "mean": (0.1,)}, "normalisation excludes mean and std"),
        ({"mean": (0.1,)}, r"mean=\[0.1\] and std=\[\] must have the same number"),
        ({"mean": (0.1,), "std": (0.0,)}, "must be finite, and std positive"),
        ({"mean": (float("nan"),), "std": (1.0,)}, "must be finite, and std positive"),
        ({"normalisation": "cifar10"}, "mean=.* must have one value, or one for each of the 1 "),
        ({"image_size": 0}, "image_size=0 must be >= 1"),
        ({"num_classes": -1}, "num_classes=-1 must be >= 1"),
        ({"image_size": 28}, r"lenet5_half_bn does not take images \[1, 1, 28, 28\]: ValueError"),
    ],
)
def test_impossible_descriptions(given: dict[str, Any], message: str, task: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=message):
        load(task, **given)


# --- arguments and names --------------------------------------------------------------------------


def test_arguments_are_read_as_yaml() -> None:
    words = ["a=2", "b=0.5", "c=yes", "d=text", "e=null", "f=[1, 2]", "g=1e-3", "h=a=b", "i="]
    expected = {"a": 2, "b": 0.5, "c": True, "d": "text", "e": None, "f": [1, 2], "g": 0.001}
    assert read_arguments(words) == {**expected, "h": "a=b", "i": None}
    config = distill_config(student_args={"width": 2, "rate": "1e-3"})
    assert config.task.student_args == {"width": 2, "rate": 0.001}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["width"], "'width' must have the form NAME=VALUE"),
        (["2=width"], "'2' cannot be the name of an argument"),
        (["day=2020-01-01"], "day=.* must be a number, text, true, false, null or a list"),
        (["a=[1"], "'a=.1' has a value that YAML cannot read"),
        (["num_classes=3"], "num_classes follows from the dataset or --num-classes: leave it out"),
        (["in_channels=3"], "in_channels follows from the dataset or --channels: leave it out"),
    ],
)
def test_impossible_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=message):
        read_arguments(arguments)
    with pytest.raises(SystemExit) as stop:
        main(["distill", "--student-args", *arguments])
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_arguments_in_a_file_are_a_mapping(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("student_args: {width: 2}\nteacher_args:\n  depth: 16\n")
    task = distill_config(config=file).task
    assert (task.student_args, task.teacher_args) == ({"width": 2}, {"depth": 16})
    file.write_text("student_args: width=2\n")
    with pytest.raises(UserError, match="student_args='width=2' must be a mapping"):
        distill_config(config=file)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("nowhere.at_all:Net", {}, "importing nowhere.at_all failed with ModuleNotFoundError"),
        ("raises:Net", {}, "importing raises failed with ZeroDivisionError: division by zero"),
        ("own_nets:Nett", {}, "own_nets has no Nett"),
        ("own_nets:number", {}, "must be a class or a function, got 3"),
        ("folder/own_nets.py:Net", {}, "for Net in folder/file.py, change to that folder"),
        ("own_nets.py:Net", {}, "for Net in folder/file.py, change to that folder"),
        ("own_nets:", {}, "must be package.module:callable"),
        ("own_nets:Net", {"depth": 2}, r"unexpected keyword argument 'depth'; .*Net\(n_classes=4"),
        ("own_nets:broken", {}, "own_nets:broken cannot be made: RuntimeError: no luck"),
        ("own_nets:nothing", {}, "own_nets:nothing must make a torch.nn.Module, got int"),
        ("resnet18", {"width": 2}, "unexpected keyword argument 'width'"),
    ],
)
def test_networks_that_cannot_be_made(
    name: str, arguments: dict[str, Any], message: str, own: Any
) -> None:
    with pytest.raises(UserError, match=message):
        build_network(name, 4, 1, **arguments)


def test_classes_and_channels_go_where_the_signature_has_them(own: Any) -> None:
    """As `build_network` says; a network's own arguments may even be called `name`."""
    seen = {}

    def both(num_classes, in_channels=1):
        seen.update(num_classes=num_classes, in_channels=in_channels)
        return nn.Identity()

    def anything(name, **rest):
        seen.update(name=name, **rest)
        return nn.Identity()

    own.both, own.anything = both, anything
    build_network("own_nets:both", 7, 2)
    assert seen == {"num_classes": 7, "in_channels": 2}
    seen.clear()
    build_network("own_nets:anything", 7, 2, name="x")
    assert seen == {"num_classes": 7, "name": "x"}
    assert build_network("torch.nn:Linear", 7, 2, in_features=3, out_features=4).in_features == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_classes": 5}, r"makes a tensor \[1, 5\] of images \[1, 1, 32, 32\], expected logits"),
        ({"planes": 3}, r"does not take images \[1, 1, 32, 32\]: RuntimeError"),
        ({"head": "tuple"}, "Net must return the logits .* alone, got tuple"),
    ],
)
def test_networks_that_make_no_logits_are_refused_before_the_run(
    arguments: dict[str, Any], message: str, task: dict[str, Any], own: Any, here: Path
) -> None:
    save_teacher(task, own.Net())
    values = {"student": "own_nets:Net", "student_args": arguments, "out_dir": here / "run"}
    with pytest.raises(UserError, match=message):
        distill(tiny_config(task, "noise", **values))
    assert not (here / "run").exists()


# --- files may not call what they like ------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_a_file_of_weights_cannot_call_functions(
    nested: bool, own: Any, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights are data: what they name is called only if it says that it makes a module, also
    where a network that they name builds another one.
    """

    def around(inner: str, arguments: dict[str, Any]) -> nn.Module:
        return build_network(inner, 4, 1, **arguments)

    own.around = around
    name, arguments = "os:system", {"command": "touch called"}
    if nested:
        name, arguments = "own_nets:around", {"inner": name, "arguments": arguments}
    info = NetworkInfo(name, 4, (1, 32, 32), (0.5,), (0.5,), "tiny.npz", arguments)
    export_network(here / "evil.safetensors", own.Net(), info)
    error = error_of(["evaluate", "--network", "evil.safetensors", "--device", "cpu"], capsys)
    assert "names os:system, which is neither a torch.nn.Module nor annotated" in error
    assert not (here / "called").exists()


def test_a_function_without_annotation_is_named_beside_its_file(
    task: dict[str, Any], own: Any, here: Path
) -> None:
    """The file still says what the network was made for."""
    info = NetworkInfo("own_nets:make", 4, (1, 32, 32), (0.3,), (0.5,), "x.npz", {"width": 5})
    export_network(here / "student.safetensors", own.Net(width=5), info)
    with pytest.raises(UserError, match=r"name it yourself with .*student.safetensors as its weig"):
        load_network("student.safetensors", None, None)
    with names_from("x"), pytest.raises(UserError, match="x names own_nets:make"):
        build_network("own_nets:make", 4, 1)
    assert load_network("own_nets:make", Path("student.safetensors"), None).info == info
    with pytest.raises(UserError, match="leave one out"):
        load_network("student.safetensors", None, None, network_args={"width": 5})


# --- parts that methods need ----------------------------------------------------------------------


def step(task: dict[str, Any], method: str) -> None:
    """Make the first student step of a run."""
    config = tiny_config(task, method)
    teacher = load_network(
        str(config.task.teacher),
        config.task.teacher_weights,
        config.task.dataset,
        data_root=config.task.data_root,
        network_args=config.task.teacher_args,
        given=config.input,
    )
    run = Distillation(config, teacher, torch.device("cpu"))
    run.prepare()
    while run.step == 0:
        run.advance()


@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_methods_without_the_need_run_without_batch_norm(
    method: str, task: dict[str, Any], own: Any
) -> None:
    save_teacher(task, own.Net(norm=False))
    task["teacher_args"] = {"norm": False}
    if not METHODS.get(method).needs_batch_norm:
        step(task, method)
        return
    with pytest.raises(UserError, match="has no BatchNorm layer with running statistics") as caught:
        step(task, method)
    listed = str(caught.value).split("needs none (")[1].split(")")[0].split(", ")
    assert listed == [name for name in METHODS if not METHODS.get(name).needs_batch_norm]


@pytest.mark.parametrize("method", METHOD_SETTINGS)
@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("head", ["conv", "scaled"])
def test_methods_without_the_need_run_on_logits_alone(
    method: str, role: str, head: str, task: dict[str, Any], own: Any
) -> None:
    """Networks whose last linear layer does not make the logits, or that have none."""
    teacher = {"head": head} if role == "teacher" else {}
    save_teacher(task, own.Net(**teacher))
    task |= {"teacher_args": teacher, "student": "own_nets:Net"}
    task["student_args"] = {"head": head} if role == "student" else {}
    if role not in METHODS.get(method).needs_features:
        step(task, method)
        return
    message = "it has no nn.Linear" if head == "conv" else "its last nn.Linear does not make"
    with pytest.raises(UserError, match=message) as caught:
        step(task, method)
    listed = str(caught.value).split("logits alone (")[1].split(")")[0].split(", ")
    assert listed == [name for name in METHODS if not METHODS.get(name).needs_features]


@pytest.mark.parametrize("method", ["fast", "cmi"])
@pytest.mark.parametrize("generator", ["generator_imagenet", "generator_dafl"])
def test_generators_of_maps_or_normalised_images(
    generator: str, method: str, task: dict[str, Any]
) -> None:
    """With latents that are maps, or images that come out normalised, it runs as with vectors."""
    values: dict[str, Any] = {"generator": generator, "latent_dim": 4}
    if method == "fast":
        values["reset_after"] = 0
    teacher = load_network("teacher.safetensors", None, None)
    run = Distillation(tiny_config(task, method, **values), teacher, torch.device("cpu"))
    while run.step == 0:
        run.advance()


def test_the_vector_before_the_last_layer_of_any_module(own: Any) -> None:
    network = own.Net(width=5).eval()
    classifier = Classifier(network, (0.5,), (0.5,))
    images = torch.rand(3, 1, 32, 32, requires_grad=True)
    features = classifier.features(images)
    assert features.shape == (3, classifier.feature_dim) == (3, 5)
    torch.testing.assert_close(features, network.body(2 * images - 1).mean((2, 3)))
    assert torch.equal(classifier.classify(features), classifier(images))
    assert torch.equal(classifier.feature_map(images)[:, :, 0, 0], features)
    (gradient,) = torch.autograd.grad(features.sum(), images)
    assert gradient.abs().sum() > 0
    assert not network.head._forward_hooks
