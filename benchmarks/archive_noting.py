"""`pmclip-deploy archive` whose workers note each image before they compute it: in OUT.images, its key and the network namespace."""

from pathlib import Path
from typing import Any

from pmclip_deploy.archive import engines, worker
from pmclip_deploy.archive.listing import Item
from pmclip_deploy.archive.worker import Job

MAIN = f"from {__name__} import patch; patch(); from pmclip_deploy.cli.app import program; program()"


class Noting(worker.Worker):
    def _rows(self, item: Item, *read: Any) -> Any:
        with Path(f"{Path(self.job.batches).parents[1]}.images").open("a") as file:
            file.write(f"{item.key} {Path('/proc/self/ns/net').readlink()}\n")
        return super()._rows(item, *read)


class NotingOnRay(engines.RayWorker):
    def __init__(self, job: Job) -> None:
        engines.WORKER = __name__
        super().__init__(job)


def begin(job: Job) -> None:
    """Of a process that computes, as are the next two."""
    worker._worker.append(Noting(job))


run, killed = worker.run, worker.killed


def noted(out: Path) -> list[list[str]]:
    """(key, network namespace) of each image that was computed, as often as it was."""
    file = Path(f"{out}.images")
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def patch() -> None:
    engines.WORKER, engines.RayWorker = __name__, NotingOnRay  # type: ignore[misc]
