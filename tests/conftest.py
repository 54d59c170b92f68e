"""Settings that all tests share."""

import os
import sys
from pathlib import Path

# The benchmarks are not installed; what is comes first.
sys.path.append(str(Path(__file__).resolve().parent.parent))

# The tests are many small calls: spinning OpenMP threads would only get in each other's way.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import HealthCheck, settings

_COMMON = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
settings.register_profile("dev", max_examples=25, **_COMMON)
settings.register_profile("ci", max_examples=60, **_COMMON)
settings.register_profile("nightly", max_examples=2000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    """Run each test on one thread from a fixed seed, and leave both as they were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def two_threads():
    """Call a function on one thread and on two, and return both results."""

    def call(function):
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(function())
        torch.set_num_threads(1)
        return results

    return call
