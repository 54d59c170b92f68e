# SPDX-License-Identifier: Apache-2.0
"""Names, defaults, files, presets and types of the configuration."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from python_models.compensation import num_prototypes
from python_models.config import (
    DistillConfig,
    TaskConfig,
    check,
    distill_config,
    distill_defaults,
    flatten,
    leaves,
    override,
    preset_paths,
    read_settings,
    read_yaml,
    write_yaml,
)
from python_models.errors import UserError
from python_models.methods import METHODS
from python_models.networks import DISCRIMINATORS, GENERATORS, NETWORKS
from python_models.schedule import learning_rate


@pytest.mark.parametrize("method", METHODS.names())
def test_names_are_unique_over_all_groups_and_every_one_is_described(method: str) -> None:
    config = distill_defaults(method=method)
    counts = Counter(name for name, _, _ in leaves(config))
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("method", METHODS.names())
def test_files_keep_every_value(method: str, tmp_path: Path) -> None:
    config = distill_config(method=method, teacher="x", seed=3, milestones=(0.3, 0.6))
    write_yaml(tmp_path / "config.yaml", config)
    again = distill_defaults(file=tmp_path / "config.yaml")
    assert again == config
    saved = read_yaml(tmp_path / "config.yaml")
    assert next(iter(saved)) == "method"
    assert not {"out_dir", "resume", "overwrite"} & set(saved)


@pytest.mark.parametrize("name", preset_paths())
def test_every_preset_loads_names_its_source_and_what_it_uses_exists(name: str) -> None:
    described = read_yaml(preset_paths()[name])
    assert described["about"]
    assert described["source"]
    assert {"method", "student"} <= described.keys()
    config = distill_config(preset=name, teacher="x")
    check(config)
    assert config.task.student in NETWORKS
    for kind, registry in (("generator", GENERATORS), ("discriminator", DISCRIMINATORS)):
        if hasattr(config.settings, kind):
            assert getattr(config.settings, kind) in registry
    for key, value in read_settings(preset_paths()[name]).items():
        assert flatten(config)[key] == value


SGD = dict(optimizer="sgd", lr=0.1, momentum=0.9)
STEPS = dict(SGD, lr=0.05, weight_decay=5e-4, epochs=240, milestones=[0.625, 0.75, 0.875])
PAPER: dict[str, tuple[int, dict[str, Any]]] = {
    "dafl-paper": (8, dict(SGD, weight_decay=5e-4, oh=1.0, act=1e-3, ie=20.0)),
    "fast-paper": (8, dict(SGD, oh=0.4, adv=1.1, bn=10.0, lr_g=1e-3)),
    "cmi-paper": (32, dict(SGD, bn=1.0, oh=0.5, adv=0.5, cr=0.8, lr_g=1e-3)),
    "deepinversion-paper": (
        32,
        dict(tv_l2=2.5e-5, l2=3e-8, bn=0.1, adi=10.0, g_steps=1000, lr_image=0.05),
    ),
    "dfnd-paper": (
        128,
        dict(
            SGD, weight_decay=5e-4, select=600_000, kd_weight=4.0, noise_weight=1.0, temperature=1.0
        ),
    ),
    "mosaickd-paper": (
        128,
        dict(SGD, weight_decay=1e-4, select=600_000, select_by="confidence", lr_g=1e-3, lr_d=1e-3),
    ),
    # These are of their own papers, CID's weights of its code; KDCI's supplement has none of them.
    "cid-paper": (128, dict(STEPS, nesterov=True, temperature=4.0, batch_size=64, sr=65.0, cr=1.0)),
    "kd3-paper": (
        128,
        dict(STEPS, nesterov=False, cutoff=0.95, mix=0.01, contrast_temperature=0.3),
    ),
    "kd3-paper-mnist": (128, dict(optimizer="adam", lr=1e-3, epochs=40, cutoff=0.95, mix=0.01)),
}
"""Each preset's size of the dictionary (KDCI, section 4) and the numbers that the paper prints."""


def test_the_papers_presets_hold_the_papers_numbers() -> None:
    assert PAPER.keys() == {name for name in preset_paths() if "-paper" in name}
    for name, (prototypes, expected) in PAPER.items():
        config = distill_config(preset=name)
        assert config.method == name.split("-")[0]
        values = flatten(config)
        assert {key: values[key] for key in expected} == expected
        assert num_prototypes(config) == prototypes
        assert values["kdci_hidden_dim"] == 256


def test_the_order_of_precedence(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("lr: 0.5\nepochs: 7\n")
    values = {"lr": 0.25}
    assert distill_config(method="fast").training.lr == 0.2  # the method's default
    assert DistillConfig(settings=None).training.lr == 0.1  # the shared default
    preset = distill_config(preset="demo-fashion")
    assert preset.training.lr != 0.2
    both = distill_config(preset="demo-fashion", config=file)
    assert (both.training.lr, both.training.epochs) == (0.5, 7)
    assert both.training.optimizer == preset.training.optimizer
    assert distill_config(preset="demo-fashion", config=file, **values).training.lr == 0.25


def test_the_method_may_come_from_a_file_or_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("method: dfnd\nselect: 10\n")
    assert distill_config(config=file).settings.select == 10
    assert distill_config(preset="demo-fashion").method == "fast"
    with pytest.raises(UserError, match="preset demo-fashion is for the method fast, not dafl"):
        distill_config(preset="demo-fashion", method="dafl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("g_stepz: 3", "unknown setting 'g_stepz': did you mean 'g_steps'"),
        ("epochs: many", "epochs='many' must be a whole number"),
        ("epochs: 1.5", "epochs=1.5 must be a whole number"),
        ("epochs: true", "epochs=True must be a whole number"),
        ("kdci: 1", "kdci=1 must be true or false"),
        ("lr: fast", "lr='fast' must be a number"),
        ("schedule: linear", "schedule='linear' must be one of 'cosine', 'step', 'constant'"),
        ("milestones: 0.5", "milestones=0.5 must be a list"),
        ("student: 3", "student=3 must be str"),
        ("- a\n- b", "must hold lines of the form"),
        ("a: b: c", "is not a YAML file"),
    ],
)
def test_mistakes_in_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        distill_config(config=file)
    assert "mine.yaml" in str(caught.value)


def test_missing_files_presets_and_methods() -> None:
    with pytest.raises(UserError, match="cannot read the configuration file nowhere"):
        distill_config(config=Path("nowhere.yaml"))
    with pytest.raises(
        UserError, match="unknown preset 'demo-fasion': did you mean 'demo-fashion'"
    ):
        distill_config(preset="demo-fasion")
    with pytest.raises(ValueError, match="unknown method 'dalf': did you mean 'dafl'"):
        distill_config(method="dalf")


def test_values_are_converted_to_the_type_of_their_name() -> None:
    config = distill_config(
        lr="1e-3", data_root="somewhere", milestones=[0.5], kdci_prototypes=None
    )
    assert config.training.lr == 1e-3
    assert config.task.data_root == Path("somewhere")
    assert config.training.milestones == (0.5,)
    assert override(TaskConfig(), {"teacher-weights": "w.pt"}, "x").teacher_weights == Path("w.pt")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"teacher": None}, "teacher is required"),
        ({"epochs": 0}, "epochs=0 must be >= 1"),
        ({"batch_size": -1}, "batch_size=-1 must be >= 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be > 0"),
        ({"temperature": float("nan")}, "temperature=nan must be > 0"),
        ({"lr": -1.0}, "lr=-1.0 must be > 0"),
        ({"g_steps": 0}, "g_steps=0 must be >= 1"),
        ({"lr_g": 0.0}, "lr_g=0.0 must be > 0"),
        ({"kdci_prototypes": 0}, "kdci_prototypes=0 must be >= 1"),
        ({"kdci_hidden_dim": 0}, "kdci_hidden_dim=0 must be >= 1"),
        ({"ep_steps": 3, "kd_steps": 5}, "kd_steps=5 must be <= ep_steps=3"),
        ({"resume": True, "overwrite": True}, "resume and overwrite exclude each other"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(distill_config(**{"teacher": "x", **values}))


def test_learning_rates() -> None:
    assert learning_rate("constant", 0.3, 0.9) == 0.3
    assert learning_rate("cosine", 0.2, 0.0, lr_min=0.1) == pytest.approx(0.2)
    assert learning_rate("cosine", 0.2, 0.5, lr_min=0.1) == pytest.approx(0.15)
    assert learning_rate("cosine", 0.2, 1.0, lr_min=0.1) == pytest.approx(0.1)
    rates = [learning_rate("step", 1.0, e / 10, milestones=(0.4, 0.8)) for e in range(10)]
    assert rates == pytest.approx([1.0] * 4 + [0.1] * 4 + [0.01] * 2)


OF_RELEASED_CODE = ("cid-paper", "kd3-paper", "kd3-paper-mnist", "deepinversion-benchmark")
"""Presets of released code or papers other than KDCI's that are not named so."""


@pytest.mark.parametrize("name", preset_paths())
def test_presets_of_released_code_train_without_kdci(name: str) -> None:
    """As that code did; those of KDCI's paper train with it, and flags win over both."""
    is_released = "-official" in name or "-imagenet" in name or name in OF_RELEASED_CODE
    if is_released:
        assert read_settings(preset_paths()[name])["kdci"] is False
    else:
        assert "kdci" not in read_settings(preset_paths()[name])
    if name.endswith("-paper") and not is_released:
        assert "KDCI" in read_yaml(preset_paths()[name])["source"]
        assert distill_config(preset=name).compensation.kdci
    assert distill_config(preset=name, kdci=True).compensation.kdci


@pytest.mark.parametrize("name", [name for name in preset_paths() if "imagenet" in name])
def test_presets_for_imagenet_have_students_for_its_images(name: str) -> None:
    """The networks for CIFAR take images of 224 pixels, at many times the cost."""
    assert distill_config(preset=name).task.student.startswith("imagenet_")


def test_deepinversions_script_for_cifar10_without_and_with_its_readmes_arguments() -> None:
    """Two presets that differ in the weight of statistics and the rate alone."""
    one, other = (
        flatten(distill_config(preset=f"deepinversion-official{end}")) for end in ("-defaults", "")
    )
    differing = {name: (one[name], other[name]) for name in one if one[name] != other[name]}
    assert differing == {"bn": (100.0, 10.0), "lr_image": (0.1, 0.05)}
    rest = {"g_steps": 2000, "tv_l2": 2.5e-5, "tv_l1": 0.0, "l2": 0.0, "adi": 0.0}
    assert {name: one[name] for name in rest} == rest


def test_kd3_for_mnist_differs_from_kd3_in_its_networks_and_optimiser() -> None:
    mnist, cifar = (flatten(distill_config(preset=f"kd3-paper{end}")) for end in ("-mnist", ""))
    differing = {name: mnist[name] for name in mnist if mnist[name] != cifar[name]}
    assert differing == {
        **{"student": "lenet5_half", "epochs": 40, "optimizer": "adam", "lr": 1e-3},
        **{"schedule": "constant", "weight_decay": 0.0, "flip": False},
    }
