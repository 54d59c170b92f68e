# SPDX-License-Identifier: Apache-2.0
"""``python -m python_models`` is ``kdci``."""

import sys

from python_models.cli import main

if __name__ == "__main__":
    sys.exit(main())
