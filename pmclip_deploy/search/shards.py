"""Several index files that are searched as one, in this process or by the actors of a Ray cluster.

The matches are those of one index with all rows, file after file: the same scores to the last bit, and of equal ones the same order. A
row's score is the same wherever the row stands. Only processors of different instruction sets may differ in its last bit.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from heapq import merge
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.answer import Match
from pmclip_deploy.cluster import ray_cluster
from pmclip_deploy.search.index import About, Index, about_from_file, index_from_file, refuse_other_bundle

RESTARTS = 3  # of an actor that ended, on any machine of the cluster


class Shards:
    """Index files of one bundle, one kind of rows and one kind of ids. They are opened and verified at the first call that needs them.

    That call raises what ``index_from_file`` raises, and BundleError or UsageError where a file is not like the first.
    """

    def __init__(self, paths: Sequence[Path], about: About | None = None) -> None:
        self.paths, self.about = paths, about or about_from_file(paths[0])

    @cached_property
    def _indexes(self) -> list[Index]:
        indexes = [index_from_file(path) for path in self.paths]
        for index in indexes:
            index.refuse_other(self.about, "search one of them at a time")
        return indexes

    def refuse_other_bundle(self, bundle: str, digest: str) -> None:
        refuse_other_bundle(self.paths[0], self.about, bundle, digest)

    def to_json(self) -> list[dict[str, Any]]:
        """What each index holds."""
        return [index.to_json() for index in self._indexes]

    def matches(self, embedding: NDArray[np.float32], k: int) -> list[Match]:
        """(D,) -> the k nearest rows of all indexes, the nearest first."""
        found = []
        for index in self._indexes:
            found.append(index.matches(embedding, k))
            if len(self.paths) > 1:
                index.give_back(0, len(index))
        return merged(found, k)


class RayShards(Shards):
    """An actor on each machine of a cluster searches its share of the files. It is all or nothing: an actor that ends is started again."""

    def __init__(self, paths: Sequence[Path], ray: Any) -> None:
        super().__init__([path.absolute() for path in paths])
        self._ray, nodes = ray, [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        affinity: Any = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        actor = ray.remote(num_cpus=0, max_restarts=RESTARTS, max_task_retries=RESTARTS)(Shards)
        count = min(len(nodes), len(paths))
        self._actors = [
            actor.options(scheduling_strategy=affinity(nodes[i], soft=True)).remote(
                self.paths[i * len(paths) // count : (i + 1) * len(paths) // count], self.about
            )
            for i in range(count)
        ]

    def to_json(self) -> list[dict[str, Any]]:
        return list(chain.from_iterable(self._of_all("to_json")))

    def matches(self, embedding: NDArray[np.float32], k: int) -> list[Match]:
        return merged(self._of_all("matches", embedding, k), k)

    def _of_all(self, method: str, *arguments: object) -> list[Any]:
        found: list[Any] = self._ray.get([getattr(actor, method).remote(*arguments) for actor in self._actors])
        return found


@contextmanager
def shards_on_ray(paths: Sequence[Path], address: str | None = None) -> Iterator[Shards]:
    """On the cluster at ``address``, by default one of this process. Each machine has the files under these paths.

    What Ray raises becomes a PmclipError.
    """
    with ray_cluster(address, "run the same command again") as ray:
        yield RayShards(paths, ray)


def merged(found: Iterable[Sequence[Match]], k: int) -> list[Match]:
    """The k nearest of several lists, each the nearest first. Of equal scores that of the earlier list stands first."""
    return list(islice(merge(*found, key=lambda match: -match.score), k))
