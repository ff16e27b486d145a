"""A folder of images, or a file of captions, to an index; journalled, so that a run that was cut off goes on with its next row."""

import base64
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

import numpy as np

from pmclip_deploy.beside import chunks, made, outcome
from pmclip_deploy.bundle.checks import no_twin
from pmclip_deploy.decision.heads import Floats
from pmclip_deploy.errors import BundleError, InputError, UsageError
from pmclip_deploy.files import files_below, is_no_picture, unreadable
from pmclip_deploy.ids import id_from_path, salt_check, salted
from pmclip_deploy.predictor import Predictor
from pmclip_deploy.search.index import OTHER_OUTPUT, ROWS, About, Chunk, Halves, beside, index_from_file, locked, unit, write_index
from pmclip_deploy.texts import lines_of_file

JOURNAL_SCHEMA = "pmclip-deploy/index-journal/2"

AT_ONCE = 256  # items whose ids are read before the first of them is embedded

T = TypeVar("T")
Line: TypeAlias = tuple[int, str]  # its number and text


@dataclass(frozen=True)
class Source(Generic[T]):
    """What is to be embedded, and how an item is named for a message."""

    about: About
    items: Sequence[T]
    id: Callable[[T], str]
    embed: Callable[[Sequence[T]], Iterable[Floats | InputError]]  # of each in order (D,), or why it cannot be read
    name: Callable[[T], str]
    broken: Mapping[Path, InputError] = field(default_factory=dict)  # what could not even be looked into


@dataclass(frozen=True)
class Report:
    """What became of the items."""

    embedded: int = 0
    known: int = 0  # their id is there already, from this run or an earlier one
    other: int = 0  # files that are no pictures
    broken: int = 0
    unreadable: tuple[dict[str, str], ...] = ()  # each of the broken, as ``files.unreadable`` has it


def images_of_folder(predictor: Predictor, folder: Path, salt: bytes | None = None) -> Source[Path]:
    """Every file below ``folder``. Ids are paths relative to it or, with ``salt``, HMACs of SOP Instance UIDs, which DICOM alone has."""
    about = _about(predictor, "image", "path" if salt is None else "uid", salt)
    files, unlisted = files_below(folder)
    return Source(
        about=about,
        items=files,
        id=partial(_id_from_path, folder) if salt is None else partial(_id_from_uid, salt),
        embed=predictor.embeddings_of_images,
        name=str,
        broken=unlisted,
    )


def captions_of_file(predictor: Predictor, file: Path) -> Source[Line]:
    """A caption a line or, in .jsonl, {"caption", "id"}; where there is no id, the caption is."""
    name = partial(_name_of_line, file)
    caption = _caption_from_json if file.suffix.lower() == ".jsonl" else _caption_from_text

    def id_and_caption(line: Line) -> tuple[str, str]:
        try:
            return caption(line[1])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InputError(f'{name(line)}: is no {{"caption": "...", "id": "..."}} with text in both', "correct the line") from None

    return Source(
        about=_about(predictor, "text", "caption"),
        items=[(number, line.strip()) for number, line in lines_of_file(file, "check the path")],
        id=lambda line: id_and_caption(line)[0],
        embed=lambda lines: predictor.embed_texts([id_and_caption(line)[1] for line in lines]) if lines else (),
        name=name,
    )


def build_index(path: Path, source: Source[T], progress: Callable[[Sequence[T]], Iterable[T]] = lambda items: items) -> Report:
    """Makes the index at ``path``, or adds to it. A row whose id is there stays as it is. ``progress`` is told of each item in its turn."""
    path = path.resolve()
    counts = {"embedded": 0, "known": 0, "other": 0}
    broken = [unreadable(path, error) for path, error in source.broken.items()]
    with locked(path):
        index = index_from_file(path) if path.exists() else None
        if index is not None:
            index.refuse_other(source.about, OTHER_OUTPUT)
        indexed = frozenset(() if index is None else index.ids())
        with Journal(beside(path, "part"), source.about) as journal:
            rows = chain.from_iterable(_embedded(source, part, indexed | journal.ids) for part in chunks(source.items, AT_ONCE))
            for item, (id, row) in zip(progress(source.items), rows, strict=True):
                try:
                    if made(id) in indexed or id in journal.ids:
                        counts["known"] += 1
                        continue
                    journal.add(made(id), unit(made(row), source.name(item)))
                    counts["embedded"] += 1
                except InputError as error:
                    if isinstance(item, Path) and is_no_picture(item, error):
                        counts["other"] += 1
                    else:
                        broken.append(unreadable(source.name(item), error))
            if journal.ids - indexed:  # of this run, or of one that was cut off
                kept = iter(()) if index is None else index.chunks()
                del index  # see write_index
                write_index(path, source.about, journal.dim, chain(kept, journal.chunks(without=indexed)))
        journal.path.unlink(missing_ok=True)
    return Report(**counts, broken=len(broken), unreadable=tuple(broken))


def _embedded(source: Source[T], items: Sequence[T], known: Set[str]) -> Iterator[tuple[str | InputError, Floats | InputError]]:
    """The id and the embedding of each item, an error for what cannot be read. What is ``known`` is not embedded."""
    ids = [outcome(source.id, item) for item in items]
    new = [not isinstance(id, InputError) and id not in known for id in ids]
    rows = iter(source.embed([item for item, is_new in zip(items, new, strict=True) if is_new]))
    return ((id, next(rows) if is_new else np.empty(0, np.float32)) for id, is_new in zip(ids, new, strict=True))


def delete_rows(path: Path, ids: Sequence[str]) -> None:
    """All of them, or none where one is unknown."""
    path = path.resolve()
    with locked(path):
        index = index_from_file(path)
        indexed = frozenset(index.ids())
        for each in ids:
            if each not in indexed:
                raise UsageError(f"{path}: has no row with the id {each}, so nothing was deleted", "check the ids")
        about, dim, kept = index.about, index.dim, index.chunks(without=frozenset(ids))
        del index  # see write_index
        write_index(path, about, dim, kept)


class Journal:
    """INDEX.part: a line on what all rows share, then a line a row, {"id", "embedding": base64 of (D,) f16, "sha256"}.

    A row's sha256 is of JSON: a list of the sha256 before it, its id and its embedding; before the first row, of the first line's sha256.
    A torn end is cut off, and so is everything from the first line on that was changed, moved or doubled. It is embedded again.
    """

    def __init__(self, path: Path, about: About) -> None:
        self.path, self.ids, self.dim = path, set[str](), 0
        head = json.dumps({"schema": JOURNAL_SCHEMA, **asdict(about)}).encode() + b"\n"
        self._start = end = len(head)
        self._top = self._last = sha256(head).hexdigest()
        try:
            path.touch(0o600)
            with path.open("rb") as file:
                first = file.readline()
            if first != head:
                if not head.startswith(first):
                    raise BundleError(
                        f"{path}: an unfinished run with another bundle or other settings", "finish that, or give it up and delete the file"
                    )
                path.write_bytes(head)
            for id, _, after, digest in self._rows():
                self.ids.add(id)
                end, self._last = after, digest
            os.truncate(path, end)
            self._file = path.open("ab", buffering=0)  # a row is in the system's hands once it is written
        except OSError as error:
            raise self._unwritable(error.strerror) from error

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if not self.ids:  # nothing to go on with, for any bundle
            self.path.unlink()

    def add(self, id: str, row: Halves) -> None:
        embedding = base64.b64encode(row.astype("<f2").tobytes()).decode()
        digest = _chained(self._last, id, embedding)
        line = json.dumps({"id": id, "embedding": embedding, "sha256": digest}).encode() + b"\n"
        try:
            written = self._file.write(line)
        except OSError as error:
            raise self._unwritable(error.strerror) from error
        if written != len(line):
            raise self._unwritable("no space is left")
        self.ids.add(id)
        self.dim, self._last = len(row), digest

    def chunks(self, without: frozenset[str]) -> Iterator[Chunk]:
        ids, rows, read = list[str](), list[Halves](), set[str]()
        for id, row, _, _ in self._rows():
            read.add(id)
            if id not in without:
                ids.append(id)
                rows.append(row)
            if len(rows) == ROWS:
                yield np.stack(rows), ids
                ids, rows = [], []
        if read != self.ids:
            raise BundleError(f"{self.path}: another program changed it during this run", "run the command again")
        if rows:
            yield np.stack(rows), ids

    def _rows(self) -> Iterator[tuple[str, Halves, int, str]]:
        """Each id and row, where its line ends and its sha256, up to the first line that is not as it was written."""
        digest = self._top
        with self.path.open("rb") as file:
            file.seek(end := self._start)
            for line in file:
                try:
                    data = json.loads(line)
                    id, row = data["id"], np.frombuffer(base64.b64decode(data["embedding"], validate=True), "<f2")
                    digest = _chained(digest, id, data["embedding"])
                except (ValueError, KeyError, TypeError, RecursionError):
                    return
                if not line.endswith(b"\n") or data.get("sha256") != digest or not row.size or len(row) != (self.dim or len(row)):
                    return
                self.dim, end = len(row), end + len(line)
                yield id, row, end, digest

    def _unwritable(self, reason: str | None) -> BundleError:
        return BundleError(f"{self.path}: cannot be written ({reason})", "check the space left and the permissions, then run it again")


def _chained(before: str, id: str, embedding: str) -> str:
    return sha256(json.dumps([before, id, embedding]).encode()).hexdigest()


def _about(predictor: Predictor, embedded: str, ids: str, salt: bytes | None = None) -> About:
    return About(predictor.model.bundle, predictor.model.sha256, embedded, ids, salt_check(salt))


def _id_from_path(folder: Path, path: Path) -> str:
    return id_from_path(path.relative_to(folder))


def _id_from_uid(salt: bytes, path: Path) -> str:
    from pmclip_deploy.imaging.dicom_file import uid_from_dicom

    return salted(salt, uid_from_dicom(path))


def _name_of_line(file: Path, line: Line) -> str:
    return f"{file}, line {line[0]}"


def _caption_from_text(line: str) -> tuple[str, str]:
    return line, line


def _caption_from_json(line: str) -> tuple[str, str]:
    """-> id and caption. Raises ValueError or what indexing into something else raises."""
    data = json.loads(line, object_pairs_hook=no_twin)
    caption, id = data["caption"].strip(), data.get("id", data["caption"]).strip()
    caption.encode(), id.encode()  # JSON can spell what is no Unicode
    if not caption or not id:
        raise ValueError
    return id, caption
