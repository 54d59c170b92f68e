# SPDX-License-Identifier: Apache-2.0
"""Real and synthetic images: datasets, unlabelled sources, augmentation and the image pool.

Images are uint8 or, in [0, 1], float32 tensors [n, c, h, w]; normalisation belongs to the network
(`python_models.networks.Classifier`).
"""

from python_models.data.augment import (
    RandomCropFlip,
    RandomResizedCropFlip,
    RandomRollFlip,
)
from python_models.data.bank import FeatureBank
from python_models.data.datasets import DATASETS, NORMALISATION, DatasetSpec, dataset_spec
from python_models.data.formats import CorruptDataError, MissingDataError
from python_models.data.images import to_float, to_uint8
from python_models.data.labelled import (
    LabelledData,
    LabelledFiles,
    LabelledImages,
    load_labelled,
)
from python_models.data.pool import ImagePool
from python_models.data.unlabelled import UnlabelledImages, load_unlabelled, open_unlabelled

__all__ = [
    "DATASETS",
    "NORMALISATION",
    "CorruptDataError",
    "DatasetSpec",
    "FeatureBank",
    "ImagePool",
    "LabelledData",
    "LabelledFiles",
    "LabelledImages",
    "MissingDataError",
    "RandomCropFlip",
    "RandomResizedCropFlip",
    "RandomRollFlip",
    "UnlabelledImages",
    "dataset_spec",
    "load_labelled",
    "load_unlabelled",
    "open_unlabelled",
    "to_float",
    "to_uint8",
]
