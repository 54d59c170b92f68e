# SPDX-License-Identifier: Apache-2.0
"""KDCI's dictionary from another model than the teacher, in runs of any method (Table 5)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_task import make_task, resumed, start
from torch import Tensor

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
    whole = start(task, method)
    whole.prepare()
    while whole.step < 3:
        whole.advance()
    again = resumed(whole, start(task, method))
    for run in (whole, again):
        while run.step < 6:
            run.advance()
    assert whole.kdci is not None
    assert again.kdci is not None
    one, other = (
        {**run.student.state_dict(), **run.kdci.state_dict()}  # type: ignore[union-attr]
        for run in (whole, again)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


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
    np.savez(task["data_root"] / "other_train.npz", images=images, labels=np.arange(14) % 7)
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
