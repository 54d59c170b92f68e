"""Benchmarks of the operators; run from a checkout, such as ``python -m benchmarks.operators``."""
