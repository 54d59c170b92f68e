# SPDX-License-Identifier: Apache-2.0
"""Labelled datasets that are MATLAB files or folders, in memory and opened as needed."""

import builtins
import gzip
import io
import os
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_data import random_images, save_image, write_npz
from tiny_task import make_task, tiny_config
from torch import Tensor, nn

from python_models.config import TrainTeacherConfig
from python_models.data import (
    CorruptDataError,
    LabelledData,
    LabelledFiles,
    MissingDataError,
    dataset_spec,
    labelled,
    load_labelled,
    to_float,
)
from python_models.distill import distill
from python_models.engine import Distillation
from python_models.errors import UserError
from python_models.evaluate import accuracies
from python_models.teacher import load_network, train_teacher


def filled(value: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.full((height, width, 3), value, dtype=np.uint8)


def make_tree(root: Path, split: str, classes: dict[str, list[int]], size: int = 8) -> None:
    """Write `split/<class>/<i>.png`, filled with the values given for each class."""
    for name, values in classes.items():
        (root / split / name).mkdir(parents=True, exist_ok=True)
        for i, value in enumerate(values):
            save_image(root / split / name / f"{i}.png", filled(value, size, size))


@pytest.fixture
def lazily(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no folder fit in memory."""
    monkeypatch.setattr(labelled, "IN_MEMORY_BYTES", 0)


# --- SVHN --------------------------------------------------------------------------------------


def svhn_bytes(images: Any, labels: Any) -> bytes:
    matlab = pytest.importorskip("scipy.io")
    file = io.BytesIO()
    matlab.savemat(file, {"X": images, "y": labels})
    return file.getvalue()


SVHN_IMAGES = random_images(32, 32, 3, 4)
SVHN_LABELS = np.array([[1], [10], [9], [2]], dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(("split", "folder"), [("train", "."), ("test", "svhn"), ("extra", "SVHN")])
def test_svhn(tmp_path: Path, split: str, folder: str, suffix: str) -> None:
    """The layout of torchvision; the file's label 10 is the digit 0."""
    (tmp_path / folder).mkdir(exist_ok=True)
    content = svhn_bytes(SVHN_IMAGES, SVHN_LABELS)
    path = tmp_path / folder / f"{split}_32x32.mat{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    data = load_labelled("svhn", split, tmp_path)
    assert isinstance(data, LabelledData)
    assert torch.equal(data.images, torch.from_numpy(SVHN_IMAGES).permute(3, 2, 0, 1))
    assert data.labels.tolist() == [1, 0, 9, 2]
    assert (data.num_classes, data.image_shape) == (10, (3, 32, 32))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable MATLAB file"),
        (b"<html>" * 100, "not a readable MATLAB file"),
        (svhn_bytes(SVHN_IMAGES, SVHN_LABELS)[:-100], "not a readable MATLAB file"),
        (svhn_bytes(SVHN_IMAGES[:8], SVHN_LABELS), r"\[32, 32, 3, n\], got uint8 \[8, 32, 3, 4\]"),
        (svhn_bytes(SVHN_IMAGES / 255, SVHN_LABELS), "got float64"),
        (svhn_bytes(SVHN_IMAGES, SVHN_LABELS[:3]), "has 4 images but 3 labels"),
        (svhn_bytes(SVHN_IMAGES, SVHN_LABELS + 9), r"must lie in 1\.\.10, got 19"),
        (svhn_bytes(SVHN_IMAGES, SVHN_LABELS / 2), "labels must be integers"),
        (svhn_bytes(SVHN_IMAGES[..., :0], SVHN_LABELS[:0]), "holds no images"),
    ],
)
def test_damaged_svhn(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "test_32x32.mat").write_bytes(content)
    with pytest.raises(CorruptDataError, match=message) as caught:
        load_labelled("svhn", "test", tmp_path)
    assert str(tmp_path / "test_32x32.mat") in str(caught.value)


def test_svhn_is_downloaded_by_its_own_signature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(root: str, split: str, download: bool) -> None:
        Path(root, f"{split}_32x32.mat").write_bytes(svhn_bytes(SVHN_IMAGES, SVHN_LABELS))

    module = types.ModuleType("torchvision.datasets")
    module.SVHN = fetch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)
    assert len(load_labelled("svhn", "test", tmp_path, download=True)) == 4


# --- folders -----------------------------------------------------------------------------------

TINY_CLASSES = [f"n{i:08}" for i in range(200)]


def make_tiny_imagenet(root: Path) -> Path:
    folder = root / "tiny-imagenet-200"
    (folder / "val" / "images").mkdir(parents=True)
    # Not in the order of the labels, as in the real file.
    (folder / "wnids.txt").write_text("\n".join(TINY_CLASSES[::-1]) + "\n")
    lines = []
    for i, label in enumerate((7, 0, 199)):
        save_image(folder / "val" / "images" / f"val_{i}.JPEG", filled(50 * i + 50, 64, 64))
        lines.append(f"val_{i}.JPEG\t{TINY_CLASSES[label]}\t0\t32\t44\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    return folder


def test_tiny_imagenet(tmp_path: Path) -> None:
    """Its validation images, labelled by a file, are the test split; labels go by sorted names."""
    folder = make_tiny_imagenet(tmp_path)
    data = load_labelled("tiny-imagenet", "test", tmp_path)
    assert isinstance(data, LabelledData)
    assert (data.image_shape, data.num_classes) == ((3, 64, 64), 200)
    assert data.labels.tolist() == [7, 0, 199]
    assert data.class_names == tuple(TINY_CLASSES)
    assert (data.images.flatten(1).float().mean(1) - torch.tensor([50.0, 100, 150])).abs().max() < 2
    for name in TINY_CLASSES:
        (folder / "train" / name / "images").mkdir(parents=True)
    save_image(folder / "train" / TINY_CLASSES[3] / "images" / "a.JPEG", filled(9, 64, 64))
    (folder / "train" / TINY_CLASSES[3] / "boxes.txt").touch()
    train = load_labelled("tiny-imagenet", "train", tmp_path)
    assert (train.labels.tolist(), train.class_names) == ([3], data.class_names)


def test_tiny_imagenet_may_be_sorted_into_folders(tmp_path: Path) -> None:
    make_tree(tmp_path, "val", {name: [] for name in TINY_CLASSES} | {TINY_CLASSES[5]: [1, 2]})
    assert load_labelled("tiny-imagenet", "test", tmp_path).labels.tolist() == [5, 5]


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ("val_0.JPEG n00000000\n", r"line 1 must be FILE, a tab and CLASS, got 'val_0"),
        ("val_0.JPEG\tn00000000\nval_1.JPEG\tcat\t0\n", "the class 'cat' is not in .*wnids"),
        (b"\xff\xfe\x00", "not a text file"),
        ("", "holds no images"),
    ],
)
def test_damaged_annotations(tmp_path: Path, annotations: str | bytes, message: str) -> None:
    path = make_tiny_imagenet(tmp_path) / "val" / "val_annotations.txt"
    path.write_bytes(annotations if isinstance(annotations, bytes) else annotations.encode())
    with pytest.raises(CorruptDataError, match=message):
        load_labelled("tiny-imagenet", "test", tmp_path)


@pytest.mark.parametrize("base", ["imagenet", "ILSVRC/Data/CLS-LOC", "."])
def test_imagenet(tmp_path: Path, base: str) -> None:
    """Class folders in train and val; the centred 7/8 of the shorter side become 224x224."""
    names = [f"n{i:08}" for i in range(1000)]
    for name in names:
        (tmp_path / base / "val" / name).mkdir(parents=True)
    wide = np.zeros((256, 400, 3), dtype=np.uint8)
    wide[16:240, 88:312] = 200  # what torchvision's Resize(256), CenterCrop(224) keeps
    save_image(tmp_path / base / "val" / names[999] / "ILSVRC2012_val_1.png", wide)
    data = load_labelled("imagenet", "test", tmp_path)
    assert isinstance(data, LabelledData)  # one image fits in memory
    assert data.images.shape == (1, 3, 224, 224)
    assert (data.images == 200).all()
    assert (data.labels.tolist(), data.num_classes) == ([999], 1000)
    assert data.class_names == tuple(names)


def test_cinic10_has_three_splits_and_the_classes_of_cifar10(tmp_path: Path) -> None:
    for split, value in (("train", 1), ("valid", 2), ("test", 3)):
        make_tree(tmp_path / "CINIC-10", split, {"truck": [value], "cat": [value, value]}, 32)
        data = load_labelled("cinic10", split, tmp_path)
        assert isinstance(data, LabelledData)
        assert data.labels.tolist() == [3, 3, 9]
        assert (data.images == value).all()
        assert data.image_shape == (3, 32, 32)
        assert data.class_names == dataset_spec("cifar10").class_names


@pytest.mark.parametrize("test_folder", ["test", "val", "valid"])
def test_any_folder_of_folders(tmp_path: Path, test_folder: str) -> None:
    """Classes are those of all splits, so that labels mean the same in each of them."""
    make_tree(tmp_path / "pets", "train", {"cat": [1], "dog": [2, 3], "eel": [4]})
    make_tree(tmp_path / "pets", test_folder, {"eel": [5], "cat": [6, 7]})
    for name, root in (("pets", tmp_path), (str(tmp_path / "pets"), Path("/nowhere"))):
        spec = dataset_spec(name, root)
        assert (spec.channels, spec.image_size) == (3, 8)
        assert spec.class_names == ("cat", "dog", "eel")
        train, test = (load_labelled(name, split, root) for split in ("train", "test"))
        assert isinstance(train, LabelledData)
        assert isinstance(test, LabelledData)
        assert train.class_names == test.class_names == spec.class_names
        assert train.labels.tolist() == [0, 1, 1, 2]
        assert train.images[:, 0, 0, 0].tolist() == [1, 2, 3, 4]
        assert test.labels.tolist() == [0, 0, 2]
        assert test.images[:, 0, 0, 0].tolist() == [6, 7, 5]
    resized = load_labelled("pets", "test", tmp_path, image_shape=(1, 4, 4))
    assert resized.image_shape == (1, 4, 4)


def test_labels_and_pixels_are_those_of_torchvision(tmp_path: Path) -> None:
    """ImageFolder's order of classes, the capital letters first, and its centre crop."""
    datasets = pytest.importorskip("torchvision.datasets")
    for name in ("b", "a", "C", "10", "9"):
        for i in range(2):
            array = random_images(30, 44, 3, seed=i + ord(name[0]))
            save_image(tmp_path / "pets" / "test" / name / f"{i}.png", array)
    data = load_labelled("pets", "test", tmp_path, image_shape=(3, 30, 30))
    theirs = datasets.ImageFolder(tmp_path / "pets" / "test")
    assert isinstance(data, LabelledData)
    assert data.class_names == tuple(theirs.classes)
    assert data.labels.tolist() == theirs.targets
    for image, (other, _) in zip(data.images, theirs, strict=True):
        assert np.array_equal(image.permute(1, 2, 0), np.asarray(other)[:, 7:37])


def test_the_size_of_a_folder_s_images_is_read_from_a_few_of_them(tmp_path: Path) -> None:
    """Squares of one size keep it, grey ones their channel; anything else becomes 3x224x224."""
    make_tree(tmp_path / "a", "test", {"x": [1], "y": [2]}, 28)
    assert (dataset_spec("a", tmp_path).channels, dataset_spec("a", tmp_path).image_size) == (3, 28)
    for i, name in enumerate("xy"):
        save_image(tmp_path / "a" / "test" / name / "0.png", random_images(28, 28, seed=i))
    assert (dataset_spec("a", tmp_path).channels, dataset_spec("a", tmp_path).image_size) == (1, 28)
    save_image(tmp_path / "a" / "test" / "y" / "0.png", filled(1, 28, 30))
    (tmp_path / "a" / "test" / "x" / "0.png").write_bytes(b"broken")
    assert dataset_spec("a", tmp_path).image_size == 224
    assert dataset_spec("a", tmp_path).channels == 3


def test_images_of_the_train_split_do_not_tell_the_size_of_others(tmp_path: Path) -> None:
    make_tree(tmp_path / "a", "train", {"x": [1], "y": [2]}, 28)
    assert dataset_spec("a", tmp_path).image_size == 28
    message = "'a': its test split, .*/a/test, is not there, and its train split, .*/a/train, is"
    with pytest.raises(MissingDataError, match=message):
        dataset_spec("a", tmp_path, may_open_train=False)
    with pytest.raises(MissingDataError, match=message):
        load_labelled("a", "test", tmp_path)
    make_tree(tmp_path / "a", "val", {"x": [1]}, 24)
    spec = dataset_spec("a", tmp_path, may_open_train=False)
    assert (spec.image_size, spec.class_names) == (24, ("x", "y"))


def test_an_npz_of_the_name_goes_before_a_folder(tmp_path: Path) -> None:
    make_tree(tmp_path / "toy", "test", {"x": [1]})
    write_npz(tmp_path / "toy_test.npz", random_images(2, 16, 16), [0, 1])
    assert load_labelled("toy", "test", tmp_path).image_shape == (1, 16, 16)


def test_folders_that_are_no_dataset(tmp_path: Path) -> None:
    def fails(error: type[Exception], message: str, dataset: str, split: str = "test") -> None:
        with pytest.raises(error, match=message):
            load_labelled(dataset, split, tmp_path)

    (tmp_path / "empty").mkdir()
    fails(MissingDataError, r"holds no labelled images: expected .*/train/<class>", "empty")
    save_image(tmp_path / "flat" / "test" / "a.png", filled(1))
    fails(MissingDataError, "holds no labelled images", "flat")
    make_tree(tmp_path / "bare", "test", {"x": [], "y": []})
    fails(CorruptDataError, "bare/test: holds no images", "bare")
    make_tree(tmp_path / "half", "test", {"x": [1]})
    fails(MissingDataError, r"half: the train split was not found.*\n.*half/ with train", "half",
          "train")  # fmt: skip
    fails(ValueError, "split='extra' must be one of 'train', 'valid', 'test'", "half", "extra")
    make_tree(tmp_path / "imagenet", "val", {"n01440764": [1]})
    fails(CorruptDataError, "imagenet has 1000 classes, but there are 1 here", "imagenet")
    save_image(tmp_path / "imagenet" / "train" / "flat.JPEG", filled(1))
    fails(CorruptDataError, "holds no folders of classes", "imagenet", "train")
    make_tree(tmp_path / "cinic10", "test", {"cat": [1], "unicorn": [1]})
    fails(CorruptDataError, "'unicorn' is not one of the classes airplane, ", "cinic10")
    with pytest.raises(ValueError, match="height and width must be equal"):
        load_labelled("half", "test", tmp_path, image_shape=(3, 8, 9))
    with pytest.raises(ValueError, match="channels=4 must be 1"):
        load_labelled("half", "test", tmp_path, image_shape=(4, 8, 8))


# --- in memory or as needed --------------------------------------------------------------------


def both(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[LabelledData, LabelledFiles]:
    """One split, in memory and in files."""
    for i in range(10):
        save_image(
            root / "pets" / "train" / "xyz"[i % 3] / f"{i}.png", random_images(8, 8, 3, seed=i)
        )
    held = load_labelled("pets", "train", root)
    monkeypatch.setattr(labelled, "IN_MEMORY_BYTES", 10 * 3 * 8 * 8 - 1)
    lazy = load_labelled("pets", "train", root)
    assert isinstance(held, LabelledData)
    assert isinstance(lazy, LabelledFiles)
    return held, lazy


@pytest.mark.parametrize("shuffle", [False, True])
def test_files_give_the_batches_that_memory_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shuffle: bool
) -> None:
    held, lazy = both(tmp_path, monkeypatch)
    assert (len(lazy), lazy.image_shape) == (len(held), held.image_shape)
    assert (lazy.num_classes, lazy.class_names) == (held.num_classes, held.class_names)
    batches = [
        list(data.batches(4, shuffle, torch.Generator().manual_seed(1))) for data in (held, lazy)
    ]
    assert [len(labels) for _, labels in batches[0]] == [4, 4, 2]
    for (images, labels), (lazy_images, lazy_labels) in zip(*batches, strict=True):
        assert torch.equal(images, lazy_images)
        assert torch.equal(labels, lazy_labels)


def test_files_are_opened_when_their_batch_is_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, lazy = both(tmp_path, monkeypatch)
    opened: list[str] = []
    original = builtins.open

    def watched(file: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(str(file))
        return original(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", watched)
    again = load_labelled("pets", "train", tmp_path)
    headers = len(opened)
    assert headers == 3  # one of each class, for the size
    chosen = torch.tensor([7, 2])
    ((_, labels),) = again.select([chosen])
    assert sorted(opened[headers:]) == sorted(
        os.path.join(lazy.source.folder, lazy.source.files[i]) for i in (7, 2)
    )
    assert torch.equal(labels, lazy.labels[chosen])


class ByFirstPixel(nn.Module):
    """Says that an image is of the class that its first pixel's red names."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.eye(3)[(images[:, 0, 0, 0] * 255).round().long() % 3]


def test_accuracy_is_the_same_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, lazy = both(tmp_path, monkeypatch)
    expected = (to_float(held.images)[:, 0, 0, 0] * 255).round().long() % 3 == held.labels
    for data in (held, lazy):
        found = accuracies(ByFirstPixel(), data, torch.device("cpu"), batch_size=3)
        assert found == {"plain": pytest.approx(100 * expected.float().mean().item())}


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_labelled_images_that_cannot_be_read_are_left_out_with_their_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Accuracy is over those that can; a warning names the others, once."""
    held, lazy = both(tmp_path, monkeypatch)
    monkeypatch.setattr(labelled, "IN_MEMORY_BYTES", 10**9 if kind == "memory" else 0)
    for i in (1, 8):
        (lazy.source.folder / lazy.source.files[i]).write_bytes(b"broken")
    kept = [i for i in range(10) if i not in (1, 8)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load_labelled("pets", "train", tmp_path)
        for _ in range(2):
            found = list(data.batches(4))
    (warning,) = caught
    assert "left out 2 of 10 labelled images that cannot be read: " in str(warning.message)
    assert all(data_file in str(warning.message) for data_file in (lazy.source.files[1], "not an"))
    assert torch.cat([labels for _, labels in found]).tolist() == held.labels[kept].tolist()
    assert torch.equal(torch.cat([images for images, _ in found]), to_float(held.images[kept]))
    right = accuracies(ByFirstPixel(), data, torch.device("cpu"))["plain"] / 100 * 8
    assert right == pytest.approx(round(right))
    for name in lazy.source.files:
        (lazy.source.folder / name).write_bytes(b"broken")
    with pytest.raises(CorruptDataError, match="none of the 10 images can be read"):
        list(load_labelled("pets", "train", tmp_path).batches(4))


def test_a_teacher_learns_the_same_from_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where images are kept decides nothing but memory; the size is given or the dataset's."""
    for i in range(24):
        for split in ("train", "test"):
            array = random_images(20, 20, 3, seed=i)
            save_image(tmp_path / "pets" / split / "xyz"[i % 3] / f"{i}.png", array)
    config: dict[str, Any] = {
        "network": "lenet5_bn",
        "dataset": "pets",
        "data_root": tmp_path,
        "image_size": 32,
        "epochs": 1,
        "batch_size": 8,
        "device": "cpu",
    }
    weights = []
    for name, limit in (("held", 10**9), ("lazy", 0)):
        monkeypatch.setattr(labelled, "IN_MEMORY_BYTES", limit)
        summary = train_teacher(TrainTeacherConfig(**config, out_dir=tmp_path / name))
        weights.append(Path(summary["weights"]).read_bytes())
    assert weights[0] == weights[1]
    with pytest.raises(UserError, match=r"image_size=0 must be >= 1"):
        train_teacher(TrainTeacherConfig(**{**config, "image_size": 0}))
    with pytest.raises(UserError, match=r"image_size=32 is for images in folders"):
        train_teacher(TrainTeacherConfig(**{**config, "dataset": "digits"}))


@pytest.mark.usefixtures("lazily")
def test_a_method_that_holds_its_training_images_says_when_they_are_too_many(
    tmp_path: Path,
) -> None:
    task = make_task(tmp_path)
    make_tree(tmp_path / "data" / "pets", "train", {name: [1] for name in "wxyz"})
    config = tiny_config(task, "dfnd", dataset="pets")
    teacher = load_network(task["teacher"], None, None)
    with pytest.raises(UserError, match=r"too many: 4 of \[1, 32, 32\]"):
        Distillation(config, teacher, torch.device("cpu"))._load_labelled()


@pytest.mark.usefixtures("lazily")
def test_a_run_is_evaluated_on_a_folder_at_the_teacher_s_size(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    for i in range(8):
        array = random_images(50, 40, 3, seed=i)
        save_image(tmp_path / "data" / "pets" / "val" / "wxyz"[i % 4] / f"{i}.jpg", array)
    out = tmp_path / "run"
    result = distill(tiny_config(task, "noise", dataset="pets", out_dir=out))
    assert result.accuracy in [100 * i / 8 for i in range(9)]
