"""Benchmarks beside what people use today: ``kdci bench``, or ``python -m benchmarks``."""
# SPDX-License-Identifier: Apache-2.0
