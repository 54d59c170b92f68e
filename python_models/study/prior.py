# SPDX-License-Identifier: Apache-2.0
"""The table of how large KDCI's prior was in a study's runs, and what it was made of."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from python_models.study.folder import StudyFolder
from python_models.study.markdown import aligned
from python_models.study.results import SIGNS, Row, health


def prior_table(folder: StudyFolder) -> str:
    """Return how large the prior was at the first and the last epoch as Markdown, mean over seeds.

    Empty where no run with KDCI is done.
    """
    of_variant: dict[tuple[str, str, int], list[Row]] = {}
    for row in health(folder):
        if any(row[sign] is None for sign in SIGNS):
            continue  # of a version that did not record it
        of_variant.setdefault((row["entry"], row["variant"], row["prototypes"]), []).append(row)
    body = []
    for (entry, variant, prototypes), rows in of_variant.items():
        epochs = [row["epoch"] for row in rows]
        ends = [[row for row in rows if row["epoch"] == e] for e in (min(epochs), max(epochs))]

        def mean(sign: str, rows: Sequence[Row]) -> float:
            return statistics.fmean(row[sign] for row in rows)

        ratios = [f"{100 * mean('compensation_ratio', end):.3g}" for end in ends]
        body.append(
            (
                *(entry, variant, str(prototypes), " to ".join(ratios)),
                f"{mean('compensation_shift', ends[-1]):.1e}",
                f"{mean('attention_prototypes', ends[-1]):.1f}",
                f"{statistics.fmean(math.exp(row['dictionary_entropy']) for row in ends[-1]):.1f}",
            )
        )
    if not body:
        return ""
    header = (
        *("entry", "variant", "K", "prior / logits (%)", "shift (nats)"),
        *("attended to", "in the dictionary"),
    )
    return "\n".join(
        [
            *aligned(header, body),
            "",
            "How large KDCI's prior was: mean |F| by mean |S| at the end of the first and of the "
            "last epoch, then, of the last one, the mean KL by which F changes the softmax, and "
            "how many of the K prototypes the attention and the dictionary's proportions spread "
            "over (exp of their entropies). Means over seeds.",
        ]
    )
