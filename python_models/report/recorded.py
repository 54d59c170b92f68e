# SPDX-License-Identifier: Apache-2.0
"""Sections about what the runs recorded: their results, settings, losses, time and memory."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Sequence
from typing import Any

from python_models.report import figures
from python_models.report.collect import Comparison, Run
from python_models.report.content import Report, number, percent, points
from python_models.report.page import (
    NOT_KNOWN,
    Markup,
    code,
    details,
    heading,
    paragraph,
    table,
    warning,
)
from python_models.reporting import METRICS

ACCURACY_TOLERANCE = 0.1
"""Points by which accuracy may differ where it is measured on another device."""


def lead(report: Report) -> list[Markup]:
    """Return the accuracy of the students, the paired difference, and where the weights are."""
    rows = []
    for run in report.runs:
        status = "" if run.summary is not None else ", not finished"
        rows.append(
            [
                run.name,
                percent(run.accuracy),
                percent(run.result("teacher_accuracy")),
                f"{run.method}, {run.label}",
                str(run.settings.get("student")),
                str(run.settings.get("seed")),
                f"{run.steps:,}{status}",
                code(str(run.weights)) if run.weights else "none yet",
            ]
        )
    body = [paragraph(text, "lead") for text in _headlines(report)]
    body.append(
        table(
            "Students: accuracy on the test images after the last step, without compensation",
            ["Run", "Accuracy", "Teacher's", "Method", "Student", "Seed", "Steps", "Weights"],
            rows,
        )
    )
    trained = next((run.weights for run in report.runs if run.weights), None)
    if trained is not None:
        command = f"kdci evaluate --network {shlex.quote(str(trained.parent))}"
        body.append(Markup(f'<p class="note">Measure a student anew: {code(command)}</p>'))
    body += _paired(report)
    body += [warning(text) for text in _warnings(report)]
    return body + [paragraph(note, "note") for note in report.notes]


def _headlines(report: Report) -> list[str]:
    """Return a sentence for each group of pairs that differ in their seeds alone."""
    lines = []
    for group in _groups(report):
        first = group[0][2]
        differences = [d for _, v, k in group if (d := _difference(v, k)) is not None]
        if not differences:
            continue
        if len(differences) == 1:
            _, vanilla, kdci = next(p for p in group if _difference(p[1], p[2]) is not None)
            lines.append(
                f"With KDCI {first.method} reached {percent(kdci.accuracy)}, without it "
                f"{percent(vanilla.accuracy)}, from the same seed: {points(differences[0])}. One "
                "seed does not tell which is better."
            )
        else:
            lines.append(
                f"KDCI minus vanilla, {first.method}: {points(statistics.mean(differences))} on "
                f"average over {len(differences)} pairs of the same seed (standard deviation "
                f"{statistics.stdev(differences):.2f}, {min(differences):+.2f} to "
                f"{max(differences):+.2f})."
            )
    if not report.pairs:
        lines.append("No two runs differ in KDCI alone, so none are compared.")
    return lines


def _groups(report: Report) -> list[list[tuple[Comparison, Run, Run]]]:
    groups: dict[tuple[Any, ...], list[tuple[Comparison, Run, Run]]] = {}
    for pair in report.pairs:
        groups.setdefault(pair[0].recipe, []).append(pair)
    return list(groups.values())


def _paired(report: Report) -> list[Markup]:
    if not report.pairs:
        return []
    rows = [
        [c.title, percent(v.accuracy), percent(k.accuracy), points(_difference(v, k))]
        for c, v, k in report.pairs
    ]
    header = ["Pair", "Vanilla", "KDCI", "KDCI minus vanilla"]
    body = [table("Paired difference: the same seed without and with KDCI", header, rows)]
    alone = [c.runs[0].name for c in report.comparisons if len(c.runs) == 1]
    if alone:
        text = f"Without a partner of the same method, networks and seed: {', '.join(alone)}."
        body.append(paragraph(text, "note"))
    return body


def _difference(vanilla: Run, kdci: Run) -> float | None:
    if vanilla.accuracy is None or kdci.accuracy is None:
        return None
    return kdci.accuracy - vanilla.accuracy


def _warnings(report: Report) -> list[str]:
    found = []
    for comparison, vanilla, kdci in report.pairs:
        other = [d.setting for d in comparison.differences if not d.is_expected]
        if other:
            found.append(
                f"{comparison.title}: the runs differ in more than KDCI ({', '.join(other)}), so "
                "their difference does not tell what KDCI does"
            )
        teachers = {report.findings[run.name].teacher for run in (vanilla, kdci)} - {None}
        if len(teachers) > 1:
            found.append(f"{comparison.title}: the teacher's weights were not the same")
        steps = {run.name: run.steps for run in (vanilla, kdci)}
        if vanilla.steps != kdci.steps:
            made = ", ".join(f"{name} {count:,}" for name, count in steps.items())
            found.append(f"{comparison.title}: the runs made different numbers of steps ({made})")
    for run in report.runs:
        measured = _measured_accuracy(report, run)
        if measured is not None and run.accuracy is not None:
            if abs(measured - run.accuracy) > ACCURACY_TOLERANCE:
                found.append(
                    f"{run.name}: its accuracy was {percent(run.accuracy)} but is "
                    f"{percent(measured)} on the test images found now: they may be others"
                )
    return found


def _measured_accuracy(report: Report, run: Run) -> float | None:
    predictions, test = report.findings[run.name].predictions, report.original.test
    if predictions is None or test is None:
        return None
    return 100.0 * (predictions == test.labels).double().mean().item()


def settings(report: Report) -> list[Markup]:
    """Return the settings that differ within each pair."""
    body = []
    for comparison, _, _ in report.pairs:
        rows = [
            [
                d.setting if d.is_expected else f"{d.setting} (not of KDCI)",
                str(d.vanilla),
                str(d.kdci),
            ]
            for d in sorted(comparison.differences, key=lambda d: d.is_expected)
        ]
        body.append(table(f"Settings: {comparison.title}", ["Setting", "Vanilla", "KDCI"], rows))
    return body


def curves(report: Report) -> list[Markup]:
    """Return the accuracy over training."""
    shown = [c for c in report.comparisons if any(run.column("accuracy") for run in c.runs)]
    if not shown:
        return [report.leave_out("Accuracy curves", "accuracy was not measured in these runs")]
    teachers = {run.result("teacher_accuracy") for run in report.runs} - {None}
    teacher = teachers.pop() if len(teachers) == 1 else None
    last = ", ".join(f"{r.name} {percent(r.accuracy)}" for c in shown for r in c.runs)
    return [
        report.draw(
            "accuracy",
            figures.accuracy_curves(shown, teacher),
            f"Curves of the students' accuracy by epoch; at the end: {last}.",
            "Accuracy of the students on the test images by epoch, without compensation; a panel "
            "for each pair.",
        ),
        details("As a table", _accuracies(report.runs)),
    ]


def _accuracies(runs: Sequence[Run]) -> Markup:
    found = {run.name: dict(run.column("accuracy")) for run in runs}
    epochs = sorted({epoch for values in found.values() for epoch in values})
    rows = [[str(e), *(percent(values.get(e)) for values in found.values())] for e in epochs]
    return table("Accuracy by epoch", ["Epoch", *found], rows)


def losses(report: Report) -> list[Markup]:
    """Return the loss terms over training, a pair in each panel."""
    body = []
    for index, comparison in enumerate(report.comparisons, 1):
        terms = list(dict.fromkeys(name for run in comparison.runs for name in run.losses))
        if not terms:
            continue
        rows = [
            [term, *(number(dict(r.column(term)).get(_last(r))) for r in comparison.runs)]
            for term in terms
        ]
        labels = [run.label for run in comparison.runs]
        body += [
            heading(comparison.title),
            report.draw(
                f"losses-{index}",
                figures.curves(comparison.runs, {term: term for term in terms}),
                f"Curves by epoch of the loss terms {', '.join(terms)}, of {' and '.join(labels)}.",
                "Weighted loss terms by epoch, each averaged over it; those of the generator's "
                "loss are of the last step of its phases.",
            ),
            details(
                "The last epoch as a table",
                table("Loss terms in the last epoch", ["Term", *labels], rows),
            ),
        ]
    return body


def health(report: Report) -> list[Markup]:
    """Return how the dictionary, its attention and the size of the compensation went."""
    columns = {
        "dictionary_entropy": "entropy of the dictionary (nats)",
        "compensation_ratio": "compensation / logits",
        "attention_prototypes": "prototypes attended to",
        "compensation_shift": "shift of the softmax (nats)",
    }
    body = []
    runs = [run for run in report.runs if run.has_kdci]
    recorded = [run for run in runs if any(run.column(name) for name in columns)]
    for index, run in enumerate(recorded, 1):
        values = {name: dict(run.column(name)).get(_last(run)) for name in columns}
        proportions = report.findings[run.name].proportions
        most = None if proportions is None else math.log(len(proportions))
        rows = [
            [
                "Entropy of the dictionary (nats)",
                number(values["dictionary_entropy"]),
                f"at most {number(most)}: all prototypes equally common",
            ],
            [
                "Compensation by logits",
                number(values["compensation_ratio"]),
                "mean |F| / mean |S| on the epoch's last batch",
            ],
            [
                "Prototypes attended to",
                number(values["attention_prototypes"]),
                f"at most {NOT_KNOWN if proportions is None else len(proportions)}: all alike; "
                "at least 1: one alone",
            ],
            [
                "Shift of the softmax (nats)",
                number(values["compensation_shift"]),
                "mean KL(softmax(S) || softmax(S + F)), likewise",
            ],
        ]
        body += [
            heading(run.name),
            report.draw(
                f"health-{index}",
                figures.curves([run], columns),
                f"Curves by epoch of the dictionary's entropy, of the attention and of the "
                f"compensation's size, of {run.name}.",
                "Whether the dictionary is spread over its prototypes, and how much the "
                "compensation moves the student's logits in training.",
            ),
            table("Signs of health in the last epoch", ["Sign", "Value", "Scale"], rows),
        ]
    missing = {
        run.name: "its metrics.csv does not hold them" for run in runs if run not in recorded
    }
    if missing:
        body.append(report.leave_out("Signs of health", missing))
    return body


def _last(run: Run) -> int:
    return int(run.epochs[-1]["epoch"])


def cost(report: Report) -> list[Markup]:
    """Return time and memory, and what KDCI changes in them."""
    body = []
    for comparison in report.comparisons:
        values = [_costs(run) for run in comparison.runs]
        header = ["Quantity", *(run.label for run in comparison.runs)]
        if len(values) == 2:
            header.append("Change with KDCI")
        rows = []
        for name in values[0]:
            amounts = [each[name] for each in values]
            row = [name, *(number(amount, 5) for amount in amounts)]
            if len(amounts) == 2:
                first, second = amounts
                change = None if not first or second is None else 100 * (second / first - 1)
                row.append(NOT_KNOWN if change is None else f"{change:+.2f} %")
            rows.append(row)
        body.append(table(f"Time and memory: {comparison.title}", header, rows))
    body.append(
        paragraph(
            "Time is that of the whole loop: generator phases, student steps and measurements of "
            "accuracy. Peak memory is what PyTorch held on a GPU, and on a CPU that of the whole "
            "process with Python and its libraries. Runs on a machine that was busy otherwise "
            "cannot be compared (the paper's Table 2).",
            "note",
        )
    )
    unknown = {
        run.name: "not recorded" if run.summary is not None else "the run has not finished"
        for run in report.runs
        if run.result("peak_memory_mb") is None
    }
    if unknown:
        body.append(report.leave_out("Peak memory", unknown))
    return body


def _costs(run: Run) -> dict[str, float | None]:
    last = run.epochs[-1]
    seconds, steps = last.get("seconds"), last.get("step")
    return {
        "Time (s)": seconds,
        "Time of a student step (ms)": 1000 * seconds / steps if seconds and steps else None,
        "Images per second": last.get("images_per_second"),
        "Peak memory (MB)": run.result("peak_memory_mb"),
    }


def runs(report: Report) -> list[Markup]:
    """Return all settings of each run, and what the columns of metrics.csv are."""
    body = []
    for run in report.runs:
        rows = [[name, str(value)] for name, value in run.settings.items()]
        body.append(
            details(
                f"All settings of {run.name}",
                table(str(run.folder.path), ["Setting", "Value"], rows),
            )
        )
    columns = [[name, text] for name, text in METRICS.items()]
    columns.append(["all others", "loss terms with their weights, averaged over the epoch"])
    body.append(
        details("Columns of metrics.csv", table("metrics.csv", ["Column", "Meaning"], columns))
    )
    return body
