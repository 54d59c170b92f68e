# SPDX-License-Identifier: Apache-2.0
"""KDCI in the training loop: the module, the model whose logits its dictionary is made of, health.

The one place where runs with KDCI differ from those without.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import kdci_ext
from python_models.checkpoint import NetworkInfo, fingerprint
from python_models.config import DistillConfig
from python_models.data import to_float
from python_models.distributed import World
from python_models.errors import UserError
from python_models.losses import kd_divergence
from python_models.methods import METHODS
from python_models.randomness import Randomness
from python_models.teacher import LoadedNetwork, load_network

DICTIONARY_BATCH = 1024
"""Images in one forward pass of another model than the teacher, for the dictionary."""


def num_prototypes(config: DistillConfig[Any]) -> int:
    """Return the size of a run's dictionary: the one it was given, or that of its method."""
    return config.compensation.kdci_prototypes or METHODS.get(config.method).num_prototypes


class Compensation:
    """KDCI of one run.

    Args:
        config: Of the run.
        info: The student's network.
        randomness: Source of random streams.
        device: Where to compute.
        world: The processes that compute together.

    Attributes:
        kdci: The module, whose weights learn with the student.
        dictionary_model: The model whose logits make the dictionary, or None for the teacher.

    Raises:
        UserError: If that model does not fit.
    """

    def __init__(
        self,
        config: DistillConfig[Any],
        info: NetworkInfo,
        randomness: Randomness,
        device: torch.device,
        world: World,
    ) -> None:
        self.settings = settings = config.compensation
        self._temperature = config.training.temperature
        # The next step overwrites what the passes of this one return.
        self._copies_logits = config.training.cuda_graphs
        self._world = world
        self._device = device
        self._randomness = randomness
        other = _load_dictionary_model(config, info)
        self.dictionary_model = None if other is None else other.classifier.to(device)
        self._fingerprint = (
            None if self.dictionary_model is None else fingerprint(self.dictionary_model)
        )
        width = info.num_classes if other is None else other.info.num_classes
        components = settings.kdci_components
        if components is not None and components > width:
            raise UserError(
                f"kdci_components={components} must be <= the {width} classes of the logits that "
                "the dictionary is made of"
            )
        with randomness.initialising("kdci"):
            self.kdci = kdci_ext.KDCI(
                info.num_classes,
                num_prototypes(config),
                settings.kdci_hidden_dim,
                weighting=settings.kdci_weighting,
                scale=settings.kdci_scale,
                attention=settings.kdci_attention,
                attention_temperature=settings.kdci_attention_temperature,
                init_gain=settings.kdci_init_gain,
                projection=settings.kdci_projection,
                prototypes=settings.kdci_dictionary,
                proportions=settings.kdci_proportions,
                dictionary_dim=None if other is None else width,
                pca_components=components or "auto",
            ).to(device)
        # Features of the last batches, where the dictionary is made from several.
        self._recent: deque[Tensor] = deque(maxlen=settings.kdci_batches)
        # The student's logits that were compensated last, for `health`.
        self._logits: Tensor | None = None

    def divergence(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Return KL_T(T || S + F), []."""
        logits = student_logits.detach()
        self._logits = logits.clone() if self._copies_logits else logits
        return self.kdci.loss(student_logits, teacher_logits, self._temperature)

    @torch.no_grad()
    def features_of(self, images: Tensor) -> Tensor:
        """Return the dictionary model's logits of all images, uint8 ``[n, c, h, w]``."""
        chunks = torch.split(images, DICTIONARY_BATCH)
        assert self.dictionary_model is not None
        return torch.cat([self.dictionary_model(to_float(c.to(self._device))) for c in chunks])

    def update(self, features: Tensor, *, is_part: bool = False) -> None:
        """Rebuild the dictionary from logits of its images.

        Args:
            features: The logits: all of them, the same on each process, or of a generator's batch
                this process's rows, to which those of the last batches may come.
            is_part: Which of the two.
        """
        count = len(features) * (self._world.size if is_part else 1)
        if count < self.kdci.num_prototypes:
            raise UserError(
                f"kdci_prototypes={self.kdci.num_prototypes} must be <= the {count} images "
                "that the dictionary is built from: lower it or raise the batch size"
            )
        if is_part and self.settings.kdci_batches > 1:
            # Of all processes, so that the rows are in the order that one process has them in.
            self._recent.append(self._world.gather(features))
            features, is_part = torch.cat(list(self._recent)), False
        # Of all logits, which every process has, each makes the same.
        group = self._world.group if is_part else None
        stream = self._randomness.on_cpu("dictionary")
        self.kdci.update(features, generator=stream, group=group)

    @torch.no_grad()
    def health(self) -> dict[str, float]:
        """Return signs of whether KDCI works, or nothing where it has not acted yet.

        All of them are on the logits that were compensated last; all processes must call it.

        Returns:
            ``dictionary_entropy``: ``-sum p log p`` of the dictionary's proportions (as shares), in
            nats: log K where all prototypes are equally common, 0 where one is all.
            ``compensation_ratio``: ``mean |F| / mean |S|``, the size of the compensation relative
            to the student's logits.
            ``attention_prototypes``: ``exp`` of the mean entropy of the attention: K where it is
            equal for all prototypes, 1 where each image attends to one.
            ``compensation_shift``: mean ``KL(softmax(S) || softmax(S + F))``, in nats.
        """
        logits = self._logits
        if logits is None:
            return {}
        logits = logits.float()
        shares = self.kdci.proportions / self.kdci.proportions.sum()
        # Looking must not change the run: the ablation with random attention draws.
        with self._randomness.untouched():
            compensated = self.kdci(logits)
            attention = self.kdci.attention_weights(logits)
        mean = self._world.mean
        ratio_of_means = mean((compensated - logits).abs().mean()) / mean(logits.abs().mean())
        entropy = mean(torch.special.entr(attention).sum(1).mean())
        shift = mean(kd_divergence(compensated, logits, 1.0))
        names = (
            *("dictionary_entropy", "compensation_ratio"),
            *("attention_prototypes", "compensation_shift"),
        )
        values = [torch.special.entr(shares).sum(), ratio_of_means, entropy.exp(), shift]
        return dict(zip(names, torch.stack(values).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on, the same on all processes."""
        # The next update drops the first of as many batches as there may be.
        is_full = len(self._recent) == self._recent.maxlen
        return {
            "kdci": self.kdci.state_dict(),
            "dictionary_model": self._fingerprint,
            "recent_features": list(self._recent)[is_full:],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            UserError: If the dictionary's model is another one.
        """
        if state["dictionary_model"] != self._fingerprint:
            raise UserError(
                "kdci_dictionary_teacher's weights are not those that the run began with: resume "
                "needs the same network"
            )
        self.kdci.load_state_dict(state["kdci"])
        self._recent.clear()
        self._recent.extend(state.get("recent_features", ()))


def _load_dictionary_model(config: DistillConfig[Any], info: NetworkInfo) -> LoadedNetwork | None:
    c = config.compensation
    if c.kdci_dictionary_teacher is None:
        return None
    if c.kdci_dictionary_weights is not None and c.kdci_dictionary_dataset is None:
        raise UserError(
            f"kdci_dictionary_teacher={c.kdci_dictionary_teacher} is a network's name: give "
            "the dataset that it was trained for as --kdci-dictionary-dataset"
        )
    other = load_network(
        *(c.kdci_dictionary_teacher, c.kdci_dictionary_weights, c.kdci_dictionary_dataset),
        *("kdci-dictionary-teacher", "kdci_dictionary_weights"),
        data_root=config.task.data_root,
        may_open_train=METHODS.get(config.method).needs_labels,
    )
    if other.info.image_shape != info.image_shape:
        raise UserError(
            f"kdci_dictionary_teacher={c.kdci_dictionary_teacher} takes images "
            f"{list(other.info.image_shape)}, but the teacher's are "
            f"{list(info.image_shape)}: give a network for images of this shape"
        )
    return other
