"""Results as JSON lines: one row per run, model, system, part and scenario. Rows of one run compare as ratios, those of two never do.

The first row of a run names its command and its environment. Later rows of that run in the same file may leave them out. A file whose name
ends in .gz is compressed; what is appended to it is a member of its own (RFC 1952 2.2).
"""

from __future__ import annotations

import gzip
import json
import sys
import uuid
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pmclip_deploy import atomic
from pmclip_deploy.atomic import write_errors
from pmclip_deploy.errors import InputError
from pmclip_deploy.spec import BENCH_SCHEMA

KEYS: dict[str, type | tuple[type, ...]] = {  # of what every row has
    **dict.fromkeys(("run", "time", "command", "model", "system", "part", "scenario"), str),
    **dict.fromkeys(("environment", "figures"), dict), "samples": int, "not_measured": (str, type(None)), "threads": (int, type(None)),
}  # fmt: skip
ONCE = ("command", "environment")  # a later row of the run has those of its first row
PATHS = ("--bundle", "--data", "--images", "--output", "--picture", "--submit-file")  # options that name one

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What the rows of one run share."""

    command: str
    environment: Mapping[str, Any]
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    time: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def row(
        self,
        model: str,
        system: str,
        part: str,
        scenario: str,
        figures: Mapping[str, Any],
        *,
        threads: int | None,
        samples: int = 0,
        not_measured: str | None = None,
    ) -> Row:
        """Figures are rounded to six digits. Without any, ``not_measured`` says why."""
        kept = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in figures.items()}
        shared = {
            "schema": BENCH_SCHEMA,
            "run": self.run,
            "time": self.time,
            "command": self.command,
            "environment": dict(self.environment),
        }
        about = {"model": model, "system": system, "part": part, "scenario": scenario, "threads": threads}
        return {**shared, **about, "figures": kept, "samples": samples, "not_measured": not_measured}


def command_line(program: str, arguments: Sequence[str] | None = None) -> str:
    """The command that runs now, without any path of this machine: what names one is told as PATH."""
    given, words = sys.argv[1:] if arguments is None else arguments, [program]
    for before, argument in zip(["", *given], given, strict=False):
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        is_path = (option or before) in PATHS or "/" in value or "\\" in value or (bool(value) and Path(value).exists())
        words.append(option + equals + ("PATH" if value and is_path else value))
    return " ".join(words)


def append(path: Path, rows: Iterable[Row]) -> None:
    """Adds lines to the file, whole or not at all. Raises UsageError."""
    lines, named = [], set[str]()
    for row in rows:
        short = {key: value for key, value in row.items() if key not in ONCE} if row["run"] in named else row
        lines.append(json.dumps(short, ensure_ascii=False, allow_nan=False) + "\n")
        named.add(row["run"])
    with write_errors(f"{path}: the results", "give another --output"):
        text = "".join(lines).encode()
        atomic.append(path, gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


def read(path: Path) -> list[Row]:
    """The rows of a file. Raises InputError with the number of the first line that is none."""
    try:
        data = path.read_bytes()
        lines = (gzip.decompress(data) if path.suffix == ".gz" else data).decode().split("\n")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error):
        raise InputError(f"{path}: cannot be read", "give a file that `bench --output` wrote") from None
    named: dict[str, Row] = {}  # the first row of each run
    return [_row(line, f"{path}, line {number}", named) for number, line in enumerate(lines, 1) if line.strip()]


def _row(line: str, where: str, named: dict[str, Row]) -> Row:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if isinstance(row, dict) and isinstance(row.get("run"), str):
        row = {**{key: value for key, value in named.get(row["run"], {}).items() if key in ONCE}, **row}
        named.setdefault(row["run"], row)
    if not isinstance(row, dict) or row.get("schema") != BENCH_SCHEMA or not all(isinstance(row.get(key), of) for key, of in KEYS.items()):
        raise InputError(f"{where}: no row of {BENCH_SCHEMA}", "give a file that `bench --output` wrote")
    return row
