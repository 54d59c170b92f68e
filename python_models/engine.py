# SPDX-License-Identifier: Apache-2.0
"""The one training loop of all methods.

An epoch is ``ep_steps // kd_steps`` rounds, a round one generator phase of the method (if it has
one), with KDCI one rebuilding of the confounder dictionary, and ``kd_steps`` student steps; see
`methods.base`. KDCI is switched on in one place, `Distillation._divergence`. The student is
evaluated and exported without compensation.

The state between any two student steps is complete in `Distillation.state_dict`, so that a run can
stop after any of them and go on as if it had not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

import kdci_ext
from python_models.checkpoint import (
    NetworkInfo,
    fingerprint,
)
from python_models.compensation import Compensation
from python_models.compiling import begin_step, compiled_networks
from python_models.config import DistillConfig
from python_models.data import (
    LabelledData,
    UnlabelledImages,
    load_labelled,
    open_unlabelled,
)
from python_models.distributed import ALONE, World
from python_models.errors import UserError
from python_models.health import Health
from python_models.interruption import RoundAbandoned
from python_models.losses import batch_norm_layers, kd_divergence
from python_models.methods import METHODS, Batch, Context, Method
from python_models.methods.base import on_device
from python_models.methods.descent import Descent
from python_models.networks import Classifier, build_network
from python_models.precision import Precision
from python_models.randomness import Randomness
from python_models.reporting import (
    LossLog,
    loss_term,
)
from python_models.schedule import learning_rate, set_learning_rate
from python_models.teacher import (
    LoadedNetwork,
    require_features,
    require_logits,
)

PREVIEW_IMAGES = 64
DICTIONARY_BATCH = 1024
"""Images in one forward pass of another model than the teacher, for the dictionary."""


class Distillation:
    """A run in memory: everything that changes while it trains, and the loop's two phases.

    Args:
        config: The resolved configuration.
        teacher: The loaded teacher.
        device: Where to compute.
        world: The processes that compute together; see `python_models.distributed`.

    Raises:
        UserError: If parts do not fit each other.
    """

    def __init__(
        self,
        config: DistillConfig[Any],
        teacher: LoadedNetwork,
        device: torch.device,
        world: World = ALONE,
    ) -> None:
        self.config = config
        self.device = device
        self.world = world
        world.require_even("batch_size", config.training.batch_size)
        if hasattr(config.settings, "synthesis_batch_size"):
            world.require_even("synthesis_batch_size", config.settings.synthesis_batch_size)
        self.dataset = config.task.dataset or teacher.info.dataset
        self.unlabelled: UnlabelledImages | None = None
        self.info = NetworkInfo(
            **{
                **asdict(teacher.info),
                "network": config.task.student,
                "arguments": config.task.student_args,
            }
        )
        self.randomness = Randomness(config.training.seed, device, world.rank)
        self._loaded_teacher = teacher
        self.teacher = teacher.classifier.to(device)
        self.teacher_info = teacher.info
        with self.randomness.initialising("student"):
            student = build_network(
                self.info.network,
                self.info.num_classes,
                self.info.image_shape[0],
                **self.info.arguments,
            )
            self.student = Classifier(student, self.info.mean, self.info.std)
            require_logits(self.student, self.info)
        self.student = world.synchronised(self.student.to(device))

        method_class = METHODS.get(config.method)
        self._require_parts(method_class)
        self.precision = Precision(config.training.precision, device)
        for classifier in (self.teacher, self.student):
            classifier.precision = self.precision
            if config.training.channels_last:
                on_device(classifier, device)
        if method_class.needs_unlabelled and config.task.unlabelled is None:
            raise UserError(
                f"method {config.method} samples from unlabelled images: give a folder, an .npz "
                "file or a dataset's name as --unlabelled"
            )
        if method_class.needs_labels and self.dataset is None:
            raise UserError(
                f"method {config.method} trains on labelled images: give their --dataset"
            )
        self.method = method_class(
            config.settings,
            Context(
                teacher=self.teacher,
                student=self.student,
                num_classes=self.info.num_classes,
                image_shape=self.info.image_shape,
                batch_size=config.training.batch_size,
                kd_steps=config.training.kd_steps,
                progress=self._progress,
                epochs=config.training.epochs,
                device=device,
                randomness=self.randomness,
                open_unlabelled=self._open_unlabelled,
                open_images=self._open_images,
                load_unlabelled=self._load_unlabelled,
                load_labelled=self._load_labelled,
                precision=self.precision,
                watch=self._watch,
                world=world,
            ),
        )
        # The teacher of student steps; the methods' own calls read it by hooks.
        self._seen_teacher = self.teacher
        if config.training.compile:
            self._seen_teacher = compiled_networks(
                self.teacher,
                self.student,
                device,
                reads_features="student" in method_class.needs_features,
                cuda_graphs=config.training.cuda_graphs,
            )
        self.deployed = self.student
        extra: Sequence[dict[str, Any]] = ()
        deployed = self.method.deployed()
        if deployed is not None:
            self.deployed = Classifier(deployed.network, self.info.mean, self.info.std).to(device)
            self.info = replace(
                self.info,
                network=deployed.name,
                arguments={
                    **deployed.arguments,
                    "student": config.task.student,
                    "student_args": dict(config.task.student_args),
                },
            )
            extra = deployed.parameter_groups
        self.compensation = self._build_compensation()
        self.optimizer = self._build_optimizer(extra)
        self._descent = Descent("student", self.precision, world=world)
        self._teacher_fingerprint = fingerprint(self.teacher)
        self.class_counts = torch.zeros(self.info.num_classes, dtype=torch.int64, device=device)
        self.log = LossLog(device, world)
        self.health = Health(self.info.num_classes, device)

        ep_steps = config.training.ep_steps or self.method.steps_per_pass()
        self.rounds_per_epoch = max(1, ep_steps // config.training.kd_steps)
        self.steps_per_epoch = self.rounds_per_epoch * config.training.kd_steps
        self.total_steps = config.training.epochs * self.steps_per_epoch
        self.warmup_rounds = self.method.warmup_rounds
        # Position: rounds begun or finished, student steps made, and whether a round is open.
        self.round = 0
        self.step = 0
        self.is_round_open = False
        # Steps of the generator phase that is being made.
        self._phase_step = 0
        # Asked at each of them; on yes it is given up by `RoundAbandoned`.
        self.wants_to_abandon: Callable[[], bool] = lambda: False

    def _require_parts(self, method_class: type[Method[Any]]) -> None:
        """Check that teacher and student have the layers that the method reads."""
        name = self.config.method
        if method_class.needs_batch_norm and not batch_norm_layers(self.teacher):
            others = [each for each in METHODS if not METHODS.get(each).needs_batch_norm]
            raise UserError(
                f"method {name} matches statistics that the teacher's BatchNorm layers store, but "
                f"{self.teacher_info.network} has no BatchNorm layer with running statistics: use "
                f"a method that needs none ({', '.join(others)}) or another teacher"
            )
        networks = {
            "teacher": (self.teacher, self.teacher_info),
            "student": (self.student, self.info),
        }
        for role in method_class.needs_features:
            try:
                require_features(*networks[role])
            except UserError as error:
                others = [each for each in METHODS if not METHODS.get(each).needs_features]
                raise UserError(
                    f"method {name} reads the vector before the {role}'s last layer. {error}; or "
                    f"use a method that needs logits alone ({', '.join(others)})"
                ) from error

    def _open_unlabelled(self) -> UnlabelledImages:
        task = self.config.task
        assert task.unlabelled is not None
        return self._open_images(task.unlabelled, task.unlabelled_imbalance)

    def _open_images(self, source: str, imbalance: float = 1.0) -> UnlabelledImages:
        channels, _, size = self.info.image_shape
        self.unlabelled = open_unlabelled(
            *(source, self.config.task.data_root, size, channels), imbalance=imbalance
        )
        return self.unlabelled

    def _load_unlabelled(self) -> Tensor:
        return self._open_unlabelled().load()

    def _load_labelled(self) -> LabelledData:
        assert self.dataset is not None
        data = load_labelled(
            self.dataset, "train", self.config.task.data_root, image_shape=self.info.image_shape
        )
        if not isinstance(data, LabelledData):
            raise UserError(
                f"method {self.config.method} keeps its training images in memory, but those of "
                f"{self.dataset} are too many: {len(data)} of {list(data.image_shape)}"
            )
        self._loaded_teacher.require_fit(data, self.dataset)
        return data

    def _build_compensation(self) -> Compensation | None:
        if not self.config.compensation.kdci:
            return None
        if not self.method.has_divergence:
            raise UserError(
                f"kdci compensates the distillation term, which {self.config.method} does not have "
                "with kd_weight=0: give --kd-weight 1, or --no-kdci"
            )
        return Compensation(self.config, self.info, self.randomness, self.device, self.world)

    @property
    def kdci(self) -> kdci_ext.KDCI | None:
        """The module of a run with KDCI."""
        return None if self.compensation is None else self.compensation.kdci

    def _build_optimizer(self, extra: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        t = self.config.training
        groups: list[dict[str, Any]] = [{"params": list(self.student.parameters())}, *extra]
        if self.kdci is not None:  # its weights learn as the student's do
            factor = self.config.compensation.kdci_lr_factor
            if factor == 1:
                groups[0]["params"] += self.kdci.parameters()
            else:
                groups.append({"params": list(self.kdci.parameters()), "lr_factor": factor})
        if t.optimizer == "adam":
            return torch.optim.Adam(groups, lr=t.lr, weight_decay=t.weight_decay)
        return torch.optim.SGD(
            groups,
            lr=t.lr,
            momentum=t.momentum,
            weight_decay=t.weight_decay,
            nesterov=t.nesterov,
        )

    def _divergence(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """The distillation term: KL_T(T || S + F) with KDCI, KL_T(T || S) without."""
        if self.compensation is not None:
            return self.compensation.divergence(student_logits, teacher_logits)
        return kd_divergence(student_logits, teacher_logits, self.config.training.temperature)

    @property
    def is_warming_up(self) -> bool:
        """Whether the next round has no student steps."""
        return self.round < self.warmup_rounds

    def prepare(self) -> None:
        """Do what comes once before training; a resumed run loads its state instead."""
        features = self.method.prepare()
        if features is None or self.compensation is None:
            return
        if self.compensation.dictionary_model is not None:
            features = self.compensation.features_of(self.method.dictionary_images())
        self.compensation.update(features)

    def advance(self) -> None:
        """Make one student step, beginning a round where one is due; in warm-up, one round."""
        with self.precision.active():
            self._advance()

    def _advance(self) -> None:
        if not self.is_round_open:
            if not self.is_warming_up and self.step % self.steps_per_epoch == 0:
                self.method.begin_epoch(self.step // self.steps_per_epoch)
            self._begin_round()
            if self.is_warming_up:
                self.round += 1
                return
            self.is_round_open = True
        self._student_step()
        self.step += 1
        if self.step % self.config.training.kd_steps == 0:
            self.is_round_open = False
            self.round += 1

    def _begin_round(self) -> None:
        self._phase_step = 0
        synthesis = self.method.begin_round(self.round)
        if synthesis is None:
            return
        if synthesis.images is not None:
            self.health.saw(self.world.gather(synthesis.images))
        self.log.add(
            self.step, {f"generator_{name}": term for name, term in synthesis.losses.items()}
        )
        if self.compensation is None or synthesis.batch is None or self.is_warming_up:
            return
        features = self._dictionary_features(self.compensation, synthesis.batch)
        largest = {"the teacher's prediction for the dictionary": features.abs().amax()}
        self.log.watch(f"step {self.step} (round {self.round})", largest)
        self.compensation.update(features, is_part=True)

    def _watch(self, terms: Mapping[str, Tensor]) -> None:
        """Look at the terms of a step of the generator phase."""
        where = f"step {self.step} (round {self.round}, step {self._phase_step} of its generator)"
        self._phase_step += 1
        self.log.watch(
            where, {loss_term(f"generator_{name}"): term for name, term in terms.items()}
        )
        if self.wants_to_abandon():
            raise RoundAbandoned

    def _progress(self) -> float:
        """Return the fraction of the run that was done when this round began."""
        kd_steps = self.config.training.kd_steps
        return self.step // kd_steps * kd_steps / self.total_steps

    def _student_step(self) -> None:
        t = self.config.training
        by_epoch = self.step // self.steps_per_epoch / t.epochs
        done = self._progress() if t.schedule_by == "round" else by_epoch
        set_learning_rate(
            self.optimizer,
            learning_rate(t.schedule, t.lr, done, lr_min=t.lr_min, milestones=t.milestones),
        )
        self.deployed.train()
        if t.cuda_graphs:
            begin_step()
        batch = self.method.next_batch()
        teacher_logits = self._teacher_logits(batch)
        losses = self.method.student_losses(batch, self._divergence)
        self._descent.backward(losses, [self.optimizer, *self.method.optimizers()])
        self._descent.step()
        labels = teacher_logits.argmax(1)
        # torch.bincount would wait for the device.
        self.class_counts.index_add_(0, labels, torch.ones_like(labels))
        self.log.add(self.step, losses)

    @torch.no_grad()
    def _teacher_logits(self, batch: Batch) -> Tensor:
        if batch.teacher_logits is None:
            batch.teacher_logits = self._seen_teacher(batch.images)
        return batch.teacher_logits

    @torch.no_grad()
    def _dictionary_features(self, compensation: Compensation, batch: Batch) -> Tensor:
        """Return what the dictionary is built from: the logits of the teacher or another model."""
        if compensation.dictionary_model is None:
            return self._teacher_logits(batch)
        logits: Tensor = compensation.dictionary_model(batch.images)
        return logits

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on.

        Called on all processes it is the same on all, whatever their number.
        """
        return {
            "teacher": self._teacher_fingerprint,
            "round": self.round,
            "step": self.step,
            "is_round_open": self.is_round_open,
            "student": self.deployed.network.state_dict(),
            **({"kdci": None} if self.compensation is None else self.compensation.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state_dict(),
            "class_counts": self.world.sum(self.class_counts),
            "log": self.log.state_dict(),
            "health": self.health.state_dict(),
            "precision": self.precision.state_dict(),
            "randomness": self.randomness.state_dict(),
            "other_processes": self.world.objects(self.randomness.global_state())[1:],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            UserError: If the teacher is another one.
        """
        if state["teacher"] != self._teacher_fingerprint:
            raise UserError(
                "the teacher's weights are not those that the run began with: resume needs the "
                "same teacher"
            )
        self.round, self.step = state["round"], state["step"]
        self.is_round_open = state["is_round_open"]
        self.deployed.network.load_state_dict(state["student"])
        if self.compensation is not None:
            self.compensation.load_state_dict(state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.method.load_state_dict(state["method"])
        if self.world.is_first:  # which adds the others'
            self.class_counts.copy_(state["class_counts"])
        self.log.load_state_dict(state["log"])
        self.health.load_state_dict(state["health"])
        self.precision.load_state_dict(state["precision"])
        self.randomness.load_state_dict(state["randomness"], state.get("other_processes", ()))
