"""Functions of a process that ends when it meets an item or a file with a name that says so."""

import os
from collections.abc import Sequence
from typing import Any

from pmclip_deploy.archive import engines, reading, worker
from pmclip_deploy.archive.listing import Item
from pmclip_deploy.archive.worker import Done, Job

warm_up, begin, killed = reading.warm_up, worker.begin, worker.killed


def picture(source: str, salt: bytes | None) -> Any:
    if "ends-decoder" in source:
        os._exit(9)
    return reading.picture(source, salt)


def run(items: Sequence[Item]) -> Done:
    if any("ends-worker" in item.id for item in items):
        os._exit(9)
    return worker.run(items)


class PoisonedOnRay(engines.RayWorker):
    def __init__(self, job: Job) -> None:
        engines.WORKER = __name__
        super().__init__(job)
