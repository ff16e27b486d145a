"""The cores that this run may use, and each of pytest-xdist's workers' share of them."""

import os

ALLOWED = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]  # of the whole run, before a worker takes its share


def take_share() -> None:
    """In a worker: onnxruntime, torch and our kernels start a thread for each core, and two workers' threads would wait for each other."""
    if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
        number, of = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        os.sched_setaffinity(0, ALLOWED[number % of :: of] or ALLOWED)
