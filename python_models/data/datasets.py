# SPDX-License-Identifier: Apache-2.0
"""The datasets that are known by name: what they are, where their files lie, how to read them.

To add one, register a `DatasetSpec`; reading a registered spec opens no file.
"""

import importlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from python_models.data.folders import (
    SPLIT_FOLDERS,
    ImageFiles,
    class_names_of,
    guess_image_shape,
    read_class_folders,
    read_tiny_imagenet_val,
    splits_of,
)
from python_models.data.formats import (
    CorruptDataError,
    MissingDataError,
    RawImages,
    read_cifar_batch,
    read_idx,
    read_npz,
    read_npz_header,
    read_svhn,
)
from python_models.data.images import fit
from python_models.registry import Registry

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of images in [0, 1] per channel; one value holds for all."""

NORMALISATION: dict[str, Normalisation] = {
    "default": ((0.5,), (0.5,)),
    "none": ((0.0,), (1.0,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion-mnist": ((0.2860,), (0.3530,)),
    "digits": ((0.3053,), (0.3235,)),
    "svhn": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "tiny-imagenet": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cinic10": ((0.4789, 0.4723, 0.4305), (0.2421, 0.2383, 0.2587)),
}
"""Normalisations by dataset, "default" for all others (to [-1, 1]), and "none"."""


@dataclass(frozen=True)
class DatasetSpec:
    """A labelled dataset, described without opening it.

    Attributes:
        name: its name on the command line.
        channels: 1 grey, 3 colour.
        image_size: height and width of the images as handed out; smaller ones are padded with 0.
        class_names: one name per class; numbers where only the files tell.
        normalisation: the usual mean and standard deviation.
        layouts: `(data_root, split)` to sets of files, best first; the first set that is complete
            is the split. A file may also be there with ".gz" appended. A set of one folder, where
            `is_folder`.
        parse: `(files, split)` to the images and labels, or where they are.
        torchvision: the class of `torchvision.datasets` that downloads it, if there is one.
        where: where to get it by hand.
        classes_inferred: the classes were counted in one split; the other may have more.
        is_folder: the images are files of their own, which are opened when they are needed and
            brought to any shape.
        crop: the centred square of such images that is kept, as a fraction of the shorter side.
        splits: the parts that there are.
    """

    name: str
    channels: int
    image_size: int
    class_names: tuple[str, ...]
    normalisation: Normalisation
    layouts: Callable[[Path, str], list[list[Path]]]
    parse: Callable[[Sequence[Path], str], RawImages | ImageFiles]
    torchvision: str | None = None
    where: str = ""
    classes_inferred: bool = False
    is_folder: bool = False
    crop: float = 1.0
    splits: tuple[str, ...] = ("train", "test")

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


DATASETS: Registry[DatasetSpec] = Registry("dataset")
"""Datasets by name."""


def dataset_spec(
    dataset: str, data_root: str | Path = ".", *, may_open_train: bool = True
) -> DatasetSpec:
    """Describes a dataset without opening its images.

    Args:
        dataset: a name in `DATASETS` (no file is opened), an .npz as in `load_labelled` (the
            labels and the images' header of its test split are read, of its train split if there
            is no test split), or a folder as in `load_labelled` (the names of its classes are
            listed, and the headers of a few images read, of the same split).
        data_root: a relative path is looked for here if it is not in the working directory.
        may_open_train: whether a train split may stand in for a test split that is not there.

    Raises:
        ValueError: for an unknown name; the message gives the nearest ones.
        MissingDataError: for an .npz or a folder that is not there, or has no split to open.
        CorruptDataError: for an .npz that is damaged or has images that are not square.

    Example:
        >>> dataset_spec("fashion-mnist").class_names[9]
        'Ankle boot'
    """
    if dataset in DATASETS:
        return DATASETS.get(dataset)
    files = {split: npz_path(dataset, split, data_root) for split in ("test", "train")}
    path = next((path for path in files.values() if path.is_file()), None)
    if path == files["train"] and not may_open_train:
        raise _only_train(dataset, files["test"], path)
    if path is None:
        places = (Path(dataset).expanduser(), Path(data_root).expanduser() / dataset)
        folder = next((place for place in places if place.is_dir()), None)
        if folder is not None:
            return _folder_spec(dataset, folder, may_open_train)
        if dataset.endswith(".npz") or "/" in dataset:
            alone = files["test"].with_name(Path(dataset).name)
            rename = f" ({alone} has no split: rename it to one of these)" * alone.is_file()
            raise MissingDataError(
                f"dataset {dataset!r}: neither {files['train']} nor {files['test']} is there"
                f"{rename}"
            )
        try:
            return DATASETS.get(dataset)
        except ValueError as error:
            raise ValueError(
                f"{error}; or the path NAME.npz for NAME_train.npz and NAME_test.npz, or a folder "
                f"with train/<class>/ and test/<class>/"
            ) from None
    header = read_npz_header(path)
    height, width = header.image_size
    if height != width:
        raise CorruptDataError(f"{path}: images must be square, got {height}x{width}")
    is_like_mnist = (header.channels, height) == (1, 28)
    return DatasetSpec(
        name=dataset,
        channels=header.channels,
        image_size=32 if is_like_mnist else height,
        class_names=header.class_names,
        normalisation=NORMALISATION["default"],
        layouts=lambda root, split: [[files[split]]],
        parse=lambda files, split: read_npz(files[0]),
        classes_inferred=header.classes_inferred,
    )


def npz_path(dataset: str, split: str, data_root: str | Path = ".") -> Path:
    """Returns where one split of an .npz dataset is or, if it is nowhere, belongs.

    `dataset` is NAME, NAME.npz, NAME_train.npz or NAME_test.npz for all splits, in the working
    directory or under `data_root`.
    """
    name = dataset.removesuffix(".npz").removesuffix("_train").removesuffix("_test")
    here = Path(name).expanduser()
    there = Path(data_root).expanduser() / here
    is_here = any(Path(f"{here}_{each}.npz").is_file() for each in ("train", "test"))
    return Path(f"{here if is_here else there}_{split}.npz")


def _only_train(dataset: str, test: Path, train: Path) -> MissingDataError:
    return MissingDataError(
        f"dataset {dataset!r}: its test split, {test}, is not there, and its train split, {train}, "
        "is not opened for this"
    )


def _folder_spec(dataset: str, folder: Path, may_open_train: bool) -> DatasetSpec:
    """Describes images in folders by class, in folders by split."""
    class_names = class_names_of(folder)
    splits = splits_of(folder)
    if "test" not in splits and not may_open_train:
        raise _only_train(dataset, folder / "test", splits["train"])
    channels, image_size = guess_image_shape(splits.get("test", folder / "train"))

    def parse(files: Sequence[Path], split: str) -> ImageFiles:
        return read_class_folders(files[0], class_names)

    return DatasetSpec(
        name=dataset,
        channels=channels,
        image_size=image_size,
        class_names=class_names,
        normalisation=NORMALISATION["default"],
        layouts=lambda root, split: [[folder / name] for name in SPLIT_FOLDERS[split]],
        parse=parse,
        is_folder=True,
        splits=tuple(SPLIT_FOLDERS),
    )


def _cifar_layouts(
    folder: str, batches: dict[str, list[str]]
) -> Callable[[Path, str], list[list[Path]]]:
    return lambda root, split: [
        [base / batch for batch in batches[split]] for base in (root / folder, root)
    ]


def _parse_cifar(label_key: str) -> Callable[[Sequence[Path], str], RawImages]:
    def parse(files: Sequence[Path], split: str) -> RawImages:
        batches = [read_cifar_batch(path, label_key) for path in files]
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return RawImages(images, labels)

    return parse


def _idx_layouts(name: str, folder: str, *others: str) -> Callable[[Path, str], list[list[Path]]]:
    def layouts(root: Path, split: str) -> list[list[Path]]:
        prefix = {"train": "train", "test": "t10k"}[split]
        folders = [root / folder / "raw", root / folder, root / name, root, *map(Path, others)]
        return [
            [base / f"{prefix}-images-idx3-ubyte", base / f"{prefix}-labels-idx1-ubyte"]
            for base in folders
        ]

    return layouts


# MNIST and Fashion-MNIST name their files alike; the labels' checksums tell them apart.
_LABELS_CRC32 = {
    0xBA07E8EF: "mnist",
    0xEE8604D9: "mnist",
    0x2ED6E46A: "fashion-mnist",
    0x242BC73F: "fashion-mnist",
}


def _parse_idx(name: str) -> Callable[[Sequence[Path], str], RawImages]:
    def parse(files: Sequence[Path], split: str) -> RawImages:
        images, labels = read_idx(files[0], ndim=3), read_idx(files[1], ndim=1)
        content = _LABELS_CRC32.get(zlib.crc32(labels.tobytes()), name)
        if content != name:
            raise CorruptDataError(
                f"{files[1]}: these are the labels of {content}, not of {name}: choose "
                f"dataset {content!r} or another data root"
            )
        if len(images) != len(labels):
            raise CorruptDataError(
                f"{files[0]} has {len(images)} images but {files[1]} has {len(labels)} labels: "
                f"delete both and fetch them again (download=True, --download)"
            )
        return RawImages(
            torch.from_numpy(images.copy())[:, None], torch.from_numpy(labels.astype(np.int64))
        )

    return parse


def _folder_layouts(
    bases: Sequence[str], folders: dict[str, str]
) -> Callable[[Path, str], list[list[Path]]]:
    return lambda root, split: [[root / base / folders[split]] for base in (*bases, "")]


def _parse_folders(files: Sequence[Path], split: str) -> ImageFiles:
    return read_class_folders(files[0])


def _parse_tiny_imagenet(files: Sequence[Path], split: str) -> ImageFiles:
    annotations = files[0] / "val_annotations.txt"
    if annotations.is_file():
        return read_tiny_imagenet_val(files[0], annotations)
    return read_class_folders(files[0])  # many sort the images into folders


def _parse_cinic10(files: Sequence[Path], split: str) -> ImageFiles:
    return read_class_folders(files[0], _CIFAR10_NAMES)


def _parse_digits(files: Sequence[Path], split: str) -> RawImages:
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise MissingDataError(
            f"dataset 'digits' comes with scikit-learn, which cannot be imported ({error}): "
            f"pip install scikit-learn"
        ) from error
    digits = datasets.load_digits()
    # The rows go writer by writer, so that the last fifth is by other hands.
    rows = slice(0, 1437) if split == "train" else slice(1437, None)
    images = torch.from_numpy((digits.images[rows] * (255 / 16)).round().astype(np.uint8))
    labels = torch.from_numpy(digits.target[rows].astype(np.int64))
    return RawImages(fit(images[:, None], 32, 1), labels)


_DIGIT_NAMES = tuple(map(str, range(10)))

_FASHION_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

_CIFAR10_NAMES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip

_CIFAR100_NAMES = tuple(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
    camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
    cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
    lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """.split()
)

_CIFAR_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"

for _spec in (
    DatasetSpec(
        name="cifar10",
        channels=3,
        image_size=32,
        class_names=_CIFAR10_NAMES,
        normalisation=NORMALISATION["cifar10"],
        layouts=_cifar_layouts(
            "cifar-10-batches-py",
            {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
        ),
        parse=_parse_cifar("labels"),
        torchvision="CIFAR10",
        where=f"{_CIFAR_PAGE} (Python version)",
    ),
    DatasetSpec(
        name="cifar100",
        channels=3,
        image_size=32,
        class_names=_CIFAR100_NAMES,
        normalisation=NORMALISATION["cifar100"],
        layouts=_cifar_layouts("cifar-100-python", {"train": ["train"], "test": ["test"]}),
        parse=_parse_cifar("fine_labels"),
        torchvision="CIFAR100",
        where=f"{_CIFAR_PAGE} (Python version)",
    ),
    DatasetSpec(
        name="mnist",
        channels=1,
        image_size=32,
        class_names=_DIGIT_NAMES,
        normalisation=NORMALISATION["mnist"],
        layouts=_idx_layouts("mnist", "MNIST"),
        parse=_parse_idx("mnist"),
        torchvision="MNIST",
        where="https://ossci-datasets.s3.amazonaws.com/mnist/",
    ),
    DatasetSpec(
        name="fashion-mnist",
        channels=1,
        image_size=32,
        class_names=_FASHION_NAMES,
        normalisation=NORMALISATION["fashion-mnist"],
        layouts=_idx_layouts("fashion-mnist", "FashionMNIST", "/usr/share/datasets/fashion-mnist"),
        parse=_parse_idx("fashion-mnist"),
        torchvision="FashionMNIST",
        where=(
            "https://github.com/zalandoresearch/fashion-mnist, or on Debian and Ubuntu "
            "`apt-get install dataset-fashion-mnist`"
        ),
    ),
    DatasetSpec(
        name="svhn",
        channels=3,
        image_size=32,
        class_names=_DIGIT_NAMES,
        normalisation=NORMALISATION["svhn"],
        layouts=lambda root, split: [
            [root / base / f"{split}_32x32.mat"] for base in ("svhn", "SVHN", "")
        ],
        parse=lambda files, split: read_svhn(files[0]),
        torchvision="SVHN",
        where="http://ufldl.stanford.edu/housenumbers/ (format 2)",
        splits=("train", "test", "extra"),
    ),
    DatasetSpec(
        name="tiny-imagenet",
        channels=3,
        image_size=64,
        class_names=tuple(map(str, range(200))),
        normalisation=NORMALISATION["tiny-imagenet"],
        # The labels of its test images are not public.
        layouts=_folder_layouts(["tiny-imagenet-200"], {"train": "train", "test": "val"}),
        parse=_parse_tiny_imagenet,
        where="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        is_folder=True,
    ),
    DatasetSpec(
        name="imagenet",
        channels=3,
        image_size=224,
        class_names=tuple(map(str, range(1000))),
        normalisation=NORMALISATION["imagenet"],
        layouts=_folder_layouts(
            ["imagenet", "ImageNet", "ILSVRC2012", "ILSVRC/Data/CLS-LOC"],
            {"train": "train", "test": "val"},
        ),
        parse=_parse_folders,
        where=(
            "https://image-net.org/download.php (ILSVRC2012); torchvision.datasets.ImageNet sorts "
            "the validation images into folders"
        ),
        is_folder=True,
        crop=0.875,
    ),
    DatasetSpec(
        name="cinic10",
        channels=3,
        image_size=32,
        class_names=_CIFAR10_NAMES,
        normalisation=NORMALISATION["cinic10"],
        layouts=_folder_layouts(
            ["CINIC-10", "cinic-10", "cinic10"],
            {"train": "train", "valid": "valid", "test": "test"},
        ),
        parse=_parse_cinic10,
        where="https://datashare.ed.ac.uk/handle/10283/3192",
        is_folder=True,
        splits=("train", "valid", "test"),
    ),
    DatasetSpec(
        name="digits",
        channels=1,
        image_size=32,
        class_names=_DIGIT_NAMES,
        normalisation=NORMALISATION["digits"],
        layouts=lambda root, split: [[]],  # scikit-learn brings it
        parse=_parse_digits,
    ),
):
    DATASETS.register(_spec.name)(_spec)
