# SPDX-License-Identifier: Apache-2.0
"""What a distillation method is to the shared training loop.

The loop (engine.py) runs every method alike:

    prepare                                    sampling methods: select the images, once
    at the start of each epoch: begin_epoch    methods that select or average once an epoch
    for each round:
        begin_round                            generation methods: train the generator
        with KDCI: rebuild the dictionary      from the round's synthetic images (Algorithm 1) or,
                                               once, from all selected ones (Algorithm 2)
        kd_steps times:
            next_batch -> teacher's logits -> student_losses -> step of the student's optimiser

What is evaluated and exported is `deployed`: the student, or the student inside a larger network.

A method is one file of this folder: a `Settings` dataclass, whose fields become command line flags
and YAML keys, and a registered subclass of `Method`. It never sees whether KDCI is on: it calls the
`divergence` that it is given, which is KL_T(T || S) or KL_T(T || S + F).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from python_models.data import LabelledData, UnlabelledImages, to_float
from python_models.distributed import ALONE, World, shared_chunks
from python_models.networks import Classifier, Generator, build_generator
from python_models.precision import Precision
from python_models.randomness import Randomness
from python_models.registry import Registry

SettingsT = TypeVar("SettingsT")
ModuleT = TypeVar("ModuleT", bound=nn.Module)

Divergence = Callable[[Tensor, Tensor], Tensor]
"""``(student logits [b, c], teacher logits [b, c]) -> scalar``: the distillation term."""


class Stateful(Protocol):
    """Anything whose state can be saved and restored."""

    def state_dict(self) -> Any:
        """Return the state."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Restore the state."""


@dataclass(frozen=True)
class Context:
    """What a method works with.

    Attributes:
        teacher: Frozen, in eval mode; images in [0, 1] to logits.
        student: Trained by the loop; in train mode during student steps.
        num_classes: Number of logits.
        image_shape: ``(channels, height, width)``.
        batch_size: Images in a student step.
        kd_steps: Student steps in a round.
        epochs: Epochs of the run.
        progress: Fraction of the run that was done when the round began, in [0, 1): what a schedule
            by rounds takes.
        device: Where all tensors live.
        randomness: Source of random streams.
        open_unlabelled: Opens the images of a sampling method, which are not read yet.
        open_images: Opens any other images, named as ``unlabelled`` is.
        load_labelled: Reads the training images with labels; for methods with `needs_labels` alone.
        precision: How networks compute; teacher, student and `generate` see to it themselves.
        watch: Is shown the terms of each step of a generator phase, to stop the run where one is
            not finite; see `methods.descent`.
        world: The processes of the run; sizes of batches are those of all of them.
    """

    teacher: Classifier
    student: Classifier
    num_classes: int
    image_shape: tuple[int, int, int]
    batch_size: int
    kd_steps: int
    epochs: int
    progress: Callable[[], float]
    device: torch.device
    randomness: Randomness
    open_unlabelled: Callable[[], UnlabelledImages]
    open_images: Callable[[str], UnlabelledImages]
    load_labelled: Callable[[], LabelledData]
    precision: Precision = field(default_factory=Precision)
    watch: Callable[[Mapping[str, Tensor]], None] = lambda terms: None
    world: World = ALONE


@dataclass
class Batch:
    """Images of one student step: this process's rows of them.

    Attributes:
        images: Float ``[b, c, h, w]`` in [0, 1].
        teacher_logits: ``[b, num_classes]``; the loop computes them where a method has not.
        labels: True classes, int64 ``[b]``; for methods with `needs_labels`.
    """

    images: Tensor
    teacher_logits: Tensor | None = None
    labels: Tensor | None = None


@dataclass(frozen=True)
class Deployed:
    """A network that a method trains around the student.

    Attributes:
        network: From normalised images to logits; it holds the student's network.
        name: What `build_network` makes it from: ``package.module:callable``.
        arguments: Keyword arguments of that callable, beside the classes, the channels and
            ``student``, the name of the student's network, which the loop adds.
        parameter_groups: What the student's optimiser trains beside the student, as
            ``torch.optim`` takes it: ``{"params": ..., "weight_decay": 0.0}``.
    """

    network: nn.Module
    name: str
    arguments: Mapping[str, Any]
    parameter_groups: Sequence[dict[str, Any]]


@dataclass
class Synthesis:
    """Result of a generator phase.

    Attributes:
        batch: One synthetic mini-batch, which the dictionary is built from; None where that is
            built once and stays.
        losses: Weighted terms of the generator's loss at its last step, detached.
        images: The new images, float ``[b, c, h, w]``; by default the batch's.
    """

    batch: Batch | None
    losses: dict[str, Tensor] = field(default_factory=dict)
    images: Tensor | None = None

    def __post_init__(self) -> None:
        if self.images is None and self.batch is not None:
            self.images = self.batch.images


class Method(ABC, Generic[SettingsT]):
    """Base class of all methods.

    Class attributes:
        summary: One line for ``kdci list methods``.
        Settings: Dataclass of the method's own settings.
        defaults: Shared settings (`python_models.config`) that differ for this method.
        num_prototypes: Default size of KDCI's dictionary.
        needs_unlabelled: Whether the method samples from unlabelled images.
        needs_labels: Whether the method is not data-free: it trains on labelled images.
        needs_batch_norm: Whether the method reads the statistics in the teacher's BatchNorm layers.
        needs_features: Whose vector before the last layer the method reads: "teacher", "student".

    Attributes:
        world: The processes of the run, all of which hold the same and work on their rows of each
            batch; see `python_models.distributed`.
        parts: What a checkpoint must hold, by name; filled by subclasses.
        images: What a sampling method selected, uint8 ``[n, c, h, w]``, after `prepare`.
    """

    summary: ClassVar[str]
    Settings: ClassVar[type]
    defaults: ClassVar[Mapping[str, Any]] = {}
    num_prototypes: ClassVar[int]
    needs_unlabelled: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    needs_batch_norm: ClassVar[bool] = False
    needs_features: ClassVar[tuple[Literal["teacher", "student"], ...]] = ()

    images: Tensor

    def __init__(self, settings: SettingsT, context: Context) -> None:
        self.settings = settings
        self.context = context
        self.teacher = context.teacher
        self.student = context.student
        self.world = context.world
        self.parts: dict[str, Stateful] = {}

    @property
    def has_divergence(self) -> bool:
        """Whether the student's loss has the divergence, which is what KDCI compensates."""
        return True

    @property
    def warmup_rounds(self) -> int:
        """Rounds before the first student step."""
        return 0

    def prepare(self) -> Tensor | None:
        """Do what comes once before training; not called when a run is resumed.

        Returns:
            The features of a dictionary that stays for the whole run, ``[n, num_classes]``
            (Algorithm 2), or None.
        """
        return None

    def dictionary_images(self) -> Tensor:
        """Return the images, uint8 ``[n, c, h, w]``, whose features `prepare` returned."""
        return self.images

    def begin_epoch(self, index: int) -> None:
        """Do what comes once an epoch, before its first round; not called for warm-up rounds.

        Args:
            index: Number of the epoch, from 0.
        """
        return None

    def begin_round(self, index: int) -> Synthesis | None:
        """Do what comes before the student steps of a round, such as training a generator.

        Args:
            index: Number of the round, from 0, warm-up rounds included.

        Returns:
            The new synthetic mini-batch, or None where there is nothing new.
        """
        return None

    @abstractmethod
    def next_batch(self) -> Batch:
        """Return the images of the next student step."""

    def student_losses(self, batch: Batch, divergence: Divergence) -> dict[str, Tensor]:
        """Return the weighted terms of the student's loss, by name; the loop adds them up.

        Args:
            batch: Images with the teacher's logits.
            divergence: The distillation term, with or without KDCI.
        """
        assert batch.teacher_logits is not None
        return {"kd": divergence(self.student(batch.images), batch.teacher_logits)}

    def optimizers(self) -> Iterable[torch.optim.Optimizer]:
        """Return optimisers that step together with the student's."""
        return ()

    def deployed(self) -> Deployed | None:
        """Return the network to evaluate and export, or None where it is the student itself.

        Called once, before training; the network is trained in place.
        """
        return None

    def steps_per_pass(self) -> int:
        """Return the student steps in one pass over a sampling method's images."""
        raise ValueError(f"ep_steps=0 needs a sampling method; {type(self).__name__} generates")

    @abstractmethod
    def preview(self, count: int) -> Tensor:
        """Return images for the run's picture, ``[count, c, h, w]``, without drawing at random."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all parts."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


METHODS: Registry[type[Method[Any]]] = Registry("method")
"""Methods by name."""


def total(losses: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of loss terms."""
    return torch.stack([term for term in losses.values()]).sum()


def backward_into(loss: Tensor, *targets: nn.Module | Tensor, world: World = ALONE) -> None:
    """Accumulate gradients in these modules' parameters and tensors, and nowhere else.

    Args:
        loss: Scalar.
        *targets: Without gradients yet where there are several processes.
        world: The processes; all hold the same targets, and get the mean of the gradients.
    """
    inputs: list[Tensor] = []
    for target in targets:
        inputs.extend(target.parameters() if isinstance(target, nn.Module) else [target])
    torch.autograd.backward(loss, inputs=inputs)
    world.average_gradients(inputs)


def build_image_generator(name: str, latent_dim: int, context: Context) -> Generator:
    """Build a method's generator on the run's device, from the stream of random numbers for it."""
    channels, size, _ = context.image_shape
    with context.randomness.initialising("generator"):
        generator = build_generator(name, latent_dim, size, channels)
    return context.world.synchronised(on_device(generator, context.device))


def generate(generator: Generator, latents: Tensor, teacher: Classifier) -> Tensor:
    """Return a generator's images as ones in [0, 1], whatever it makes.

    Those of a generator of normalised images are normalised in the teacher's way, and may leave the
    interval.
    """
    images = teacher.precision.run(generator, latents)
    return teacher.denormalise(images) if generator.output_is_normalised else images


@torch.no_grad()
def logits_of(
    chunks: Sequence[Tensor], teacher: Classifier, world: World, num_classes: int
) -> Tensor:
    """Return a teacher's logits of many images, ``[n, num_classes]``, on all processes.

    Args:
        chunks: The images, uint8, on any device, of which each process looks at some.
        teacher: Makes the logits on its device.
        world: The processes.
        num_classes: Number of logits.
    """
    device = teacher.mean.device
    own = shared_chunks(chunks, world)
    logits = [teacher(to_float(chunk.to(device))) for chunk in own]
    if world.size == 1:
        return torch.cat(logits)
    # A process without a chunk must exchange the same type.
    logits.append(torch.empty(0, num_classes, device=device))
    return world.gather_uneven(torch.cat(logits).float())


def on_device(module: ModuleT, device: torch.device) -> ModuleT:
    """Move a network to a device, in the memory format that is quickest for convolutions.

    channels_last about halves a generator's time, on CPUs too.
    """
    on_it: Any = module.to(device)  # Any: before 2.15, PyTorch's types know no memory format here
    moved: ModuleT = on_it.to(memory_format=torch.channels_last)
    return moved
