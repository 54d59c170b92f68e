# SPDX-License-Identifier: Apache-2.0
"""DFND: selection in one pass, and its loss by hand."""

import gc
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import compensated
from hypothesis import given
from hypothesis import strategies as st
from tiny_task import CLASSES, in_double, make_task
from tiny_task import start as start_run
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import selection
from python_models.data import open_unlabelled, to_float
from python_models.engine import Distillation
from python_models.errors import UserError
from python_models.methods import sampling
from python_models.methods.sampling import RandomOrder
from python_models.selection import ROOM, Ranking, TopRows, select_images


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    return make_task(tmp_path)


def start(task: dict[str, Any], **values: Any) -> Distillation:
    return start_run(task, "dfnd", **values)


# --- the best rows of a stream -----------------------------------------------------------------


@given(
    levels=st.lists(st.integers(0, 6), max_size=60),
    count=st.integers(1, 30),
    width=st.sampled_from([1, 3, 40]),
    batch=st.integers(1, 70),
    slack=st.integers(1, 9),
)
def test_the_best_rows_are_those_of_the_whole_sorted_stream(
    levels: list[int], count: int, width: int, batch: int, slack: int
) -> None:
    """However the stream is cut and however little room there is: the largest values first, of
    equal ones the earlier; level 0 stands for NaN, which is never kept.
    """
    values = torch.tensor([math.nan if level == 0 else level / 7 for level in levels])
    positions = 10 + 3 * torch.arange(len(levels))
    rows = torch.rand(len(levels), width)
    top = TopRows(count, width)
    for name in ("_values", "_positions", "_rows"):
        setattr(top, name, getattr(top, name)[: count + slack].clone())
    for parts in zip(*(torch.split(x, batch) for x in (values, positions, rows)), strict=True):
        top.add(*parts)
    order = [i for i, level in enumerate(levels) if level]
    order = sorted(order, key=lambda i: (-levels[i], i))[:count]
    found = top.result()
    for column, expected in zip(found, (values, positions, rows), strict=True):
        assert torch.equal(column, expected[order])


def test_the_best_rows_need_a_count_and_a_width() -> None:
    for arguments, name in (((0, 3), "count"), ((3, 0), "width")):
        with pytest.raises(ValueError, match=f"{name}=0 must be >= 1"):
            TopRows(*arguments)


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensors made within it that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def freed() -> None:
            self._known.discard(key)
            self.now -= size

        weakref.finalize(storage, freed)


def test_live_memory_is_counted_rightly() -> None:
    """The gauge of the next test: views add nothing, what is freed is taken away."""
    with LiveMemory() as memory:
        a = torch.zeros(1000)
        b = a[:10].view(2, 5)
        assert memory.now == 4000
        c = a + 1
        assert memory.now == 8000
        del a, b
        assert memory.now == 4000
        del c
    assert (memory.now, memory.peak) == (0, 8000)


STREAM_BATCH = 500


def peak_of_selection(files: int, count: int, classes: int) -> int:
    """Bytes that selecting from a stream of so many files takes at most."""

    def stream() -> Any:
        generator = torch.Generator().manual_seed(0)
        for begin in range(0, files, STREAM_BATCH):
            # Ever more certain, so that every batch drives others out.
            sharpness = 1 + begin / files
            logits = sharpness * torch.randn(STREAM_BATCH, classes, generator=generator)
            yield torch.arange(begin, begin + STREAM_BATCH), logits

    gc.collect()
    with LiveMemory() as memory:
        found = select_images(stream(), count, classes, "highest confidence")
        assert len(found.indices) == count
    return memory.peak


@pytest.mark.parametrize(("count", "classes"), [(20_000, 10), (4_000, 300)])
def test_memory_of_the_selection_does_not_grow_with_the_stream(count: int, classes: int) -> None:
    """It is that of what is kept (position, certainty, logits), of the room for what is new, of
    what moves from there to the kept, and of a few copies of a batch.
    """
    batch = 4 * (STREAM_BATCH * 4 * classes)
    for files in (4 * count, 20 * count):
        peak = peak_of_selection(files, count, classes)
        assert peak < (count + 2 * ROOM // classes) * (8 + 4 + 4 * classes) + batch


def test_the_benchmark_measures_a_selection_in_a_process_of_its_own() -> None:
    """A small stream: what the process grows by holds what is kept, and is far from the stream."""
    row = selection.bench_shape(files=60_000, classes=100, select=20_000, threads=1)
    assert row.kept_mb == pytest.approx(20_000 * 412 / 1e6)
    assert row.seconds > 0
    assert row.files_per_s == pytest.approx(row.files / row.seconds)
    text = selection.describe(row)
    assert "60,000 images, 100 classes, 20,000 selected" in text
    if math.isfinite(row.growth_mb):  # where the kernel tells
        assert 0.9 * row.kept_mb < row.growth_mb < 60_000 * 412 / 1e6
        assert "(< 200 [yes])" in text


RANKINGS: list[Ranking] = ["highest confidence", "lowest confidence", "highest entropy"]


@pytest.mark.parametrize("by", RANKINGS)
@pytest.mark.parametrize("count", [1, 7, 20, 100])
def test_selection_is_that_of_the_whole_sorted_set(count: int, by: Ranking) -> None:
    """Three classes, so that entropy and confidence rank images differently."""
    logits = 2 * torch.randn(41, 3, generator=torch.Generator().manual_seed(0))
    logits[30] = logits[3]
    p = logits.softmax(1)
    confidence = p.amax(1)
    worth = {
        "highest confidence": confidence,
        "lowest confidence": -confidence,
        "highest entropy": -(p * p.log()).sum(1),
    }[by]
    stream = zip(torch.split(torch.arange(41), 5), torch.split(logits, 5), strict=True)
    found = select_images(stream, count, 3, by)
    order = sorted(range(41), key=lambda i: (-worth[i].item(), i))
    assert found.indices.tolist() == order[:count]
    torch.testing.assert_close(found.logits, logits[found.indices])
    assert found.confidence == pytest.approx(confidence.mean().item(), rel=1e-5)


@pytest.mark.parametrize("by", RANKINGS)
def test_selection_leaves_out_images_without_a_confidence(by: Ranking) -> None:
    """NaN is no certainty: it neither is kept nor spoils the mean."""
    logits = torch.randn(9, 3)
    logits[:2] = torch.nan
    logits[2, 0] = torch.inf  # its softmax is NaN
    found = select_images([(torch.arange(9), logits)], 8, 3, by)
    assert sorted(found.indices.tolist()) == list(range(3, 9))
    expected = logits[3:].softmax(1).amax(1).sum() / 9
    assert found.confidence == pytest.approx(expected.item(), rel=1e-6)
    empty = select_images([], 8, 3, by)
    assert (len(empty.indices), empty.logits.shape, empty.confidence) == (0, (0, 3), 0.0)


def test_a_teacher_without_any_confidence_is_an_error(task: dict[str, Any]) -> None:
    run = start(task)
    with torch.no_grad():
        next(run.teacher.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match="logits are NaN for every unlabelled image"):
        run.prepare()


# --- the method --------------------------------------------------------------------------------


def test_every_candidate_is_seen_once_and_the_kept_ones_read_again(
    task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass of the teacher in eval mode over the unaugmented images, then the kept by index."""
    monkeypatch.setattr("python_models.data.unlabelled.READ_SIZE", 16)
    run = start(task)
    method: Any = run.method
    seen: list[Tensor] = []
    original = run.teacher.forward

    def watched(images: Tensor) -> Tensor:
        assert not run.teacher.training
        seen.append(images)
        return original(images)

    monkeypatch.setattr(run.teacher, "forward", watched)
    run.prepare()
    assert [len(images) for images in seen] == [16, 16, 16, 2]
    candidates = open_unlabelled("wild.npz", task["data_root"], 32, 1).load()
    assert torch.equal(torch.cat(seen), to_float(candidates))
    assert torch.equal(method.images, candidates[method.indices])
    confidence = original(to_float(method.images)).softmax(1).amax(1)
    assert (confidence.diff() <= 1e-6).all()


def by_hand(
    s: Tensor, t: Tensor, theta: Tensor, diagonal: float, weight: float, temperature: float
) -> dict[str, float]:
    """The two terms as the formulas read, with loops."""
    classes = s.shape[1]
    q = torch.zeros(classes, classes, dtype=torch.float64)
    for i in range(classes):
        shares = iter(theta[i].exp() / theta[i].exp().sum())
        for j in range(classes):
            q[i, j] = diagonal if i == j else (1 - diagonal) * next(shares)
    assert torch.allclose(q.sum(1), torch.ones(classes, dtype=torch.float64))

    def softmax(x: Tensor) -> Tensor:
        return x.exp() / x.exp().sum(1, keepdim=True)

    adapted = softmax(s) @ q
    noise = -sum(adapted[b, t[b].argmax()].log() for b in range(len(t))) / len(t)
    p, r = softmax(t / temperature), softmax(s / temperature)
    kl = (p * (p / r).log()).sum() / len(t)
    return {"kd": weight * temperature**2 * kl.item(), "noise": float(noise)}


@pytest.mark.parametrize("kdci", [False, True], ids=["vanilla", "kdci"])
@pytest.mark.parametrize(
    ("form", "weight", "temperature"), [("code", 1.0, 4.0), ("paper", 4.0, 1.0)]
)
def test_the_terms_of_a_step_by_hand(
    form: str, weight: float, temperature: float, kdci: bool, task: dict[str, Any]
) -> None:
    """Both forms of the loss, in float64: the code's 16 KL_4 + NLL, the paper's H_CE + 4 KL. With
    KDCI the compensated student enters the divergence, the bare one the noise adaptation.
    """
    settings = {} if form == "code" else {"kd_weight": weight, "temperature": temperature}
    run = start(task, kdci=kdci, diagonal=0.9, **settings)
    run.prepare()
    method: Any = run.method
    in_double(run)
    method.theta = nn.Parameter(torch.randn(CLASSES, CLASSES - 1, dtype=torch.float64))
    batch = method.next_batch()
    batch.images = batch.images.double()
    run.student.eval()  # the same logits twice
    t = run._teacher_logits(batch)
    found = method.student_losses(batch, run._divergence)
    with torch.no_grad():
        s, theta = run.student(batch.images), method.theta.detach()
        expected = by_hand(s, t, theta, 0.9, weight, temperature)
        if run.kdci is not None:
            prior = compensated(run.kdci, s) - s
            assert prior.abs().max() > 1e-6
            expected["kd"] = by_hand(s + prior, t, theta, 0.9, weight, temperature)["kd"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == torch.float64
        assert found[name].item() == pytest.approx(value, rel=1e-6, abs=1e-12), name


def test_images_that_no_memory_holds_are_refused_before_the_selection(
    task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling.os, "sysconf", lambda name: 100)
    with pytest.raises(UserError, match=r"select=30: 30 images of \[1, 32, 32\] take .* GiB, but"):
        start(task)
    monkeypatch.setattr(sampling.os, "sysconf", lambda name: 1000)
    start(task)


def test_dfnd_estimates_its_diagonal_from_all_unlabelled_images(task: dict[str, Any]) -> None:
    run = start(task)
    candidates = run._open_unlabelled().load()
    run.prepare()
    method: Any = run.method
    assert len(method.images) < len(candidates)
    with torch.no_grad():
        confidence = run.teacher(to_float(candidates)).softmax(1).amax(1).mean().item()
    assert method.diagonal == pytest.approx(confidence, rel=1e-5)
    before = method.theta.detach().clone()
    run.advance()
    assert not torch.equal(method.theta, before)


@pytest.mark.parametrize("value", [0.0, 1.0, 1.5])
def test_dfnd_refuses_an_impossible_diagonal(value: float, task: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"diagonal={value} must lie between 0 and 1"):
        start(task, diagonal=value)


def test_dfnd_goes_through_its_images_without_repetition(task: dict[str, Any]) -> None:
    run = start(task, batch_size=10, crop=0, flip=False)
    run.prepare()
    seen = torch.cat([run.method.next_batch().images for _ in range(3)])
    expected = to_float(run.method.images)  # type: ignore[attr-defined]
    assert torch.equal(seen.flatten(1).sum(1).sort()[0], expected.flatten(1).sum(1).sort()[0])
    assert run.steps_per_epoch == 3


def test_an_order_shows_every_row_once_a_pass() -> None:
    order = RandomOrder(torch.Generator().manual_seed(0), torch.device("cpu"))
    order.reset(23)
    passes = [torch.cat([order.take(5) for _ in range(4)]) for _ in range(2)]
    assert all(len(set(positions.tolist())) == 20 for positions in passes)
    assert passes[0].tolist() != passes[1].tolist()
    order.reset(3)
    assert sorted(order.take(7)[:6].tolist()) == [0, 0, 1, 1, 2, 2]


def test_sampling_needs_images(task: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--unlabelled"):
        start(task, unlabelled=None)
