# SPDX-License-Identifier: Apache-2.0
"""What a report measures anew: it looks at students and synthetic images beside test images.

Nothing here trains. A part that a run cannot give, since a file, a network or the data is missing,
is left out, and the reason is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from python_models.checkpoint import fingerprint, load_checkpoint
from python_models.config import ReportConfig, distill_config
from python_models.data import LabelledData, dataset_spec, load_labelled, to_float, to_uint8
from python_models.engine import Distillation
from python_models.errors import UserError
from python_models.methods import Method
from python_models.networks import Classifier
from python_models.report.collect import Run, Task
from python_models.teacher import LoadedNetwork, load_network, load_teacher, resolve_device

BATCH = 500
"""Images in a forward pass."""
GRID_CLASSES = 10
"""Classes in an image grid, a row each."""
GRID_COLUMNS = 8
"""Images of a class in it."""
EMBEDDED_IMAGES = 1000
"""Test images in an embedding."""
EMBEDDED_CLASSES = 20
"""Classes in an embedding: more colours cannot be told apart."""


# --- Frechet distance -----------------------------------------------------------------------------


def frechet_distance(first: Tensor, second: Tensor) -> float:
    r"""Return the Frechet distance between normal distributions fitted to two sets of features.

    .. math:: |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2})

    (Dowson and Landau, 1982; with the features of an Inception network it is the FID of Heusel et
    al., 2017.) The covariances are the unbiased ones. Small sets make it larger, so compare
    distances of sets of the same size alone.

    Args:
        first: ``[n, d]`` with n >= 2, floating point; computed in float64.
        second: ``[m, d]`` with m >= 2.

    Returns:
        The distance, >= 0.

    Raises:
        ValueError: If a set has fewer than 2 rows, or their columns differ.

    Example:
        >>> frechet_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [5.0]]))
        9.0
    """
    for name, features in (("first", first), ("second", second)):
        if features.dim() != 2 or len(features) < 2:
            raise ValueError(
                f"{name} must be [n, d] with n >= 2 rows, got shape {list(features.shape)}"
            )
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"first and second must have as many columns, got {first.shape[1]} and "
            f"{second.shape[1]}"
        )
    first, second = first.double(), second.double()
    root = _symmetric_root(first.T.cov().reshape(2 * (first.shape[1],)))
    covariance = second.T.cov().reshape(root.shape)
    # The product C1 C2 is not symmetric, but it has the eigenvalues of this matrix, which is.
    product = root @ covariance @ root
    values = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0)
    shift = (first.mean(0) - second.mean(0)).square().sum()
    distance = shift + root.square().sum() + covariance.trace() - 2 * values.sqrt().sum()
    return max(0.0, float(distance))


def _symmetric_root(matrix: Tensor) -> Tensor:
    """Return the square root of a symmetric positive semi-definite matrix ``[d, d]``."""
    values, vectors = torch.linalg.eigh(matrix)
    # Rounding may leave eigenvalues of 0 a little below it.
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


# --- the task -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Original:
    """The original data, as far as it is there.

    Attributes:
        class_names: A name per class.
        test: The test images, or None.
        why_not: Why there are none.
    """

    class_names: tuple[str, ...]
    test: LabelledData | None
    why_not: str = ""

    @property
    def proportions(self) -> Tensor:
        """Share of each class, float64 ``[c]``: of the test labels, or else uniform."""
        classes = len(self.class_names)
        if self.test is None:
            return torch.full((classes,), 1 / max(classes, 1), dtype=torch.float64)
        counts = torch.bincount(self.test.labels, minlength=classes).double()
        return counts / counts.sum()


def load_original(task: Task, runs: list[Run], config: ReportConfig) -> Original:
    """Load the task's test images, where the runs may use them and they are there."""
    root = config.data_root or Path(str(runs[0].settings.get("data_root", "data")))
    names = tuple(map(str, range(task.num_classes or 0)))
    if task.dataset is None:
        return Original(names, None, "the runs name no dataset")
    try:
        spec = dataset_spec(task.dataset, root, may_open_train=False)
        if task.num_classes in (None, spec.num_classes):
            names = spec.class_names
        if not any(run.settings.get("evaluate", True) for run in runs):
            return Original(names, None, "the runs were made with --no-evaluate")
        test = load_labelled(task.dataset, "test", root)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        return Original(
            names,
            None,
            f"the test images of {task.dataset} were not loaded ({reason}): give --data-root",
        )
    if task.num_classes not in (None, test.num_classes):
        reason = f"{task.dataset} has {test.num_classes} classes, the students {task.num_classes}"
        return Original(names, None, reason)
    if not isinstance(test, LabelledData):
        reason = f"the test images of {task.dataset} are too many to be kept in memory: {len(test)}"
        return Original(test.class_names, None, reason)
    return Original(test.class_names, test)


# --- a run ----------------------------------------------------------------------------------------


@dataclass(eq=False)
class Findings:
    """What was found out about a run; None (or empty) where it could not be.

    Attributes:
        class_counts: How often the teacher saw each class in the training images, int64 ``[c]``.
        teacher: Hash of the teacher's weights.
        prototypes: Those of the last confounder dictionary, ``[K, c]``.
        proportions: Theirs, ``[K]``.
        images: Synthetic (or sampled) images by the teacher's class, see `by_class`.
        frechet: Frechet distance between them and the test images, in the teacher's features.
        frechet_images: Number of images of each kind in it.
        frechet_floor: The same between these test images and as many others.
        predictions: The student's classes of all test images, int64 ``[n]``.
        embedding: t-SNE of its features of some test images, float64 ``[m, 2]``.
        embedding_labels: Their classes, int64 ``[m]``.
        left_out: What is None, and why.
    """

    class_counts: Tensor | None = None
    teacher: str | None = None
    prototypes: Tensor | None = None
    proportions: Tensor | None = None
    images: Tensor | None = None
    frechet: float | None = None
    frechet_images: int = 0
    frechet_floor: float | None = None
    predictions: Tensor | None = None
    embedding: Tensor | None = None
    embedding_labels: Tensor | None = None
    left_out: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def leaving_out(self, *parts: str) -> Iterator[None]:
        """Keep the reason why parts are left out, where the block fails for the user's data."""
        try:
            yield
        except KeyError as error:
            self._leave_out(parts, f"its checkpoint lacks {error}")
        except ModuleNotFoundError as error:
            self._leave_out(parts, f"the package {error.name} is not installed")
        # Networks of other shapes raise RuntimeError, and those without features TypeError.
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            self._leave_out(parts, str(error).splitlines()[0])

    def _leave_out(self, parts: tuple[str, ...], reason: str) -> None:
        for part in parts:
            self.left_out.setdefault(part, reason)


class Measurer:
    """Measures runs of one task, one after the other.

    Args:
        original: The original data.
        config: Of the report.

    Attributes:
        num_classes: Of the task; 0 until a run says it, where the original data does not.

    Raises:
        UserError: If the device cannot be used.
    """

    def __init__(self, original: Original, config: ReportConfig) -> None:
        self.original = original
        self.config = config
        self.device = resolve_device(config.device)
        self.num_classes = len(original.class_names)
        self._real: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def measure(self, run: Run) -> Findings:
        """Return what can be found out about a run."""
        found = Findings()
        synthetic = ("images", "frechet")
        with found.leaving_out("class_counts", "dictionary", *synthetic):
            state = load_checkpoint(run.folder.checkpoint)["run"]
            self._require_classes(len(state["class_counts"]))
            found.class_counts, found.teacher = state["class_counts"], state["teacher"]
            if state["kdci"] is not None:
                found.prototypes = state["kdci"]["prototypes"]
                found.proportions = state["kdci"]["proportions"]
            with found.leaving_out(*synthetic):
                self._measure_images(run, state, found)
        with found.leaving_out("predictions", "embedding"):
            self._measure_student(run, found)
        return found

    def _require_classes(self, found: int) -> None:
        self.num_classes = self.num_classes or found
        if found != self.num_classes:
            raise UserError(
                f"its checkpoint is of {found} classes, but the task has {self.num_classes}"
            )

    def _measure_images(self, run: Run, state: Mapping[str, Any], found: Findings) -> None:
        """Restore the method from the last checkpoint, and look at its images."""
        method, teacher = self._restore(run, state)
        images = _distinct(method.preview(self.config.images))
        network = teacher.classifier
        logits = torch.cat([network(part) for part in torch.split(images, BATCH)])
        found.images = by_class(images.cpu(), logits.argmax(1).cpu(), logits.shape[1])
        with found.leaving_out("frechet"):
            test = self._test_images(teacher)
            count = min(len(images), len(test))
            real, other = self._real_features(network, state["teacher"], test, count)
            synthetic = _features(network, images[:count], self.device)
            found.frechet = frechet_distance(synthetic, real)
            found.frechet_images = count
            if len(other) == count:
                found.frechet_floor = frechet_distance(other, real)

    def _restore(self, run: Run, state: Mapping[str, Any]) -> tuple[Method[Any], LoadedNetwork]:
        values: dict[str, Any] = {"device": self.config.device}
        if self.config.teacher is not None:
            values |= {"teacher": self.config.teacher, "teacher_weights": None, "teacher_args": {}}
        if self.config.data_root is not None:
            values["data_root"] = self.config.data_root
        config = distill_config(config=run.folder.config, **values)
        teacher = load_teacher(config)
        if fingerprint(teacher.classifier) != state["teacher"]:
            raise UserError(
                f"teacher={config.task.teacher} has other weights than the run's teacher had: give "
                "that one as --teacher"
            )
        method = Distillation(config, teacher, self.device).method
        method.load_state_dict(state["method"])
        return method, teacher

    def _test_images(self, network: LoadedNetwork) -> LabelledData:
        test = self.original.test
        if test is None:
            raise UserError(self.original.why_not)
        network.require_fit(test, "of the runs")
        return test

    def _real_features(
        self, teacher: Classifier, name: str, test: LabelledData, count: int
    ) -> tuple[Tensor, Tensor]:
        """Return the teacher's features of test images and, if there are, of as many others."""
        if (name, count) not in self._real:
            chosen = spread(len(test), 2 * count)
            real, other = chosen[::2], chosen[1::2]
            if len(chosen) < 2 * count:
                real, other = spread(len(test), count), chosen[:0]
            self._real[name, count] = (
                _features(teacher, test.images[real], self.device),
                _features(teacher, test.images[other], self.device),
            )
        return self._real[name, count]

    def _measure_student(self, run: Run, found: Findings) -> None:
        if run.weights is None:
            raise UserError("it has no student.safetensors: the run has not finished")
        student = load_network(str(run.weights), None, None, "run")
        test = self._test_images(student)
        network = student.classifier.to(self.device)
        logits = [
            network(to_float(part.to(self.device))) for part in torch.split(test.images, BATCH)
        ]
        found.predictions = torch.cat(logits).argmax(1).cpu()
        with found.leaving_out("embedding"):
            few = (test.labels < EMBEDDED_CLASSES).nonzero().squeeze(1)
            chosen = few[spread(len(few), EMBEDDED_IMAGES)]
            found.embedding = embed(_features(network, test.images[chosen], self.device))
            found.embedding_labels = test.labels[chosen]


def _features(network: Classifier, images: Tensor, device: torch.device) -> Tensor:
    """Return a network's penultimate vectors of images, ``[n, d]`` on the CPU."""
    parts = [network.features(to_float(part.to(device))) for part in torch.split(images, BATCH)]
    return torch.cat(parts).float().cpu()


def spread(total: int, count: int) -> Tensor:
    """Return at most ``count`` distinct positions of ``total``, evenly over all of them."""
    count = min(total, count)
    return torch.arange(count) * total // max(count, 1)


def _distinct(images: Tensor) -> Tensor:
    """Return images without repetitions: a pool that holds fewer than asked for repeats them."""
    rows = to_uint8(images).flatten(1).cpu().numpy()
    first: dict[bytes, int] = {}
    for index, row in enumerate(rows):
        first.setdefault(row.tobytes(), index)
    return images[torch.tensor(list(first.values()), device=images.device)]


def by_class(images: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return the first images of each of the first classes.

    Args:
        images: ``[n, c, h, w]``, uint8 or in [0, 1].
        labels: int64 ``[n]``.
        num_classes: Number of classes.

    Returns:
        `GRID_COLUMNS` images of each of at most `GRID_CLASSES` classes, ``[n, c, h, w]`` in [0, 1],
        a class after the other; white where a class has fewer images.
    """
    grid = torch.ones(min(num_classes, GRID_CLASSES), GRID_COLUMNS, *images.shape[1:])
    for label, row in enumerate(grid):
        chosen = (labels == label).nonzero().squeeze(1)[:GRID_COLUMNS]
        row[: len(chosen)] = to_float(images[chosen])
    return grid.flatten(0, 1)


def embed(features: Tensor) -> Tensor:
    """Return the t-SNE of features ``[n, d]``, ``[n, 2]``; the same in each call.

    Raises:
        UserError: Without scikit-learn, and if there are fewer than 4 rows or all are the same.
    """
    try:
        from sklearn.manifold import TSNE  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError("scikit-learn is not installed: pip install scikit-learn") from error
    if len(features) < 4 or not (features != features[0]).any():
        raise UserError("there are too few different features for an embedding")
    perplexity = min(30.0, (len(features) - 1) / 3)
    model = TSNE(perplexity=perplexity, init="pca", random_state=0)
    return torch.from_numpy(model.fit_transform(features.numpy()))
