"""An index as a script for psql: a table of PostgreSQL with pgvector, in one transaction. No driver is needed here, and no password."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np

from pmclip_deploy.errors import InputError, UsageError
from pmclip_deploy.search.index import Index

# What is cut off before COMMIT leaves no trace. Errors are terse, because their details hold ids.
BEGIN = r"""\set ON_ERROR_STOP on
\set QUIET on
\set VERBOSITY terse
\set SHOW_CONTEXT never
\encoding UTF8
BEGIN;
SET LOCAL client_min_messages = warning;
SET LOCAL pmclip.about = {about};
CREATE EXTENSION IF NOT EXISTS vector;
DO $$
DECLARE
    about text := current_setting('pmclip.about');
    held text := obj_description(to_regclass('{table}'), 'pg_class');
BEGIN
    IF to_regclass('{table}') IS NULL THEN
        CREATE TABLE {table} (id text PRIMARY KEY, embedding halfvec({dim}) NOT NULL, bundle_sha256 text NOT NULL);
        EXECUTE format('ALTER TABLE {table} ADD CHECK (bundle_sha256 = %L)', about::json->>'bundle_sha256');
        EXECUTE format('COMMENT ON TABLE {table} IS %L', about);
    ELSIF held IS DISTINCT FROM about THEN
        RAISE EXCEPTION 'table {table} holds other rows (%); choose another --table for %', coalesce(held, 'not of pmclip-deploy'), about;
    END IF;
END $$;
CREATE TEMPORARY TABLE {table}_new (id text, embedding halfvec({dim})) ON COMMIT DROP;
"""
INSERT = r"""\.
INSERT INTO {table} SELECT id, embedding, {sha256} FROM {table}_new
    ON CONFLICT (id) DO UPDATE SET embedding = excluded.embedding WHERE {table}.embedding <> excluded.embedding;
TRUNCATE {table}_new;
"""
END = "COMMIT;\n\\echo {table}: {rows} rows are up to date\n"
ESCAPED = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})


def sql_from_index(index: Index, table: str) -> Iterator[str]:
    """Ids, embeddings as they are and the bundle's sha256. Rows whose id is in the table are updated; of equal ids the last is taken.

    A table holds rows of one bundle, kind and salt, or the script ends. Raises UsageError where ``table`` is no plain name, and InputError
    for an id with a character that PostgreSQL cannot hold.
    """
    if not re.fullmatch("[a-z_][a-z0-9_]{0,58}", table):
        raise UsageError(f"--table {table[:60]!r} is no plain name", "take up to 59 lower-case letters, digits and _")
    about = {key: value for key, value in asdict(index.about).items() if key != "bundle"}
    values = {"table": table, "dim": index.dim, "about": _literal(json.dumps(about)), "sha256": _literal(index.about.bundle_sha256)}
    halves = [str(half) for half in np.arange(1 << 16, dtype=np.uint16).view(np.float16)]  # the shortest texts that give them back
    yield BEGIN.format(**values)
    for embeddings, ids in index.chunks():
        lines = [f"COPY {table}_new FROM STDIN;\n"]
        for id, row in dict(zip(ids, embeddings.view(np.uint16).tolist(), strict=True)).items():
            if "\0" in id:
                raise InputError(f"{index.path}: an id has a NUL character, which PostgreSQL cannot hold", "delete that row")
            lines.append(f"{id.translate(ESCAPED)}\t[{','.join([halves[number] for number in row])}]\n")
        yield "".join([*lines, INSERT.format(**values)])
    yield END.format(table=table, rows=len(index))


def _literal(text: str) -> str:
    doubled = text.replace("'", "''")
    return f"'{doubled}'"
