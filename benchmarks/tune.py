"""Which backend, precision between operators, threads and batch run each graph of a bundle fastest on this machine.

Every candidate must keep the gates of the bundle's precision beside the bundle itself in onnxruntime on the CPU, which computes in f32
between operators. Only then is it timed, in turns with what runs without a tuning. The fastest of each device is timed over many inputs
of a tower too, one by one and in batches. Whole plans are timed in new processes.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pmclip_deploy.benchmarks import harness, reference
from pmclip_deploy.benchmarks.stages import first_answer
from pmclip_deploy.benchmarks.tune_batches import MANY, towers_of, way, why_not
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.decision.needs import graphs_of_ask
from pmclip_deploy.errors import BundleError, DeviceError
from pmclip_deploy.export.gates import FINDINGS, misses
from pmclip_deploy.export.parity import parity_of_runs
from pmclip_deploy.export.probes import QUESTIONS, computing_nothing_twice, sample_pictures
from pmclip_deploy.export.samples import feeds_of
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.opening import load, session_from_bundle
from pmclip_deploy.predictor import Predictor
from pmclip_deploy.sessions import DEFAULT, F32, Session, devices
from pmclip_deploy.threads import cpu_threads, performance_cores
from pmclip_deploy.towers import BATCH
from pmclip_deploy.tuning import WORTH, Choice, Plan, plan_for, save_own

ROUNDS, COLD = 11, 7  # of each candidate beside the default; new processes of each plan
SLOWER, SLOW, COMPILES = 20, 0.05, 2.0  # times the default, and seconds, of a run that is not worth more; seconds of a first run
ASKED = QUESTIONS[1]  # of 10 tokens


@dataclass(frozen=True)
class Row:
    """One way to run a graph; without a ``choice``, as without a tuning."""

    graph: str
    choice: Choice | None
    ratio: float | None = None  # of its time to the default's, round by round; None where ``dropped`` says why
    ms: float | None = None
    dropped: str | None = None
    many_ratio: float | None = None  # the same over MANY inputs, where that was measured
    many_ms: float | None = None  # of one of them

    @property
    def score(self) -> float:
        """What it is chosen by. Inputs may come one by one or many at once, so both count."""
        ratio = np.inf if self.ratio is None else self.ratio
        return ratio if self.many_ratio is None else float(np.sqrt(ratio * self.many_ratio))


@dataclass(frozen=True)
class Tuned:
    rows: tuple[Row, ...]
    plans: tuple[Plan, ...]  # the default first; of the others those that are fastest for one picture or for many
    dropped: tuple[str, ...]  # of whole plans, why


def measure(bundle: Path, rounds: int = ROUNDS, cold: int = COLD, note: Callable[[str], object] = lambda line: None) -> Tuned:
    """Measures a bundle and writes nothing. Raises BundleError for a broken one, and DeviceError where onnxruntime does not run here."""
    with tempfile.TemporaryDirectory() as scratch, cache_in(Path(scratch, "tune")):
        known, rows, dropped = computing_nothing_twice(load(bundle, "cpu")), list[Row](), list[str]()
        for name, feed in feeds_of_graphs(known).items():
            note(f"Measuring the graph {name}")
            rows += rows_of_graph(known, name, feed, rounds)
        named = dict[str, Mapping[str, Choice]]()
        for title, graphs in graphs_of_plans(rows).items():
            if why := missed(known, {name: _opened(known, name, choice) for name, choice in graphs.items()}):
                dropped.append(f"{title}: {why}")
            else:
                named[title] = graphs
        note("Measuring new processes")
        plans = [
            Plan(graphs, ms, *next_ms(known.manifest, graphs, rows)) for graphs, ms in first_answers(bundle, known, named, cold, scratch)
        ]
    chosen = {id(plan): plan for plan in (plans[0], plan_for(plans, 1), plan_for(plans, None))}
    return Tuned(tuple(rows), tuple(chosen.values()), tuple(dropped))


def compile_graphs(bundle: Path) -> None:
    """Opens all graphs as the bundle's tuning says, and runs its batches, so that the first command finds what a backend keeps of them."""
    for single_use in (True, False):
        predictor = load(bundle, single_use=single_use)
        computing_nothing_twice(predictor)
        for name, batch in predictor.towers.tuned.items():
            way(predictor, name, predictor._sessions[name], batch)()


# --- one graph ------------------------------------------------------------------------------------------------------------------


def feeds_of_graphs(known: Predictor) -> dict[str, dict[str, Any]]:
    """What each graph is given of a picture and a question. The graph "labels" has none: a product with few rows, it is not tuned."""
    picture, head = sample_pictures()[:1], known.manifest.head
    feeds = {name: next(iter(of)) for name, of in feeds_of(known, picture, [ASKED], lambda items, what: items).items()}
    if head is not None:  # the head of the embedded model sees a picture and its mirror image at once
        feeds |= known._graphs.inputs_of_head(picture_from_path(picture[0]), head)
    return feeds


def rows_of_graph(known: Predictor, name: str, feed: Mapping[str, Any], rounds: int) -> list[Row]:
    """The default, and every candidate of every device that this machine has."""
    default, rows, base, base_of_many = _opened(known, name), list[Row](), list[harness.Measurement](), list[harness.Measurement]()

    def timed(choice: Choice, session: Session, own: Mapping[str, Any] = feed) -> Row:
        jobs = {"default": partial(default.run, feed), "candidate": partial(session.run, own)}
        turns = harness.interleaved({of: partial(harness.burst, job) for of, job in jobs.items()}, rounds)
        base.extend(turns["default"])
        return Row(name, choice, harness.ratio(turns["candidate"], turns["default"])["ratio"], _ms(turns["candidate"]))

    def timed_over_many(row: Row) -> list[Row]:
        """One by one and in batches. With those a text is longer when it is alone, too."""
        assert row.choice is not None
        choice = row.choice._replace(batch=MANY)
        session, alone, batch = _opened(known, name, choice), row, replace(row, choice=choice)
        ways = {"default": way(known, name, default, None), "alone": way(known, name, session, None)}
        if why := why_not(known, name, session, MANY):
            batch = replace(batch, ratio=None, ms=None, dropped=why)
        else:
            ways["batch"] = way(known, name, session, MANY)
            if name == "text":
                batch = timed(choice, session, {"tokens": towers_of(known, name, session, MANY).tokens(ASKED)})
        for job in ways.values():
            job()  # compiles, and sees that rows are equal
        turns = harness.interleaved({of: partial(_once, job) for of, job in ways.items()}, rounds)
        base_of_many.extend(turns["default"])

        def with_many(row: Row, of: str) -> Row:
            return replace(row, many_ratio=harness.ratio(turns[of], turns["default"])["ratio"], many_ms=_ms(turns[of]) / MANY)

        return [with_many(alone, "alone"), with_many(batch, "batch") if "batch" in turns else batch]

    for device, backend in devices().items():
        found, on_cpu = list[Row](), False
        for between in backend.between() if device != "auto" and backend.available() else ():
            choice = Choice(device, between)
            try:
                session = _opened(known, name, choice)
                on_cpu = session.device == "cpu"
                if between == F32 and (session.backend, session.device) == (default.backend, default.device):
                    found.append(Row(name, choice, 1.0))  # stands for the default, whose threads are tried
                else:
                    why = far_slower(session, default, feed) or missed(known, {name: session})
                    found.append(Row(name, choice, dropped=why) if why else timed(choice, session))
            except DeviceError as error:
                if found or backend.name != DEFAULT:  # not of providers that this onnxruntime has not
                    found.append(Row(name, choice, dropped=error.message))
        best = fastest(found)
        for threads in thread_counts() if best is not None and on_cpu else ():
            assert best is not None and best.choice is not None
            choice = best.choice._replace(threads=threads)
            session = _opened(known, name, choice)
            row = timed(choice, session)
            if row.score < best.score:  # twice: meanwhile another program, or a neighbour of a virtual machine, may have had a core
                row = max(row, timed(choice, session), key=lambda each: each.score)
            found.append(row)
        if name in BATCH and (best := fastest(found)) is not None:
            place = found.index(best)
            found[place : place + 1] = timed_over_many(best)
        rows += [row for row in found if row.ms is not None or row.dropped or (row.choice and row.choice.batch)]
    ms = _ms(base or [harness.burst(partial(default.run, feed))])
    of_many = (1.0, _ms(base_of_many) / MANY) if base_of_many else (None, None)
    return [Row(name, None, 1.0, ms, None, *of_many), *(replace(row, ms=ms) if row.ms is None and not row.dropped else row for row in rows)]


def _ms(measured: Sequence[harness.Measurement]) -> float:
    return 1e3 * float(np.median([np.median(m.latencies) for m in measured]))


def _once(job: Callable[[], Any]) -> harness.Measurement:
    seconds = _seconds(job)
    return harness.Measurement("many", MANY, np.array([seconds]), seconds)


def far_slower(candidate: Session, default: Session, feed: Mapping[str, Any]) -> str | None:
    """Why it is not worth the checks, which run a graph a hundred times; None where it is. A first run may compile."""
    usual, took = min(_seconds(partial(default.run, feed)) for _ in range(3)), _seconds(partial(candidate.run, feed))
    if took < COMPILES:
        took = min(_seconds(partial(candidate.run, feed)) for _ in range(3))
    slow = took > max(SLOWER * usual, SLOW)
    return f"a run takes {1e3 * took:.3g} ms, and without a tuning {1e3 * usual:.3g} ms" if slow else None


def _seconds(job: Callable[[], Any]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def thread_counts() -> list[int]:
    """Worth a try beside ``cpu_threads()``: the fast cores alone, and powers of 2 below."""
    most = cpu_threads()
    return sorted({performance_cores(), *(2**n for n in range(most.bit_length()))} & {*range(1, most)})


def missed(known: Predictor, sessions: Mapping[str, Session]) -> str | None:
    """What misses the gates where these graphs run so; None where nothing does."""
    other = Predictor(known.path, known.manifest, {**known._sessions, **sessions}, known._tokenizers)
    try:
        found = [text for part in misses(known.manifest.precision, parity_of_runs(known, other)).values() for text in part]
        if not found and known.manifest.head is not None:
            figures, _ = reference.agreement(other)
            found = reference.misses(known.manifest.precision, figures) if figures else []
    except BundleError as error:
        found = [error.message]
    return "; ".join(found) or None


# --- whole plans ----------------------------------------------------------------------------------------------------------------


def fastest(rows: Sequence[Row], least: float = np.inf) -> Row | None:
    """The row of the least score that is at most ``least``."""
    return min((row for row in rows if row.ratio is not None and row.score <= least), key=lambda row: row.score, default=None)


def graphs_of_plans(rows: Sequence[Row]) -> dict[str, Mapping[str, Choice]]:
    """What is worth a measurement as a whole: the default, each device for all graphs that it runs, and of each graph the fastest."""
    graphs, chosen = dict.fromkeys(row.graph for row in rows), [row for row in rows if row.choice is not None]
    plans: dict[str, Mapping[str, Choice]] = {"default": {}}
    for device in dict.fromkeys(row.choice.device for row in chosen if row.choice):
        plans[device] = _choices(
            fastest([row for row in chosen if row.graph == name and row.choice and row.choice.device == device]) for name in graphs
        )
    plans["fastest"] = _choices(fastest([row for row in chosen if row.graph == name], WORTH) for name in graphs)
    return {title: of for i, (title, of) in enumerate(plans.items()) if of not in [*plans.values()][:i]}


def _choices(rows: Iterable[Row | None]) -> dict[str, Choice]:
    return {row.graph: row.choice for row in rows if row is not None and row.choice is not None}


def next_ms(manifest: Manifest, graphs: Mapping[str, Choice], rows: Sequence[Row]) -> tuple[float, float]:
    """Of the graphs that an answer about a finding runs: of one picture after another, and of many at once."""
    default = {row.graph: row for row in rows if row.choice is None}
    chosen = {(row.graph, row.choice): row for row in rows}
    one, many = 0.0, 0.0
    for name in (*graphs_of_ask(manifest), FINDINGS):
        if name in default:
            base, row = default[name], chosen[name, graphs.get(name)]
            one += (base.ms or 0.0) * (row.ratio or 1.0)
            many += (base.many_ms or base.ms or 0.0) * (row.many_ratio or row.ratio or 1.0)
    return one, many


def first_answers(
    bundle: Path, known: Predictor, plans: Mapping[str, Mapping[str, Choice]], cold: int, scratch: str
) -> Iterator[tuple[Mapping[str, Choice], float]]:
    """Of each plan the median milliseconds of a new process to its first answer; what a backend compiles is there already."""
    command = first_answer(bundle, known.manifest, "auto")

    def process(folder: Path) -> harness.Measurement:
        with cache_in(folder):
            seconds = harness.process(command)[0]
        return harness.Measurement("cold", 1, np.array([seconds]), seconds)

    jobs = dict[str, Callable[[], harness.Measurement]]()
    for title, graphs in plans.items():
        folder = Path(scratch, str(len(jobs)))
        with cache_in(folder):
            save_own(bundle, [Plan({}, 1e9, 1e9, 1e9), *([Plan(graphs, 1.0, 1.0, 1.0)] if graphs else [])])
        jobs[title] = partial(process, folder)
        jobs[title]()  # compiles
    for title, measured in harness.interleaved(jobs, cold).items():
        yield plans[title], 1e3 * float(np.median([m.seconds for m in measured]))


def _opened(known: Predictor, name: str, choice: Choice | None = None) -> Session:
    """As without a tuning where there is no choice."""
    assert known.path is not None
    if choice is None:
        return session_from_bundle(known.path, known.manifest, name)
    return session_from_bundle(known.path, known.manifest, name, **choice._asdict())


@contextmanager
def cache_in(folder: Path) -> Iterator[None]:
    """This process's and its children's cache, in which what is tried leaves what it compiles."""
    name = "LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME"
    before = os.environ.get(name)
    folder.mkdir(exist_ok=True)
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
