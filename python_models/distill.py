# SPDX-License-Identifier: Apache-2.0
"""``kdci distill``: a `Distillation` with its run folder, clock, checkpoints and reports."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from python_models.checkpoint import (
    StopRequest,
    export_network,
    fingerprint,
    first_not_finite,
    load_checkpoint,
    resume_checkpoint,
    save_checkpoint,
    write_atomically,
)
from python_models.config import DistillConfig, check, flatten, write_yaml
from python_models.data import LabelledImages, load_labelled
from python_models.distributed import World, connect, local_device
from python_models.engine import Distillation
from python_models.errors import DivergenceError, Interrupted, UserError
from python_models.evaluate import accuracies, accuracy
from python_models.interruption import RoundAbandoned, RoundStart
from python_models.networks import short_name
from python_models.reporting import (
    Progress,
    RunFolder,
    duration,
    peak_memory_mb,
    picture_of_images,
    picture_of_proportions,
    write_metrics,
    write_summary,
)
from python_models.scalars import NoScalars, Scalars, summary_writer
from python_models.schedule import check_same_run
from python_models.teacher import load_teacher, resolve_device

PREVIEW_IMAGES = 64


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
    teacher = load_teacher(config)
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
        compensation = {} if run.compensation is None else run.compensation.health()
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
