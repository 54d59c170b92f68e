# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks`` is ``kdci bench``, without anything but this folder and ``kdci_ext``."""

import sys

from benchmarks.cli import main

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
