# SPDX-License-Identifier: Apache-2.0
"""A study: what its file may say, that its runs are made once each, and what the table says."""

import csv
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny_task import METHOD_SETTINGS, make_task

from python_models import processes
from python_models.checkpoint import remove_temporaries, write_atomically
from python_models.cli import main
from python_models.config import StudyConfig, flatten, study_paths
from python_models.data import MissingDataError
from python_models.errors import UserError
from python_models.methods import METHODS
from python_models.processes import cores
from python_models.study import (
    Line,
    Study,
    StudyResult,
    load_study,
    paired_difference,
    plan,
    records,
    run,
    run_study,
    worker,
)
from python_models.study.folder import Job, StudyFolder
from python_models.study.markdown import accuracy_table, comparison_table
from python_models.study.plots import (
    accuracies,
    by_size,
    dictionary_sizes,
    overhead,
    overheads,
    write_plots,
)
from python_models.study.records import locked, write_json
from python_models.study.results import results
from python_models.study.table import accuracies_of, comparisons, table

VARIANTS = {"vanilla": {"kdci": False}, "kdci": {"kdci": True, "kdci_prototypes": 3}}


def write_study(folder: Path, **changes: Any) -> Path:
    """Write a task and a study of it: a teacher of its own, Noise, two variants, two seeds."""
    task = make_task(folder)
    common = {k: task[k] for k in ("student", "batch_size", "epochs", "lr", "kdci_hidden_dim")}
    teacher = {
        "network": "lenet5_half_bn",
        "dataset": "labelled.npz",
        "epochs": 1,
        "crop": 0,
        "flip": False,
        "batch_size": 10,
        "device": "cpu",
    }
    study = {
        "about": "a tiny study",
        "seeds": [0, 1],
        "settings": {**common, "teacher": "own", "dataset": "labelled.npz", "device": "cpu"},
        "teachers": {"own": teacher},
        "methods": {"noise": {"method": "noise", **METHOD_SETTINGS["noise"]}},
        "variants": VARIANTS,
        **changes,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def config_of(path: Path, out: str = "out", **values: Any) -> StudyConfig:
    return StudyConfig(
        study=str(path),
        out_dir=path.parent / out,
        data_root=path.parent / "data",
        **{"jobs": 1, **values},
    )


FRESH = "KDCI_TEST_IN_FRESH_PROCESS"


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the worker of `run_study` be this process, which has imported torch already, and draw
    nothing; the runs are made in children all the same.

    A process in which another test has used autograd cannot fork them: these tests share a fresh
    one, `test_those_whose_worker_is_the_test_itself`.
    """
    if FRESH not in os.environ:
        pytest.skip("run in a process of its own, by another test of this file")

    def work(commands: Mapping[str, Sequence[str]], jobs: int, shows: object) -> list[str]:
        return [name for name, words in commands.items() if worker.main(words[1:])]

    monkeypatch.setattr(run, "run_beside", work)
    monkeypatch.setattr(run, "write_plots", lambda *_: [])
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def test_those_whose_worker_is_the_test_itself() -> None:
    """The tests with `in_process`, all of which must pass."""
    words = ["-m", "pytest", "-n0", "-p", "no:cacheprovider", "-m", "usefixtures", __file__]
    done = subprocess.run(
        [sys.executable, *words], env={**os.environ, FRESH: "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def begun(folder: Path) -> dict[str, int]:
    """Return how often each run's loop was entered, by what it printed."""
    logs = sorted((folder / "runs").rglob("log.txt"))
    return {str(log.parent): log.read_text().count("teacher: ") for log in logs}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyConfig, StudyResult]:
    """A study that ran through without a stop."""
    config = config_of(write_study(tmp_path_factory.mktemp("study")))
    return config, run_study(config)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", study_paths())
def test_shipped_studies_are_valid(name: str) -> None:
    """Each has a line about it and its source, pairs that differ in KDCI alone, and one baseline
    run for each seed.
    """
    study = load_study(name)
    values = yaml.safe_load(study_paths()[name].read_text())
    assert values["about"]
    assert values["source"]
    assert study.baseline == "vanilla"
    for cells in study.entries.values():
        by_seed: dict[int, Any] = {}
        for cell in cells:
            if cell.variant == "vanilla":
                assert cell.seed not in by_seed
                by_seed[cell.seed] = flatten(cell.config)
        for cell in cells:
            mine = flatten(cell.config)
            differing = {k for k, v in mine.items() if v != by_seed[cell.seed][k]}
            assert all(key.startswith("kdci") for key in differing)
            assert (mine["kdci"] is False) == (cell.variant == "vanilla")
            assert cell.config.task.teacher in study.teachers or name == "imagenet"


def test_mini_has_every_method_with_floors_and_six_with_five_seeds() -> None:
    from python_models.methods import METHODS

    cells = load_study("mini").cells
    assert {cell.config.method for cell in cells} == set(METHODS.names()) - {"noise"}
    assert all(cell.floor is not None and cell.floor > 50 for cell in cells)
    assert len(cells) == 6 * 2 * 5 + 2 * 2


def test_a_method_may_be_kept_to_some_of_the_seeds(tmp_path: Path) -> None:
    noise = {"method": "noise", **METHOD_SETTINGS["noise"]}
    path = write_study(tmp_path, methods={"a": noise, "b": {**noise, "seeds": [1]}})
    assert [(c.method, c.seed) for c in load_study(str(path)).cells if c.variant == "kdci"] == [
        *(("a", 0), ("a", 1)),
        ("b", 1),
    ]
    for wrong in ([], [2], [[1]], 1):
        path = write_study(tmp_path, methods={"a": {**noise, "seeds": wrong}})
        with pytest.raises(UserError, match="methods: a: seeds must be a list of some of"):
            load_study(str(path))


@pytest.mark.usefixtures("in_process")
def test_a_study_may_be_kept_to_some_of_its_seeds(tmp_path: Path) -> None:
    """Only these are run; the results are of the whole study, whatever seeds a call works on."""
    path = write_study(tmp_path)
    result = run_study(config_of(path, seeds=(1,)))
    assert not result.problems
    assert [(line.planned, len(line.accuracies)) for line in result.lines] == [(2, 1), (2, 1)]
    assert "1 of 2" in result.text
    assert not (tmp_path / "out" / "runs" / "noise" / "kdci-seed0").exists()
    whole = run_study(config_of(path))
    assert not whole.problems
    files = [tmp_path / "out" / name for name in ("results.csv", "health.csv", "table.md")]
    before = [file.read_bytes() for file in files]
    again = run_study(config_of(path, seeds=(0,)))
    assert again.lines == whole.lines
    assert [file.read_bytes() for file in files] == before
    for wrong in ((2,), (0, 5), ()):
        with pytest.raises(UserError, match=r"must be some of those of the study tiny: 0, 1"):
            run_study(config_of(path, seeds=wrong))


def test_the_later_of_settings_task_method_and_variant_wins(tmp_path: Path) -> None:
    path = write_study(
        tmp_path,
        tasks={"a": {"lr": 0.2, "epochs": 3, "temperature": 2.0}},
        methods={"m": {"preset": "demo-fashion", "epochs": 4, "temperature": 3.0, "floor": 7}},
        variants={"first": {"temperature": 5.0}, "second": {}},
    )
    first, second, *others = load_study(str(path)).cells
    training = first.config.training
    assert (training.lr, training.epochs, training.temperature) == (0.2, 4, 5.0)
    assert second.config.training.temperature == 3.0
    assert first.config.settings.generator == "generator_tiny"  # of the preset
    assert [c.path for c in (first, second)] == ["a/m/first-seed0", "a/m/second-seed0"]
    assert [cell.seed for cell in others] == [1, 1]
    assert (first.floor, first.entry) == (7.0, "a/m")


BROKEN = {
    "unknown key": ({"seedz": [1]}, "unknown key 'seedz': did you mean 'seeds'"),
    "unknown setting": ({"settings": {"lrr": 1}}, "settings: unknown setting 'lrr'"),
    "of the study": ({"settings": {"seed": 1}}, "settings: seed is not for a study file: give"),
    "wrong type": (
        {"variants": {"vanilla": {"kdci": "no way"}}},
        "variants: vanilla: kdci='no way' must be true or false",
    ),
    "preset": ({"methods": {"m": {"preset": "dmo"}}}, "methods: m: unknown preset 'dmo'"),
    "method": ({"methods": {"m": {"method": "fats"}}}, "methods: m: unknown.*'fast'"),
    "neither": ({"methods": {"m": {}}}, "methods: m: must give a `preset` or a `method`"),
    "student": (
        {"methods": {"m": {"method": "fast", "student": "lenet6"}}},
        "m vanilla: unknown network 'lenet6'",
    ),
    "value": (
        {"methods": {"m": {"method": "fast", "temperature": 0}}},
        "m vanilla: temperature=0.0 must be > 0",
    ),
    "seeds": ({"seeds": [0, 0]}, "seeds: names a seed twice"),
    "seed": ({"seeds": [True]}, "seeds: True must be a whole number"),
    "large seed": ({"seeds": [2**70]}, r"seeds: \d+ must be a whole number from 0 to 2\*\*63 - 1"),
    "no seeds": ({"seeds": 3}, "seeds: must be a list"),
    "name": ({"methods": {"a/b": {"method": "fast"}}}, "methods: the name 'a/b' must be"),
    "case": (
        {"methods": {"a": {"method": "fast"}, "A": {"method": "fast"}}},
        "'a' and 'A' differ in case alone",
    ),
    "floor": (
        {"methods": {"m": {"method": "fast", "floor": 101}}},
        "methods: m: floor=101 must be an accuracy in percent",
    ),
    "floor of": (
        {"methods": {"m": {"method": "fast", "floor": {"kdcii": 1}}}},
        "floor: unknown variant 'kdcii'",
    ),
    "chosen": (
        {"methods": {"m": {"method": "fast", "variants": ["kdci"]}}},
        "methods: m: variants must keep the baseline, 'vanilla'",
    ),
    "misplaced": (
        {"variants": {"a": {"preset": "demo-fashion"}}},
        "variants: a: preset belongs to `methods`",
    ),
    "teacher": ({"teachers": {"t": {"network": "lenet5"}}}, "teachers: t: dataset is required"),
    "teacher key": (
        {"teachers": {"t": {"dataset": "digits", "lrr": 1}}},
        "teachers: t: unknown setting 'lrr'",
    ),
    "teacher network": (
        {"teachers": {"t": {"dataset": "digits", "network": "lenet6"}}},
        "teachers: t: unknown network 'lenet6'",
    ),
    "teacher seed": (
        {"teachers": {"t": {"dataset": "digits", "network": "lenet5", "seed": -1}}},
        "teachers: t: seed: -1 must be a whole number",
    ),
    "teacher name": (
        {"settings": {"teacher": "owm"}},
        "noise vanilla: teacher: unknown teacher 'owm': did you mean 'own'",
    ),
    "dictionary teacher": (
        {"variants": {"a": {"teacher": "own", "kdci_dictionary_teacher": "onw"}}},
        "noise a: kdci_dictionary_teacher: unknown teacher 'onw': did you mean 'own'",
    ),
    "long teacher name": (
        {"settings": {"teacher": 300 * "own"}},
        "noise vanilla: teacher: unknown teacher 'ownown",
    ),
    "number as preset": (
        {"methods": {"m": {"preset": 3}}},
        "methods: m: preset=3 must be the name",
    ),
    "list as method": (
        {"methods": {"m": {"method": ["fast"]}}},
        r"methods: m: method=\['fast'\] must be the name",
    ),
    "list as variant": (
        {"methods": {"m": {"method": "fast", "variants": [["v"]]}}},
        "methods: m: unknown variant",
    ),
    "twice": (
        {"settings": {"kd_steps": 1, "kd-steps": 2}},
        "settings: kd_steps is given twice, with - and with _",
    ),
    "not a list of pairs": ({"compare": {"a": "b"}}, "compare: must be a list of pairs"),
    "pair": ({"compare": [["kdci"]]}, r"compare: \['kdci'\] must be two variants"),
    "pair of one": ({"compare": [["kdci", "kdci"]]}, "compare: .* must be two variants"),
    "variant of a pair": (
        {"compare": [["kdci", "vanila"]]},
        "compare: unknown variant 'vanila': did you mean 'vanilla'",
    ),
    "pair of no method": (
        {
            "methods": {"m": {"method": "fast", "variants": ["vanilla"]}},
            "compare": [["kdci", "vanilla"]],
        },
        r"compare: no method has both variants of \['kdci', 'vanilla'\]",
    ),
    "no mapping": ({"tasks": 0}, "tasks: must hold lines of the form"),
    "list": ({"methods": ["fast"]}, "methods: must hold lines of the form"),
    "nothing": ({"methods": {}}, "methods: must name at least one"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_studies_are_refused_with_file_and_key(kind: str, tmp_path: Path) -> None:
    changes, message = BROKEN[kind]
    path = write_study(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as error:
        load_study(str(path))
    assert str(error.value).startswith(f"{path}: ")


def test_a_name_given_twice_and_missing_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("seeds: [0]\nmethods:\n  a: {method: fast}\n  a: {method: dafl}\n")
    with pytest.raises(UserError, match="line 4: 'a' is given twice"):
        load_study(str(path))
    path.write_text("seeds: [0]\n? [a, b]\n: 3\n")
    with pytest.raises(UserError, match=r"twice.yaml: line 2: a name must be text, not a list"):
        load_study(str(path))
    path.write_text("seeds: [2020-13-01]\n")
    with pytest.raises(UserError, match=r"twice.yaml is not a YAML file: month must be"):
        load_study(str(path))
    assert main(["study", "mimi"]) == 2
    assert "unknown study 'mimi': did you mean 'mini'" in capsys.readouterr().err
    assert main(["study", str(tmp_path / "gone.yaml")]) == 2
    assert "gone.yaml is not there" in capsys.readouterr().err
    assert main(["list", "studies"]) == 0
    assert "lenet-mnist" in capsys.readouterr().out


def test_the_documented_example_is_a_study(tmp_path: Path) -> None:
    block = re.search(r"::\n\n(.*?)\n(?=\S)", plan.__doc__ or "", re.S)
    assert block is not None
    path = tmp_path / "example.yaml"
    path.write_text(textwrap.dedent(block[1]))
    study = load_study(str(path))
    assert set(study.entries) == {
        f"{task}/{m}" for task in ("half", "same") for m in ("fast", "dafl")
    }
    assert study.comparisons == (("kdci", "shuffled"),)
    used = {name for cell in study.cells for name in study.own_teachers(cell).values()}
    assert used == set(study.teachers)


def test_a_teacher_may_be_a_network_a_file_or_of_the_study(tmp_path: Path) -> None:
    """Only a bare name that is none of these is an error when the file is read."""
    (tmp_path / "there").mkdir()
    noise = {"method": "noise", **METHOD_SETTINGS["noise"]}
    names = ("own", "resnet18", "mine:Network", "to/come", "come.safetensors", str(tmp_path))
    for name in names:
        load_study(str(write_study(tmp_path, methods={"m": {**noise, "teacher": name}})))
    load_study(str(write_study(tmp_path, settings={"teacher": "come"}, teachers={})))


# --- running --------------------------------------------------------------------------------------


def test_a_study_runs_every_cell_and_writes_its_results(
    finished: tuple[StudyConfig, StudyResult],
) -> None:
    result = finished[1]
    assert result.problems == ()
    out = result.folder
    assert list(begun(out).values()) == [1, 1, 1, 1]
    header, *rows = (out / "results.csv").read_text().splitlines()
    assert header.startswith("study,entry,method,variant,teacher,student,dataset,seed,accuracy,")
    assert [row.split(",")[:4] for row in rows] == [
        ["tiny", "noise", "noise", variant] for variant in ("vanilla", "kdci") * 2
    ]
    for row, seed in zip(rows, "0011", strict=True):
        assert row.split(",")[7] == seed
    seconds = (out / "timings.csv").read_text()
    assert "seconds,peak_memory_mb" in seconds
    assert (out / "table.md").read_text() == result.text
    header, *rows = (out / "health.csv").read_text().splitlines()
    assert header.startswith("study,entry,variant,seed,prototypes,epoch,compensation_ratio,")
    assert [row.split(",")[2:6] for row in rows] == [
        ["kdci", seed, "3", epoch] for seed in "01" for epoch in "12"
    ]
    assert all(float(value) > 0 for row in rows for value in row.split(",")[6:])
    for name in ("accuracy", "differences", "overhead", "curves", "prior", "attention"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not (out / "sizes.png").exists()  # a single size
    vanilla, kdci = result.lines
    assert vanilla.difference is None
    assert kdci.difference is not None
    expected = np.mean(kdci.accuracies) - np.mean(vanilla.accuracies)
    assert kdci.difference.mean == pytest.approx(expected)


@pytest.mark.usefixtures("in_process")
def test_runs_of_versions_that_did_not_record_the_prior_are_left_out_of_its_table(
    tmp_path: Path,
) -> None:
    config = config_of(write_study(tmp_path, seeds=[0]))
    result = run_study(config)
    assert "attended to" in result.text
    metrics = tmp_path / "out" / "runs" / "noise" / "kdci-seed0" / "metrics.csv"
    header, *rows = metrics.read_text().splitlines()
    metrics.write_text("\n".join([header.replace("attention_prototypes", "other"), *rows]) + "\n")
    again = run_study(config)
    assert not again.problems
    assert "attended to" not in again.text
    assert again.lines == result.lines


def test_what_a_study_needs_is_downloaded_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Test images of the task, other images by their names, the task's own training images for the
    teacher and for what learns from labels; no training images of a task for a data-free method.
    """
    wanted: set[tuple[str, str]] = set()
    tried: list[str] = []

    def load(name: str, split: str, root: Path, download: bool) -> None:
        wanted.add((name, split))
        if name == "svhn":
            tried.append(f"{download}")
            with locked(root / "download.lock") as is_free:
                assert is_free != download
            raise MissingDataError("svhn has no downloader")

    monkeypatch.setattr(run, "load_labelled", load)
    methods = {
        "sampled": {"method": "dfnd", "unlabelled": "svhn"},
        "pooled": {"method": "fast", "initial_pool": "mnist"},
        "labelled": {"method": "cid", "dataset": "cifar100"},
        "of a folder": {"method": "dfnd", "unlabelled": "photos"},
    }
    path = write_study(
        tmp_path,
        settings={"teacher": "somewhere", "dataset": "cifar10", "device": "cpu"},
        methods={name.replace(" ", "-"): values for name, values in methods.items()},
        teachers={},
    )
    config = config_of(path)
    run._download(StudyFolder(load_study(str(path)), config), config.data_root)
    assert wanted == {
        *(("cifar10", "test"), ("svhn", "train"), ("mnist", "train")),
        *(("cifar100", "train"), ("cifar100", "test")),
    }
    # What cannot be downloaded is named, and the others are all the same.
    assert tried == ["False", "True"]
    text = capsys.readouterr().out
    assert text == "svhn has no downloader\nThe study goes on without the train split of svhn.\n"


def test_what_is_done_is_not_done_again(
    finished: tuple[StudyConfig, StudyResult], capsys: pytest.CaptureFixture[str]
) -> None:
    config, result = finished
    before = (result.folder / "results.csv").read_bytes()
    again = run_study(config)
    assert "5 to train, 5 done" in capsys.readouterr().out
    assert again.lines == result.lines
    assert (result.folder / "results.csv").read_bytes() == before
    assert list(begun(result.folder).values()) == [1, 1, 1, 1]


def run_command(config: StudyConfig, **values: Any) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "python_models", "study", config.study, "--jobs", "1"]
    words += ["--out-dir", str(config.out_dir), "--data-root", str(config.data_root)]
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **values
    )


def children_of(pid: int) -> list[int]:
    """Return the process's descendants, by /proc."""
    found = []
    for entry in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, entry.read_text().split()):
            found += [child, *children_of(child)]
    return found


def test_a_killed_study_goes_on_to_the_same_csv(
    finished: tuple[StudyConfig, StudyResult],
) -> None:
    """SIGKILL to the command, its worker and the run in progress: locks are free at once, and the
    results are those of the study that was not stopped, byte for byte.
    """
    config, result = finished
    config = replace(config, out_dir=result.folder.parent / "killed")
    assert config.out_dir is not None
    process = run_command(config)
    assert process.stdout is not None
    for line in process.stdout:
        if "noise kdci seed 0: begun" in line:
            break
    checkpoint = config.out_dir / "runs/noise/kdci-seed0/config.yaml"
    deadline = time.monotonic() + 30
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    for pid in [process.pid, *children_of(process.pid)]:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (config.out_dir / "runs/noise/kdci-seed1").exists()
    assert run_study(config).problems == ()
    for name in ("results.csv", "table.md"):
        assert (config.out_dir / name).read_bytes() == (result.folder / name).read_bytes()


def test_two_processes_of_several_jobs_never_do_one_run_twice(
    finished: tuple[StudyConfig, StudyResult],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One with a worker and one with two, each with as many threads as the study had."""
    config, result = finished
    config = replace(config, out_dir=result.folder.parent / "shared")
    assert config.out_dir is not None
    monkeypatch.setattr(processes, "cores", lambda: 2 * cores())
    other = run_command(config)
    shared = run_study(replace(config, jobs=2))
    text = other.communicate()[0] + capsys.readouterr().out
    assert (other.returncode, shared.problems) == (0, ()), text
    assert list(begun(config.out_dir).values()) == [1, 1, 1, 1]
    assert text.count(": begun") == 5
    for name in ("results.csv", "table.md"):
        assert (config.out_dir / name).read_bytes() == (result.folder / name).read_bytes()


PAUSING = """
import time
from pathlib import Path
from python_models.networks import build_network

class Pausing(torch.nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.network = build_network("lenet5_half_bn", num_classes, in_channels)
        self.steps = 0

    def forward(self, images):
        if self.training:
            self.steps += 1
            while self.steps == 6 and not Path(PAUSED).exists():
                Path(HERE).touch()
                time.sleep(0.01)
        return self.network(images)
"""


@pytest.mark.usefixtures("in_process")
def test_a_run_that_is_killed_after_a_checkpoint_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second epoch, where a checkpoint of the first is there; what goes on is of
    another commit, and says so beside the one that began.
    """
    here, paused = tmp_path / "here", tmp_path / "paused"
    names = f"import torch\nHERE, PAUSED = {str(here)!r}, {str(paused)!r}\n"
    (tmp_path / "pausing.py").write_text(names + PAUSING)
    monkeypatch.syspath_prepend(tmp_path)
    noise = {"method": "noise", **METHOD_SETTINGS["noise"], "student": "pausing:Pausing"}
    variants = {"kdci": VARIANTS["kdci"]}
    path = write_study(tmp_path, methods={"noise": noise}, seeds=[0], variants=variants)
    config = config_of(path)
    run_folder = tmp_path / "out" / "runs" / "noise" / "kdci-seed0"
    monkeypatch.setattr(records, "provenance", lambda: {"version": "1", "commit": "before"})
    pid = os.fork()
    if pid == 0:
        os.setsid()
        worker.main([json.dumps(flatten(config))])
        os._exit(0)
    try:
        deadline = time.monotonic() + 60
        while not here.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert here.exists()
    assert (run_folder / "checkpoints" / "last.pt").is_file()
    assert not (run_folder / "summary.json").exists()
    paused.touch()
    whole = run_study(replace(config, out_dir=tmp_path / "whole"))
    monkeypatch.setattr(records, "provenance", lambda: {"version": "1", "commit": "after"})
    resumed = run_study(config)
    assert resumed.problems == ()
    rows = [(each.folder / "results.csv").read_text() for each in (whole, resumed)]
    assert rows[0].endswith(",1,before\n")
    assert rows[1] == rows[0].replace(",before\n", ",before+after\n")
    assert resumed.text == whole.text
    write_json(run_folder / "study.json", {"version": ["1"], "commit": ["", "after"]})
    (row,) = results(StudyFolder(load_study(config.study), config))
    assert (row["version"], row["commit"]) == ("1", "")  # of code that is not known


@pytest.mark.usefixtures("in_process")
def test_a_dictionarys_teacher_may_be_of_the_study(tmp_path: Path) -> None:
    """It is trained first, and its weights are held to like the teacher's."""
    values = yaml.safe_load(write_study(tmp_path).read_text())
    own = values["teachers"]["own"]
    variants = {**VARIANTS, "by-other": {**VARIANTS["kdci"], "kdci_dictionary_teacher": "other"}}
    changes: dict[str, Any] = {"teachers": {"own": own, "other": {**own, "seed": 5}}, "seeds": [0]}
    config = config_of(write_study(tmp_path, variants=variants, **changes))
    first = run_study(config)
    assert first.problems == ()
    assert first.lines[1].accuracies
    before = (first.folder / "results.csv").read_bytes()
    run_folder = first.folder / "runs" / "noise" / "by-other-seed0"
    record = json.loads((run_folder / "study.json").read_text())
    teacher = first.folder / "teachers" / "other" / "teacher.safetensors"
    digest = hashlib.sha256(teacher.read_bytes()).hexdigest()
    assert record["dictionary_teacher_sha256"] == digest != record["teacher_sha256"]
    settings = yaml.safe_load((run_folder / "config.yaml").read_text())
    assert settings["kdci_dictionary_teacher"] == str(teacher.parent)
    # A study folder may be moved, and be of a version that recorded less.
    moved = replace(config, out_dir=tmp_path / "moved")
    first.folder.rename(tmp_path / "moved")
    commit = "+".join(record["commit"])
    old = {"teacher_sha256": record["teacher_sha256"], "version": "", "commit": commit}
    old["version"] = "+".join(record["version"])
    run_folder = tmp_path / "moved" / "runs" / "noise" / "by-other-seed0"
    write_json(run_folder / "study.json", old)
    assert run_study(moved).problems == ()
    assert (tmp_path / "moved" / "results.csv").read_bytes() == before
    write_json(run_folder / "study.json", record)
    folder = StudyFolder(load_study(config.study), moved)
    (job,) = (job for cell, job in folder.runs.items() if cell.variant == "by-other")
    assert folder.is_ready(job)
    assert folder.why_not(job) is None
    other = folder.teachers["other"]
    other.record_failure("no memory")
    assert folder.why_not(job) == "its teacher other failed: no memory"
    other.forget_failure()
    weights = other.path / "teacher.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    assert "the dictionary's teacher's weights are others now" in (folder.why_not(job) or "")
    weights.unlink()
    other.folder.summary.unlink()
    assert not folder.is_ready(job)
    write_study(tmp_path, variants={**VARIANTS, "by-other": VARIANTS["kdci"]}, **changes)
    (job,) = (
        job
        for cell, job in StudyFolder(load_study(config.study), moved).runs.items()
        if cell.variant == "by-other"
    )
    assert "kdci_dictionary_teacher was " in (job.refusal() or "")


def test_writers_of_one_file_in_processes_of_the_same_number_do_not_meet(tmp_path: Path) -> None:
    """As on two machines, or in two containers: here the second one writes within the first."""

    def write(temporary: Path) -> None:
        temporary.write_text("the first")
        write_json(tmp_path / "file.json", {"by": "the second"})

    write_atomically(tmp_path / "file.json", write)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [
        ("file.json", "the first")
    ]
    (tmp_path / ".file.json.12ab.tmp").touch()
    remove_temporaries(tmp_path / "file.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_a_job_that_another_process_holds_is_left_alone(tmp_path: Path) -> None:
    config = config_of(write_study(tmp_path))
    folder = StudyFolder(load_study(config.study), config)
    job = folder.jobs[0]
    with job.locked() as first, job.locked() as second:
        assert (first, second) == (True, False)
    with job.locked() as again:
        assert again


@pytest.mark.usefixtures("in_process")
def test_a_failing_run_does_not_stop_the_others_and_is_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named with its reason, and the exit code is 1; floors that are missed as well."""
    noise = {"method": "noise", **METHOD_SETTINGS["noise"]}
    methods = {
        "broken": {**noise, "variants": ["vanilla"], "student": "nowhere.at.all:Network"},
        "noise": {**noise, "floor": {"vanilla": 0, "kdci": 100}},
    }
    path = write_study(tmp_path, methods=methods, seeds=[0])
    words = ["study", str(path), "--out-dir", str(tmp_path / "out"), "--jobs", "1"]
    words += ["--data-root", str(tmp_path / "data")]
    assert main(words) == 1
    text, error = capsys.readouterr()
    assert "broken vanilla seed 0: " in error
    assert "nowhere" in error
    assert "noise kdci: " in error
    assert "is below the floor of 100 %" in error
    assert "0: met" in text
    assert "100: missed" in text
    assert "one pair" in text
    rows = (tmp_path / "out" / "results.csv").read_text().splitlines()[1:]
    assert [row.split(",")[3] for row in rows] == ["vanilla", "kdci"]
    record = tmp_path / "out" / "runs/broken/vanilla-seed0/failed.json"
    assert "nowhere" in json.loads(record.read_text())["reason"]


def test_threads_follow_the_jobs_not_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study that goes on with one run left gives it as many threads as before: other threads
    would give other bits.
    """
    started: list[str] = []
    start = processes._start

    def recorded(words: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
        started.append(environment["OMP_NUM_THREADS"])
        return start(["timeit", "-n1", "-r1"], environment)  # does nothing, and says so

    monkeypatch.setattr(processes, "_start", recorded)
    monkeypatch.setattr(processes, "cores", lambda: 12)
    monkeypatch.setattr(run, "_conclude", lambda folder, failed: None)
    config = config_of(write_study(tmp_path), jobs=3)
    run_study(config)
    assert started == ["4", "4", "4"]
    _, *others = StudyFolder(load_study(config.study), config).jobs
    for job in others:
        write_json(job.folder.summary, {"accuracy": 50.0})
    run_study(config)
    assert started == ["4", "4", "4", "4"]


EXITS = {
    "sys": ("raise SystemExit('no licence')", "SystemExit: no licence; see .*log.txt"),
    "code": ("import os; os._exit(7)", "its process ended with 7; see .*log.txt"),
    "nothing": ("import os; os._exit(0)", "its process ended with 0; see .*log.txt"),
    "signal": ("import os; os.kill(os.getpid(), 9)", "its process was ended by SIGKILL; see"),
}


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("kind", EXITS)
def test_a_run_whose_process_ends_without_a_word_has_failed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However a student's factory ends the process, the run is named and not tried for ever."""
    statement, reason = EXITS[kind]
    (tmp_path / "leaving.py").write_text(
        f"def network(num_classes, in_channels):\n    {statement}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    noise = {"method": "noise", **METHOD_SETTINGS["noise"], "student": "leaving:network"}
    variants = {"vanilla": {"kdci": False}}
    path = write_study(tmp_path, methods={"noise": noise}, seeds=[0], variants=variants)
    (problem,) = run_study(config_of(path)).problems
    assert re.fullmatch(rf"noise vanilla seed 0: {reason}.*", problem)


@pytest.mark.usefixtures("in_process")
def test_a_run_whose_log_cannot_be_written_has_failed(tmp_path: Path) -> None:
    path = write_study(tmp_path, seeds=[0], variants={"vanilla": {"kdci": False}})
    (tmp_path / "out" / "teachers" / "own" / "log.txt").mkdir(parents=True)
    (tmp_path / "out" / "runs" / "noise" / "vanilla-seed0" / "log.txt").mkdir(parents=True)
    first, second = run_study(config_of(path)).problems
    assert first.startswith("teacher own: IsADirectoryError: ")
    assert second.startswith("noise vanilla seed 0: its teacher own failed: IsADirectoryError: ")


@pytest.mark.usefixtures("in_process")
def test_a_worker_that_cannot_record_a_failure_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(write_study(tmp_path, seeds=[0]))
    folder = StudyFolder(load_study(config.study), config)

    def full(*_: object) -> None:
        raise UserError("cannot write: no space left on device")

    monkeypatch.setattr(Job, "record_failure", full)
    monkeypatch.setattr(worker, "train", lambda job: sys.exit(3))
    with pytest.raises(UserError, match="no space left"):
        worker.Worker(folder).work()
    assert not list((tmp_path / "out").rglob("failed.json"))


def test_runs_of_other_settings_are_refused_not_mixed(
    finished: tuple[StudyConfig, StudyResult], tmp_path: Path
) -> None:
    """Where the study's file or a teacher has changed since, the run is named and left out."""
    config, result = finished
    values = yaml.safe_load(Path(config.study).read_text())
    values["variants"]["kdci"]["kdci_scale"] = 2.0
    changed = Path(config.study).parent / "changed.yaml"
    changed.write_text(yaml.safe_dump(values, sort_keys=False))
    found = run_study(replace(config, study=str(changed)))
    assert len(found.problems) == 2
    assert "kdci seed 0: " in found.problems[0]
    assert "kdci_scale was 1.0 and is 2.0 now" in found.problems[0]
    assert [len(line.accuracies) for line in found.lines] == [2, 0]
    assert list(begun(result.folder).values()) == [1, 1, 1, 1]
    folder = StudyFolder(load_study(config.study), config)
    assert len(results(folder)) == 4
    teacher = folder.teachers["own"].path / "teacher.safetensors"
    before = teacher.read_bytes()
    teacher.write_bytes(before + b" ")
    try:
        assert results(folder) == []
        reason = folder.why_not(next(iter(folder.runs.values())))
        assert reason is not None
        assert "the teacher's weights are others now" in reason
    finally:
        teacher.write_bytes(before)
    run_study(config)  # restores the files of the module's study


# --- plots ----------------------------------------------------------------------------------------


def test_tasks_sizes_and_their_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: None
) -> None:
    """Several tasks, each with its student: entries of their own, pairs within them."""
    monkeypatch.setattr(run, "write_plots", write_plots)
    sizes = {f"n{k}": {"kdci": True, "kdci_prototypes": k} for k in (2, 3)}
    path = write_study(
        tmp_path,
        tasks={"half": {}, "whole": {"student": "lenet5_bn"}},
        variants={"vanilla": {"kdci": False}, **sizes},
        seeds=[0],
    )
    result = run_study(config_of(path))
    assert result.problems == ()
    assert [(line.entry, line.variant, len(line.accuracies)) for line in result.lines] == [
        (f"{task}/noise", variant, 1)
        for task in ("half", "whole")
        for variant in ("vanilla", "n2", "n3")
    ]
    rows = list(csv.DictReader((result.folder / "results.csv").open()))
    assert {row["entry"]: row["student"] for row in rows} == {
        "half/noise": "lenet5_half_bn",
        "whole/noise": "lenet5_bn",
    }
    for name in ("sizes", "accuracy", "overhead", "differences", "curves", "prior", "attention"):
        assert (result.folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def lines_of(study: Study, accuracy: Callable[[str, int], float]) -> list[Line]:
    """Return the table of made-up accuracies by variant and seed."""
    rows = [{"entry": c.entry, "variant": c.variant, "seed": c.seed} for c in study.cells]
    return table(
        study,
        accuracies_of({**row, "accuracy": accuracy(row["variant"], row["seed"])} for row in rows),
    )


def test_a_line_joins_variants_that_differ_in_size_alone(tmp_path: Path) -> None:
    """By what the settings come to: the method's own size is one of them, other options are not."""
    variants = {
        "vanilla": {"kdci": False, "kdci_prototypes": 7},
        "n4": {"kdci_prototypes": 4},
        "own": {},
        "posterior": {"kdci_prototypes": 4, "kdci_weighting": "posterior"},
        "posterior-2": {"kdci_prototypes": 2, "kdci_weighting": "posterior"},
        "scaled": {"kdci_prototypes": 16, "kdci_scale": 2.0},
    }
    noise = {"method": "noise", **METHOD_SETTINGS["noise"]}
    methods = {"a": noise, "b": {**noise, "variants": ["vanilla", "own", "posterior"]}}
    study = load_study(str(write_study(tmp_path, variants=variants, methods=methods)))
    lines = lines_of(study, lambda variant, seed: 10.0 * len(variant) + seed)
    sizes = dictionary_sizes(study, {(line.entry, line.variant) for line in lines})
    own = METHODS.get("noise").num_prototypes
    assert sizes == {
        "a": [{"n4": 4, "own": own}, {"posterior": 4, "posterior-2": 2}, {"scaled": 16}]
    }
    figure = by_size(lines, sizes, "vanilla", dict.fromkeys(variants, "black"))
    (axes,) = figure.axes
    drawn = {tuple(line[0].get_xdata()): tuple(line[0].get_ydata()) for line in axes.containers}
    assert drawn == {(4, own): (20.5, 30.5), (2, 4): (110.5, 90.5), (16,): (60.5,)}
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {
        *("n4 to own", "posterior-2 to posterior", "scaled", "vanilla")
    }


def test_bars_are_of_each_method_and_variant(tmp_path: Path) -> None:
    noise = {"method": "noise", **METHOD_SETTINGS["noise"]}
    methods = {"a": noise, "b": {**noise, "variants": ["vanilla"]}}
    tasks: dict[str, dict[str, Any]] = {"one": {}, "two": {}}
    study = load_study(str(write_study(tmp_path, methods=methods, tasks=tasks)))
    lines = lines_of(study, lambda variant, seed: 40.0 + 10 * seed + (variant == "kdci"))
    colors = {"vanilla": "red", "kdci": "blue"}
    figure = accuracies(study, lines, colors)
    for axes, task in zip(figure.axes, tasks, strict=True):
        assert axes.get_title() == task
        assert [text.get_text() for text in axes.get_xticklabels()] == ["a", "b"]
        assert [bar.get_height() for bar in axes.patches] == [45.0, 45.0, 46.0]
        spread = math.sqrt(50)  # of 40 and 50, by n - 1
        for bars in axes.collections:
            ((_, low), (_, high)) = bars.get_segments()[0]
            assert high - low == pytest.approx(2 * spread)
    # Before all is done, what is: here one task's, of one method.
    figure = accuracies(study, [line for line in lines if line.entry == "two/b"], colors)
    (axes,) = figure.axes
    assert (axes.get_title(), len(axes.patches)) == ("two", 1)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["vanilla"]
    assert figure.legends[0].get_patches()[0].get_facecolor() == axes.patches[0].get_facecolor()


def test_overhead_is_of_pairs_with_the_same_seed() -> None:
    cost = {("vanilla", 0): 10.0, ("vanilla", 1): 20.0, ("kdci", 0): 11.0, ("kdci", 1): 30.0}
    cost["kdci", 2] = 99.0  # alone
    rows = [
        {"entry": "e", "variant": v, "seed": s, "seconds": value, "peak_memory_mb": None}
        for (v, s), value in cost.items()
    ]
    ratios = overheads(rows, "vanilla")
    assert ratios == {("e", "kdci"): {"seconds": [1.1, 1.5]}}
    panel = overhead(ratios, "vanilla", {"kdci": "black"}).axes[0]
    assert panel.lines[1].get_xdata() == pytest.approx([1.3])
    ((low, _), (high, _)) = panel.collections[0].get_segments()[0]
    assert (low, high) == pytest.approx((1.1, 1.5))


# --- statistics -----------------------------------------------------------------------------------


def test_the_interval_is_students_over_the_pairs() -> None:
    """Against the printed quantiles of t (4.303 for 2, 2.776 for 4 degrees of freedom) and scipy's
    paired test.
    """
    from scipy.stats import ttest_rel

    three = paired_difference([1.0, 2.0, 3.0])
    assert three.half_width == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    random = np.random.default_rng(0)
    a, b = random.normal(80, 2, 5), random.normal(81, 2, 5)
    found = paired_difference((b - a).tolist())
    interval = ttest_rel(b, a).confidence_interval(0.95)
    assert found.half_width is not None
    assert found.mean - found.half_width == pytest.approx(interval.low)
    assert found.mean + found.half_width == pytest.approx(interval.high)
    spread = float(np.std(b - a, ddof=1))
    assert found.half_width == pytest.approx(2.776 * spread / math.sqrt(5), rel=1e-3)


def test_signs_and_single_pairs() -> None:
    found = paired_difference([0.5, 0.0, -1.0, 2.0])
    assert (found.better, found.worse, found.pairs) == (2, 1, 4)
    assert paired_difference([1.5]).half_width is None


def test_pairs_are_of_the_same_seed(tmp_path: Path) -> None:
    """A seed that only one variant has finished counts for its mean, not for the difference."""
    variants = {**VARIANTS, "other": {"kdci_dictionary": "shuffled"}}
    pairs = [["kdci", "other"], ["other", "vanilla"]]
    study = load_study(
        str(write_study(tmp_path, seeds=[3, 5, 7], variants=variants, compare=pairs))
    )
    accuracy = {("vanilla", 3): 50.0, ("kdci", 3): 51.0, ("kdci", 5): 90.0, ("vanilla", 7): 60.0}
    accuracy |= {("kdci", 7): 57.0, ("other", 5): 88.0, ("other", 7): 57.0}
    found = accuracies_of(
        {"entry": "noise", "variant": variant, "seed": seed, "accuracy": value}
        for (variant, seed), value in accuracy.items()
    )
    vanilla, kdci, other = table(study, found)
    assert (vanilla.mean, kdci.mean) == (55.0, 66.0)
    assert kdci.difference is not None
    assert (kdci.difference.mean, kdci.difference.pairs) == (-1.0, 2)
    text = accuracy_table([vanilla, kdci], study.baseline)
    assert "2 of 3" in text
    assert "-26.41 to +24.41" in text  # -1 +- 12.706 * sqrt(8) / sqrt(2)
    first, second = comparisons(study, found)
    assert (first.variant, first.other) == ("kdci", "other")
    assert first.difference == paired_difference([2.0, 0.0])
    assert second.difference == other.difference
    rows = comparison_table([first, second]).splitlines()[-2:]
    assert "kdci minus other    | 2 " in rows[0]
    assert "-11.71 to +13.71" in rows[0]  # 1 +- 12.706 * sqrt(2) / sqrt(2)
    assert "one pair" in rows[1]
