# SPDX-License-Identifier: Apache-2.0
"""KDCI as modules for a training loop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from kdci_ext import _checks, functional, reference
from kdci_ext.dictionary import ConfounderDictionary
from kdci_ext.distributed import (
    GATHERED_ROWS,
    check_finite_rows,
    distributed_confounder_dictionary,
    gathered_rows,
    row_counts,
    share_bits,
    shared_generator,
)
from kdci_ext.functional import Backend, Weighting, confounder_dictionary
from kdci_ext.sums import column_moments

__all__ = ["KDCI", "PriorCompensation"]

Attention = Literal["learned", "uniform", "random"]
Prototypes = Literal["kmeans", "random", "shuffled", "classes"]

DIAGNOSED_VALUES = 2**24
"""Numbers, B x K x H, in one piece of :meth:`PriorCompensation.attention_weights`."""


class PriorCompensation(nn.Module):
    r"""The attention that adds a dictionary's prior to logits (KDCI, equations 3 to 5).

    Its three weights, :math:`W_q, W_k` [H, d] and :math:`w_t` [H] (5,376 numbers for 10 classes),
    start as ``torch.nn.Linear`` without bias does and learn with the student's optimiser.

    Args:
        num_classes: d, the width of the logits.
        hidden_dim: H; the paper's 256.
        weighting: ``"paper"`` or ``"posterior"``; see :func:`kdci_ext.functional.compensate`.
        scale: Factor on the prior, any finite number; 1 is the paper, 0 switches it off.
        attention: ``"learned"``, or, for the paper's ablation (Table 4), ``"uniform"``: all
            scores equal, or ``"random"``: normal scores, new at each call. The last two have no
            weights of attention.
        attention_temperature: Ours: divisor of the scores, > 0; below 1 attention concentrates. 1
            is the paper.
        init_gain: Ours: factor > 0 on the initial :math:`W_q, W_k, w_t`.
        projection: Ours: bring the prior into the logits by a learnable matrix,
            :math:`s'_b = s_b + W_p F_b` with :math:`W_p` [d, d] Xavier-normal at first.
        backend: ``"auto"``, ``"native"`` or ``"reference"``.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a size is below 1, ``scale`` is not finite, ``attention_temperature`` or
            ``init_gain`` not finite and positive, or an option is unknown.

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
        attention_temperature: float = 1.0,
        init_gain: float = 1.0,
        projection: bool = False,
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
        self.attention_temperature = _checks.finite_float(
            "attention_temperature", attention_temperature, above=0
        )
        self.init_gain = _checks.finite_float("init_gain", init_gain, above=0)
        self.backend: Backend = backend
        if attention == "learned":
            self.w_query = nn.Parameter(torch.empty(hidden_dim, num_classes))
            self.w_key = nn.Parameter(torch.empty(hidden_dim, num_classes))
            self.w_score = nn.Parameter(torch.empty(hidden_dim))
        self.w_project: nn.Parameter | None = None
        if projection:
            self.w_project = nn.Parameter(torch.empty(num_classes, num_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew from PyTorch's generator.

        Those of attention uniform in +- gain / sqrt(inputs), the projection Xavier-normal.

        Example:
            >>> compensation = PriorCompensation(num_classes=10)
            >>> _ = torch.manual_seed(0)
            >>> compensation.reset_parameters()
            >>> bool(compensation.w_query.abs().max() < 10**-0.5)
            True
        """
        if self.attention == "learned":
            for weight in (self.w_query, self.w_key, self.w_score):
                _init_like_linear(weight, self.init_gain)
        if self.w_project is not None:
            nn.init.xavier_normal_(self.w_project)

    def forward(self, logits: Tensor, dictionary: ConfounderDictionary) -> Tensor:
        """Return the compensated logits S'.

        Args:
            logits: Student logits S, [B, d], float32, float64, bfloat16 or float16.
            dictionary: Whose prior is added; of width d.

        Returns:
            [B, d] in the type of ``logits``; computed in float32, or float64 if an input is.

        Raises:
            TypeError: For an argument of the wrong type.
            ValueError: For a wrong shape or device, and for an empty batch.
            RuntimeError: With ``backend="native"`` where there is no native kernel.

        Example:
            >>> compensation = PriorCompensation(num_classes=10, scale=0.0)
            >>> d = confounder_dictionary(torch.randn(256, 10), num_prototypes=8)
            >>> logits = torch.randn(32, 10)
            >>> bool((compensation(logits, d) == logits).all())
            True
        """
        self._check("logits", logits, dictionary)
        if self.w_project is None:
            return self._added(logits, dictionary)
        # In float32 at least, so that the difference is the prior and not rounding.
        wide = logits.to(torch.promote_types(logits.dtype, self.w_project.dtype))
        with torch.autocast(logits.device.type, enabled=False):
            prior = self._added(wide, dictionary) - wide
            return (wide + prior @ self.w_project.T).to(logits.dtype)

    def _added(self, logits: Tensor, dictionary: ConfounderDictionary) -> Tensor:
        """Add the prior as it is."""
        if self.attention != "learned":
            return self._with_fixed_attention(logits, dictionary)
        return functional._compensated(
            (logits, dictionary.prototypes, dictionary.proportions, *self._weights()),
            *(self.weighting == "posterior", self.scale, self.backend),
        )

    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return W_q, W_k and w_t, the last one divided by the temperature of attention."""
        w_score: Tensor = self.w_score
        if self.attention_temperature != 1:
            w_score = w_score / self.attention_temperature
        return self.w_query, self.w_key, w_score

    @torch.no_grad()
    def attention_weights(self, logits: Tensor, dictionary: ConfounderDictionary) -> Tensor:
        """Return how each row attends to the prototypes, to be looked at: lambda, [B, K].

        Args:
            logits: Student logits S, [B, d], float32, float64, bfloat16 or float16.
            dictionary: Whose prototypes are attended to; of width d.

        Returns:
            float32, or float64 if an input is; rows sum to 1. With ``weighting="posterior"`` the
            weights that have the proportions in them.

        Raises:
            TypeError: For an argument of the wrong type.
            ValueError: For a wrong shape or device, and for an empty batch.

        Example:
            >>> compensation = PriorCompensation(num_classes=10)
            >>> d = confounder_dictionary(torch.randn(256, 10), num_prototypes=8)
            >>> compensation.attention_weights(torch.randn(32, 10), d).shape
            torch.Size([32, 8])
        """
        self._check("logits", logits, dictionary)
        if self.attention != "learned":
            return self._fixed_weights(logits, dictionary)
        prototypes, proportions = dictionary.prototypes, dictionary.proportions
        rows = max(1, DIAGNOSED_VALUES // (len(prototypes) * self.hidden_dim))
        posterior = self.weighting == "posterior"
        parts = [
            reference.compensate(part, prototypes, proportions, *self._weights(), posterior, 1.0)[1]
            for part in torch.split(logits, rows)
        ]
        return torch.cat(parts)

    def loss(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        dictionary: ConfounderDictionary,
        temperature: float = 1.0,
    ) -> Tensor:
        """Return KL_T(teacher || S'), batch mean times T^2.

        See :func:`kdci_ext.functional.compensated_kd_loss`.

        Args:
            student_logits: S, [B, d], float32, float64, bfloat16 or float16.
            teacher_logits: [B, d], a constant: it must not require gradients.
            dictionary: Whose prior is added to S; of width d.
            temperature: T > 0.

        Returns:
            The loss, [] float32, or float64 if an input is.

        Raises:
            TypeError: For an argument of the wrong type.
            ValueError: For a wrong shape, device or value, an empty batch, and a teacher that
                requires gradients.
            RuntimeError: With ``backend="native"`` where there is no native kernel.

        Example:
            >>> compensation = PriorCompensation(num_classes=10)
            >>> d = confounder_dictionary(torch.randn(256, 10), num_prototypes=8)
            >>> s, t = torch.randn(32, 10, requires_grad=True), torch.randn(32, 10)
            >>> compensation.loss(s, t, d, temperature=4.0).backward()
            >>> s.grad.shape
            torch.Size([32, 10])
        """
        self._check("student_logits", student_logits, dictionary)
        _checks.logits_like("teacher_logits", teacher_logits, "student_logits", student_logits)
        _checks.constant("teacher_logits", teacher_logits)
        temperature = _checks.finite_float("temperature", temperature, above=0)
        if self.attention != "learned" or self.w_project is not None:
            compensated = self(student_logits, dictionary)
            dtype = torch.promote_types(compensated.dtype, torch.float32)
            divergence = F.kl_div(
                F.log_softmax(compensated.to(dtype) / temperature, 1),
                F.log_softmax(teacher_logits.detach().to(dtype) / temperature, 1),
                reduction="batchmean",
                log_target=True,
            )
            return divergence * temperature**2
        prior = (dictionary.prototypes, dictionary.proportions, *self._weights())
        return functional._kd_loss(
            (student_logits, teacher_logits, *prior),
            *(temperature, self.weighting == "posterior", self.scale, self.backend),
        )

    def _check(self, name: str, logits: Tensor, dictionary: ConfounderDictionary) -> None:
        """Check what all methods take; ``name`` is what the caller calls ``logits``."""
        if not isinstance(dictionary, ConfounderDictionary):
            raise TypeError(
                f"dictionary must be a ConfounderDictionary, got {type(dictionary).__name__}: make "
                "one with build_confounder_dictionary(teacher_logits, num_prototypes)"
            )
        prototypes, proportions = dictionary.prototypes, dictionary.proportions
        _check_logits(name, logits, self.num_classes)
        _checks.not_empty(
            "dictionary.prototypes", _checks.tensor("dictionary.prototypes", prototypes, ("K", "d"))
        )
        _checks.size("dictionary.prototypes", prototypes, 1, self.num_classes, "num_classes")
        _checks.tensor("dictionary.proportions", proportions, ("K",))
        _checks.size(
            *("dictionary.proportions", proportions, 0, prototypes.shape[0]),
            "number of prototypes",
        )
        weight = self.w_query if self.attention == "learned" else self.w_project
        module = {} if weight is None else {"the module": weight}
        dictionary_tensors = {
            "dictionary.prototypes": prototypes,
            "dictionary.proportions": proportions,
        }
        _checks.same_device({**module, name: logits, **dictionary_tensors})

    def _with_fixed_attention(self, logits: Tensor, dictionary: ConfounderDictionary) -> Tensor:
        """Compensate with equal or random scores, which need no attention kernel."""
        prototypes, proportions = dictionary.prototypes, dictionary.proportions
        weights = self._fixed_weights(logits, dictionary)
        values = prototypes if self.weighting == "posterior" else proportions[:, None] * prototypes
        return logits + (self.scale * (weights @ values)).to(logits.dtype)

    def _fixed_weights(self, logits: Tensor, dictionary: ConfounderDictionary) -> Tensor:
        """Return the weights of equal or random scores, [B, K]."""
        prototypes = dictionary.prototypes
        scores = logits.new_zeros(logits.shape[0], prototypes.shape[0], dtype=prototypes.dtype)
        if self.attention == "random":
            scores = torch.randn_like(scores) / self.attention_temperature
        if self.weighting == "posterior":
            scores = scores + dictionary.proportions.log()
        return torch.softmax(scores, 1)

    def extra_repr(self) -> str:
        """Describe the module in its repr."""
        return (
            f"num_classes={self.num_classes}, hidden_dim={self.hidden_dim}, "
            f"weighting={self.weighting!r}, scale={self.scale:g}, attention={self.attention!r}, "
            f"attention_temperature={self.attention_temperature:g}, init_gain={self.init_gain:g}, "
            f"projection={self.w_project is not None}"
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
        attention_temperature: Likewise.
        init_gain: Likewise.
        projection: Likewise.
        prototypes: ``"kmeans"``, or for the ablation ``"random"``: normal draws with the features'
            column means and standard deviations. Two are ours, to compare with:
            ``"shuffled"``, a prior of the same size that knows nothing of the classes: each
            prototype of k-means with its columns in an order drawn at random; and ``"classes"``,
            logit adjustment (Menon et al., ICLR 2021): every prototype is the log of the mean
            softmax of the features, and every proportion 1, so that the prior is ``scale`` times
            log p(class), whatever attention does.
        proportions: ``"frequency"``, or for the ablation ``"none"``: leave P(z) out.
        dictionary_dim: d', the width of another model's logits that :meth:`update` is given; by
            default they are the teacher's, of width d, and there is no mapping matrix.
        pca_components: See :func:`kdci_ext.functional.confounder_dictionary`.
        max_iter: Likewise.
        tol: Likewise.
        warm_start: Let every :meth:`update` but the first start from the prototypes of the last
            one instead of k-means++: fewer iterations where a generator's batches change slowly,
            and prototypes that keep their places.
        check_finite: Let :meth:`update` raise on NaN or Inf. By default on for CPU tensors, and off
            elsewhere, where it would stall the stream, and under ``torch.compile``. Where it is
            off, the dictionary of such logits holds NaN, and with ``warm_start`` so do those that
            begin from it. The rows of a ``group`` beyond
            :data:`kdci_ext.distributed.GATHERED_ROWS` are always looked at.
        backend: ``"auto"``, ``"native"`` or ``"reference"``.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a size is below 1, a number out of range, ``pca_components`` above the width
            of the logits, or an option unknown.

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
        attention_temperature: float = 1.0,
        init_gain: float = 1.0,
        projection: bool = False,
        prototypes: Prototypes = "kmeans",
        proportions: Literal["frequency", "none"] = "frequency",
        dictionary_dim: int | None = None,
        pca_components: int | Literal["auto"] = "auto",
        max_iter: int = 50,
        tol: float = 2e-4,
        warm_start: bool = False,
        check_finite: bool | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.compensation = PriorCompensation(
            *(num_classes, hidden_dim),
            weighting=weighting,
            scale=scale,
            attention=attention,
            attention_temperature=attention_temperature,
            init_gain=init_gain,
            projection=projection,
            backend=backend,
        )
        self.num_prototypes = _checks.positive_int("num_prototypes", num_prototypes)
        self.prototype_source = _checks.choice("prototypes", prototypes, get_args(Prototypes))
        self.proportion_source = _checks.choice("proportions", proportions, ("frequency", "none"))
        functional._check_stopping(max_iter, tol)
        self.max_iter = max_iter
        self.tol = float(tol)
        self.warm_start = warm_start
        self.check_finite = check_finite
        self.dictionary_dim = num_classes
        self.w_map: nn.Parameter | None = None
        if dictionary_dim is not None:
            self.dictionary_dim = _checks.positive_int("dictionary_dim", dictionary_dim)
            self.w_map = nn.Parameter(torch.empty(num_classes, dictionary_dim))
            _init_like_linear(self.w_map)
        functional._num_components(pca_components, num_prototypes, self.dictionary_dim)
        self.pca_components = pca_components
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
            teacher_logits: M, [n, d] with n >= num_prototypes, float32, float64, bfloat16 or
                float16: one synthetic mini-batch, or all sampled data. With ``dictionary_dim`` the
                other model's logits of the same images, [n, dictionary_dim].
            generator: Source of the random draws; with ``group`` that of its first process.
            group: Processes whose rows are clustered together, each with at least 0 rows; by
                default this one alone.

        Returns:
            The dictionary as clustered, with the labels of this process's rows.

        Raises:
            TypeError: For an argument of the wrong type.
            ValueError: For a wrong shape or device, fewer rows than prototypes (with ``group``: of
                all processes), and NaN or Inf where ``check_finite`` looks for them.
            RuntimeError: With ``backend="native"`` where there is no native kernel.

        Example:
            >>> kdci = KDCI(num_classes=10, num_prototypes=8)
            >>> found = kdci.update(torch.randn(256, 10), torch.Generator().manual_seed(0))
            >>> found.labels.shape, kdci.is_ready, torch.equal(kdci.prototypes, found.prototypes)
            (torch.Size([256]), True, True)
        """
        _checks.tensor("teacher_logits", teacher_logits, ("n", "d"))
        width = "num_classes" if self.w_map is None else "dictionary_dim"
        _checks.size("teacher_logits", teacher_logits, 1, self.dictionary_dim, width)
        _checks.same_device({"kdci": self.prototypes, "teacher_logits": teacher_logits})
        _checks.generator(generator)
        rows = teacher_logits
        # What is not finite is looked for here, where its name is known.
        cluster: Callable[..., ConfounderDictionary]
        cluster = functools.partial(confounder_dictionary, check_finite=False)
        counts = [len(rows)] if group is None else row_counts(rows, group)
        if sum(counts) < self.num_prototypes:
            whose = "" if group is None else " in all processes"
            raise ValueError(
                f"teacher_logits has {sum(counts)} rows{whose}, but must have at least "
                f"num_prototypes={self.num_prototypes}: give more, or make a KDCI of fewer"
            )
        is_whole = True
        if group is not None:
            generator = shared_generator(generator, rows.device, group)
            is_whole = sum(counts) <= GATHERED_ROWS
            if is_whole:
                rows = gathered_rows(rows, group)
            else:
                check_finite_rows("teacher_logits", rows, sum(counts), group)
                cluster = functools.partial(distributed_confounder_dictionary, group=group)
        start = self.prototypes if self.warm_start and self._ready else None
        found = cluster(
            *(rows, self.num_prototypes, self.pca_components),
            generator=generator,
            initial_prototypes=start,
            max_iter=self.max_iter,
            tol=self.tol,
            backend=self.compensation.backend,
        )
        if is_whole and functional._looks_for_nan(self.check_finite, rows.device):
            start_name = "the prototypes of the last update"
            functional._check_found(found, "teacher_logits", rows, start_name, start)
        prototypes, proportions = found.prototypes, found.proportions
        if self.prototype_source != "kmeans":
            across = None if is_whole else group
            prototypes = self._instead_of(prototypes, rows, generator, across)
        if self.proportion_source == "none" or self.prototype_source == "classes":
            proportions = torch.ones_like(proportions)
        self.prototypes.copy_(prototypes)
        self.proportions.copy_(proportions)
        self._ready = True
        if group is None:
            return found
        share_bits([self.prototypes, self.proportions], group)
        if not is_whole:
            return found
        first = sum(counts[: distributed.get_rank(group)])
        return replace(found, labels=found.labels[first : first + len(teacher_logits)])

    def _instead_of(
        self,
        prototypes: Tensor,
        rows: Tensor,
        generator: torch.Generator | None,
        group: distributed.ProcessGroup | None,
    ) -> Tensor:
        """Return what an option takes in place of the clusters' means, [K, d].

        Args:
            prototypes: The means, [K, d].
            rows: The features, [n, d]; with ``group`` this process's rows of them.
            generator: Source of the random draws.
            group: Processes that hold the other rows.
        """
        drawn_on = rows.device if generator is None else generator.device
        if self.prototype_source == "shuffled":
            draws = torch.rand(prototypes.shape, generator=generator, device=drawn_on)
            return prototypes.gather(1, draws.argsort(1).to(prototypes.device))
        is_of_classes = self.prototype_source == "classes"
        moments = column_moments(rows.softmax(1) if is_of_classes else rows)
        if group is not None:
            moments = moments.all_reduce(group)
        if is_of_classes:
            smallest = torch.finfo(prototypes.dtype).tiny
            return moments.mean.to(prototypes).clamp(min=smallest).log().expand_as(prototypes)
        deviation = (moments.scatter.diagonal() / moments.count).sqrt()
        normal = torch.randn(prototypes.shape, generator=generator, device=drawn_on)
        return (moments.mean + deviation * normal.to(deviation)).to(prototypes)

    def attention_weights(self, student_logits: Tensor) -> Tensor:
        """Return how each row attends to the prototypes, to be looked at: lambda, [B, K].

        See :meth:`PriorCompensation.attention_weights`.

        Args:
            student_logits: S, [B, d], float32, float64, bfloat16 or float16.

        Returns:
            float32, or float64 if an input is; rows sum to 1.

        Raises:
            RuntimeError: Before the first :meth:`update`.
            TypeError: For an argument of the wrong type.
            ValueError: For a wrong shape or device, and for an empty batch.

        Example:
            >>> kdci = KDCI(num_classes=10, num_prototypes=8)
            >>> _ = kdci.update(torch.randn(256, 10))
            >>> kdci.attention_weights(torch.randn(32, 10)).shape
            torch.Size([32, 8])
        """
        self._check("student_logits", student_logits)
        return self.compensation.attention_weights(student_logits, self._dictionary())

    def forward(self, student_logits: Tensor) -> Tensor:
        """Return the compensated logits S'.

        Args:
            student_logits: S, [B, d], float32, float64, bfloat16 or float16.

        Returns:
            [B, d] in the type of ``student_logits``.

        Raises:
            RuntimeError: Before the first :meth:`update`, and with ``backend="native"`` where there
                is no native kernel.
            TypeError: For an argument of the wrong type.
            ValueError: For a wrong shape or device, and for an empty batch.

        Example:
            >>> kdci = KDCI(num_classes=10, num_prototypes=8)
            >>> _ = kdci.update(torch.randn(256, 10))
            >>> kdci(torch.randn(32, 10)).shape
            torch.Size([32, 10])
        """
        self._check("student_logits", student_logits)
        return self.compensation(student_logits, self._dictionary())  # type: ignore[no-any-return]

    def loss(
        self, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """Return the distillation loss KL_T(teacher || S'), batch mean times T^2.

        Args:
            student_logits: S, [B, d], float32, float64, bfloat16 or float16.
            teacher_logits: [B, d], a constant: it must not require gradients.
            temperature: T > 0.

        Returns:
            The loss, [] float32, or float64 if an input is.

        Raises:
            RuntimeError: Before the first :meth:`update`, and with ``backend="native"`` where there
                is no native kernel.
            TypeError: For an argument of the wrong type.
            ValueError: For a wrong shape, device or value, an empty batch, and a teacher that
                requires gradients.

        Example:
            >>> kdci = KDCI(num_classes=10, num_prototypes=8)
            >>> _ = kdci.update(torch.randn(256, 10))
            >>> s, t = torch.randn(32, 10, requires_grad=True), torch.randn(32, 10)
            >>> kdci.loss(s, t, temperature=20.0).backward()
            >>> s.grad.shape, kdci.compensation.w_query.grad.shape
            (torch.Size([32, 10]), torch.Size([256, 10]))
        """
        return self.compensation.loss(
            student_logits, teacher_logits, self._dictionary(), temperature
        )

    def _check(self, name: str, logits: Tensor) -> None:
        """Check logits that the caller calls ``name``."""
        _check_logits(name, logits, self.compensation.num_classes)
        _checks.same_device({"kdci": self.prototypes, name: logits})

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


def _check_logits(name: str, logits: Tensor, num_classes: int) -> None:
    _checks.not_empty(name, _checks.tensor(name, logits, ("B", "d")))
    _checks.size(name, logits, 1, num_classes, "num_classes")


def _init_like_linear(weight: nn.Parameter, gain: float = 1.0) -> None:
    bound = gain * weight.shape[-1] ** -0.5
    nn.init.uniform_(weight, -bound, bound)


def _note_loaded_dictionary(module: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(module, KDCI)
    module._ready = not bool(module.proportions.isnan().any())
