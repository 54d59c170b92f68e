# SPDX-License-Identifier: Apache-2.0
"""Array datasets, augmentation and the image pool, on tiny generated files."""

import builtins
import gzip
import io
import os
import pickle
import socket
import struct
import sys
import types
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_data import idx_bytes, random_images, write_idx_split, write_npz
from hypothesis import given
from hypothesis import strategies as st

from python_models.data import (
    DATASETS,
    NORMALISATION,
    CorruptDataError,
    ImagePool,
    LabelledData,
    MissingDataError,
    RandomCropFlip,
    dataset_spec,
    load_labelled,
    to_float,
    to_uint8,
)
from python_models.data.augment import _ShiftFlip
from python_models.data.datasets import _LABELS_CRC32
from python_models.data.formats import read_idx, read_pickle
from python_models.data.images import fit

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- files -----------------------------------------------------------------------------------


GREY = random_images(6, 28, 28)
GREY_LABELS = np.array([0, 9, 3, 3, 1, 2], dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("folder", ["FashionMNIST/raw", "FashionMNIST", "fashion-mnist", "."])
def test_mnist_family_layouts(tmp_path: Path, folder: str, suffix: str) -> None:
    write_idx_split(tmp_path / folder, "t10k", GREY, GREY_LABELS, suffix)
    data = load_labelled("fashion-mnist", "test", tmp_path)  # there is no train split
    assert data.images.shape == (6, 1, 32, 32)
    assert torch.equal(data.images[:, 0, 2:-2, 2:-2], torch.from_numpy(GREY))
    assert int(data.images.sum()) == int(GREY.sum())  # the border is zero
    assert data.labels.tolist() == GREY_LABELS.tolist()
    assert (data.num_classes, data.class_names[9]) == (10, "Ankle boot")


def cifar_batch(n: int, label_key: str, seed: int = 0) -> tuple[np.ndarray, dict[Any, Any]]:
    data = random_images(n, 3072, seed=seed)
    return data, {b"data": data, label_key.encode(): list(range(n))}


def test_cifar10_pickles(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    arrays = []
    for i in range(1, 6):
        array, batch = cifar_batch(3, "labels", seed=i)
        arrays.append(array)
        (folder / f"data_batch_{i}").write_bytes(pickle.dumps(batch, protocol=2))
    data = load_labelled("cifar10", "train", tmp_path)
    assert data.images.shape == (15, 3, 32, 32)
    assert torch.equal(data.images.flatten(1), torch.from_numpy(np.concatenate(arrays)))
    assert data.labels.tolist() == [0, 1, 2] * 5
    assert load_labelled("cifar10", "train", folder).labels.tolist() == data.labels.tolist()


@pytest.mark.parametrize("protocol", [2, 5])
def test_cifar100_takes_the_fine_labels(tmp_path: Path, protocol: int) -> None:
    _, batch = cifar_batch(4, "fine_labels")
    batch[b"coarse_labels"] = [19] * 4
    (tmp_path / "cifar-100-python").mkdir()
    path = tmp_path / "cifar-100-python" / "test"
    path.write_bytes(pickle.dumps(batch, protocol=protocol))
    data = load_labelled("cifar100", "test", tmp_path)
    assert data.labels.tolist() == [0, 1, 2, 3]
    assert (data.num_classes, data.class_names[:2]) == (100, ("apple", "aquarium_fish"))


def python2_pickle(pixels: bytes) -> bytes:
    """A pickle as Python 2 and its numpy wrote the published files: byte strings throughout."""
    n = len(pixels) // 3072
    return b"".join(
        [
            b"\x80\x02}(U\x04data",
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R",
            b"(K\x01K" + bytes([n]) + b"M\x00\x0c\x86",
            b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff",
            b"K\x00tb\x89T" + struct.pack("<I", len(pixels)) + pixels + b"tb",
            b"U\x06labels](" + b"".join(b"K" + bytes([i]) for i in range(n)) + b"eu.",
        ]
    )


def test_pickles_of_python_2(tmp_path: Path) -> None:
    pixels = random_images(2, 3072)
    path = tmp_path / "test_batch"
    path.write_bytes(python2_pickle(pixels.tobytes()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load_labelled("cifar10", "test", tmp_path)
    assert torch.equal(data.images.flatten(1), torch.from_numpy(pixels))


class Malicious:
    """Runs a command when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickles_run_no_code(tmp_path: Path, protocol: int) -> None:
    path, proof = tmp_path / "test_batch", tmp_path / "proof"
    path.write_bytes(pickle.dumps({b"data": Malicious(proof)}, protocol=protocol))
    with pytest.raises(CorruptDataError, match=r"test_batch.*\.system, which is not allowed"):
        load_labelled("cifar10", "test", tmp_path)
    assert not proof.exists()


@pytest.mark.parametrize("name", ["eval", "getattr", "__import__"])
def test_pickles_reach_no_builtins(tmp_path: Path, name: str) -> None:
    path = tmp_path / "test_batch"
    path.write_bytes(pickle.dumps({b"data": getattr(builtins, name)}))
    with pytest.raises(CorruptDataError, match="not allowed"):
        read_pickle(path)


@pytest.mark.parametrize("dataset", ["toy", "toy.npz", "toy_train.npz", "toy_test.npz"])
def test_npz_names(tmp_path: Path, dataset: str) -> None:
    images = {"train": random_images(4, 8, 8, 3, seed=1), "test": random_images(2, 8, 8, 3, seed=2)}
    for split, array in images.items():
        write_npz(tmp_path / f"toy_{split}.npz", array, np.arange(len(array)))
    for split, array in images.items():
        for data in (
            load_labelled(dataset, split, tmp_path),
            load_labelled(str(tmp_path / dataset), split),
        ):
            assert torch.equal(data.images.permute(0, 2, 3, 1), torch.from_numpy(array))
            assert data.labels.tolist() == list(range(len(array)))
    # Two classes are seen in the test split, four in the train split.
    assert dataset_spec(dataset, tmp_path).num_classes == 2
    assert load_labelled(dataset, "train", tmp_path).num_classes == 4


def test_npz_says_what_it_is_without_its_images_or_its_train_split(tmp_path: Path) -> None:
    (tmp_path / "toy_train.npz").write_bytes(b"never to be opened")
    names = np.array(["cat", "dog", "eel"])
    write_npz(tmp_path / "toy_test.npz", GREY, GREY_LABELS % 2, class_names=names)
    path = tmp_path / "toy_test.npz"
    content = path.read_bytes()
    # Damage in the compressed pixels goes unnoticed as long as nobody reads them.
    middle = content.index(b"images.npy") + 2000
    path.write_bytes(content[:middle] + bytes(100) + content[middle + 100 :])
    spec = dataset_spec("toy", tmp_path)
    assert (spec.channels, spec.image_size, spec.class_names) == (1, 32, ("cat", "dog", "eel"))
    with pytest.raises(CorruptDataError, match=r"toy_test\.npz: not a readable \.npz"):
        load_labelled("toy", "test", tmp_path)


def test_a_train_split_may_stand_in_for_a_test_split_only_where_it_is_told_to(
    tmp_path: Path,
) -> None:
    """Reading the test split never opens the train split, which may even be damaged."""
    path = tmp_path / "toy_train.npz"
    write_npz(path, GREY, GREY_LABELS)
    assert dataset_spec("toy", tmp_path).image_size == 32
    path.write_bytes(b"never to be opened")
    message = r"'toy': its test split, .*toy_test\.npz, is not there, and its train split, .*toy_tr"
    with pytest.raises(MissingDataError, match=message):
        dataset_spec("toy", tmp_path, may_open_train=False)
    with pytest.raises(MissingDataError, match=message):
        load_labelled("toy", "test", tmp_path)
    with pytest.raises(CorruptDataError, match=r"toy_train\.npz: not a readable \.npz"):
        dataset_spec("toy", tmp_path)


def test_npz_of_28x28_grey_images_is_padded(tmp_path: Path) -> None:
    write_npz(tmp_path / "toy_test.npz", GREY, GREY_LABELS)
    data = load_labelled("toy", "test", tmp_path)
    assert data.image_shape == (1, 32, 32)
    assert torch.equal(data.images[:, 0, 2:-2, 2:-2], torch.from_numpy(GREY))


def test_a_named_dataset_may_be_an_npz(tmp_path: Path) -> None:
    write_npz(tmp_path / "mnist_test.npz", GREY, GREY_LABELS)
    data = load_labelled("mnist", "test", tmp_path)
    assert (data.image_shape, data.num_classes) == ((1, 32, 32), 10)


def test_digits_come_with_scikit_learn(tmp_path: Path) -> None:
    train, test = (load_labelled("digits", split, tmp_path) for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    assert train.image_shape == (1, 32, 32)
    assert set(train.labels.tolist()) == set(test.labels.tolist()) == set(range(10))
    (mean,), (std,) = NORMALISATION["digits"]
    floats = to_float(train.images)
    assert abs(float(floats.mean()) - mean) < 2e-3
    assert abs(float(floats.std()) - std) < 2e-3


# --- what is missing or broken ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "split", "expected"),
    [
        ("cifar10", "train", ["cifar-10-batches-py/ with data_batch_1, ", "cs.toronto.edu"]),
        ("cifar100", "test", ["cifar-100-python/ with test", "cifar100_test.npz"]),
        ("mnist", "test", ["MNIST/raw/ with t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte"]),
        ("mnist", "train", ["MNIST/raw/ with train-images-idx3-ubyte", "--download"]),
    ],
)
def test_missing_files_are_named(
    tmp_path: Path, dataset: str, split: str, expected: list[str]
) -> None:
    with pytest.raises(MissingDataError) as caught:
        load_labelled(dataset, split, tmp_path)
    message = str(caught.value)
    assert f"{dataset}: the {split} split was not found" in message
    assert str(tmp_path) in message
    assert all(part in message for part in expected), message


def test_a_set_that_is_there_in_part_names_what_is_missing(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i in (1, 2, 4, 5):
        (folder / f"data_batch_{i}").touch()
    with pytest.raises(MissingDataError, match=r"\(missing: data_batch_3\)"):
        load_labelled("cifar10", "train", tmp_path)


def test_a_failing_download_ends_in_the_same_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(root: str, train: bool, download: bool) -> None:
        assert (root, train, download) == (str(tmp_path), False, True)
        assert socket.getdefaulttimeout() is not None
        raise OSError("Name or service not known")

    module = types.ModuleType("torchvision.datasets")
    module.CIFAR10 = unreachable  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)
    with pytest.raises(MissingDataError, match="download failed: Name or service") as caught:
        load_labelled("cifar10", "test", tmp_path, download=True)
    assert "cifar-10-batches-py/ with test_batch" in str(caught.value)
    assert socket.getdefaulttimeout() is None


def test_a_download_without_torchvision_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(MissingDataError, match=r"download failed: .*torchvision"):
        load_labelled("mnist", "test", tmp_path, download=True)


def test_a_download_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(root: str, train: bool, download: bool) -> None:
        write_idx_split(Path(root, "MNIST/raw"), "train", GREY, GREY_LABELS)

    module = types.ModuleType("torchvision.datasets")
    module.MNIST = fetch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)
    assert len(load_labelled("mnist", "train", tmp_path, download=True)) == 6


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        ("cifar-10", ValueError, "unknown dataset 'cifar-10': did you mean 'cifar10'.*NAME.npz"),
        ("toy.npz", MissingDataError, r"toy_train\.npz nor .*toy_test\.npz is there$"),
        ("lone.npz", MissingDataError, r"lone\.npz has no split: rename it"),
    ],
)
def test_unknown_datasets(
    tmp_path: Path, dataset: str, error: type[Exception], message: str
) -> None:
    write_npz(tmp_path / "lone.npz", GREY, GREY_LABELS)
    with pytest.raises(error, match=message):
        load_labelled(dataset, "test", tmp_path)


def test_unknown_split(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split='val' must be one of 'train', 'test'"):
        load_labelled("mnist", "val", tmp_path)


IMAGES_IDX, LABELS_IDX = idx_bytes(GREY), idx_bytes(GREY_LABELS)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (b"", LABELS_IDX, "images-idx3-ubyte: starts with nothing, but"),
        (b"<html>", LABELS_IDX, "starts with 3c68746d, but .* starts with 00000803"),
        (LABELS_IDX, LABELS_IDX, "starts with 00000801"),
        (IMAGES_IDX[:10], LABELS_IDX, "10 bytes are fewer than its header's 16"),
        (IMAGES_IDX[:-1], LABELS_IDX, r"promises 4704 bytes .*\[6, 28, 28\], but there are 4703"),
        (IMAGES_IDX + b"x", LABELS_IDX, "but there are 4705"),
        (gzip.compress(IMAGES_IDX)[:-20], LABELS_IDX, "not a complete gzip file"),
        (b"\x1f\x8b" + IMAGES_IDX, LABELS_IDX, "not a complete gzip file"),
        (IMAGES_IDX, IMAGES_IDX, "labels-idx1-ubyte: starts with 00000803"),
        (IMAGES_IDX, idx_bytes(GREY_LABELS[:5]), "has 6 images but .* has 5 labels"),
        (IMAGES_IDX, idx_bytes(GREY_LABELS + 1), r"labels must lie in \[0, 10\), got 1 to 10"),
        (
            idx_bytes(random_images(6, 40, 40)),
            LABELS_IDX,
            r"\[n, 1, 32, 32\], got \[6, 1, 40, 40\]",
        ),
        (idx_bytes(GREY[:0]), idx_bytes(GREY_LABELS[:0]), "holds no images"),
    ],
)
def test_damaged_idx_files(tmp_path: Path, images: bytes, labels: bytes, message: str) -> None:
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    (folder / "t10k-images-idx3-ubyte").write_bytes(images)
    (folder / "t10k-labels-idx1-ubyte").write_bytes(labels)
    with pytest.raises(CorruptDataError, match=message) as caught:
        load_labelled("mnist", "test", tmp_path)
    assert str(folder) in str(caught.value)


def test_fashion_mnist_is_not_taken_for_mnist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crc = zlib.crc32(GREY_LABELS.tobytes())
    monkeypatch.setitem(_LABELS_CRC32, crc, "fashion-mnist")
    write_idx_split(tmp_path, "t10k", GREY, GREY_LABELS)
    assert len(load_labelled("fashion-mnist", "test", tmp_path)) == 6
    with pytest.raises(CorruptDataError, match="labels of fashion-mnist, not of mnist"):
        load_labelled("mnist", "test", tmp_path)


PIXELS = random_images(2, 3072)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable pickle"),
        (python2_pickle(PIXELS.tobytes())[:-100], "not a readable pickle"),
        (random_images(500).tobytes(), "not a readable pickle"),
        (pickle.dumps([1, 2]), "holds a list instead of a dictionary"),
        (pickle.dumps({b"data": PIXELS}), r"has no \['labels'\], only \['data'\]"),
        (pickle.dumps({"data": PIXELS.astype(float), "labels": [0, 1]}), "got float64"),
        (
            pickle.dumps({"data": PIXELS[:, :9], "labels": [0, 1]}),
            r"\[n, 3072\], got uint8 \[2, 9\]",
        ),
        (pickle.dumps({"data": "x", "labels": [0, 1]}), "got a str"),
        (pickle.dumps({"data": PIXELS, "labels": [0]}), "has 2 images but 1 labels"),
        (pickle.dumps({"data": PIXELS, "labels": [0.5, 1.0]}), r"integers \[2\], got a list"),
        (pickle.dumps({"data": PIXELS, "labels": [[0], [1, 2]]}), r"integers \[2\], got a list"),
        (pickle.dumps({"data": PIXELS, "labels": [0, -1]}), "must not be negative, got -1"),
        (pickle.dumps({"data": PIXELS, "labels": [0, 10]}), r"lie in \[0, 10\), got 0 to 10"),
    ],
)
def test_damaged_pickles(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(CorruptDataError, match=message) as caught:
        load_labelled("cifar10", "test", tmp_path)
    assert str(tmp_path / "test_batch") in str(caught.value)


COLOUR = random_images(2, 8, 8, 3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": [0, 1]}, "has no array 'images', only"),
        ({"images": COLOUR}, "has no array 'labels', only"),
        ({"images": COLOUR / 255, "labels": [0, 1]}, "must be uint8, got float64"),
        ({"images": COLOUR.transpose(0, 3, 1, 2), "labels": [0, 1]}, r"got \[2, 3, 8, 8\]"),
        ({"images": COLOUR[0, 0], "labels": [0, 1]}, r"got \[8, 3\]"),
        ({"images": COLOUR[:0], "labels": []}, r"not be empty, got \[0, 8, 8, 3\]"),
        ({"images": COLOUR[:, :4], "labels": [0, 1]}, "must be square, got 4x8"),
        ({"images": COLOUR, "labels": [0.0, 1.0]}, r"integers \[2\], got float64 \[2\]"),
        ({"images": COLOUR, "labels": [0, 1, 2]}, "has 2 images but 3 labels"),
        ({"images": COLOUR, "labels": [0, -2]}, "must not be negative, got -2"),
        ({"images": COLOUR, "labels": [0, 5], "class_names": ["a", "b"]}, r"lie in \[0, 2\)"),
        ({"images": np.full((2, 8, 8), None), "labels": [0, 1]}, "not a readable .npz"),
    ],
)
def test_damaged_npz(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = tmp_path / "toy_test.npz"
    np.savez(path, **{name: np.asarray(value) for name, value in arrays.items()})
    with pytest.raises(CorruptDataError, match=message) as caught:
        load_labelled("toy", "test", tmp_path)
    assert str(path) in str(caught.value)


def test_an_npz_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "toy_test.npz"
    write_npz(path, COLOUR, [0, 1])
    content = path.read_bytes()
    for cut in (0, 20, len(content) - 10):
        path.write_bytes(content[:cut])
        with pytest.raises(CorruptDataError, match=r"toy_test\.npz: .*write it again with numpy"):
            load_labelled("toy", "test", tmp_path)


@given(cut=st.integers(0, len(IMAGES_IDX) - 1))
def test_no_cut_idx_file_loads(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "images"
    path.write_bytes(IMAGES_IDX[:cut])
    with pytest.raises(CorruptDataError, match="fetch it again"):
        read_idx(path, 3)


@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    seed=st.integers(0, 100),
    compressed=st.booleans(),
)
def test_idx_round_trip(tmp_path: Path, shape: list[int], seed: int, compressed: bool) -> None:
    array = random_images(*shape, seed=seed)
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(idx_bytes(array)) if compressed else idx_bytes(array))
    assert np.array_equal(read_idx(path, array.ndim), array)


# --- specs and labelled data -----------------------------------------------------------------


def test_reading_a_spec_opens_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **keywords: object) -> None:
        raise AssertionError(f"opened {arguments}")

    monkeypatch.setattr(builtins, "open", refuse)
    monkeypatch.setattr(io, "open", refuse)
    monkeypatch.setattr(os, "open", refuse)
    for name in DATASETS:
        spec = dataset_spec(name, "/nowhere")
        assert spec.name == name
        assert len(set(spec.class_names)) == spec.num_classes
        assert spec.normalisation == NORMALISATION[name]
        assert {len(part) for part in spec.normalisation} == {spec.channels}
    assert {name: dataset_spec(name).num_classes for name in DATASETS} == {
        "cifar10": 10,
        "cifar100": 100,
        "mnist": 10,
        "fashion-mnist": 10,
        "svhn": 10,
        "tiny-imagenet": 200,
        "imagenet": 1000,
        "cinic10": 10,
        "digits": 10,
    }


@pytest.mark.parametrize(
    ("images", "labels", "classes", "message"),
    [
        (torch.zeros(2, 1, 4, 4), torch.zeros(2).long(), 2, "uint8.*got torch.float32"),
        (torch.zeros(2, 4, 4).byte(), torch.zeros(2).long(), 2, r"got torch.uint8 \[2, 4, 4\]"),
        (torch.zeros(2, 1, 4, 4).byte(), torch.zeros(3).long(), 2, r"int64 \[2\], got .*\[3\]"),
        (torch.zeros(2, 1, 4, 4).byte(), torch.zeros(2).int(), 2, "got torch.int32"),
        (torch.zeros(2, 1, 4, 4).byte(), torch.tensor([0, 2]), 2, r"\[0, 2\), got 0 to 2"),
        (torch.zeros(2, 1, 4, 4).byte(), torch.tensor([0, 1]), 3, "num_classes=3 names, got 2"),
    ],
)
def test_labelled_data_refuses_what_does_not_fit(
    images: torch.Tensor, labels: torch.Tensor, classes: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LabelledData(images, labels, classes, ("a", "b"))


def counted(n: int) -> LabelledData:
    """Image i is filled with i and labelled i."""
    labels = torch.arange(n)
    images = labels.byte().view(n, 1, 1, 1).expand(n, 1, 4, 4).contiguous()
    return LabelledData(images, labels, n, tuple(map(str, range(n))))


@given(n=st.integers(1, 40), batch_size=st.integers(1, 50), shuffle=st.booleans())
def test_batches_visit_every_image_once_with_its_label(
    n: int, batch_size: int, shuffle: bool
) -> None:
    batches = list(counted(n).batches(batch_size, shuffle, seeded()))
    assert [len(images) for images, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)
    labels = torch.cat([labels for _, labels in batches])
    assert sorted(labels.tolist()) == list(range(n))
    assert shuffle or labels.tolist() == list(range(n))
    for images, its_labels in batches:
        assert images.dtype == torch.float32
        assert torch.equal(images[:, 0, 0, 0], its_labels / 255)


def test_batches_repeat_with_their_seed_and_drop_the_last() -> None:
    data = counted(40)
    first, second, other = (
        torch.cat([labels for _, labels in data.batches(7, True, seeded(seed), drop_last=True)])
        for seed in (1, 1, 2)
    )
    assert len(first) == 35
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_batches_are_augmented_as_floats() -> None:
    def negative(images: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        assert generator is source
        return 1 - images

    source = seeded()
    ((images, labels),) = counted(5).batches(8, generator=source, augment=negative)
    torch.testing.assert_close(images[:, 0, 0, 0], 1 - labels / 255)


def test_batches_refuse_an_impossible_size_at_once() -> None:
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        counted(3).batches(0)


def test_bytes_and_floats() -> None:
    every = torch.arange(256).byte()
    floats = to_float(every)
    assert (floats[0], floats[255]) == (0, 1)
    assert torch.equal(to_uint8(floats), every)
    assert to_uint8(torch.tensor([-1.0, 2.0])).tolist() == [0, 255]
    for convert in (to_float, to_uint8):
        with pytest.raises(TypeError, match=r"got torch\.int64"):
            convert(torch.zeros(3).long())


# --- sizes and channels -----------------------------------------------------------------------


@given(
    value=st.integers(0, 255),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    channels=st.sampled_from([(1, 1), (1, 3), (3, 1), (3, 3)]),
    size=st.integers(1, 12),
)
def test_fit_keeps_a_constant_image(
    value: int, height: int, width: int, channels: tuple[int, int], size: int
) -> None:
    images = torch.full((2, channels[0], height, width), value, dtype=torch.uint8)
    assert torch.equal(
        fit(images, size, channels[1]), torch.full((2, channels[1], size, size), value).byte()
    )


# --- augmentation ----------------------------------------------------------------------------


@given(
    shape=st.tuples(*[st.integers(1, 6)] * 4),
    padding=st.integers(0, 3),
    flip=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_crop_and_flip_only_moves_pixels(
    shape: tuple[int, int, int, int], padding: int, flip: bool, seed: int
) -> None:
    """Each image is one of the (2p + 1)^2 windows of its padded self or, with flip, its mirror."""
    images = torch.from_numpy(random_images(*shape, seed=seed)).clamp(min=1)
    result = RandomCropFlip(padding, flip)(images, seeded(seed))
    assert (result.dtype, result.shape) == (images.dtype, images.shape)
    height, width = shape[2:]
    for image, moved in zip(images, result, strict=True):
        mirrors = [image, image.flip(2)] if flip else [image]
        padded = [torch.nn.functional.pad(each, (padding,) * 4) for each in mirrors]
        assert any(
            torch.equal(each[:, i : i + height, j : j + width], moved)
            for each in padded
            for i in range(2 * padding + 1)
            for j in range(2 * padding + 1)
        )


def test_crop_and_flip_draws_every_shift_evenly() -> None:
    images = torch.zeros(16_200, 1, 5, 5)
    images[:, 0, 2, 2] = 1
    counts = RandomCropFlip(padding=2)(images, seeded()).sum(dim=(0, 1))
    expected = len(images) / 25
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 52  # the 0.1 % point for 24 degrees of freedom is 51.2
    mirrored = RandomCropFlip(padding=0)(torch.tensor([[[[0.0, 1.0]]]]).repeat(1000, 1, 1, 1))
    assert 430 < int(mirrored[:, 0, 0, 0].sum()) < 570


def test_crop_and_flip_leaves_its_input_and_repeats_with_its_seed() -> None:
    images = torch.rand(8, 3, 6, 6)
    before = images.clone()
    augment = RandomCropFlip(2)
    assert torch.equal(augment(images, seeded(1)), augment(images, seeded(1)))
    assert not torch.equal(augment(images, seeded(1)), augment(images, seeded(2)))
    assert torch.equal(images, before)
    assert torch.equal(RandomCropFlip(0, flip=False)(images), images)
    assert augment(images[:0]).shape == (0, 3, 6, 6)
    assert repr(augment) == "RandomCropFlip(padding=2, flip=True)"


def test_crop_and_flip_gradient_is_its_adjoint() -> None:
    images = torch.rand(4, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    down, right = torch.tensor([1, -2, 0, 2]), torch.tensor([2, -1, 1, 0])
    flips = torch.tensor([True, False, True, False])

    def move(x: torch.Tensor) -> torch.Tensor:
        return _ShiftFlip.apply(x, down, right, flips, 2)

    assert torch.autograd.gradcheck(move, images)
    assert torch.autograd.gradgradcheck(lambda x: move(x) ** 2, images)


@pytest.mark.parametrize("device", DEVICES)
def test_crop_and_flip_is_the_same_on_every_device(device: str) -> None:
    images = torch.rand(8, 3, 6, 6)
    augment = RandomCropFlip(2)
    assert torch.equal(augment(images.to(device), seeded()).cpu(), augment(images, seeded()))
    own = torch.Generator(device).manual_seed(0)
    assert augment(images.to(device), own).device.type == device


def test_crop_and_flip_arguments() -> None:
    with pytest.raises(ValueError, match="padding=-1 must not be negative"):
        RandomCropFlip(-1)
    with pytest.raises(ValueError, match=r"\[b, c, h, w\], got \[3, 6, 6\]"):
        RandomCropFlip()(torch.rand(3, 6, 6))


# --- the image pool --------------------------------------------------------------------------


def numbered(start: int, count: int) -> torch.Tensor:
    """Images whose only pixel is their number, in 1/255."""
    return (torch.arange(start, start + count) / 255).view(-1, 1, 1, 1)


def numbers(pool: ImagePool) -> list[int]:
    return sorted((pool.sample(len(pool)) * 255).round().int().flatten().tolist()) if pool else []


@given(capacity=st.integers(1, 20), adds=st.lists(st.integers(0, 30), max_size=8))
@pytest.mark.parametrize("storage", ["float", "uint8"])
def test_newest_keeps_the_newest(storage: Any, capacity: int, adds: list[int]) -> None:
    pool = ImagePool(capacity, (1, 1, 1), storage=storage)
    seen = 0
    for count in adds:
        pool.add(numbered(seen, count))
        seen += count
        assert len(pool) == min(seen, capacity)
        assert pool.seen == seen
        assert numbers(pool) == list(range(max(seen - capacity, 0), seen))


@given(capacity=st.integers(1, 20), adds=st.lists(st.integers(0, 30), max_size=8))
def test_reservoir_holds_distinct_images_of_all_it_saw(capacity: int, adds: list[int]) -> None:
    pool = ImagePool(capacity, (1, 1, 1), policy="reservoir")
    seen = 0
    for count in adds:
        pool.add(numbered(seen, count))
        seen += count
        assert len(set(numbers(pool))) == len(pool) == min(seen, capacity)
        assert set(numbers(pool)) <= set(range(seen))


@pytest.mark.parametrize("batch", [1, 7, 50])
def test_reservoir_is_uniform(batch: int) -> None:
    """However the images arrive, each is kept with probability capacity / seen."""
    capacity, seen, repeats = 10, 50, 200
    counts = torch.zeros(seen)
    for seed in range(repeats):
        pool = ImagePool(capacity, (1, 1, 1), policy="reservoir", seed=seed)
        for start in range(0, seen, batch):
            pool.add(numbered(start, min(batch, seen - start)))
        counts[torch.tensor(numbers(pool))] += 1
    expected = repeats * capacity / seen
    # Kept images are drawn without replacement, which shrinks the variance by (1 - capacity/seen).
    chi_square = float(((counts - expected) ** 2).sum() / (expected * (1 - capacity / seen)))
    assert chi_square < 86  # the 0.1 % point for 49 degrees of freedom is 85.4


@given(size=st.integers(1, 12), n=st.integers(0, 40), seed=st.integers(0, 100))
def test_sample_is_as_even_as_can_be(size: int, n: int, seed: int) -> None:
    pool = ImagePool(12, (1, 1, 1))
    pool.add(numbered(0, size))
    drawn = (pool.sample(n, seeded(seed)) * 255).round().long().flatten()
    counts = torch.bincount(drawn, minlength=size)
    assert len(drawn) == n
    assert counts.max() - counts.min() <= 1
    assert torch.equal(pool.sample(n, seeded(seed)), pool.sample(n, seeded(seed)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", ["newest", "reservoir"])
@pytest.mark.parametrize("storage", ["float", "uint8"])
def test_a_restored_pool_goes_on_as_if_never_stopped(
    tmp_path: Path, storage: Any, policy: Any, device: str
) -> None:
    def build(seed: int) -> ImagePool:
        return ImagePool(5, (1, 2, 2), device, storage=storage, policy=policy, seed=seed)

    def batch(i: int) -> torch.Tensor:
        return torch.rand(3, 1, 2, 2, generator=seeded(i)).to(device)

    for stop in range(5):
        through = build(1)
        for i in range(stop):
            through.add(batch(i))
        torch.save(through.state_dict(), tmp_path / "pool.pt")
        restored = build(2)
        restored.load_state_dict(torch.load(tmp_path / "pool.pt", weights_only=True))
        for i in range(stop, 9):
            through.add(batch(i))
            restored.add(batch(i))
        assert (len(restored), restored.seen) == (len(through), through.seen)
        assert torch.equal(restored.sample(9, seeded()), through.sample(9, seeded()))
        assert restored.sample(1).device.type == device


def test_a_saved_pool_is_a_copy() -> None:
    pool = ImagePool(2, (1, 1, 1))
    pool.add(numbered(1, 2))
    state = pool.state_dict()
    pool.add(numbered(5, 2))
    assert state["images"].flatten().tolist() == numbered(1, 2).flatten().tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capacity": 3}, "saved pool has capacity=2, this one has capacity=3"),
        ({"image_shape": (1, 2, 1)}, r"image_shape=\(1, 1, 1\), this one has image_shape=\(1, 2"),
        ({"storage": "uint8"}, "storage='float', this one has storage='uint8'"),
        ({"policy": "reservoir"}, "policy='newest', this one has policy='reservoir'"),
    ],
)
def test_a_pool_refuses_the_state_of_another(settings: dict[str, Any], message: str) -> None:
    state = ImagePool(2, (1, 1, 1)).state_dict()
    with pytest.raises(ValueError, match=message):
        ImagePool(**{"capacity": 2, "image_shape": (1, 1, 1), **settings}).load_state_dict(state)


def test_the_pool_detaches_copies_and_rounds() -> None:
    images = torch.rand(4, 3, 2, 2, requires_grad=True)
    pool, small = ImagePool(4, (3, 2, 2)), ImagePool(4, (3, 2, 2), storage="uint8")
    pool.add(images)
    small.add(images)
    with torch.no_grad():
        before = images.clone()
        images.zero_()
    sample = pool.sample(4, seeded())
    assert not sample.requires_grad
    assert sorted(sample.flatten().tolist()) == sorted(before.flatten().tolist())
    error = (small.sample(4, seeded()) - sample).abs().max()
    assert 0 < error <= 0.5 / 255 + 1e-6
    pool.add(to_uint8(before))
    assert pool.sample(1).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capacity": 0}, "capacity=0 must be at least 1"),
        ({"image_shape": (8, 8)}, r"image_shape=\(8, 8\) must be"),
        ({"image_shape": (3, 0, 8)}, "all positive"),
        ({"storage": "int"}, "storage='int' must be 'float' or 'uint8'"),
        ({"policy": "oldest"}, "policy='oldest' must be 'newest' or 'reservoir'"),
    ],
)
def test_pool_arguments(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImagePool(**{"capacity": 2, "image_shape": (1, 1, 1), **settings})


def test_pool_misuse() -> None:
    pool = ImagePool(2, (3, 4, 4))
    with pytest.raises(RuntimeError, match="pool is empty: add images"):
        pool.sample(1)
    with pytest.raises(ValueError, match=r"\[b, 3, 4, 4\], got \[2, 1, 4, 4\]"):
        pool.add(torch.rand(2, 1, 4, 4))
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        pool.add(torch.zeros(2, 3, 4, 4).long())
    with pytest.raises(ValueError, match="n=-1 must not be negative"):
        pool.sample(-1)
