# SPDX-License-Identifier: Apache-2.0
"""The laws of the benchmark harness itself; nothing here depends on how fast anything is."""

from __future__ import annotations

import math
import re
import socket
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import compensation, dictionary, harness, memory, report
from benchmarks.data import CHUNK, teacher_like_logits
from benchmarks.harness import Contender, Timer, measure
from benchmarks.peers import PEERS, Peer, Problem, Solution, plain_torch
from benchmarks.quality import Judge, mean_and_error
from benchmarks.study import save_study
from python_models.cli import main

ROOT = harness.ROOT

# --- timing, on a machine whose clock and speed the test sets -------------------------------------


@dataclass
class Machine:
    """Time passes only when something runs; at half the speed while ``slow`` says so."""

    slow: Callable[[float], bool] = lambda now: False
    now: float = 0.0
    log: list[tuple[str, int]] = field(default_factory=list)

    def work(self, seconds: float) -> float:
        """Do work that takes so long at full speed; return the speed it was begun with."""
        speed = 0.5 if self.slow(self.now) else 1.0
        self.now += seconds / speed
        return speed

    def timer(self) -> Timer:
        def clock() -> float:
            return self.now

        return Timer(clock, lambda: self.work(1e-3), clock, clock)

    def contender(self, name: str, seconds: float) -> Contender:
        def run(seed: int) -> object:
            self.log.append((name, seed))
            self.work(seconds)
            return name

        return Contender(name, run)


def test_rounds_take_turns_and_seeds() -> None:
    """Contenders run in turn, each round with the next seed, and their times are the clock's."""
    machine = Machine()
    both = [machine.contender("a", 1.0), machine.contender("b", 2.0)]
    found = measure(both, machine.timer(), seconds=0, min_rounds=3, seeds=2)
    assert machine.log == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 0), ("b", 0)]
    for name, ms in (("a", 1000), ("b", 2000)):
        timing = found[name]
        assert (timing.median_ms, timing.p20_ms, timing.p80_ms) == pytest.approx((ms, ms, ms))
        assert (timing.rounds, timing.rejected, timing.noisy) == (3, 0, 0)
        assert timing.cores == pytest.approx(1)


def test_short_calls_are_averaged() -> None:
    """A call shorter than the clock's ticks is repeated within a sample, of which the mean is
    reported; before each sample come calls for 25 times as long that are not timed.
    """
    machine = Machine()
    found = measure([machine.contender("a", 1e-4)], machine.timer(), seconds=0, min_rounds=2)
    assert found["a"].median_ms == pytest.approx(0.1)
    first = len(machine.log) - 2 * (500 + 20)  # those that find out how long a call takes
    assert first in (1 + 20, 1 + 21)
    assert [seed for _, seed in machine.log[first:]] == [0] * 520 + [1] * 520


def test_long_calls_are_not_repeated() -> None:
    """A call that is long by itself has no need of calls before it."""
    machine = Machine()
    measure([machine.contender("a", 0.5)], machine.timer(), seconds=0, min_rounds=3)
    assert len(machine.log) == 3


def test_disturbed_samples_are_dropped_and_repeated() -> None:
    """While the machine is slow its check says so: no sample of that time counts, each is made
    again, and the figure is the undisturbed one.
    """
    machine = Machine(slow=lambda now: 3 < now < 12)
    timer = machine.timer()
    found = measure([machine.contender("a", 1.0)], timer, seconds=0, min_rounds=8)
    timing = found["a"]
    assert timing.rounds == 8
    assert timing.rejected >= 4
    assert timing.noisy == 0
    assert timing.median_ms == timing.p80_ms == pytest.approx(1000)


def test_samples_are_judged_by_a_best_found_later() -> None:
    """A machine that is slow at first looks normal until it speeds up; its first samples go."""
    machine = Machine(slow=lambda now: now < 7)
    found = measure([machine.contender("a", 1.0)], machine.timer(), seconds=20, min_rounds=3)
    assert found["a"].rejected >= 3
    assert found["a"].p80_ms == pytest.approx(1000)


def test_samples_that_cannot_be_repeated_are_kept_and_counted() -> None:
    """Where the machine never calms down the repeats end, after as many samples as were wanted,
    and what is kept is called noisy.
    """
    machine = Machine(slow=lambda now: now > 0.5)
    timer = machine.timer()
    timer.burst()
    found = measure([machine.contender("a", 1.0)], timer, seconds=0, min_rounds=3)
    assert (found["a"].rounds, found["a"].rejected, found["a"].noisy) == (3, 3, 3)


def test_a_contender_over_its_limit_stops_and_the_others_go_on() -> None:
    machine = Machine()
    both = [machine.contender("slow", 10.0), machine.contender("quick", 1.0)]
    found = measure(both, machine.timer(), seconds=0, min_rounds=4, limit_s=15)
    assert (found["slow"].rounds, found["quick"].rounds) == (2, 4)


def test_results_are_collected_with_their_seed() -> None:
    machine, seen = Machine(), []
    measure(
        [machine.contender("a", 1.0)],
        *(machine.timer(),),
        seconds=0,
        min_rounds=3,
        seeds=3,
        collect=lambda *what: seen.append(what),
    )
    assert seen == [("a", seed, "a") for seed in range(3)]


def test_the_real_check_has_a_rate() -> None:
    timer = harness.make_timer(1)
    assert timer.best > 0
    assert harness.fma_peak(1)[0] > 0


# --- data, quality, floor -------------------------------------------------------------------------


def test_data_is_seeded_and_imbalanced() -> None:
    """The same seed gives the same rows over all chunks; classes are of unequal frequency and their
    peaks stand out.
    """
    n = CHUNK + 500
    rows = teacher_like_logits(n, 10)
    assert rows.shape == (n, 10)
    assert torch.equal(rows, teacher_like_logits(n, 10))
    assert not torch.equal(rows, teacher_like_logits(n, 10, seed=1))
    assert not torch.equal(rows[:500], rows[CHUNK:])
    frequencies = torch.bincount(rows.argmax(1), minlength=10) / n
    assert float(frequencies.max()) > 2 * float(frequencies.median())
    assert 4 < float(rows.max(1).values.mean()) < 9


def judged(features: Tensor, k: int = 2, q: int = 1) -> Judge:
    return Judge(Problem(features, k, q))


def test_quality_by_hand() -> None:
    """Two pairs, 2 and 4 apart: 2 (1 + 4) by 4 rows; 83 of the total scatter of 95 is along x."""
    judge = judged(torch.tensor([[0.0, 0.0], [2.0, 0.0], [10.0, 0.0], [10.0, 4.0]]))
    assert judge.inertia(torch.tensor([0, 0, 1, 1])) == pytest.approx(2.5)
    assert judge.inertia(torch.tensor([0, 0, 0, 0])) == pytest.approx(95 / 4)
    assert judge.captured(torch.tensor([[3.0], [0.0]])) == pytest.approx(83 / 95)
    assert judge.captured(torch.eye(2)) == pytest.approx(1)


def test_inertia_does_not_depend_on_where_the_rows_are() -> None:
    """Far from the origin the differences of large numbers must not drown the inertia."""
    rows = teacher_like_logits(300, 6)
    labels = torch.arange(300) % 5
    near, far = judged(rows, 5), judged(rows + 1000, 5)
    assert far.inertia(labels) == pytest.approx(near.inertia(labels), rel=1e-4)


def test_variance_captured_by_native_is_that_of_exact_pca() -> None:
    rows = teacher_like_logits(400, 20)
    singular = torch.linalg.svdvals((rows - rows.mean(0)).double()).square()
    expected = float(singular[:6].sum() / singular.sum())
    assert judged(rows, 8, 6).captured_by_native() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 1, 2, 0])}, "labels are not 4 numbers from 0 to 1"),
        ({"labels": torch.tensor([0, 1])}, "labels are not 4 numbers"),
        ({"prototypes": torch.zeros(3, 2)}, "not of the shapes"),
        ({"prototypes": torch.full((2, 2), math.nan)}, "not finite"),
        ({"proportions": torch.tensor([0.5, 0.4])}, "do not sum to 1"),
    ],
)
def test_what_is_no_dictionary_is_refused(change: dict[str, Tensor], message: str) -> None:
    fine = Solution(torch.tensor([0, 0, 1, 1]), torch.zeros(2, 2), torch.tensor([0.5, 0.5]))
    judge = judged(torch.randn(4, 2))
    judge.check(fine)
    with pytest.raises(ValueError, match=message):
        judge.check(replace(fine, **change))


def test_mean_and_its_standard_error() -> None:
    assert mean_and_error([1.0, 3.0]) == pytest.approx((2.0, 1.0))
    assert math.isnan(mean_and_error([5.0])[1])


def test_floor_by_hand() -> None:
    """(256, 100, 8) with q = 32 and 9 iterations: 2,560,000 for the covariance, 6,400,000 for its 8
    products with 40 vectors, 1,638,400 for the projection, 524,288 for 4 candidates for each of 8
    centres, 131,072 for each of 10 assignments. At d = 10 there are no such products.
    """
    shape = dictionary.find_shapes(["256x100x8"])[0]
    assert dictionary.floor_gflop(shape, 9) * 1e9 == pytest.approx(12_433_408)
    small = dictionary.find_shapes(["256x10x8"])[0]
    expected = 256 * 100 + 2 * 256 * 10 * 8 + 2 * 8 * 4 * 8 * 256 + 2 * 2 * 256 * 8 * 8
    assert dictionary.floor_gflop(small, 1) * 1e9 == pytest.approx(expected)


# --- peers ----------------------------------------------------------------------------------------


def blobs() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    centers = 10 * torch.randn(4, 12, generator=generator)
    rows = centers[torch.arange(240) % 4]
    return rows + 0.3 * torch.randn(240, 12, generator=generator)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_every_peer_builds_a_dictionary(peer: Peer) -> None:
    """Prototypes are the means of the original rows of the peer's own clusters, proportions their
    frequencies, the directions capture what PCA's do, and the best of some seeds finds separated
    clusters as native does.
    """
    # Written for GPUs, but PyTorch: it must be right on the CPU too.
    reason = peer.absent("cuda" if peer.name == "torch-flash-style" else "cpu")
    if reason:
        pytest.skip(reason)
    problem = Problem(blobs(), 4, 3)
    judge = Judge(problem)
    inertias = {"native": [], peer.name: []}
    for seed in range(6):
        for one in (PEERS[0], peer):
            found = one.solve(problem, seed)
            judge.check(found)
            inertias[one.name].append(judge.inertia(found.labels))
            labels = found.labels.long()
            counts = torch.bincount(labels, minlength=4)
            torch.testing.assert_close(found.proportions.float(), counts / 240)
            for i in labels.unique():
                mean = problem.features[labels == i].mean(0)
                torch.testing.assert_close(found.prototypes[i].float(), mean, rtol=1e-4, atol=1e-4)
            if found.basis is not None:
                assert judge.captured(found.basis()) == pytest.approx(
                    judge.captured_by_native(), rel=1e-4
                )
    assert min(inertias[peer.name]) <= 1.3 * min(inertias["native"])


def test_native_comes_first_and_needs_nothing() -> None:
    assert PEERS[0].name == "native"
    assert PEERS[0].absent() == ""


def test_an_absent_peer_says_why() -> None:
    assert "no_such_module" in Peer("x", ("no_such_module",), (), plain_torch).absent()
    assert Peer("x", (), (), plain_torch).absent("cuda") == "does not run on cuda"


OPTIONS = dictionary.Options(seconds=0, min_rounds=1, seeds=2, memory="none")


def test_a_slow_peer_is_predicted_and_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of 1 s and 1 ms a row takes 13.8 s for 12,800 rows, as two smaller runs tell."""
    clock = Machine()
    monkeypatch.setattr(dictionary.time, "perf_counter", lambda: clock.now)

    def solve(problem: Problem, seed: int) -> Solution:
        clock.work(1 + 1e-3 * len(problem.features))
        return plain_torch(problem, seed)

    shape = dictionary.Shape(12_800, 4, 8, 4, 1, 1)
    problem = Problem(teacher_like_logits(shape.n, shape.d), shape.k, shape.q)
    peer = Peer("slow", (), (), solve)
    assert dictionary._unfit(peer, problem, shape, replace(OPTIONS, peer_limit=13.9)) == ""
    reason = dictionary._unfit(peer, problem, shape, replace(OPTIONS, peer_limit=13.7))
    assert reason == "skipped: 14 s expected from 800 rows, the limit is 13.7 s"


def test_a_shape_is_measured_and_absent_peers_are_listed() -> None:
    """A row for each peer, in order; who could not run has a reason instead of figures."""

    def broken(problem: Problem, seed: int) -> Solution:
        raise RuntimeError("no kernel\nfor this")

    peers = [
        PEERS[0],
        Peer("torch", (), (), plain_torch),
        Peer("gone", ("gone_",), (), plain_torch),
        Peer("broken", (), (), broken),
    ]
    shape = dictionary.Shape(200, 8, 4, 3, 1, 1)
    rows = dictionary.bench_shape(
        shape, peers, OPTIONS, Timer(time.process_time, lambda: 1.0), 100.0
    )
    assert [row.peer for row in rows] == ["native", "torch", "gone", "broken"]
    assert (rows[2].rounds, rows[2].note) == (0, "not installed: No module named 'gone_'")
    assert (rows[3].rounds, rows[3].note) == (0, "failed: RuntimeError: no kernel for this")
    for row in rows[:2]:
        assert (row.seeds, row.note) == (2, "")
        assert row.iterations >= 1
        assert 0 < row.captured < 1
    assert rows[0].inertia == pytest.approx(rows[1].inertia, rel=0.3)
    assert rows[0].captured == pytest.approx(rows[1].captured, rel=1e-4)
    assert rows[0].floor_ms == pytest.approx(
        dictionary.floor_gflop(shape, rows[0].iterations) / 100 * 1e3
    )


def test_peak_memory_of_a_known_allocation() -> None:
    """After a reset the high-water mark counts from what is resident: 64 MiB that come and go."""
    if not memory._reset_peak():
        pytest.skip("the kernel does not reset the mark here")
    before = memory._status("VmRSS")
    block = torch.ones(16 << 20)
    del block
    found = (memory._status("VmHWM") - before) / 1024
    assert 60 < found < 80


# --- files ----------------------------------------------------------------------------------------


def row(peer: str, ms: float, **changes: object) -> dictionary.Row:
    fine = dictionary.Row(
        *("256x10x8", 256, 10, 8, 8, peer, ms, ms, ms, 9, 1, 0, 1.0, ms / 2.0, 20.0, 0.1, 0.9),
        *(5, 8.5, math.nan, math.nan, 0.5, ms / 0.5, math.nan, math.nan, ""),
    )
    return replace(fine, **changes)


ABOUT = {
    "machine": "a machine, 1 of 2 cores",
    "build": "simd avx2",
    "commit": "abc",
    "date": "2026-01-01",
    "clock": "CPU time",
}
ROWS = [
    row("native", 2.0),
    row("scikit-learn", 50.0),
    row("torch", 10.0),
    dictionary.absent_row("256x10x8", 256, 10, 8, 8, "gone", "not installed: gone"),
]


def test_result_files_come_back(tmp_path: Path) -> None:
    """What is loaded is what was saved, NaN and notes included, and saves to the same bytes."""
    path = tmp_path / "a.csv"
    harness.save(path, ABOUT, ROWS)
    about, rows = harness.load(path, dictionary.Row)
    assert about == ABOUT
    for found, expected in zip(rows, ROWS, strict=True):
        for a, b in zip(astuple(found), astuple(expected), strict=True):
            assert a == b or (math.isnan(a) and math.isnan(b))
    harness.save(tmp_path / "b.csv", about, rows)
    assert (tmp_path / "b.csv").read_bytes() == path.read_bytes()
    with pytest.raises(ValueError, match="was it written by another version"):
        harness.load(path, compensation.Row)


def test_the_table_of_known_rows() -> None:
    table = report.dictionary_table(ABOUT, ROWS).splitlines()
    assert table[2] == (
        "| 256 x 10, 8, 8 | 2 ms | torch | 10 ms, x5.00 | 50 ms, x25.00 | +0.00% | 4.00 |"
    )
    assert table[-1] == "a machine, 1 of 2 cores; simd avx2; commit abc; 2026-01-01."


def test_the_best_peer_counts_whatever_its_quality() -> None:
    """The fastest peer is the one to beat; a ratio is not reached at a worse inertia."""
    assert dictionary.find_best(ROWS).peer == "torch"  # type: ignore[union-attr]
    assert dictionary.find_best(ROWS[:1]) is None
    line = dictionary.summarize(ROWS)[0]
    assert "best (torch) x5.00 (>= 4), inertia no worse [yes]" in line
    assert "scikit-learn x25.00 (>= 36), inertia no worse [no]" in line
    worse = [row("native", 2.0, inertia=20.5), *ROWS[1:]]
    assert "x5.00 (>= 4), but inertia +2.50%" in dictionary.summarize(worse)[0]
    assert "[yes]" not in dictionary.summarize(worse)[0]
    within_error = row("native", 2.0, inertia=20.25)
    assert dictionary.is_no_worse(within_error, ROWS[1])
    assert not dictionary.is_no_worse(row("native", 2.0, captured=0.8), ROWS[1])


def test_the_plot_is_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    a, b = (report.plot_dictionary(ABOUT, ROWS, tmp_path / f"{name}.svg") for name in "ab")
    assert a.read_bytes() == b.read_bytes()
    text = a.read_text()
    assert all(word in text for word in ("torch", "scikit-learn", "not installed", "n=256 d=10"))


def test_the_readme_shows_the_saved_figures() -> None:
    """`kdci bench readme` would change nothing."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.fill_readme(text) == text
    with pytest.raises(ValueError, match="bench:dictionary"):
        report.fill_readme("no markers")


def test_what_a_study_found_is_kept_with_its_origin(tmp_path: Path) -> None:
    """All under the study's name, nothing of an earlier copy, and no run of unknown code."""
    folder, results = tmp_path / "run", tmp_path / "results"
    folder.mkdir()
    results.mkdir()
    with pytest.raises(FileNotFoundError, match="give the folder of a study"):
        save_study(folder, results)
    (folder / "table.md").write_text("# Study tiny\n")
    (folder / "curves.png").write_bytes(b"png")
    for name in ("health", "timings"):
        (folder / f"{name}.csv").write_text(f"study\n{name}\n")
    (folder / "results.csv").write_text("study,commit\n")
    with pytest.raises(ValueError, match="holds no run that is done"):
        save_study(folder, results)
    (folder / "results.csv").write_text("study,commit\ntiny,\n")
    with pytest.raises(ValueError, match="runs of unknown code"):
        save_study(folder, results)
    (folder / "results.csv").write_text("study,commit\ntiny,abc\n")
    for name in ("study-tiny-old.png", "study-tinyer.csv"):
        (results / name).touch()
    page = save_study(folder, results).read_text()
    assert page.startswith("# Study tiny\n")
    assert "at commit abc on " in page
    assert "![curves](study-tiny-curves.png)" in page
    assert {path.name for path in results.iterdir()} == {
        *("study-tiny.md", "study-tiny.csv", "study-tiny-health.csv", "study-tiny-timings.csv"),
        *("study-tiny-curves.png", "study-tinyer.csv"),
    }


def test_result_files_name_no_host_and_no_path() -> None:
    texts = ["\n".join(harness.header(1, ["numpy", "no-such-package"]).values())]
    assert "no-such-package absent" in texts[0]
    texts += [path.read_text(encoding="utf-8") for path in harness.RESULTS.glob("*.csv")]
    assert len(texts) >= 3
    for text in texts:
        assert not re.search(r"(^|\s)/\w", text, re.M)
        assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", text)


def test_mistakes_on_the_command_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.threads.set_environment", lambda threads: None)
    for words, message in (
        (["dictionary", "--shapes", "1x2x3"], "unknown shape '1x2x3': expected some of 256x10x8"),
        (["dictionary", "--peers", "nobody"], "unknown peer 'nobody': expected some of native"),
        (["dictionary", "--seconds", "0"], "seconds=0.0 must be > 0"),
        (["compensation", "--shapes", "1x2"], "unknown shape '1x2': expected some of 256x10x8x256"),
        (["compensation", "--seconds", "0"], "seconds=0.0 must be > 0"),
        (["step", "--networks", "resnet"], "unknown name 'resnet': expected some of lenet5"),
        (["step", "--rounds", "-1"], "rounds=-1 must be > 0"),
    ):
        assert main(["bench", *words]) == 2
        assert message in capsys.readouterr().err


def test_an_installation_without_benchmarks_says_where_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("python_models.cli.__file__", str(tmp_path / "python_models" / "cli.py"))
    assert main(["bench", "dictionary"]) == 2
    assert "kdci bench needs a clone of the repository" in capsys.readouterr().err
