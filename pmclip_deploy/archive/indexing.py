"""From an archive's embeddings to an index of `search`: nothing is computed again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pmclip_deploy.archive import ABOUT, EMBED
from pmclip_deploy.archive.output import parts_of
from pmclip_deploy.archive.tables import embeddings_of
from pmclip_deploy.errors import InputError, UsageError
from pmclip_deploy.search.index import OTHER_OUTPUT, ROWS, About, Chunk, index_from_file, locked, write_index
from pmclip_deploy.search.indexing import Report


def index_from_archive(path: Path, source: Path) -> Report:
    """Makes the index at ``path``, or adds to it. ``source`` is an archive or one of its parts. A row whose id is there stays as it is.

    Raises UsageError where the archive has no embeddings, InputError where it is broken, and what ``index_from_file`` raises.
    """
    folder, part = (source, None) if source.is_dir() else (source.parent, source)
    try:
        of = json.loads((folder / ABOUT).read_text("utf-8"))
        about = About(of["bundle"], of["bundle_sha256"], "image", of["ids"], of["salt_check"])
        command, files = of["command"], parts_of(folder) if part is None else [part]
        dim = pq.read_schema(files[0]).field("embedding").type.list_size if command == EMBED and files else 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{folder}: is a broken archive", "make it again with `pmclip-deploy archive`") from None
    if command != EMBED:
        raise UsageError(f"{folder}: is an archive of `{command}`, without embeddings", "make one with `pmclip-deploy archive embed`")
    if not files:
        raise InputError(f"{folder}: holds no rows", "run `pmclip-deploy archive embed` to its end")
    path = path.resolve()
    with locked(path):
        index = index_from_file(path) if path.exists() else None
        if index is not None:
            index.refuse_other(about, OTHER_OUTPUT)
        known = frozenset(() if index is None else index.ids())
        counts = {"embedded": 0, "known": 0}
        kept = iter(()) if index is None else index.chunks()
        del index  # see write_index
        write_index(path, about, dim, chain(kept, _new(files, known, counts)))
    return Report(counts["embedded"], counts["known"])


def _new(files: list[Path], known: frozenset[str], counts: dict[str, int]) -> Iterator[Chunk]:
    for file in files:
        parquet: Any = pq.ParquetFile(file)
        for batch in parquet.iter_batches(ROWS, columns=["id", "embedding"]):
            rows, ids = embeddings_of(batch)
            new = [i for i, id in enumerate(ids) if id not in known]
            counts["known"] += len(ids) - len(new)
            counts["embedded"] += len(new)
            yield rows[new], [ids[i] for i in new]
