"""How `pmclip-deploy serve` bears load: one client beside `Predictor.ask`, more clients in a closed loop, and an open loop above the peak.

    python -m pmclip_deploy.benchmarks.serving [--requests 10000] [--clients 1 4 16 64] [--seconds 20] [--bundle FOLDER]

Clients ask about two packaged radiographs over connections that stay open. In the closed loop a client sends its next request when the last
one is answered. In the open loop requests come at a fixed rate, whether or not the others were answered. Every answer is compared with the
single one. The clients run on the same cores as the service. A number of clients that stands more than once shows whether memory grows with
the answers or with the clients: `--clients 4 4 4 64 64 4`.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pmclip_deploy.benchmarks import harness
from pmclip_deploy.models import DEMO
from pmclip_deploy.opening import load

PICTURES = (DEMO / "leg-1.dcm", DEMO / "leg-2.dcm")
QUESTION = "is there a fracture?"
BOUNDARY = "0123456789abcdef"
GIVE_UP_S = 60.0
IDLE_S = 4.0  # after which a connection is not used again: the service closes it after 5 s


@dataclass
class Seen:
    """What came of some requests."""

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)  # of those that were answered
    refused: list[float] = field(default_factory=list)  # of those with status 503
    wrong: int = 0
    took: float = 0.0

    @property
    def goodput(self) -> float:
        return self.statuses["200"] / self.took

    def line(self) -> str:
        answered, lost = self.statuses["200"], self.statuses["lost"]
        times = f"p50 {_ms(self.seconds, 0.5)}, p90 {_ms(self.seconds, 0.9)}, p99 {_ms(self.seconds, 0.99)} ms" if answered else "none"
        refused = f"; 503: {len(self.refused):,}, p50 {_ms(self.refused, 0.5)}, p99 {_ms(self.refused, 0.99)} ms" if self.refused else ""
        others = {status: n for status, n in self.statuses.items() if status not in ("200", "503", "lost")}
        return f"{answered:,} answers, {self.goodput:.1f} a second, {times}{refused}; wrong {self.wrong}, lost {lost}, others {others or 0}"


def _ms(seconds: list[float], share: float) -> str:
    return f"{1e3 * sorted(seconds)[min(int(share * len(seconds)), len(seconds) - 1)]:.1f}" if seconds else "-"


class Client:
    """HTTP/1.1 over one connection. A library's client would take more of the cores than the service's own HTTP does."""

    def __init__(self, url: str, token: str, expected: list[str]) -> None:
        self.host, self.port, self.expected = urlsplit(url).hostname, urlsplit(url).port, expected
        self.requests = [_request(f"{self.host}:{self.port}", token, path.read_bytes()) for path in PICTURES]
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.used = 0.0

    async def ask(self, number: int, seen: Seen) -> None:
        begun, which = time.perf_counter(), number % len(self.requests)
        if begun - self.used > IDLE_S:
            self.close()
        try:
            status, body = await asyncio.wait_for(self._exchange(self.requests[which]), GIVE_UP_S)
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            self.close()
            seen.statuses["lost"] += 1
            return
        self.used = time.perf_counter()
        took = self.used - begun
        seen.statuses[str(status)] += 1
        if status == 200:
            seen.seconds.append(took)
            seen.wrong += _said(json.loads(body)["answers"][0]) != self.expected[which]
        elif status == 503:
            seen.refused.append(took)

    async def _exchange(self, request: bytes) -> tuple[int, bytes]:
        if self.streams is None:
            self.streams = await asyncio.open_connection(self.host, self.port)
        reader, writer = self.streams
        writer.write(request)
        await writer.drain()
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        body = await reader.readexactly(int(head.partition("content-length:")[2].split("\r\n")[0]))
        if "connection: close" in head:
            self.close()
        return int(head.split()[1]), body

    def close(self) -> None:
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None


def _request(host: str, token: str, picture: bytes) -> bytes:
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="questions"\r\n\r\n{QUESTION}\r\n'.encode(),
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="image"\r\n\r\n'.encode() + picture,
        f"\r\n--{BOUNDARY}--\r\n".encode(),
    ]
    body = b"".join(parts)
    head = f"POST /v1/answers HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n\r\n".encode() + body


def _said(answer: dict[str, Any]) -> str:
    return json.dumps([answer["answer"], answer["probability"], answer["reason"]])


async def closed(make: Callable[[], Client], clients: int, requests: int) -> Seen:
    seen, numbers = Seen(), iter(range(requests))

    async def one() -> None:
        client = make()
        for number in numbers:
            await client.ask(number, seen)
        client.close()

    begun = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    seen.took = time.perf_counter() - begun
    return seen


async def opened(make: Callable[[], Client], rate: float, seconds: float) -> Seen:
    """Idle connections are used again; where none is idle, another one is opened."""
    seen, idle, tasks = Seen(), list[Client](), set[asyncio.Task[None]]()

    async def one(number: int) -> None:
        client = idle.pop() if idle else make()
        await client.ask(number, seen)
        idle.append(client)

    begun, number = time.perf_counter(), 0
    while (now := time.perf_counter() - begun) < seconds:
        while number < now * rate:
            tasks.add(task := asyncio.ensure_future(one(number)))
            task.add_done_callback(tasks.discard)
            number += 1
        await asyncio.sleep(0.002)
    seen.took = time.perf_counter() - begun  # what is answered later came in this time
    await asyncio.gather(*tasks)
    for client in idle:
        client.close()
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="of each closed loop with more than one client")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=20.0, help="of the open loop")
    parser.add_argument("--bundle", type=Path)
    options = parser.parse_args()
    predictor = load(options.bundle)
    expected = [_said(predictor.ask(path, QUESTION).to_json()) for path in PICTURES]
    single = []
    for number in range(200):
        begun = time.perf_counter()
        predictor.ask(PICTURES[number % 2], QUESTION)
        single.append(time.perf_counter() - begun)
    print(f"Predictor.ask: p50 {1e3 * statistics.median(single):.1f} ms", flush=True)
    bundle = [] if options.bundle is None else ["--bundle", str(options.bundle)]
    process = subprocess.Popen([*harness.CLI, "serve", "--port", "0", *bundle], stderr=subprocess.PIPE, text=True)
    try:
        asyncio.run(_measure(process, expected, options))
    finally:
        process.terminate()
        process.wait()


async def _measure(process: "subprocess.Popen[str]", expected: list[str], options: argparse.Namespace) -> None:
    assert process.stderr is not None
    url, _, token = next(line.split("Open ")[1].strip() for line in process.stderr if "Open " in line).partition("#token=")
    asyncio.get_running_loop().run_in_executor(None, lambda: sum(1 for _ in process.stderr or ()))  # so that the pipe never fills

    def make() -> Client:
        return Client(url, token, expected)

    try:
        peak = 0.0
        for clients in options.clients:
            seen = await closed(make, clients, options.requests if clients > 1 else max(200, options.requests // 20))
            peak = max(peak, seen.goodput)
            print(f"closed loop, {clients:3} clients: {seen.line()}{_resident(process.pid)}", flush=True)
        for times in (1, 4):
            seen = await opened(make, times * peak, options.seconds)
            share = f"{seen.goodput / peak:.0%} of the peak"
            print(f"open loop, {times} x the peak: {seen.line()}; {share}{_resident(process.pid)}", flush=True)
    finally:
        process.terminate()  # or the thread that reads from it, and with it the event loop, never ends


def _resident(pid: int) -> str:
    """What the process holds in memory, without those that decode; nothing where /proc does not tell."""
    if sys.platform != "linux":
        return ""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return f"; resident {int(line.split()[1]) / 1024:.1f} MiB"


if __name__ == "__main__":
    main()
