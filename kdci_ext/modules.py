# SPDX-License-Identifier: Apache-2.0
"""KDCI as modules for a training loop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from kdci_ext import _checks
from kdci_ext.dictionary import ConfounderDictionary
from kdci_ext.distributed import (
    GATHERED_ROWS,
    distributed_confounder_dictionary,
    gathered_rows,
    row_counts,
    share_bits,
    shared_generator,
)
from kdci_ext.functional import (
    Backend,
    Weighting,
    compensate,
    compensated_kd_loss,
    confounder_dictionary,
)
from kdci_ext.streaming import column_moments

__all__ = ["KDCI", "PriorCompensation"]

Attention = Literal["learned", "uniform", "random"]


class PriorCompensation(nn.Module):
    r"""The attention that adds a dictionary's prior to logits (KDCI, equations 3 to 5).

    Its three weights, :math:`W_q, W_k` [H, d] and :math:`w_t` [H] (5,376 numbers for 10 classes),
    start as ``torch.nn.Linear`` without bias does and learn with the student's optimiser.

    Args:
        num_classes: d, the width of the logits.
        hidden_dim: H; the paper's 256.
        weighting: ``"paper"`` or ``"posterior"``; see :func:`kdci_ext.functional.compensate`.
        scale: Factor on the prior; 1 is the paper.
        attention: ``"learned"``, or, for the paper's ablation (Table 4), ``"uniform"``: all
            scores equal, or ``"random"``: normal scores, new at each call. The last two have no
            parameters.
        backend: ``"auto"``, ``"native"`` or ``"reference"``.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a size is below 1, or an option is unknown.

    Example:
        >>> compensation = PriorCompensation(num_classes=10)
        >>> d = confounder_dictionary(torch.randn(256, 10), num_prototypes=8)
        >>> compensation(torch.randn(32, 10), d).shape
        torch.Size([32, 10])
    """

    def __init__(
        self,
        num_classes: int,
        hidden_dim: int = 256,
        *,
        weighting: Weighting = "paper",
        scale: float = 1.0,
        attention: Attention = "learned",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.num_classes = _checks.positive_int("num_classes", num_classes)
        self.hidden_dim = _checks.positive_int("hidden_dim", hidden_dim)
        _checks.choice("weighting", weighting, ("paper", "posterior"))
        _checks.choice("attention", attention, ("learned", "uniform", "random"))
        _checks.choice("backend", backend, ("auto", "native", "reference"))
        self.weighting: Weighting = weighting
        self.scale = _checks.finite_float("scale", scale)
        self.attention: Attention = attention
        self.backend: Backend = backend
        if attention == "learned":
            self.w_query = nn.Parameter(torch.empty(hidden_dim, num_classes))
            self.w_key = nn.Parameter(torch.empty(hidden_dim, num_classes))
            self.w_score = nn.Parameter(torch.empty(hidden_dim))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, uniform in +- 1 / sqrt(inputs), from PyTorch's generator."""
        for weight in self.parameters():
            _init_like_linear(weight)

    def forward(self, logits: Tensor, dictionary: ConfounderDictionary) -> Tensor:
        """Return the compensated logits S', [B, d], of ``logits`` [B, d]."""
        if self.attention != "learned":
            return self._with_fixed_attention(logits, dictionary)
        return compensate(
            *(logits, dictionary.prototypes, dictionary.proportions),
            *(self.w_query, self.w_key, self.w_score),
            weighting=self.weighting,
            scale=self.scale,
            backend=self.backend,
        )

    def loss(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        dictionary: ConfounderDictionary,
        temperature: float = 1.0,
    ) -> Tensor:
        """Return KL_T(teacher || S'), []; see ``functional.compensated_kd_loss``."""
        if self.attention != "learned":
            _checks.finite_float("temperature", temperature, above=0)
            compensated = self._with_fixed_attention(student_logits, dictionary)
            dtype = torch.promote_types(compensated.dtype, torch.float32)
            divergence = F.kl_div(
                F.log_softmax(compensated.to(dtype) / temperature, 1),
                F.log_softmax(teacher_logits.detach().to(dtype) / temperature, 1),
                reduction="batchmean",
                log_target=True,
            )
            return divergence * temperature**2
        return compensated_kd_loss(
            *(student_logits, teacher_logits, dictionary.prototypes, dictionary.proportions),
            *(self.w_query, self.w_key, self.w_score),
            temperature,
            weighting=self.weighting,
            scale=self.scale,
            backend=self.backend,
        )

    def _with_fixed_attention(self, logits: Tensor, dictionary: ConfounderDictionary) -> Tensor:
        """Compensate with equal or random scores, which need no attention kernel."""
        prototypes, proportions = dictionary.prototypes, dictionary.proportions
        _checks.tensor("logits", logits, ("B", "d"))
        _checks.size("logits", logits, 1, prototypes.shape[1], "number of prototype columns")
        scores = logits.new_zeros(logits.shape[0], prototypes.shape[0], dtype=prototypes.dtype)
        if self.attention == "random":
            scores = torch.randn_like(scores)
        if self.weighting == "posterior":
            prior = torch.softmax(scores + proportions.log(), 1) @ prototypes
        else:
            prior = torch.softmax(scores, 1) @ (proportions[:, None] * prototypes)
        return logits + (self.scale * prior).to(logits.dtype)

    def extra_repr(self) -> str:
        """Describe the module in its repr."""
        return (
            f"num_classes={self.num_classes}, hidden_dim={self.hidden_dim}, "
            f"weighting={self.weighting!r}, scale={self.scale:g}, attention={self.attention!r}"
        )


class KDCI(nn.Module):
    r"""Dictionary and compensation as one module: the drop-in form.

    :meth:`update` clusters teacher logits into the dictionary (after each generator phase, or once
    for sampled data), and :meth:`loss` replaces the loop's distillation loss. The parameters are
    those of :class:`PriorCompensation`; the dictionary is part of the ``state_dict``. Evaluate and
    deploy the student *without* this module.

    The dictionary may be that of *another* model, with :math:`d'` classes of its own (the paper's
    Table 5). A learnable mapping matrix :math:`W_m` [d, d'] then brings its prototypes into the
    student's logit space, :math:`z'_i = W_m z_i`, and attention and prior take :math:`z'_i`:

    .. math::
        s'_b = s_b + \textstyle\sum_i \lambda_{bi} P(z_i) W_m z_i

    ``w_map`` is one more parameter of this module: its gradient comes through the prototypes.

    Args:
        num_classes: d, the width of the logits.
        num_prototypes: K; the paper's 8 for generators, 32 for inversion, 128 for sampled data.
        hidden_dim: H; the paper's 256.
        weighting: ``"paper"`` or ``"posterior"``; see :func:`kdci_ext.functional.compensate`.
        scale: Factor on the prior; 1 is the paper.
        attention: See :class:`PriorCompensation`.
        prototypes: ``"kmeans"``, or for the ablation ``"random"``: normal draws with the features'
            column means and standard deviations.
        proportions: ``"frequency"``, or for the ablation ``"none"``: leave P(z) out.
        dictionary_dim: d', the width of another model's logits that :meth:`update` is given; by
            default they are the teacher's, of width d, and there is no mapping matrix.
        pca_components: See :func:`kdci_ext.functional.confounder_dictionary`.
        max_iter: Likewise.
        tol: Likewise.
        warm_start: Let every :meth:`update` but the first start from the prototypes of the last
            one instead of k-means++: fewer iterations where a generator's batches change slowly,
            and prototypes that keep their places.
        backend: ``"auto"``, ``"native"`` or ``"reference"``.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a size is below 1, or an option is unknown.

    Example:
        >>> kdci = KDCI(num_classes=10, num_prototypes=8)
        >>> _ = kdci.update(torch.randn(256, 10))
        >>> loss = kdci.loss(torch.randn(32, 10), torch.randn(32, 10), temperature=20.0)
    """

    prototypes: Tensor
    proportions: Tensor

    def __init__(
        self,
        num_classes: int,
        num_prototypes: int,
        hidden_dim: int = 256,
        *,
        weighting: Weighting = "paper",
        scale: float = 1.0,
        attention: Attention = "learned",
        prototypes: Literal["kmeans", "random"] = "kmeans",
        proportions: Literal["frequency", "none"] = "frequency",
        dictionary_dim: int | None = None,
        pca_components: int | Literal["auto"] = "auto",
        max_iter: int = 50,
        tol: float = 2e-4,
        warm_start: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.compensation = PriorCompensation(
            *(num_classes, hidden_dim),
            weighting=weighting,
            scale=scale,
            attention=attention,
            backend=backend,
        )
        self.num_prototypes = _checks.positive_int("num_prototypes", num_prototypes)
        self.prototype_source = _checks.choice("prototypes", prototypes, ("kmeans", "random"))
        self.proportion_source = _checks.choice("proportions", proportions, ("frequency", "none"))
        self.pca_components = pca_components
        self.max_iter = _checks.positive_int("max_iter", max_iter)
        self.tol = _checks.finite_float("tol", tol)
        self.warm_start = warm_start
        self.dictionary_dim = num_classes
        self.w_map: nn.Parameter | None = None
        if dictionary_dim is not None:
            self.dictionary_dim = _checks.positive_int("dictionary_dim", dictionary_dim)
            self.w_map = nn.Parameter(torch.empty(num_classes, dictionary_dim))
            _init_like_linear(self.w_map)
        # NaN until the first update, so that a dictionary nobody built cannot pass unseen.
        nan = float("nan")
        self.register_buffer("prototypes", torch.full((num_prototypes, self.dictionary_dim), nan))
        self.register_buffer("proportions", torch.full((num_prototypes,), nan))
        self._ready = False
        self.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
            _note_loaded_dictionary
        )

    @property
    def is_ready(self) -> bool:
        """Whether there is a dictionary, built or loaded with the ``state_dict``."""
        return self._ready

    @torch.no_grad()
    def update(
        self,
        teacher_logits: Tensor,
        generator: torch.Generator | None = None,
        *,
        group: distributed.ProcessGroup | None = None,
    ) -> ConfounderDictionary:
        """Rebuild the dictionary from predictions.

        In a loop of several processes (DistributedDataParallel), each with rows of its own, give
        ``group=torch.distributed.group.WORLD``: all processes call this, and all get the dictionary
        that one process would make, to rounding, of all rows in the order of the ranks. Without it
        each would have a dictionary of its own.

        Args:
            teacher_logits: M, [n, d] with n >= num_prototypes: one synthetic mini-batch, or all
                sampled data. With ``dictionary_dim`` the other model's logits of the same images,
                [n, dictionary_dim].
            generator: Source of the random draws; with ``group`` that of its first process.
            group: Processes whose rows are clustered together, each with at least 0 rows; by
                default this one alone.

        Returns:
            The dictionary as clustered, with the labels of this process's rows.

        Raises:
            TypeError: For an argument of the wrong type.
            ValueError: For a wrong shape, fewer rows than prototypes, and NaN or Inf.
        """
        _checks.tensor("teacher_logits", teacher_logits, ("n", "d"))
        width = "num_classes" if self.w_map is None else "dictionary_dim"
        _checks.size("teacher_logits", teacher_logits, 1, self.dictionary_dim, width)
        _checks.same_device({"kdci": self.prototypes, "teacher_logits": teacher_logits})
        rows = teacher_logits
        cluster: Callable[..., ConfounderDictionary] = confounder_dictionary
        if group is not None:
            generator = shared_generator(generator, rows.device, group)
            counts = row_counts(rows, group)
            if sum(counts) <= GATHERED_ROWS:
                rows = gathered_rows(rows, group)
            else:
                cluster = functools.partial(distributed_confounder_dictionary, group=group)
        found = cluster(
            *(rows, self.num_prototypes, self.pca_components),
            generator=generator,
            initial_prototypes=self.prototypes if self.warm_start and self._ready else None,
            max_iter=self.max_iter,
            tol=self.tol,
            backend=self.compensation.backend,
        )
        prototypes, proportions = found.prototypes, found.proportions
        if self.prototype_source == "random":
            moments = column_moments(rows)
            if cluster is not confounder_dictionary:
                moments = moments.all_reduce(group)
            deviation = (moments.scatter.diagonal() / moments.count).sqrt()
            drawn_on = rows.device if generator is None else generator.device
            normal = torch.randn(prototypes.shape, generator=generator, device=drawn_on)
            prototypes = (moments.mean + deviation * normal.to(deviation)).to(prototypes)
        if self.proportion_source == "none":
            proportions = torch.ones_like(proportions)
        self.prototypes.copy_(prototypes)
        self.proportions.copy_(proportions)
        self._ready = True
        if group is None:
            return found
        share_bits([self.prototypes, self.proportions], group)
        if rows is teacher_logits:
            return found
        first = sum(counts[: distributed.get_rank(group)])
        return replace(found, labels=found.labels[first : first + len(teacher_logits)])

    def forward(self, student_logits: Tensor) -> Tensor:
        """Return the compensated logits S', [B, d], of ``student_logits`` [B, d]."""
        return self.compensation(student_logits, self._dictionary())  # type: ignore[no-any-return]

    def loss(
        self, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """Return the distillation loss KL_T(teacher || S'), [], batch mean times T^2.

        Args:
            student_logits: S, [B, d].
            teacher_logits: [B, d], without gradients.
            temperature: T > 0.

        Raises:
            RuntimeError: Before the first :meth:`update`.
            TypeError: For an argument of the wrong type.
            ValueError: For a wrong shape, device or value.
        """
        return self.compensation.loss(
            student_logits, teacher_logits, self._dictionary(), temperature
        )

    def _dictionary(self) -> ConfounderDictionary:
        if not self._ready:
            raise RuntimeError(
                "there is no confounder dictionary yet: call update(teacher_logits) first"
            )
        # Labels and the rest concern the rows that were clustered, not the prior.
        none = self.proportions.new_empty(0)
        return ConfounderDictionary(self._mapped(), self.proportions, none, none, none)

    def _mapped(self) -> Tensor:
        """Return the prototypes in the student's logit space, [K, d]."""
        if self.w_map is None:
            return self.prototypes
        # Under autocast too in the precision of the dictionary, as the compensation is.
        with torch.autocast(self.prototypes.device.type, enabled=False):
            return self.prototypes @ self.w_map.T

    def extra_repr(self) -> str:
        """Describe the module in its repr."""
        return (
            f"num_prototypes={self.num_prototypes}, prototypes={self.prototype_source!r}, "
            f"proportions={self.proportion_source!r}, dictionary_dim={self.dictionary_dim}, "
            f"ready={self._ready}"
        )


def _init_like_linear(weight: nn.Parameter) -> None:
    inputs = weight.shape[-1]
    nn.init.uniform_(weight, -(inputs**-0.5), inputs**-0.5)


def _note_loaded_dictionary(module: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(module, KDCI)
    module._ready = not bool(module.proportions.isnan().any())
