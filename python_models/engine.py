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

import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

import kdci_ext
from python_models.checkpoint import (
    NetworkInfo,
    StopRequest,
    export_network,
    fingerprint,
    first_not_finite,
    load_checkpoint,
    resume_checkpoint,
    save_checkpoint,
    write_atomically,
)
from python_models.compiling import begin_step, compiled_networks
from python_models.config import DistillConfig, check, flatten, write_yaml
from python_models.data import (
    LabelledData,
    LabelledImages,
    UnlabelledImages,
    load_labelled,
    open_unlabelled,
    to_float,
)
from python_models.distributed import ALONE, World, connect, local_device
from python_models.errors import DivergenceError, Interrupted, UserError
from python_models.evaluate import accuracies, accuracy
from python_models.health import Health
from python_models.interruption import RoundAbandoned, RoundStart
from python_models.losses import batch_norm_layers, kd_divergence
from python_models.methods import METHODS, Batch, Context, Method
from python_models.methods.base import on_device
from python_models.methods.descent import Descent
from python_models.networks import Classifier, build_network, short_name
from python_models.precision import Precision
from python_models.randomness import Randomness
from python_models.reporting import (
    LossLog,
    Progress,
    RunFolder,
    duration,
    loss_term,
    peak_memory_mb,
    picture_of_images,
    picture_of_proportions,
    write_metrics,
    write_summary,
)
from python_models.scalars import NoScalars, Scalars, summary_writer
from python_models.schedule import check_same_run, learning_rate, set_learning_rate
from python_models.teacher import (
    LoadedNetwork,
    load_network,
    require_features,
    require_logits,
    resolve_device,
)

PREVIEW_IMAGES = 64
DICTIONARY_BATCH = 1024
"""Images in one forward pass of another model than the teacher, for the dictionary."""


@dataclass(frozen=True)
class RunResult:
    """Results of a distillation.

    Attributes:
        accuracy: Of the student after the last step, without compensation, in percent; None
            where no test images were used.
        best_accuracy: Highest over the epochs *on the test set*; not a fair estimate.
        compensated_accuracy: Of the last student with KDCI's compensation; a diagnostic.
        teacher_accuracy: Of the teacher.
        seconds: Time spent in the loop.
        steps: Student steps made.
        peak_memory_mb: Largest memory of the run, see `reporting.peak_memory_mb`.
        student: File of the student's weights.
    """

    accuracy: float | None
    best_accuracy: float | None
    compensated_accuracy: float | None
    teacher_accuracy: float | None
    seconds: float
    steps: int
    peak_memory_mb: float
    student: str


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
        other = self._load_dictionary_model()
        # None: the teacher itself makes the dictionary.
        self.dictionary_model = None if other is None else other.classifier.to(device)
        self.kdci = self._build_kdci(
            method_class.num_prototypes, None if other is None else other.info.num_classes
        )
        self.optimizer = self._build_optimizer(extra)
        self._descent = Descent("student", self.precision, world=world)
        self._teacher_fingerprint = fingerprint(self.teacher)
        self._dictionary_fingerprint = (
            None if self.dictionary_model is None else fingerprint(self.dictionary_model)
        )
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
        # The student's logits that KDCI compensated last, for `compensation_health`.
        self._compensated_logits: Tensor | None = None

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
        channels, _, size = self.info.image_shape
        self.unlabelled = open_unlabelled(task.unlabelled, task.data_root, size, channels)
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

    def _load_dictionary_model(self) -> LoadedNetwork | None:
        c = self.config.compensation
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
            data_root=self.config.task.data_root,
        )
        if other.info.image_shape != self.info.image_shape:
            raise UserError(
                f"kdci_dictionary_teacher={c.kdci_dictionary_teacher} takes images "
                f"{list(other.info.image_shape)}, but the teacher's are "
                f"{list(self.info.image_shape)}: give a network for images of this shape"
            )
        return other

    def _build_kdci(
        self, default_prototypes: int, dictionary_dim: int | None
    ) -> kdci_ext.KDCI | None:
        c = self.config.compensation
        if not c.kdci:
            return None
        if not self.method.has_divergence:
            raise UserError(
                f"kdci compensates the distillation term, which {self.config.method} does not have "
                "with kd_weight=0: give --kd-weight 1, or --no-kdci"
            )
        with self.randomness.initialising("kdci"):
            return kdci_ext.KDCI(
                self.info.num_classes,
                c.kdci_prototypes or default_prototypes,
                c.kdci_hidden_dim,
                weighting=c.kdci_weighting,
                scale=c.kdci_scale,
                attention=c.kdci_attention,
                prototypes=c.kdci_dictionary,
                proportions=c.kdci_proportions,
                dictionary_dim=dictionary_dim,
            ).to(self.device)

    def _build_optimizer(self, extra: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        t = self.config.training
        parameters = list(self.student.parameters())
        if self.kdci is not None:  # its weights learn as the student's do
            parameters += self.kdci.parameters()
        groups = [{"params": parameters}, *extra]
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
        temperature = self.config.training.temperature
        if self.kdci is not None:
            self._compensated_logits = student_logits.detach()
            if self.config.training.cuda_graphs:  # the next step overwrites its passes' results
                self._compensated_logits = self._compensated_logits.clone()
            return self.kdci.loss(student_logits, teacher_logits, temperature)
        return kd_divergence(student_logits, teacher_logits, temperature)

    def _update_dictionary(self, features: Tensor, *, is_part: bool = False) -> None:
        """Rebuild the confounder dictionary from logits of its images, with KDCI.

        Args:
            features: The logits, on each process all or its part of them.
            is_part: Which of the two.
        """
        if self.kdci is None:
            return
        count = len(features) * (self.world.size if is_part else 1)
        if count < self.kdci.num_prototypes:
            raise UserError(
                f"kdci_prototypes={self.kdci.num_prototypes} must be <= the {count} images "
                "that the dictionary is built from: lower it or raise the batch size"
            )
        # Of all logits, which every process has, each makes the same.
        group = self.world.group if is_part else None
        self.kdci.update(features, generator=self._dictionary_stream, group=group)

    @property
    def _dictionary_stream(self) -> torch.Generator:
        return self.randomness.on_cpu("dictionary")

    @property
    def is_warming_up(self) -> bool:
        """Whether the next round has no student steps."""
        return self.round < self.warmup_rounds

    def prepare(self) -> None:
        """Do what comes once before training; a resumed run loads its state instead."""
        features = self.method.prepare()
        if features is None:
            return
        if self.dictionary_model is not None:
            chunks = torch.split(self.method.dictionary_images(), DICTIONARY_BATCH)
            batches = (Batch(to_float(chunk.to(self.device))) for chunk in chunks)
            features = torch.cat([self._dictionary_features(batch) for batch in batches])
        self._update_dictionary(features)

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
        if self.kdci is not None and synthesis.batch is not None and not self.is_warming_up:
            features = self._dictionary_features(synthesis.batch)
            largest = {"the teacher's prediction for the dictionary": features.abs().amax()}
            self.log.watch(f"step {self.step} (round {self.round})", largest)
            self._update_dictionary(features, is_part=True)

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
    def _dictionary_features(self, batch: Batch) -> Tensor:
        """Return what the dictionary is built from: the logits of the teacher or another model."""
        if self.dictionary_model is None:
            return self._teacher_logits(batch)
        logits: Tensor = self.dictionary_model(batch.images)
        return logits

    @torch.no_grad()
    def compensation_health(self) -> dict[str, float]:
        """Return two signs of whether KDCI works, or nothing where it has not acted yet.

        Returns:
            ``dictionary_entropy``: ``-sum p log p`` of the dictionary's proportions (as shares), in
            nats: log K where all prototypes are equally common, 0 where one is all.
            ``compensation_ratio``: ``mean |F| / mean |S|``, the size of the compensation relative
            to the student's logits, on the last batch. All processes must call it.
        """
        logits = self._compensated_logits
        if self.kdci is None or logits is None:
            return {}
        logits = logits.float()
        shares = self.kdci.proportions / self.kdci.proportions.sum()
        # Looking must not change the run: the ablation with random attention draws.
        with self.randomness.untouched():
            size = (self.kdci(logits) - logits).abs().mean()
        mean = self.world.mean
        ratio_of_means = mean(size) / mean(logits.abs().mean())
        values = torch.stack([torch.special.entr(shares).sum(), ratio_of_means])
        entropy, ratio = values.tolist()
        return {"dictionary_entropy": entropy, "compensation_ratio": ratio}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on.

        Called on all processes it is the same on all, whatever their number.
        """
        return {
            "teacher": self._teacher_fingerprint,
            "dictionary_model": self._dictionary_fingerprint,
            "round": self.round,
            "step": self.step,
            "is_round_open": self.is_round_open,
            "student": self.deployed.network.state_dict(),
            "kdci": None if self.kdci is None else self.kdci.state_dict(),
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
        if state["dictionary_model"] != self._dictionary_fingerprint:
            raise UserError(
                "kdci_dictionary_teacher's weights are not those that the run began with: resume "
                "needs the same network"
            )
        self.round, self.step = state["round"], state["step"]
        self.is_round_open = state["is_round_open"]
        self.deployed.network.load_state_dict(state["student"])
        if self.kdci is not None:
            self.kdci.load_state_dict(state["kdci"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.method.load_state_dict(state["method"])
        if self.world.is_first:  # which adds the others'
            self.class_counts.copy_(state["class_counts"])
        self.log.load_state_dict(state["log"])
        self.health.load_state_dict(state["health"])
        self.precision.load_state_dict(state["precision"])
        self.randomness.load_state_dict(state["randomness"], state.get("other_processes", ()))


def distill(config: DistillConfig[Any]) -> RunResult:
    """Run ``kdci distill``.

    Args:
        config: From `config.distill_config`.

    Returns:
        The results, which ``summary.json`` in the run folder holds too.

    Raises:
        UserError: If the configuration, the networks or the data are wrong.
        DivergenceError: If a loss became NaN or infinite.
        Interrupted: After Ctrl-C, when the state is saved.

    Example:
        >>> config = distill_config(method="dafl", teacher="runs/teacher", student="lenet5_half")
        >>> distill(config).accuracy
    """
    check(config)
    with connect(config.training.device) as world:
        result: RunResult = world.from_first(_distill(config, world))
        return result


def _distill(config: DistillConfig[Any], world: World) -> RunResult | None:
    """Run this process's part of a distillation; the first one has the results."""
    task, output = config.task, config.output
    assert task.teacher is not None
    if output.tensorboard:
        summary_writer()  # before anything is computed or written
    device = resolve_device(local_device(config.training.device))
    teacher = load_network(
        task.teacher,
        task.teacher_weights,
        task.dataset,
        data_root=task.data_root,
        network_args=task.teacher_args,
        given=config.input,
    )
    run = Distillation(config, teacher, device, world)
    if not world.is_first:
        return _Session(run, None, None).finish()
    test: LabelledImages | None = None
    if task.evaluate:
        if run.dataset is None:
            raise UserError("dataset is required to measure accuracy: give it or --no-evaluate")
        test = load_labelled(
            run.dataset, "test", task.data_root, image_shape=teacher.info.image_shape
        )
        teacher.require_fit(test, run.dataset)
    path = output.out_dir or Path("runs") / "-".join(
        (
            config.method,
            short_name(teacher.info.network),
            short_name(task.student),
            "kdci" if config.compensation.kdci else "vanilla",
            f"seed{config.training.seed}",
        )
    )
    folder = RunFolder(path, resume=output.resume, overwrite=output.overwrite)
    if output.resume:
        check_same_run(flatten(config), folder.config)
    write_yaml(folder.config, config)
    return _Session(run, folder, test).finish()


class _Session:
    """A `Distillation` with its folder, clock and reports.

    Of several processes the first one has a folder and test images; the others have neither, write
    nothing and print nothing.
    """

    def __init__(
        self, run: Distillation, folder: RunFolder | None, test: LabelledImages | None
    ) -> None:
        self.run = run
        self.folder = folder
        self.test = test
        self.rows: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.scalars: Scalars | NoScalars = NoScalars()
        self.peak_memory_mb = 0.0
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(run.device)
        self.teacher_accuracy = None if test is None else accuracy(run.teacher, test, run.device)
        state = self._saved_state()
        if state is not None:
            run.load_state_dict(state["run"])
            self.rows, self.seconds = state["rows"], state["seconds"]
            self.peak_memory_mb = state.get("peak_memory_mb", 0.0)
        else:
            run.prepare()
        if folder and run.unlabelled is not None and run.unlabelled.skipped.count:
            write_atomically(folder.skipped, run.unlabelled.skipped.write)
        run.unlabelled = None  # it may hold all candidates
        # Time of the run at its last checkpoint.
        self._saved_at = self.seconds

    def _saved_state(self) -> dict[str, Any] | None:
        """Return the checkpoint to go on from, which the first process reads for all."""
        world = self.run.world
        if not self.run.config.output.resume:
            return None
        state = None if self.folder is None else resume_checkpoint(self.folder.checkpoint)
        if world.size == 1:
            return state
        contents = None
        if state is not None:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            contents = buffer.getvalue()
        contents = world.bytes_from_first(contents)
        return None if contents is None else load_checkpoint(Path("checkpoint"), contents)

    def finish(self) -> RunResult | None:
        """Run to the end, or to Ctrl-C; the first process has the results."""
        run, output = self.run, self.run.config.output
        if output.tensorboard and self.folder is not None:
            self.scalars = Scalars(self.folder.tensorboard, run.step)
        compensation = "with KDCI" if run.kdci is not None else "without KDCI"
        title = f"{run.config.method} {compensation}"
        progress = Progress(
            *(title, run.warmup_rounds + run.total_steps),
            min(run.round, run.warmup_rounds) + run.step,
            is_shown=run.world.is_first,
        )
        if self.teacher_accuracy is not None:
            progress.note(f"teacher: {self.teacher_accuracy:.2f} %")
        begin = time.monotonic() - self.seconds
        try:
            with StopRequest(is_announced=run.world.is_first) as stop:
                start = RoundStart(run.state_dict, is_kept=run.world.size == 1)
                run.wants_to_abandon = lambda: stop.requested and start.state is not None
                while run.step < run.total_steps:
                    before = run.step
                    try:
                        with start.making(not run.is_round_open):
                            run.advance()
                    except RoundAbandoned:
                        assert start.state is not None
                        self._stop(start.state)
                    self.seconds = time.monotonic() - begin
                    progress.step(run.log.last)
                    if run.step > before and run.step % run.steps_per_epoch == 0:
                        epoch = run.step // run.steps_per_epoch
                        self._end_epoch(epoch, progress)
                        if epoch % output.checkpoint_every == 0 or run.step == run.total_steps:
                            self._save(run.state_dict())
                    # Processes have clocks of their own, and a signal finds them at other steps.
                    is_due, is_stopping = run.world.any(self._is_checkpoint_due(), stop.requested)
                    if is_stopping:
                        self._stop(run.state_dict())
                    if is_due:
                        self._save(run.state_dict())
        except DivergenceError as error:
            if self.folder is None:
                raise
            saved = self.folder.checkpoint
            kept = f"the last checkpoint, {saved}, is from before" if saved.exists() else ""
            raise DivergenceError(
                f"{error}; {kept or 'there is no checkpoint yet'}. A smaller learning rate may help"
            ) from error
        finally:
            progress.close()
            self.scalars.close()
        return self._write_results()

    def _stop(self, state: Mapping[str, Any]) -> NoReturn:
        """Save a state of the run, and stop it."""
        self._save(state)
        path = "" if self.folder is None else self.folder.path
        raise Interrupted(
            f"stopped after {state['step']} of {self.run.total_steps} steps, saved in "
            f"{path}; {self._how_to_go_on()}"
        )

    def _end_epoch(self, epoch: int, progress: Progress) -> None:
        run, training = self.run, self.run.config.training
        averages = run.log.averages()
        run.log.reset()
        compensation = run.compensation_health()
        health = run.health.end_epoch(run.world.sum(run.class_counts))
        if self.folder is None:
            return
        row: dict[str, Any] = {
            "epoch": epoch,
            "step": run.step,
            "lr": run.optimizer.param_groups[0]["lr"],
            **averages,
        }
        text = ", ".join(f"{name} {value:.3g}" for name, value in list(row.items())[3:])
        row.update(compensation)
        row.update(health)
        short = {}
        last = epoch == training.epochs
        if self.test is not None and (last or epoch % run.config.output.evaluate_every == 0):
            heads = {} if run.kdci is None else {"compensated": run.kdci}
            # Looking must not change the run: the ablation with random attention draws.
            with run.randomness.untouched():
                found = accuracies(run.deployed, self.test, run.device, heads=heads)
            row["accuracy"] = found["plain"]
            if "compensated" in found:
                row["accuracy_compensated"] = found["compensated"]
            short["accuracy"] = f"{found['plain']:.2f} %"
            text += f", accuracy {found['plain']:.2f} %"
        row["images_per_second"] = run.step * training.batch_size / self.seconds
        row["peak_memory_mb"] = self._measure_memory()
        row["seconds"] = self.seconds
        self.rows.append(row)
        write_metrics(self.folder.metrics, self.rows)
        self.scalars.add(row)
        short["images/s"] = f"{row['images_per_second']:.0f}"
        short["memory"] = f"{row['peak_memory_mb']:.0f} MB"
        text += f", {short['images/s']} images/s, {short['memory']}"
        progress.epoch(f"epoch {epoch}/{training.epochs}, {text}", short)

    def _save(self, state: Mapping[str, Any]) -> None:
        # A last step may have spoilt the weights after its losses were still fine.
        kdci = {} if self.run.kdci is None else dict(self.run.kdci.named_parameters())
        spoilt = first_not_finite(
            {"student": state["student"], "kdci": kdci, "method": state["method"]}
        )
        if spoilt is not None:
            raise DivergenceError(f"{spoilt} became nan or infinite by step {state['step']}")
        if self.run.world.size > 1:
            self.run.world.require_equal("the student", fingerprint(self.run.deployed))
        if self.folder is None:
            self._saved_at = self.seconds
            return
        try:
            save_checkpoint(
                self.folder.checkpoint,
                {
                    "run": state,
                    "rows": self.rows,
                    "seconds": self.seconds,
                    "peak_memory_mb": self._measure_memory(),
                },
            )
        except UserError as error:
            raise UserError(f"{error}; when it can be written, {self._how_to_go_on()}") from error
        self._saved_at = self.seconds

    def _is_checkpoint_due(self) -> bool:
        minutes = self.run.config.output.checkpoint_minutes
        return minutes > 0 and self.seconds - self._saved_at >= 60 * minutes

    def _how_to_go_on(self) -> str:
        path = "" if self.folder is None else self.folder.path
        return f"go on with: kdci distill --resume --out-dir {path}"

    def _measure_memory(self) -> float:
        """Return the peak so far, that of the processes before a resume included."""
        self.peak_memory_mb = max(self.peak_memory_mb, peak_memory_mb(self.run.device))
        return self.peak_memory_mb

    def _write_results(self) -> RunResult | None:
        run, folder = self.run, self.folder
        class_counts = run.world.sum(run.class_counts)
        if folder is None:
            return None
        export_network(folder.weights("student"), run.deployed.network, run.info)
        picture_of_images(folder.images, run.method.preview(PREVIEW_IMAGES))
        names = None if self.test is None else self.test.class_names
        picture_of_proportions(folder.class_proportions, class_counts, names)
        measured = [row["accuracy"] for row in self.rows if "accuracy" in row]
        result = RunResult(
            accuracy=measured[-1] if measured else None,
            best_accuracy=max(measured) if measured else None,
            compensated_accuracy=self.rows[-1].get("accuracy_compensated"),
            teacher_accuracy=self.teacher_accuracy,
            seconds=round(self.seconds, 1),
            steps=run.step,
            peak_memory_mb=round(self._measure_memory(), 1),
            student=str(folder.weights("student")),
        )
        write_summary(folder.summary, asdict(result))
        return result


def describe(result: RunResult) -> str:
    """Return the results as lines for the terminal."""
    lines = []
    if result.accuracy is not None:
        lines.append(f"student: {result.accuracy:.2f} % (last step, without compensation)")
        lines.append(f"teacher: {result.teacher_accuracy:.2f} %")
        lines.append(
            f"best epoch on the test set: {result.best_accuracy:.2f} % (not a fair estimate)"
        )
    if result.compensated_accuracy is not None:
        lines.append(f"with compensation: {result.compensated_accuracy:.2f} % (diagnostic)")
    lines.append(f"time: {duration(result.seconds)}, {result.steps} steps")
    lines.append(f"files: {Path(result.student).parent}")
    return "\n".join(lines)
