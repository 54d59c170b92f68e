# SPDX-License-Identifier: Apache-2.0
"""KDCI's options in runs: a dictionary from another model (Table 5), and settings of our own."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_task import make_task, resumed, start
from torch import Tensor

import kdci_ext
from python_models.checkpoint import NetworkInfo, export_network, read_weights, save_checkpoint
from python_models.config import check, distill_config
from python_models.data import to_float
from python_models.distill import distill
from python_models.engine import Distillation
from python_models.errors import UserError
from python_models.methods.base import Synthesis
from python_models.networks import build_network

OTHER_CLASSES = 7


def write_other(path: Path, image_shape: tuple[int, int, int] = (1, 32, 32), seed: int = 9) -> Path:
    """A network for other classes, with a normalisation of its own."""
    torch.manual_seed(seed)
    info = NetworkInfo("lenet5_half", OTHER_CLASSES, image_shape, (0.3,), (0.4,), "other.npz")
    export_network(path, build_network("lenet5_half", OTHER_CLASSES, image_shape[0]), info)
    return path


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    other = write_other(tmp_path / "other.safetensors")
    return {**make_task(tmp_path), "kdci_dictionary_teacher": str(other)}


def watch_updates(run: Distillation) -> list[Tensor]:
    features: list[Tensor] = []
    assert run.kdci is not None
    original = run.kdci.update

    def update(rows: Tensor, **options: Any) -> Any:
        features.append(rows)
        return original(rows, **options)

    run.kdci.update = update  # type: ignore[method-assign, assignment]
    return features


def stopped_between(task: dict[str, Any], method: str) -> tuple[Distillation, Distillation]:
    """Return a run after 6 steps, and one that stopped after 3 and went on to bitwise the same."""
    whole = start(task, method)
    whole.prepare()
    while whole.step < 3:
        whole.advance()
    again = resumed(whole, start(task, method))
    weights = []
    for run in (whole, again):
        while run.step < 6:
            run.advance()
        assert run.kdci is not None
        weights.append({**run.student.state_dict(), **run.kdci.state_dict()})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    return whole, again


@pytest.mark.parametrize("method", ["dafl", "fast"])
def test_a_generators_dictionary_is_the_other_models_logits_of_the_same_images(
    method: str, task: dict[str, Any]
) -> None:
    run = start(task, method)
    assert run.compensation.dictionary_model is not None
    features = watch_updates(run)
    made: list[Tensor] = []
    original = run.method.begin_round

    def begin_round(index: int) -> Synthesis | None:
        synthesis = original(index)
        assert synthesis is not None
        assert synthesis.batch is not None
        made.append(synthesis.batch.images)
        return synthesis

    run.method.begin_round = begin_round  # type: ignore[method-assign]
    while run.step < 3:
        run.advance()
    assert len(features) == 2
    for rows, images in zip(features, made[-2:], strict=True):
        assert rows.shape[1] == OTHER_CLASSES
        expected = run.compensation.dictionary_model.network((images - 0.3) / 0.4)
        torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "count"), [("dfnd", 30), ("mosaickd", 30), ("kd3", 12), ("cid", 40)]
)
def test_a_sampling_methods_dictionary_is_that_of_all_selected_images(
    method: str, count: int, task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same images as the teacher's own dictionary: KD3's are its first epoch's."""
    monkeypatch.setattr("python_models.compensation.DICTIONARY_BATCH", 7)
    run = start(task, method, kdci=True)
    own = start({**task, "kdci_dictionary_teacher": None}, method, kdci=True)
    assert run.compensation.dictionary_model is not None
    features, of_teacher = watch_updates(run), watch_updates(own)
    for each in (run, own):
        each.prepare()
        each.advance()
    assert [rows.shape for rows in features] == [(count, OTHER_CLASSES)]
    images = to_float(run.method.dictionary_images())
    with torch.no_grad():
        torch.testing.assert_close(
            features[0], run.compensation.dictionary_model(images), atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(of_teacher[0], own.teacher(images), atol=1e-5, rtol=1e-4)


def test_the_mapping_learns_with_the_student_and_changes_nothing_else(
    task: dict[str, Any],
) -> None:
    """Student, attention and images start as with the teacher's own dictionary."""
    run = start(task, "dafl")
    own = start({**task, "kdci_dictionary_teacher": None}, "dafl")
    assert run.kdci is not None
    assert own.kdci is not None
    assert own.compensation.dictionary_model is None
    assert run.kdci.w_map is not None
    assert run.kdci.w_map.shape == (4, OTHER_CLASSES)
    assert torch.equal(run.kdci.compensation.w_key, own.kdci.compensation.w_key)
    run.method.begin_round(0)
    own.method.begin_round(0)
    assert torch.equal(run.method.next_batch().images, own.method.next_batch().images)

    fresh = start(task, "dafl")
    assert fresh.kdci is not None
    assert fresh.compensation.dictionary_model is not None
    before = [p.detach().clone() for p in fresh.kdci.parameters()]
    weights = [p.clone() for p in fresh.compensation.dictionary_model.parameters()]
    fresh.advance()
    assert all(not torch.equal(a, b) for a, b in zip(before, fresh.kdci.parameters(), strict=True))
    parameters = fresh.compensation.dictionary_model.parameters()
    assert all(torch.equal(a, b) for a, b in zip(weights, parameters, strict=True))


@pytest.mark.parametrize("attention", ["uniform", "random"])
def test_with_fixed_attention_the_mapping_is_all_that_kdci_learns(
    attention: str, task: dict[str, Any]
) -> None:
    run = start(task, "dafl", kdci_attention=attention)
    assert run.kdci is not None
    (w_map,) = run.kdci.parameters()
    before = w_map.detach().clone()
    run.advance()
    assert not torch.equal(w_map, before)


@pytest.mark.parametrize("method", ["dafl", "mosaickd"])
def test_such_a_run_goes_on_alike(method: str, task: dict[str, Any]) -> None:
    stopped_between(task, method)


def test_a_whole_run_reports_the_mapped_compensation(task: dict[str, Any], tmp_path: Path) -> None:
    values = {"method": "noise", "kd_steps": 2, "ep_steps": 2, **task, "epochs": 1}
    result = distill(distill_config(**values, out_dir=tmp_path / "run"))
    assert result.compensated_accuracy is not None


def test_it_may_be_given_by_name_with_weights_and_dataset(
    task: dict[str, Any], tmp_path: Path
) -> None:
    weights = tmp_path / "other.pt"
    save_checkpoint(weights, dict(read_weights(Path(task["kdci_dictionary_teacher"]))))
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (14, 32, 32), generator=random, dtype=torch.uint8).numpy()
    np.savez(task["data_root"] / "other_test.npz", images=images, labels=np.arange(14) % 7)
    named = {
        **task,
        "kdci_dictionary_teacher": "lenet5_half",
        "kdci_dictionary_weights": weights,
        "kdci_dictionary_dataset": "other.npz",
    }
    run = start(named, "dafl")
    assert run.kdci is not None
    assert run.kdci.dictionary_dim == OTHER_CLASSES
    with pytest.raises(UserError, match="--kdci-dictionary-dataset"):
        start({**named, "kdci_dictionary_dataset": None}, "dafl")
    (task["data_root"] / "other_test.npz").rename(task["data_root"] / "other_train.npz")
    message = r"other_train.npz, is not opened .* give a --kdci-dictionary-teacher that .*\)$"
    with pytest.raises(UserError, match=message):
        start(named, "dafl")


def test_mistakes_are_named(task: dict[str, Any], tmp_path: Path) -> None:
    wrong = write_other(tmp_path / "colour.safetensors", (3, 32, 32))
    expected = r"takes images \[3, 32, 32\], but the teacher's are \[1, 32, 32\]"
    with pytest.raises(UserError, match=expected):
        start({**task, "kdci_dictionary_teacher": str(wrong)}, "dafl")
    with pytest.raises(UserError, match="kdci-dictionary-teacher=no/where is not there"):
        start({**task, "kdci_dictionary_teacher": "no/where"}, "dafl")
    with pytest.raises(UserError, match="needs KDCI: leave it out or give --kdci"):
        check(distill_config(**task, kdci=False))
    for name, value in (("weights", tmp_path / "w.pt"), ("dataset", "cifar10")):
        alone = {**task, "kdci_dictionary_teacher": None, f"kdci_dictionary_{name}": value}
        with pytest.raises(UserError, match=f"kdci_dictionary_{name} belongs to a network"):
            check(distill_config(**alone))


def test_resuming_with_another_such_network_is_refused(
    task: dict[str, Any], tmp_path: Path
) -> None:
    run = start(task, "dafl")
    run.advance()
    write_other(tmp_path / "other.safetensors", seed=10)
    with pytest.raises(UserError, match="kdci_dictionary_teacher's weights are not those"):
        resumed(run, start(task, "dafl"))


def test_the_dictionary_of_several_batches_is_that_of_their_rows(tmp_path: Path) -> None:
    """Of the last three, also where the run stopped and went on between."""
    values = {**make_task(tmp_path), "kdci_batches": 3}
    run = start(values, "dafl")
    single = start({**values, "kdci_batches": 1}, "dafl")
    features, of_one = watch_updates(run), watch_updates(single)
    for each in (run, single):
        while each.step < 8:
            each.advance()
    # The first generator phases alone are alike: dictionaries then teach other students.
    assert torch.equal(features[0], of_one[0])
    assert [len(rows) for rows in features] == [12, 24, 36, 36]
    for before, after in itertools.pairwise(features):
        kept = before[-24:]
        assert torch.equal(after[: len(kept)], kept)

    begun = start(values, "dafl")
    while begun.step < 5:
        begun.advance()
    again = resumed(begun, start(values, "dafl"))
    more = watch_updates(again)
    while again.step < 8:
        again.advance()
    assert [len(rows) for rows in more] == [36]
    assert torch.equal(more[0], features[3])
    assert run.kdci is not None
    assert again.kdci is not None
    assert torch.equal(run.kdci.prototypes, again.kdci.prototypes)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_kdcis_weights_may_learn_at_a_rate_of_their_own(optimizer: str, tmp_path: Path) -> None:
    """The student's rate is untouched, and a first step of KDCI's weights is as much larger."""
    task = {**make_task(tmp_path), "optimizer": optimizer, "weight_decay": 0.0, "lr": 1e-3}
    task["kdci_scale"] = 1e3  # gradients that weights in float32 do not swallow
    steps = []
    for factor in (1.0, 4.0):
        run = start(task, "dafl", kdci_lr_factor=factor)
        assert run.kdci is not None
        before = {name: p.clone() for name, p in run.kdci.named_parameters()}
        run.advance()
        steps.append({name: p.detach() - before[name] for name, p in run.kdci.named_parameters()})
        assert run.optimizer.param_groups[0]["lr"] == 1e-3
    for name, step in steps[0].items():
        torch.testing.assert_close(steps[1][name], 4 * step, rtol=1e-3, atol=1e-7)
        assert float(step.detach().abs().sum()) > 0


def test_components_are_those_that_the_dictionary_is_clustered_in(tmp_path: Path) -> None:
    """The run's dictionary is that of the library for as many components, and no other."""
    run = start({**make_task(tmp_path), "kdci_components": 1}, "dafl")
    assert run.kdci is not None
    made: list[tuple[Tensor, torch.Generator]] = []
    original = run.kdci.update

    def update(rows: Tensor, generator: torch.Generator, **options: Any) -> Any:
        made.append((rows, generator.clone_state()))
        return original(rows, generator, **options)

    run.kdci.update = update  # type: ignore[method-assign, assignment]
    run.prepare()
    run.advance()
    rows, generator = made[-1]
    by_hand = {
        q: kdci_ext.build_confounder_dictionary(rows, 3, q, generator=generator.clone_state())
        for q in (1, 2)
    }
    assert torch.equal(run.kdci.prototypes, by_hand[1].prototypes)
    assert not torch.equal(run.kdci.prototypes, by_hand[2].prototypes)


def test_more_components_than_classes_are_refused(task: dict[str, Any], tmp_path: Path) -> None:
    """The classes are those of the network that makes the dictionary's logits."""
    for values, classes in ((make_task(tmp_path), 4), (task, OTHER_CLASSES)):
        start(values, "dafl", kdci_components=classes)
        with pytest.raises(UserError, match=f"kdci_components={classes + 1} must be <= the"):
            start(values, "dafl", kdci_components=classes + 1)


@pytest.mark.parametrize(
    "options",
    [
        {"kdci_projection": True},
        {"kdci_attention_temperature": 0.1},
        {"kdci_init_gain": 2.0},
        {"kdci_dictionary": "shuffled"},
        {"kdci_dictionary": "classes"},
        {"kdci_lr_factor": 2.0},
        {"kdci_batches": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["dafl", "dfnd"])
def test_own_options_are_runs_that_stop_and_go_on(
    method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    task = {**make_task(tmp_path), **options}
    whole, again = stopped_between(task, method)
    assert whole.compensation is not None
    assert again.compensation is not None
    health = whole.compensation.health()
    assert health == again.compensation.health()
    assert 1 <= health["attention_prototypes"] <= 3 + 1e-5
    assert health["compensation_shift"] >= 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kdci_batches", 0),
        ("kdci_components", 0),
        ("kdci_attention_temperature", 0.0),
        ("kdci_init_gain", -1.0),
        ("kdci_lr_factor", float("inf")),
        ("unlabelled_imbalance", 0.5),
    ],
)
def test_values_that_no_run_can_use_are_named(name: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{name}={value} must be >"):
        check(distill_config(**make_task(tmp_path), **{name: value}))
