# SPDX-License-Identifier: Apache-2.0
"""``kdci study``: many runs that differ in one thing alone, and what the difference comes to.

The parts: `plan` reads and checks a study's file, `folder` knows where its runs are and which are
taken, `worker` trains them, `table` compares them, `plots` draws, `run` puts it together.
"""

from python_models.config import StudyConfig
from python_models.study.plan import Study, load_study
from python_models.study.run import StudyResult, run_study
from python_models.study.table import Difference, Line, paired_difference

__all__ = [
    "Difference",
    "Line",
    "Study",
    "StudyConfig",
    "StudyResult",
    "load_study",
    "paired_difference",
    "run_study",
]
