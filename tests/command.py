"""`pmclip-deploy` as a user meets it: in a new process, and what a command in this one (the fixture ``command``) ended with."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

MAIN = "from pmclip_deploy.cli.app import program; program()"


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def answer(self) -> Any:
        """The only answer of `infer --json`, or the only classification of `classify --json`."""
        ((only,),) = (rows for key, rows in self.json.items() if key in ("answers", "classifications"))
        return only


def process(*arguments: str | Path, **environment: str) -> Result:
    """The command in a process of its own, with these variables."""
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *map(str, arguments)], capture_output=True, timeout=60, env={**os.environ, **environment}
    )
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


def is_one_line(err: str) -> bool:
    return err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")


def ends_in_one_line(err: str) -> bool:
    """The error is the last line. Before it stand the stages of long work, a line each."""
    return is_one_line(err[err.find("error: ") :]) and "error" not in err[: err.find("error: ")]


@contextmanager
def started(command: Sequence[str], ready: str, **environment: str) -> Iterator[tuple["subprocess.Popen[str]", list[str], str]]:
    """(process, its lines on standard error, what ``ready`` caught in one of them): of a command that runs until it is ended."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
    assert process.stderr is not None
    lines, found = list[str](), None
    for line in process.stderr:
        lines.append(line)
        if found := re.search(ready, line):
            break
    assert found, "".join(lines)
    reader = threading.Thread(target=lambda: lines.extend(process.stderr or ()), daemon=True)
    reader.start()
    try:
        yield process, lines, found[1]
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()
        reader.join(5)
