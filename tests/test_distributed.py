# SPDX-License-Identifier: Apache-2.0
"""A run in several processes is the run of one, to rounding; they end together."""

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import team
import torch
from safetensors.torch import load_file
from sharded import mixture
from tiny_task import METHOD_SETTINGS, make_task, tiny_config
from torch import Tensor, nn

import kdci_ext
from python_models.checkpoint import load_checkpoint
from python_models.distill import distill
from python_models.distributed import Part, World
from python_models.errors import UserError


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[team.Team]:
    workers = team.Team(4, tmp_path_factory.mktemp("team"))
    yield workers
    workers.close()


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the processes of the team."""
    for module, name, value in team.SMALL_PIECES:
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    return make_task(tmp_path)


def curves(folder: Path) -> dict[str, Tensor]:
    """Return the columns of metrics.csv but for times and memory."""
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    names = [name for name in rows[0] if "second" not in name and "memory" not in name]
    return {name: torch.tensor([float(row[name] or 0) for row in rows]) for name in names}


def assert_same_run(one: Path, other: Path) -> None:
    """Losses are equal to rounding, and so are the students."""
    expected, found = curves(one), curves(other)
    assert list(expected) == list(found)
    for name, curve in expected.items():
        # An accuracy is one of 41 values, and a rounded logit may change which.
        tolerance = 2.6 if name.startswith("accuracy") else 1e-5
        assert torch.allclose(found[name], curve, rtol=1e-4, atol=tolerance), (name, found, curve)
    weights, others = (load_file(each / "student.safetensors") for each in (one, other))
    torch.testing.assert_close(others, weights, rtol=1e-3, atol=1e-4)


# --- dictionaries ---------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {"num_prototypes": 5},
    {"num_prototypes": 5, "init": "plain", "momentum": 0.0},
    {"num_prototypes": 8, "pca_components": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["greedy", "plain", "pca"])
@pytest.mark.parametrize("size", [2, 4])
def test_processes_make_the_dictionary_of_all_rows(
    size: int, options: dict[str, Any], workers: team.Team
) -> None:
    """Uneven shards, one of them empty: the dictionary is that of one process with all rows, to
    rounding, and bitwise the same on all, though only the first process's random numbers agree.
    """
    rows = mixture(300, 6).double()
    shards = list(rows.split([190, 110] if size == 2 else [150, 0, 97, 53]))
    found = workers(size, team.cluster, shards, options)
    generator = torch.Generator().manual_seed(0)
    whole = kdci_ext.build_confounder_dictionary(rows, generator=generator, **options)
    for each in found:
        assert torch.equal(each["prototypes"], found[0]["prototypes"])
        assert torch.equal(each["proportions"], found[0]["proportions"])
    torch.testing.assert_close(found[0]["prototypes"], whole.prototypes, rtol=1e-9, atol=1e-12)
    assert torch.equal(found[0]["proportions"], whole.proportions)
    assert torch.equal(torch.cat([each["labels"] for each in found]), whole.labels)
    torch.testing.assert_close(found[0]["inertia"], whole.inertia)


@pytest.mark.parametrize("gathered", [1000, 10], ids=["gathered", "by sums"])
@pytest.mark.parametrize("prototypes", ["kmeans", "random", "shuffled", "classes"])
def test_a_module_updated_by_a_group_holds_the_dictionary_of_all(
    prototypes: str, gathered: int, workers: team.Team
) -> None:
    rows = mixture(90, 4).double()
    options = {"prototypes": prototypes}
    found = workers(2, team.update, list(rows.split([60, 30])), options, gathered)
    kdci = kdci_ext.KDCI(4, 5, 8, prototypes=prototypes)  # type: ignore[arg-type]
    whole = kdci.update(rows, torch.Generator().manual_seed(0))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][0], kdci.prototypes, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0][1], kdci.proportions)
    assert torch.equal(torch.cat([each[2] for each in found]), whole.labels)


def test_bad_rows_of_one_process_are_refused_by_all(workers: team.Team) -> None:
    shards = [torch.randn(20, 3), torch.full((5, 3), torch.nan)]
    for message in workers(2, team.refusal, team.cluster, shards, {"num_prototypes": 4}):
        assert "5 of the 25 rows of all processes hold NaN or Inf" in message
    shards = [torch.randn(3, 3), torch.randn(2, 3)]
    for message in workers(2, team.refusal, team.cluster, shards, {"num_prototypes": 6}):
        assert "num_prototypes=6 must be <= the number of rows of all processes, 5" in message

    shards = [torch.randn(20, 3), torch.full((5, 3), torch.nan)]
    for gathered in (1000, 10):
        for message in workers(2, team.refusal, team.update, shards, {}, gathered):
            assert "teacher_logits must be finite: 5 of" in message
    shards = [torch.randn(3, 3), torch.randn(1, 3)]
    for message in workers(2, team.refusal, team.update, shards, {}, 1000):
        assert "teacher_logits has 4 rows in all processes" in message


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
def test_synchronised_batch_norm_is_that_of_all_rows(affine: bool, workers: team.Team) -> None:
    """Outputs, running statistics and all gradients are those of one process with all rows."""
    rows = torch.randn(8, 3, 5, 5, dtype=torch.float64)
    weights = torch.randn(8, 3, 5, 5, dtype=torch.float64)
    layer = nn.BatchNorm2d(3, momentum=0.3, affine=affine).double()
    found = workers(4, team.batch_norm, layer, rows, weights)
    whole = team.batch_norm_alone(layer, rows, weights)
    for name in ("out", "grad"):
        torch.testing.assert_close(torch.cat([each[name] for each in found]), whole[name])
    for each in found:
        rest = {name: value for name, value in each.items() if name not in ("out", "grad")}
        torch.testing.assert_close(rest, {name: whole[name] for name in rest})


def assert_same_losses(size: int, arguments: tuple[Any, ...], workers: team.Team) -> None:
    whole = team.losses_in_double(0, *arguments)
    found = workers(size, team.losses_in_double, *arguments)
    assert all(each == found[0] for each in found)
    for expected, terms in zip(whole, found[0], strict=True):
        assert terms == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_two_processes_train_as_one(method: str, task: dict[str, Any], workers: team.Team) -> None:
    """At the same whole batch, with KDCI: every loss term of every step, for every method. The
    networks have BatchNorm layers, which are synchronised. In float64, since generators that Adam
    has just begun to train turn rounding errors into other images.
    """
    values: dict[str, Any] = {"kdci": True}
    if "pool_size" in METHOD_SETTINGS[method]:
        values["pool_storage"] = "float"  # a rounding error may be a whole step of a byte
    assert_same_losses(2, (task, method, values), workers)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dafl joint": ("dafl", {"form": "joint"}),
    "fast with shared latents": (
        "fast",
        {"redraw_z_every": 2, "meta": "reptile", "pool_storage": "float"},
    ),
    "deepinversion with norms": (
        "deepinversion",
        {"tv_l2": 1e-3, "l2": 1e-3, "adi_form": "clamped", "pool_storage": "float"},
    ),
    "kd3 as in the code": ("kd3", {"form": "code"}),
    "cid as in the paper": ("cid", {"form": "paper"}),
    "no BatchNorm": ("dafl", {"student": "lenet5_half"}),
    "a dictionary of several batches": ("dafl", {"kdci": True, "kdci_batches": 2}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_forms_of_the_losses_are_those_of_all_rows(
    variant: str, task: dict[str, Any], workers: team.Team
) -> None:
    assert_same_losses(2, (task, *VARIANTS[variant]), workers)


@pytest.mark.parametrize(("method", "size"), [("dafl", 2), ("dfnd", 2), ("dfnd", 4)])
def test_runs_of_several_processes_leave_the_files_of_one(
    method: str, size: int, task: dict[str, Any], tmp_path: Path, workers: team.Team
) -> None:
    """In float32, from the command's configuration to the metrics and the student."""
    distill(tiny_config(task, method, out_dir=tmp_path / "one"))
    values = {"out_dir": tmp_path / "several"}
    accuracies = workers(size, team.run, task, method, values)
    assert len(set(accuracies)) == 1
    assert_same_run(tmp_path / "one", tmp_path / "several")
    names = [{path.name for path in (tmp_path / run).iterdir()} for run in ("one", "several")]
    assert names[0] == names[1]


def test_four_processes_train_as_one(task: dict[str, Any], workers: team.Team) -> None:
    assert_same_losses(
        4, (task, "fast", {"synthesis_batch_size": 12, "pool_storage": "float"}), workers
    )


def test_processes_stop_together_and_resume_bitwise(
    task: dict[str, Any], tmp_path: Path, workers: team.Team
) -> None:
    """Ctrl-C that one process gets stops all after the same step; resumed they end, bit for bit,
    where they would have ended. One process can go on with what two began, to rounding.
    """
    whole, parts, other = (tmp_path / name for name in ("whole", "parts", "other"))
    workers(2, team.run, task, "dafl", {"out_dir": whole})
    for out in (parts, other):
        first, second = workers(2, team.run_interrupted, task, "dafl", {"out_dir": out}, 4)
        assert "stopped after 4 of 8 steps" in first
        assert second == ""  # one speaks
    workers(2, team.run, task, "dafl", {"out_dir": parts, "resume": True})
    for name in ("student.safetensors", "images.png", "class_proportions.png"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    before, after = curves(whole), curves(parts)
    assert all(torch.equal(after[name], curve) for name, curve in before.items())
    assert distill(tiny_config(task, "dafl", out_dir=other, resume=True)).steps == 8
    assert_same_run(whole, other)


def test_the_clock_of_one_process_makes_all_save(
    task: dict[str, Any], tmp_path: Path, workers: team.Team
) -> None:
    """Checkpoints by minutes come when they are due in any process, or the others would wait."""
    values = {"out_dir": tmp_path / "run", "checkpoint_minutes": 1.0, "evaluate": False}
    workers(2, team.run_by_clocks, task, "noise", values)
    last, previous = (
        load_checkpoint(tmp_path / "run" / "checkpoints" / f"{name}.pt")["run"]["step"]
        for name in ("last", "previous")
    )
    assert (last, previous) == (8, 7)  # by epochs: 8, 4


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("dfnd", {"batch_size": 14}, "batch_size=14 is shared out over 4 processes"),
        ("dafl", {"synthesis_batch_size": 10}, "synthesis_batch_size=10 is shared out over 4"),
        ("mosaickd", {"batch_size": 12}, "half of batch_size=6 is shared out over 4 processes"),
    ],
)
def test_batches_that_do_not_divide_are_refused(
    method: str,
    values: dict[str, Any],
    message: str,
    task: dict[str, Any],
    tmp_path: Path,
    workers: team.Team,
) -> None:
    values = {**values, "out_dir": tmp_path / "run"}
    for found in workers(4, team.refusal, team.run, task, method, values):
        assert message in found
        assert "give" in found
    assert not (tmp_path / "run").exists()


# --- failures -------------------------------------------------------------------------------------


def test_a_nan_of_one_process_stops_all_at_its_step(
    task: dict[str, Any], tmp_path: Path, workers: team.Team
) -> None:
    first, second = workers(2, team.run_spoilt, task, {"out_dir": tmp_path / "run"})
    reason = "the loss term 'kd' became nan at step 2"
    assert first.startswith(f"DivergenceError: {reason}; there is no checkpoint yet")
    assert second == f"PeerError: {reason}"


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("error", "error: something is wrong here"),
        ("killed", "error: another process of the run ended without a word"),
    ],
)
def test_one_process_that_fails_ends_all_with_one_message(
    failure: str, message: str, task: dict[str, Any], tmp_path: Path
) -> None:
    words = ["distill", "--method", "noise", "--no-evaluate", "--device", "cpu"]
    for name in ("teacher", "student", "data_root", "batch_size", "epochs", "kdci_prototypes"):
        words += [f"--{name.replace('_', '-')}", str(task[name])]
    words += ["--ep-steps", "4", "--kd-steps", "2", "--out-dir", str(tmp_path / "run")]
    codes, logs = team.failing(2, words, failure, tmp_path)
    assert all(code != 0 for code in codes)
    assert "".join(logs).count("error:") == 1, logs
    assert message in "".join(logs)
    assert "Traceback" not in "".join(logs)


# --- one process ----------------------------------------------------------------------------------


def test_parts_cover_a_batch_once() -> None:
    for total in (0, 1, 7, 12):
        rows = [i for rank in range(4) for i in range(total)[World(rank, 4).part(total).rows]]
        assert rows == list(range(total))
    assert World(1, 2).part(7) == Part(3, 7, 7)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from python_models import distributed

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"process 1 .* finds 1: start torchrun .*-per-node 1"):
        distributed.local_device("auto")
    assert distributed.local_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.local_device("cuda") == "cuda:1"
    assert "RANK" not in os.environ
