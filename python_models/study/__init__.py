# SPDX-License-Identifier: Apache-2.0
"""``kdci study``: many runs that differ in one thing alone, and what the difference comes to.

The parts: `plan` reads and checks a study's file and makes a `grid` of it; `folder` knows where its
runs are and which are taken, `records` what is written beside them; `worker` trains them; `results`
collects them, `table` compares them, `prior` measures KDCI's part; `markdown` and `plots` show it;
`run` puts it together.
"""

from python_models.config import StudyConfig
from python_models.study.grid import Cell, Study
from python_models.study.plan import load_study
from python_models.study.run import StudyResult, run_study
from python_models.study.table import Comparison, Difference, Line, paired_difference

__all__ = [
    "Cell",
    "Comparison",
    "Difference",
    "Line",
    "Study",
    "StudyConfig",
    "StudyResult",
    "load_study",
    "paired_difference",
    "run_study",
]
