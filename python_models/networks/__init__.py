# SPDX-License-Identifier: Apache-2.0
"""Teachers, students, generators and discriminators by name.

To add a network, write a class derived from `ImageNetwork` and register a factory of it under
`NETWORKS`, in a module that is imported here.
"""

# The modules are imported for their registrations, in the order `kdci list` shows.
from python_models.networks import lenet, resnet, wide_resnet
from python_models.networks.base import (
    NETWORKS,
    Classifier,
    ImageNetwork,
    build_network,
    count_parameters,
)
from python_models.networks.discriminators import DISCRIMINATORS, build_discriminator
from python_models.networks.generators import GENERATORS, Generator, build_generator
from python_models.networks.layers import init_normal_

__all__ = [
    "DISCRIMINATORS",
    "GENERATORS",
    "NETWORKS",
    "Classifier",
    "Generator",
    "ImageNetwork",
    "build_discriminator",
    "build_generator",
    "build_network",
    "count_parameters",
    "init_normal_",
    "lenet",
    "resnet",
    "wide_resnet",
]
