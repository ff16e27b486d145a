"""Runs systems under test in processes of their own, and measures them in MLPerf Inference's terms.

A `Worker` is one process that speaks the protocol of systems.py: a line of JSON each way. Times are taken inside that process, so that
what the protocol costs stays out of them. A scenario makes a `Measurement` of it; `interleaved` sets several side by side.

Longer than other files by the docstrings, which define each scenario's terms.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.errors import PmclipError

Seconds = NDArray[np.float64]

CLI = [sys.executable, "-c", "from pmclip_deploy.cli.app import program; program()"]  # pmclip-deploy, as this Python has it
SYSTEMS = Path(__file__).with_name("systems.py")
CONFIDENCE = 0.99  # LoadGen's, of its early stopping
PERCENTILES = (0.5, 0.9, 0.99)
STREAMS = 8  # samples of a multi-stream query, LoadGen's default
WARM_UP = 0.5  # seconds of queries that are not counted
BURST = 3  # calls of a system's turn
CHUNK = 0.5  # seconds of queries that are asked for at a time
PAUSE = 0.05  # seconds, until threads of the system before have stopped spinning
ANSWER = 600.0  # seconds beyond its own work after which a worker is given up
RATES = (0.9, 0.75, 0.6)  # of the rate at which the simulated queue still holds: what the server scenario measures, until one holds


class SystemFailed(PmclipError):
    """A system under test ended, hung or said that it cannot: one line."""


class Worker:
    """One process that holds one system under test; killed when the ``with`` block ends."""

    def __init__(self, system: str, command: Sequence[str] | None = None, env: Mapping[str, str] | None = None) -> None:
        """``command`` starts a program of systems.py's protocol: by default that file, run by this Python."""
        self.system = system
        self.versions: dict[str, str] = {}
        self.open_seconds = 0.0
        self._command = list(command or (sys.executable, str(SYSTEMS)))
        self._env = None if env is None else dict(env)

    def __enter__(self) -> Worker:
        self._folder = tempfile.TemporaryDirectory()
        self._stderr = (Path(self._folder.name) / "stderr").open("w+b")
        try:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, stderr=self._stderr, env=self._env)
        except OSError as error:
            self._stderr.close()
            self._folder.cleanup()
            raise SystemFailed(f"{self.system}: {self._command[0]} cannot be started ({error.strerror}); build its environment") from None
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            with contextlib.suppress(BrokenPipeError):  # what was not read of it any more
                stream.close()  # type: ignore[union-attr]
        self._folder.cleanup()

    def open(self, model: str, weights: Path | str, threads: int, device: str = "cpu") -> Worker:
        """Loads the model in the system. Raises SystemFailed."""
        asked = {"system": self.system, "model": model, "weights": str(weights), "threads": threads, "device": device}
        ready = self.ask({"open": asked})["ready"]
        self.open_seconds, self.versions = float(ready.get("open_seconds", 0)), dict(ready.get("versions", {}))
        return self

    def embed(self, part: str, inputs: Path) -> NDArray[Any]:
        """(N, D) f32 of the (N, ...) inputs in a .npy file."""
        output = Path(self._folder.name) / "embedding.npy"
        self.ask({"embed": {"part": part, "input": str(inputs), "output": str(output)}})
        return np.asarray(np.load(output))

    def run(self, part: str, inputs: Path, batch: int, count: int, starts: Seconds | None = None) -> Seconds:
        """(count, 2): when each query began and ended, in seconds from the run's own start. With ``starts`` none begins before its time."""
        asked = {"part": part, "input": str(inputs), "batch": batch, "starts": None if starts is None else starts.tolist(), "count": count}
        times = np.array(self.ask({"run": asked}, 0.0 if starts is None else float(starts[-1]))["times"], np.float64)
        if times.shape != (count, 2):
            raise SystemFailed(f"{self.system}: gave times of shape {times.shape} for {count} queries; mend its run")
        return times

    def memory(self) -> float:
        """The peak resident memory in MiB."""
        found = self.ask({"memory": {}})["memory"]
        return float(found["peak_mib"] if isinstance(found, dict) else found)

    def ask(self, request: Mapping[str, Any], seconds: float = 0.0) -> dict[str, Any]:
        """The answer to one request. ``seconds`` is what the work takes at least, and a worker may take `ANSWER` more."""
        what, process = next(iter(request)), self._process
        assert process.stdin and process.stdout
        timer = threading.Timer(seconds + ANSWER, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            hung = timer.finished.is_set()
            timer.cancel()
        if not line:
            why = f"gave no answer in {seconds + ANSWER:.0f} s" if hung else f"ended with status {process.wait()}"
            raise SystemFailed(f"{self.system}: {what}: {why}; {self._said()}")
        try:
            answer = json.loads(line)
        except ValueError:
            raise SystemFailed(f"{self.system}: {what}: no line of JSON; what it prints must not get onto the protocol's stdout") from None
        if "error" in answer:
            raise SystemFailed(f"{self.system}: {what}: {answer['error']}")
        return dict(answer)

    def _said(self) -> str:
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").split("\n")
        return next((f"its last line: {line.strip()[:200]}" for line in reversed(lines) if line.strip()), "it said nothing")


def process(command: Sequence[str]) -> tuple[float, float | None, str]:
    """(wall seconds, peak resident MiB where the kernel counts it, stdout) of one new process, which begins with this one's peak.

    Where it fails, SystemFailed has its last line and its exit code.
    """
    with tempfile.TemporaryFile() as stderr:
        start, peak = time.perf_counter(), None
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        assert child.stdout
        with child.stdout:
            out = child.stdout.read()
        if hasattr(os, "wait4"):
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            peak = usage.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
        else:
            child.wait()
        seconds = time.perf_counter() - start
        if child.returncode:
            stderr.seek(0)
            said = stderr.read().decode(errors="replace").strip().rpartition("\n")[2].removeprefix("error: ")
            failed = SystemFailed(said or f"{Path(command[0]).name}: a new process ended with status {child.returncode}")
            failed.exit_code = max(child.returncode, 1)
            raise failed
    return seconds, peak, out


@dataclass(frozen=True)
class Measurement:
    """What a scenario measured, or why it did not."""

    scenario: str
    batch: int  # samples of a query
    latencies: Seconds  # (queries,), from when each was to begin
    seconds: float  # all of them took
    figures: Mapping[str, float | None] = field(default_factory=dict)
    not_measured: str | None = None  # why

    @property
    def samples(self) -> int:
        """Of all queries together."""
        return self.batch * len(self.latencies)


# --- scenarios ----------------------------------------------------------------------------------------------------------------


def single_stream(
    worker: Worker, part: str, inputs: Path, seconds: float, *, queries: int | None = None, warm_up: float = WARM_UP
) -> Measurement:
    """One sample at a time, the next when the last is done; until the 99th percentile has its bound, or ``seconds`` have passed."""
    return _closed("single-stream", worker, part, inputs, 1, seconds, queries, warm_up)


def multi_stream(
    worker: Worker,
    part: str,
    inputs: Path,
    seconds: float,
    *,
    streams: int = STREAMS,
    queries: int | None = None,
    warm_up: float = WARM_UP,
) -> Measurement:
    """``streams`` samples at a time: the latency is that of all of them."""
    return _closed("multi-stream", worker, part, inputs, streams, seconds, queries, warm_up)


def offline(worker: Worker, part: str, inputs: Path, seconds: float, *, batch: int = 32, warm_up: float = WARM_UP) -> Measurement:
    """All samples are there: how many a second, in batches."""
    return _closed("offline", worker, part, inputs, batch, seconds, sys.maxsize, warm_up)


def _closed(
    scenario: str, worker: Worker, part: str, inputs: Path, batch: int, seconds: float, queries: int | None, warm_up: float
) -> Measurement:
    each = _warm(worker, part, inputs, batch, warm_up)
    queries = least_queries(0.99) if queries is None else queries
    latencies, spent = np.empty(0), 0.0
    while len(latencies) < queries and (spent < seconds or not len(latencies)):
        left = min(CHUNK, max(seconds - spent, each))
        times = worker.run(part, inputs, batch, max(1, min(queries - len(latencies), int(left / max(each, 1e-7)))))
        latencies, spent = np.append(latencies, times[:, 1] - times[:, 0]), spent + float(times[-1, 1] - times[0, 0])
        each = spent / len(latencies)
    return measurement(scenario, batch, latencies, spent)


def server(
    worker: Worker, part: str, inputs: Path, service: Seconds, bound: float, seconds: float, *, percentile: float = 0.99, seed: int = 0
) -> Measurement:
    """Poisson arrivals, one queue: the highest rate tried at which ``percentile`` of the queries take at most ``bound`` seconds.

    ``service`` are single-stream latencies: from them a queue is simulated, which says where to begin. A try takes at most ``seconds``.
    """
    nothing = Measurement("server", 1, np.empty(0), 0.0, {"bound_ms": 1e3 * bound, "queries_per_s": None})
    if float(np.median(service)) >= bound:
        return _refused(nothing, f"a query alone takes longer than the bound of {1e3 * bound:g} ms")
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(size=2 * least_queries(percentile, over=0)))  # at a rate of 1
    simulated = rng.choice(service, len(arrivals))

    def holds(rate: float) -> bool:
        return _passes(arrivals, queue_latencies(arrivals / rate, simulated), bound, percentile)

    low, high = 0.0, 1 / float(np.mean(service))
    for _ in range(20):
        low, high = ((low + high) / 2, high) if holds((low + high) / 2) else (low, (low + high) / 2)
    if low == 0:
        return _refused(nothing, f"its slowest queries take longer than the bound of {1e3 * bound:g} ms")
    _warm(worker, part, inputs, 1, WARM_UP)
    for rate in (low * share for share in RATES):
        starts = arrivals[arrivals < seconds * rate] / rate
        if overs_allowed(len(starts), percentile) < 0:
            least = least_queries(percentile, over=0)
            return _refused(nothing, f"{len(starts)} queries in {seconds:g} s at {rate:.3g} a second, {least} are needed; give it longer")
        times = worker.run(part, inputs, 1, len(starts), starts)
        latencies = times[:, 1] - starts
        if _passes(starts, latencies, bound, percentile):
            over = {"bound_ms": 1e3 * bound, "queries_per_s": rate, "over_bound": float((latencies > bound).sum())}
            made = measurement("server", 1, latencies, float(times[-1, 1]))
            return Measurement(made.scenario, 1, latencies, made.seconds, {**made.figures, **over})
    return _refused(nothing, f"the bound of {1e3 * bound:g} ms was missed at {rate:.3g} queries a second, and at more")


def _refused(nothing: Measurement, why: str) -> Measurement:
    return Measurement(nothing.scenario, 1, nothing.latencies, 0.0, nothing.figures, why)


def _passes(starts: Seconds, latencies: Seconds, bound: float, percentile: float) -> bool:
    return int((latencies > bound).sum()) <= overs_allowed(len(starts), percentile)


def queue_latencies(starts: Seconds, service: Seconds) -> Seconds:
    """(N,): from arrival to end in a queue that serves one at a time, first come first served (Lindley's recursion)."""
    out, free = np.empty(len(starts)), 0.0
    for i, (start, takes) in enumerate(zip(starts.tolist(), service.tolist(), strict=True)):
        free = max(start, free) + takes
        out[i] = free - start
    return out


def _warm(worker: Worker, part: str, inputs: Path, batch: int, seconds: float) -> float:
    """Queries that nobody counts, two at least. -> what one takes"""
    each, spent = 1e-7, 0.0
    for count in (1, 1):
        times = worker.run(part, inputs, batch, count)
        each, spent = max(float(times[0, 1] - times[0, 0]), 1e-7), spent + float(times[0, 1] - times[0, 0])
    if spent < seconds:
        times = worker.run(part, inputs, batch, max(1, min(int((seconds - spent) / each), 10000)))
        each = max(float((times[:, 1] - times[:, 0]).mean()), 1e-7)
    return each


# --- several systems ----------------------------------------------------------------------------------------------------------


def interleaved(jobs: Mapping[str, Callable[[], Measurement]], repeats: int) -> dict[str, list[Measurement]]:
    """Each job in turn, again and again, so that what else this machine does falls on all of them."""
    made: dict[str, list[Measurement]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            time.sleep(PAUSE)
            made[name].append(job())
    return made


def pooled(measurements: Sequence[Measurement]) -> Measurement:
    """All repeats of one system as one."""
    first = measurements[0]
    latencies = np.concatenate([m.latencies for m in measurements])
    return measurement(first.scenario, first.batch, latencies, sum(m.seconds for m in measurements))


def ratio(of: Sequence[Measurement], to: Sequence[Measurement]) -> dict[str, float]:
    """The median time of a sample against another system's, round by round: the median of the rounds, and their quartiles."""
    rounds = [np.median(a.latencies) / a.batch / (np.median(b.latencies) / b.batch) for a, b in zip(of, to, strict=True)]
    low, median, high = np.percentile(rounds, (25, 50, 75))
    return {"ratio": float(median), "ratio_p25": float(low), "ratio_p75": float(high)}


# --- statistics ---------------------------------------------------------------------------------------------------------------


def measurement(scenario: str, batch: int, latencies: Seconds, seconds: float) -> Measurement:
    """With the figures that every scenario has. A bound is None where there are too few queries for it."""
    figures: dict[str, float | None] = {}
    for percentile in PERCENTILES:
        name = f"p{100 * percentile:.0f}"
        bound = percentile_bound(latencies, percentile)
        figures[f"{name}_ms"] = 1e3 * float(np.quantile(latencies, percentile))
        figures[f"{name}_bound_ms"] = None if bound is None else 1e3 * bound
    low, high = np.quantile(latencies, (0.25, 0.75))
    throughput = batch * len(latencies) / seconds if seconds > 0 else None
    figures |= {"p25_ms": 1e3 * float(low), "p75_ms": 1e3 * float(high), "samples_per_s": throughput}
    return Measurement(scenario, batch, latencies, seconds, figures)


def burst(job: Callable[[], Any]) -> Measurement:
    """BURST calls one after the other, after one that follows a pause and is not counted."""
    job()
    taken = []
    for _ in range(BURST):
        start = time.perf_counter()
        job()
        taken.append(time.perf_counter() - start)
    return measurement("stage", 1, np.array(taken), sum(taken))


def overs_allowed(queries: int, percentile: float, confidence: float = CONFIDENCE) -> int:
    """How many of so many queries may be over a latency that, at this confidence, the percentile is under; -1 where there are too few.

    LoadGen's early stopping: the largest t with P(Binomial(queries, 1 - percentile) <= t) <= 1 - confidence.
    """
    k = np.arange(1, queries + 1)
    steps = np.log((queries - k + 1) / k) + np.log1p(-percentile) - np.log(percentile)
    at_most = np.cumsum(np.exp(queries * np.log(percentile) + np.append(0.0, np.cumsum(steps))))
    return int(np.searchsorted(at_most, 1 - confidence, side="right")) - 1


def least_queries(percentile: float, over: int = 1, confidence: float = CONFIDENCE) -> int:
    """How many queries it takes that ``over`` of them may be over: with 1, LoadGen's least for an estimate (64 for p90, 662 for p99)."""
    low, high = over, over + 1
    while overs_allowed(high, percentile, confidence) < over:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if overs_allowed(middle, percentile, confidence) >= over else (middle, high)
    return high


def percentile_bound(latencies: Seconds, percentile: float, confidence: float = CONFIDENCE) -> float | None:
    """A latency that, at this confidence, the percentile is under: LoadGen's early-stopping estimate. None for too few queries."""
    over = overs_allowed(len(latencies), percentile, confidence)
    return float(np.sort(latencies)[len(latencies) - over]) if over >= 1 else None
