"""`pmclip-deploy serve` in a process of its own, and a client of it."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.command import MAIN, started

TOKEN = "a-token-for-tests-0123456789"


class Running:
    """A service that listens."""

    def __init__(self, process: "subprocess.Popen[str]", lines: list[str], url: str, token: str) -> None:
        self.process, self.lines, self.url, self.token = process, lines, url, token
        self.client = self.connect()

    def connect(self, **headers: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.token}", **headers}, timeout=60, trust_env=False)

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def ask(self, data: bytes, *questions: str, **fields: Any) -> httpx.Response:
        return self.client.post("/v1/answers", files={"image": ("image", data)}, data={"questions": list(questions), **fields})

    def keep(self, data: bytes) -> httpx.Response:
        return self.client.post("/v1/images", files={"image": ("image", data)})

    def readers(self) -> list[int]:
        """The processes that decode (Linux)."""
        pid = self.process.pid
        return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]

    def memory(self) -> int:
        """Resident bytes of the service without its readers (Linux)."""
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())[1]) << 10  # type: ignore[index]


@contextmanager
def running(folder: Path, *options: str | Path, **environment: str) -> Iterator[Running]:
    token = folder / "token"
    token.write_text(f"{TOKEN}\n")
    token.chmod(0o600)
    command = [sys.executable, "-c", MAIN, "serve", "--port", "0", "--token-file", str(token), *map(str, options)]
    with started(command, r"Open (https?://\S+)", **environment) as (process, lines, url):
        yield Running(process, lines, url, TOKEN)
