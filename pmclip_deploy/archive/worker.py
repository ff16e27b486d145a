"""A loaded bundle, and a process beside it that decodes: items in, a file of rows out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pmclip_deploy.answer import Answer
from pmclip_deploy.archive import ASK, EMBED
from pmclip_deploy.archive.listing import Item
from pmclip_deploy.archive.tables import ABSTAINED, KILLED, NO_PICTURE, OK, UNREADABLE, About, schema_of, table_from_rows
from pmclip_deploy.atomic import written
from pmclip_deploy.beside import chunks
from pmclip_deploy.child import Child, ChildEnded
from pmclip_deploy.decision.evidence import findings_of
from pmclip_deploy.decision.heads import Floats
from pmclip_deploy.decision.rules import question_about
from pmclip_deploy.errors import InputError, NoPictureError, PmclipError
from pmclip_deploy.ids import salted
from pmclip_deploy.imaging.picture import Picture
from pmclip_deploy.opening import load
from pmclip_deploy.search.index import unit

DECODER, MEMORY, SECONDS, START_S = "pmclip_deploy.archive.reading", 4 << 30, 60.0, 120.0
AHEAD = 2  # pictures that are decoded before their turn
Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """What a worker needs to know, on whichever machine it is."""

    about: About
    bundle: str | None
    device: str
    threads: int | None
    salt: bytes | None
    batches: str  # the folder of the files


class Done(NamedTuple):
    """A batch whose rows lie on the disk."""

    file: str  # its name in the folder of batches
    images: int
    failed: int  # of these, how many could not be read


class Worker:
    def __init__(self, job: Job) -> None:
        self.job, self.predictor = job, load(job.bundle, job.device, threads=job.threads)
        manifest = self.predictor.manifest
        self.schema = schema_of(job.about, manifest.embed_dim)
        self._findings = {finding.name: question_about(manifest, finding.name) for finding in findings_of(manifest)}
        self._decoder: Child | None = None
        self._thread = ThreadPoolExecutor(1)

    def run(self, items: Sequence[Item]) -> Done:
        """Computes a batch. A batch that is computed again takes the place of the first."""
        rows, failed = list[Row](), 0
        for made in self._embedded(items) if self.job.about.command == EMBED else self._answered(items):
            failed += isinstance(made, dict)
            rows += [made] if isinstance(made, dict) else made
        return self.write(items, rows, failed)

    def write(self, items: Sequence[Item], rows: Sequence[Row], failed: int) -> Done:
        name = sha256(b"".join(item.key.to_bytes(8, "little") for item in items)).hexdigest()[:24] + ".parquet"
        with written(Path(self.job.batches) / name, mode=0o600) as new:
            pq.write_table(table_from_rows(rows, self.schema), new, compression="zstd")
        return Done(name, len(items), failed)

    def killed(self, items: Sequence[Item]) -> Done:
        """The rows of items that ended the worker, or one of its processes, twice."""
        return self.write(items, [self._failed(item, KILLED, "the process that worked on it ended twice") for item in items], len(items))

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        if self._decoder is not None:
            self._decoder.close()

    def _embedded(self, items: Sequence[Item]) -> Iterator[list[Row] | Row]:
        """Of each item its row, or why there is none; as many are computed at a time as `tune` chose."""
        towers = self.predictor.towers
        size = towers.tuned.get("image", 1)
        for part in chunks(zip(items, self._ahead(self._tensor, items, max(AHEAD, size)), strict=True), size):
            embeddings = iter(towers.of_tensors("image", [read[0][None] for _, read in part if not isinstance(read, dict)]))
            for item, read in part:
                yield read if isinstance(read, dict) else self._rows(item, *read[1:], partial(_rows_of_embedding, next(embeddings)))

    def _answered(self, items: Sequence[Item]) -> Iterator[list[Row] | Row]:
        for item, read in zip(items, self._ahead(self._decoded, items, AHEAD), strict=True):
            if isinstance(read, dict):
                yield read
            else:
                picture, uid = read
                yield self._rows(item, uid, picture.info.frame, partial(self._answers, picture))

    def _ahead(self, read: Callable[[Item], T], items: Iterable[Item], count: int) -> Iterator[T]:
        """Each in its turn; some are read beside what is computed."""
        begun, left = list[Future[T]](), iter(items)
        for item in left:
            begun.append(self._thread.submit(read, item))
            if len(begun) > count:
                yield begun.pop(0).result()
        for future in begun:
            yield future.result()

    def _tensor(self, item: Item) -> tuple[Floats, str | None, int | None] | Row:
        """What the image tower takes, which is smaller than a picture; and the UID and the frame."""
        read = self._decoded(item)
        if isinstance(read, dict):
            return read
        picture, uid = read
        return self.predictor.towers.tensor(picture), uid, picture.info.frame

    def _decoded(self, item: Item) -> tuple[Picture, str | None] | Row:
        for _ in range(2):
            try:
                if self._decoder is None:
                    self._decoder = Child(DECODER, MEMORY)
                    self._decoder.call(START_S, "warm_up")
                return self._decoder.call(SECONDS, "picture", item.source, self.job.salt)  # type: ignore[no-any-return]
            except NoPictureError as error:
                return self._failed(item, NO_PICTURE, error.message)
            except PmclipError as error:
                return self._failed(item, UNREADABLE, error.message)
            except ChildEnded as ended:
                self._decoder = None
                if ended.late:
                    return self._failed(item, KILLED, f"it was not decoded in {SECONDS:g} s")
        return self._failed(item, KILLED, "the process that decoded it ended twice")

    def _rows(self, item: Item, uid: str | None, frame: int | None, make: Callable[[], list[Row]]) -> list[Row] | Row:
        of_image = {"id": uid or item.id, "key": item.key, "frame": frame}
        try:
            return [of_image | row for row in make()]
        except InputError as error:
            return self._failed(item, UNREADABLE, error.message)

    def _answers(self, picture: Picture) -> list[Row]:
        predictor, about = self.predictor, self.job.about
        if about.command == ASK:
            return [{"question": answer.question, **_of_answer(answer)} for answer in predictor.ask_many(picture, about.questions)]
        looked = zip(self._findings, predictor.ask_many(picture, list(self._findings.values())), strict=True)
        return [{"finding": name, "probability_of_yes": _of_yes(answer), **_of_answer(answer)} for name, answer in looked]

    def _failed(self, item: Item, status: str, reason: str) -> Row:
        salt = self.job.salt
        id = item.id if salt is None else salted(salt, item.id)
        return {"id": id, "key": item.key, "status": status, "reason": reason}


def _rows_of_embedding(embedding: Floats) -> list[Row]:
    return [{"status": OK, "embedding": unit(embedding, "the image")}]


def _of_answer(answer: Answer) -> Row:
    row: Row = {"status": ABSTAINED if answer.abstained else OK, "reason": answer.reason, "answer": answer.answer, "note": answer.note}
    row |= {"source": answer.source, "probability": answer.probability}
    if answer.worth is not None:
        worth = answer.worth
        row |= {"stratum": worth.stratum, "sensitivity": worth.sensitivity, "specificity": worth.specificity}
    return row


def _of_yes(answer: Answer) -> float | None:
    return next((candidate.probability for candidate in answer.candidates if candidate.answer == "yes"), None)


def items_of_table(table: pa.Table) -> list[Item]:
    columns = (table[name].to_pylist() for name in ("id", "source", "key"))
    return [Item(id, os.fsdecode(source), key) for id, source, key in zip(*columns, strict=True)]


# The functions of a process of the local engine.

_worker: list[Worker] = []


def begin(job: Job) -> None:
    _worker.append(Worker(job))


def run(items: Sequence[Item]) -> Done:
    return _worker[0].run(items)


def killed(items: Sequence[Item]) -> Done:
    return _worker[0].killed(items)
