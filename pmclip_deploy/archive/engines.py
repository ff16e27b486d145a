"""Who computes the batches: processes of this machine, or actors of a Ray cluster. Both write the same files."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pmclip_deploy.archive.listing import Item
from pmclip_deploy.archive.output import items_of_files
from pmclip_deploy.archive.worker import START_S, Done, Job, items_of_table
from pmclip_deploy.child import Child, ChildEnded
from pmclip_deploy.cluster import ray_cluster
from pmclip_deploy.errors import DeviceError

WORKER = "pmclip_deploy.archive.worker"


@dataclass(frozen=True)
class Size:
    workers: int
    batch: int


def local(job: Job, files: Sequence[Path], size: Size) -> Iterator[Done]:
    """Processes, each fed by a thread. A process that ends is replaced; a batch that ends two is halved, down to the item."""
    batches, lock = items_of_files(files, size.batch), threading.Lock()
    done, stopped = queue.Queue[Done | BaseException | None](), threading.Event()
    workers = [_Process(job) for _ in range(size.workers)]

    def feed(worker: _Process) -> None:
        try:
            while not stopped.is_set():
                with lock:
                    items = next(batches, None)
                if items is None:
                    break
                for made in worker.run(items):
                    done.put(made)
        except BaseException as error:
            done.put(error)
        done.put(None)

    for worker in workers:
        threading.Thread(target=feed, args=(worker,), daemon=True).start()
    left = size.workers
    try:
        while left:
            made = done.get()
            if isinstance(made, BaseException):
                raise made
            if made is None:
                left -= 1
            else:
                yield made
    finally:
        stopped.set()
        for worker in workers:
            worker.close()


class _Process:
    def __init__(self, job: Job) -> None:
        self._job = job
        self._child: Child | None = None

    def run(self, items: Sequence[Item]) -> Iterator[Done]:
        for _ in range(2):
            with suppress(ChildEnded):
                yield self._called("run", items)
                return
        if len(items) == 1:
            yield self._called("killed", items)
            return
        for half in (items[: len(items) // 2], items[len(items) // 2 :]):
            yield from self.run(half)

    def _called(self, name: str, items: Sequence[Item]) -> Done:
        if self._child is None or not self._child.is_alive:
            self.close()
            self._child = Child(WORKER)
            self._child.call(START_S, "begin", self._job)
        return self._child.call(None, name, items)  # type: ignore[no-any-return]

    def close(self) -> None:
        if self._child is not None:
            self._child.close()


def on_ray(job: Job, files: Sequence[Path], size: Size, address: str | None, cpus: float, gpus: float) -> Iterator[Done]:
    """Ray Data: an actor holds a process. Batches are handed out as actors become free, and taken up again if an actor's node is lost."""
    with ray_cluster(address, "run the same command again: it goes on where it stopped") as ray:
        from ray.data import ActorPoolStrategy, DataContext, from_items

        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its import sets another level
        _refuse_larger_than_machines(ray, {"CPU": cpus, "GPU": gpus})
        DataContext.get_current().enable_progress_bars = False
        slices = [row for file in files for row in _slices(file, size.batch)]
        worker: Any = RayWorker
        done = from_items(slices, override_num_blocks=len(slices)).flat_map(
            worker,
            fn_constructor_args=(job,),
            compute=ActorPoolStrategy(size=size.workers),
            num_cpus=cpus,
            num_gpus=gpus,
        )
        yield from (Done(**row) for row in done.iter_rows())


def _refuse_larger_than_machines(ray: Any, wanted: dict[str, float]) -> None:
    """Raises DeviceError if no machine has what a worker wants: Ray would wait for one."""
    offered = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(name, 0) >= count for name, count in wanted.items()) for node in offered):
        asked = " and ".join(f"{count:g} {name}s" for name, count in wanted.items())
        raise DeviceError(f"no machine of the Ray cluster has {asked}", "give --num-cpus and --num-gpus that one has")


def _slices(file: Path, size: int) -> Iterator[dict[str, Any]]:
    """Batches as places in a file of the listing: all that the driver holds of them."""
    count = pq.read_metadata(file).num_rows
    return ({"file": os.fspath(file.absolute()), "start": start, "size": size} for start in range(0, count, size))


class RayWorker:
    """A process of its own computes, as with the local engine: what ends it twice is a row, and not tried again for ever."""

    def __init__(self, job: Job) -> None:
        self._process = _Process(job)

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        items = items_of_table(pq.read_table(row["file"]).slice(row["start"], row["size"]))
        return [done._asdict() for done in self._process.run(items)]
