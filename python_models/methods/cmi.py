# SPDX-License-Identifier: Apache-2.0
"""CMI: Contrastive Model Inversion for Data-Free Knowledge Distillation (Fang et al., IJCAI 2021).

A round draws the generator anew (weights N(0, 0.02)) and a batch of latents ``z``, and improves
both for ``g_steps`` steps of Adam, with uniformly drawn classes ``y``. Two views of each image go
through the teacher: a global one (shifted and perhaps mirrored) and a local one (a random part,
resized). With the teacher's and student's logits ``t`` and ``s`` of the global view, the loss is

    bn * sum_layers r + oh * mean CE(t, y) - adv * mean_b [argmax s = argmax t] KL_1(T || S)_b
        + cr * (mean_{i current} l_i + mean_{i cached} l_i),

    l_i = -log softmax_j(u_i . v_j / cr_temperature)_i.

``r`` is the distance of the batch's statistics from those of the teacher's BatchNorm layers. The
features of a view are the spatial means of what enters the hooked modules of the teacher, side by
side; ``u`` (local) and ``v`` (global, constants) are their projections by the head
``normalise(W_2 relu(W_1 f + b_1) + b_2)``, which has an Adam of its own that lives as long as the
run. Rows and columns are those of the current images and, drawn anew at each step, of earlier
images in a memory bank: images shall differ from each other and from all before.

The images of the lowest loss go to a pool, their features to the bank, and the student learns from
random batches of the pool. The features are hooked at the inputs of all BatchNorm layers, or, for
networks of four stages ``layer1`` to ``layer4`` (ResNets), at those of the stages. The student is
in eval mode during synthesis.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from python_models import losses
from python_models.data import FeatureBank, RandomCropFlip, RandomResizedCropFlip
from python_models.errors import UserError
from python_models.methods.base import (
    METHODS,
    Batch,
    Context,
    Synthesis,
    build_image_generator,
    generate,
)
from python_models.methods.descent import Descent
from python_models.methods.pooled import Best, PooledMethod, PoolSettings
from python_models.networks import init_normal_
from python_models.precision import at_least_float32

FeatureHooks = Literal["auto", "batchnorm", "stages"]


@dataclass(kw_only=True)
class CMISettings(PoolSettings):
    """Settings of CMI."""

    g_steps: int = 200
    """Steps of a round."""
    lr_g: float = 1e-3
    """Learning rate of the generator and the latents (Adam, betas 0.5 and 0.999)."""
    lr_head: float = 1e-3
    """Learning rate of the projection head (Adam)."""
    generator: str = "generator_small"
    """Name of the generator (see: kdci list generators)."""
    latent_dim: int = 256
    """Length of the latent vectors."""
    synthesis_batch_size: int = 256
    """Images made in a round."""
    bn: float = 1.0
    """Weight of the BatchNorm statistics."""
    oh: float = 1.0
    """Weight of the one-hot term."""
    adv: float = 0.5
    """Weight of the adversarial term."""
    cr: float = 0.8
    """Weight of the contrast."""
    cr_temperature: float = 0.1
    """Temperature of the contrast."""
    head_dim: int = 256
    """Length of the projected features."""
    bank_size: int = 40960
    """Images whose features the memory bank holds; the oldest leave it. The released code's 40,960
    take 0.9 GB on the device and in each checkpoint for the features of WRN-40-2, 0.2 GB for
    ResNet-34."""
    bank_sample_size: int = 4096
    """Rows drawn from the bank in a step; all, if there are fewer."""
    local_scale: float = 0.25
    """Least share of the image that a local view shows."""
    feature_hooks: FeatureHooks = "auto"
    """Where features are read: the inputs of all BatchNorm layers, those of the stages layer1,
    layer2, ..., or (auto) of the stages where there are layer1 to layer4."""


class InputMeans:
    """Spatial means of the inputs of some modules, read by hooks inside a ``with`` block.

    Args:
        modules: Modules of one network, whose inputs are ``[b, c, ...]``.

    Example:
        >>> with InputMeans([network.layer1, network.layer2]) as features:
        ...     network(images)
        >>> features.read().shape
        torch.Size([8, 128])
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._means: list[Tensor] = [torch.empty(0)] * len(modules)
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> InputMeans:
        self._handles = [
            module.register_forward_pre_hook(self._reader(index))
            for index, module in enumerate(self._modules)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _reader(self, index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def read(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            value = at_least_float32(inputs[0])
            self._means[index] = value if value.dim() == 2 else value.flatten(2).mean(2)

        return read

    def read(self) -> Tensor:
        """Return the means of the last batch, side by side, ``[b, d]``."""
        return torch.cat(self._means, dim=1)


def hooked_modules(network: nn.Module, hooks: FeatureHooks) -> list[nn.Module]:
    """Return the modules whose inputs are CMI's features.

    Args:
        network: The teacher's network.
        hooks: ``batchnorm``, ``stages``, or ``auto``: the stages where there are four of them.

    Raises:
        UserError: If there are none.
    """
    stages = _stages(network)
    if hooks == "stages" or (hooks == "auto" and len(stages) == 4):
        if not stages:
            raise UserError(
                "feature_hooks='stages' needs a teacher with stages named layer1, layer2, ..., and "
                f"{type(network).__name__} has none: use feature_hooks='batchnorm'"
            )
        return stages
    return [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def _stages(network: nn.Module) -> list[nn.Module]:
    """Return the modules named layer1, layer2, ... of the network, or of the one that it wraps.

    They are children of the shallowest module that has any; where several have, as blocks with
    layers do, they are not the network's stages.
    """
    found: dict[int, list[list[nn.Module]]] = {}
    for path, module in network.named_modules():
        children = [m for name, m in module.named_children() if re.fullmatch(r"layer\d+", name)]
        if children:
            depth = len(path.split(".")) if path else 0
            found.setdefault(depth, []).append(children)
    shallowest = found[min(found)] if found else []
    return shallowest[0] if len(shallowest) == 1 else []


class ProjectionHead(nn.Module):
    """Two linear layers with a ReLU between; unit vectors come out."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(in_features, in_features)
        self.out = nn.Linear(in_features, out_features)

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``[n, in_features]`` to unit vectors ``[n, out_features]``."""
        return F.normalize(self.out(F.relu(self.hidden(features))), dim=1)


@METHODS.register("cmi")
class CMI(PooledMethod[CMISettings]):
    """Generator drawn anew for each batch, kept apart from earlier ones by a contrast."""

    summary = "generator drawn anew each round, contrast with a memory bank, image pool"
    Settings = CMISettings
    defaults: ClassVar = {"kd_steps": 400, "temperature": 20.0, "lr": 0.1, "weight_decay": 1e-4}
    num_prototypes = 32
    needs_batch_norm = True

    def __init__(self, settings: CMISettings, context: Context) -> None:
        super().__init__(settings, context)
        if not settings.cr_temperature > 0:
            raise UserError(f"cr_temperature={settings.cr_temperature} must be > 0")
        if not 0 < settings.local_scale <= 1:
            raise UserError(f"local_scale={settings.local_scale} must lie in (0, 1]")
        self.generator = build_image_generator(settings.generator, settings.latent_dim, context)
        self.statistics = losses.BatchNormStatistics(self.teacher, world=self.world)
        self.features = InputMeans(hooked_modules(self.teacher.network, settings.feature_hooks))
        width = self._feature_width()
        with context.randomness.initialising("head"):
            self.head = ProjectionHead(width, settings.head_dim).to(context.device)
        self.head_optimizer = torch.optim.Adam(self.head.parameters(), lr=settings.lr_head)
        self.bank = FeatureBank(settings.bank_size, 2 * width, context.device)
        self.global_view = RandomCropFlip()
        self.local_view = RandomResizedCropFlip((settings.local_scale, 1.0))
        self.parts |= {
            "generator": self.generator,
            "head": self.head,
            "head_optimizer": self.head_optimizer,
            "bank": self.bank,
        }
        self.descent = Descent("generator", context.precision, context.watch, context.world)
        self._synthesis_stream = context.randomness.on_device("synthesis")
        self._bank_stream = context.randomness.on_device("bank")

    @torch.no_grad()
    def _feature_width(self) -> int:
        black = torch.zeros(1, *self.context.image_shape, device=self.context.device)
        with self.features:
            self.teacher(black)
        return self.features.read().shape[1]

    def begin_round(self, index: int) -> Synthesis:
        """Make one batch of images, put it in the pool and its features in the bank."""
        s, stream = self.settings, self._synthesis_stream
        with self.context.randomness.initialising(f"generator/{index}"):
            init_normal_(self.generator)
        self.generator.train()
        self.student.eval()
        latents = self.generator.sample_latents(s.synthesis_batch_size, stream).requires_grad_()
        targets = torch.randint(
            self.context.num_classes,
            (s.synthesis_batch_size,),
            generator=stream,
            device=self.context.device,
        ).sort()[0]
        optimizer = torch.optim.Adam(
            [*self.generator.parameters(), latents], lr=s.lr_g, betas=(0.5, 0.999)
        )
        part = self.world.part(s.synthesis_batch_size)
        best = Best(self.world)
        terms: dict[str, Tensor] = {}
        for _ in range(s.g_steps):
            images = generate(self.generator, latents[part.rows], self.teacher)
            terms, features = self.generator_losses(
                self.global_view(images, stream, part),
                self.local_view(images, stream, part),
                targets[part.rows],
                self.bank.sample(s.bank_sample_size, self._bank_stream),
            )
            optimizers = [optimizer, self.head_optimizer]
            loss = self.descent.backward(terms, optimizers, self.generator, latents, self.head)
            best.offer(loss, images, features)
            self.descent.step()
        best_images, best_features = best.tensors
        self.pool.add(self.world.gather(best_images))
        self.bank.add(self.world.gather(best_features))
        return Synthesis(Batch(best_images), {name: term.detach() for name, term in terms.items()})

    def generator_losses(
        self, global_view: Tensor, local_view: Tensor, targets: Tensor, cached: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the weighted terms of the generator's loss and the features of both views.

        Args:
            global_view: Images, ``[b, c, h, w]``.
            local_view: The other view of the same images.
            targets: Classes asked for, int64 ``[b]``.
            cached: Features of earlier images, local and global side by side, ``[m, 2 d]``.

        Returns:
            The terms by name, and the features, side by side like the cached ones, ``[b, 2 d]``.
        """
        s = self.settings
        with self.statistics, self.features:
            logits = self.teacher(global_view)
        global_features = self.features.read()
        with self.features:
            self.teacher(local_view)
        local_features = self.features.read()
        cached_local, cached_global = cached.chunk(2, dim=1)
        rows = self.head(torch.cat([local_features, cached_local]))
        part = self.world.part(len(targets) * self.world.size)
        with torch.no_grad():
            of_all = self.world.gather(global_features)
            columns = self.head(torch.cat([of_all, cached_global]))
        contrast = losses.contrastive_loss(rows, columns, len(targets), s.cr_temperature, part)
        terms = {
            "bn": s.bn * self.statistics.loss(),
            "oh": s.oh * losses.one_hot_loss(logits, targets),
            "cr": s.cr * contrast,
        }
        if s.adv:
            student_logits = self.student(global_view)
            terms["adv"] = s.adv * losses.masked_adversarial_loss(student_logits, logits)
        return terms, torch.cat([local_features, global_features], dim=1)
