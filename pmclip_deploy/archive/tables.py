"""The rows of an archive, the same from every engine.

Each image has one row (embed), one for each question (ask) or one for each finding (findings). An image that cannot be read has one row.
docs/reference/archive.md lists the columns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pmclip_deploy.archive import ASK, EMBED, FINDINGS
from pmclip_deploy.search.index import Halves
from pmclip_deploy.spec import ARCHIVE_SCHEMA

METADATA = b"pmclip-deploy"

OK, ABSTAINED, NO_PICTURE, UNREADABLE, KILLED = "ok", "abstained", "no picture", "unreadable", "killed"
OF_IMAGE = [
    pa.field("id", pa.string(), nullable=False),
    pa.field("key", pa.uint64(), nullable=False),  # of the id, the file's size and its time of change
    pa.field("frame", pa.int32()),
    pa.field("status", pa.string(), nullable=False),
    pa.field("reason", pa.string()),
]
OF_ANSWER = [
    pa.field("answer", pa.string()),
    pa.field("source", pa.string()),
    pa.field("probability", pa.float32()),
    pa.field("note", pa.string()),
    pa.field("stratum", pa.string()),
    pa.field("sensitivity", pa.float32()),
    pa.field("specificity", pa.float32()),
]
ITEMS = pa.schema([pa.field("id", pa.string()), pa.field("source", pa.binary()), pa.field("key", pa.uint64())])


@dataclass(frozen=True)
class About:
    """What all rows of an archive have in common."""

    command: str
    bundle: str
    version: str
    precision: str
    bundle_sha256: str  # of its manifest.json
    ids: str  # "path" or "uid"
    salt_check: str = ""  # of the ids "uid", as an index has it
    questions: Sequence[str] = ()
    schema: str = ARCHIVE_SCHEMA

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def schema_of(about: About, dim: int) -> pa.Schema:
    own = {
        EMBED: [pa.field("embedding", pa.list_(pa.float16(), dim))],  # of length 1
        ASK: [pa.field("question", pa.string()), *OF_ANSWER],
        FINDINGS: [pa.field("finding", pa.string()), pa.field("probability_of_yes", pa.float32()), *OF_ANSWER],
    }
    return pa.schema([*OF_IMAGE, *own[about.command]], metadata={METADATA: about.to_json()})


def table_from_rows(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """What a row does not name is null in it."""
    return pa.table([_column(field, [row.get(field.name) for row in rows]) for field in schema], schema=schema)


def _column(field: pa.Field, values: Sequence[Any]) -> pa.Array:
    if not pa.types.is_fixed_size_list(field.type):
        return pa.array(values, field.type)
    dim = field.type.list_size
    flat = np.zeros((len(values), dim), np.float16)
    for row, value in zip(flat, values, strict=True):
        if value is not None:
            row[:] = value
    missing = pa.array([value is None for value in values])
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), dim, mask=missing)


def embeddings_of(rows: pa.RecordBatch) -> tuple[Halves, list[str]]:
    """((N, D), ids) of the rows that have an embedding."""
    kept = rows.filter(rows["embedding"].is_valid())
    column = kept["embedding"]
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(kept), column.type.list_size), kept["id"].to_pylist()
