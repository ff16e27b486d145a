"""Many items one by one, side by side and in batches: whether each row has the same bits, the time and the processor time.

    python -m pmclip_deploy.benchmarks.batches [--bundle FOLDER] [--device cpu] [--pictures FOLDER] [--repeats 5]

First each tower takes 16 inputs of random numbers (texts: 12 tokens). Then, with --pictures, the bundle reads the folder and embeds its
pictures, as `search index`, and answers a question about each if it has a head, as `infer FOLDER`. Ways take turns, and each ratio is to
one by one, round by round: the median and quartiles.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pmclip_deploy import beside
from pmclip_deploy.benchmarks import harness
from pmclip_deploy.beside import chunks, side_by_side
from pmclip_deploy.bundle.files import manifest_from_bundle
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.errors import PmclipError
from pmclip_deploy.files import files_below
from pmclip_deploy.models import DEFAULT_BUNDLE
from pmclip_deploy.opening import load, session_from_bundle
from pmclip_deploy.process import take_over
from pmclip_deploy.threads import cpu_threads

ITEMS, LENGTH, QUESTION = 16, 12, "is there a fracture?"
Way = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    take_over()
    try:
        manifest = manifest_from_bundle(options.bundle)
        for name in ("image", "text"):
            session = session_from_bundle(options.bundle, manifest, name, options.device)
            print(f"{name} tower, {ITEMS} items, {options.device}")
            said(of_graph(session, inputs_of(manifest, name)), options.repeats)
        if options.pictures:
            for what, ways in of_folder(options.bundle, options.device, options.pictures).items():
                print(what)
                said(ways, options.repeats)
    except PmclipError as error:
        parser.exit(error.exit_code, f"error: {error}\n")


def inputs_of(manifest: Manifest, name: str) -> list[Any]:
    """Batch 1 each, of different ranges."""
    drawn, size = np.random.default_rng(0), manifest.preprocess.size
    if name == "image":
        return [(drawn.normal(size=(1, 3, size, size)) * drawn.uniform(0.2, 2)).astype(np.float32) for _ in range(ITEMS)]
    return [drawn.integers(5, 900, (1, min(LENGTH, manifest.context_length))) for _ in range(ITEMS)]


def of_graph(session: Any, inputs: list[Any]) -> dict[str, Way]:
    pool = ThreadPoolExecutor(cpu_threads())

    def run(part: list[Any]) -> Any:
        return session.run({session.inputs[0]: np.concatenate(part)})["embedding"]

    def every(mapped: Callable[..., Any], size: int) -> Any:
        return np.concatenate(list(mapped(run, chunks(inputs, size))))

    ways: dict[str, Way] = {}
    for size in (1, 4, 8, ITEMS):
        ways[f"batches of {size}" if size > 1 else "one by one"] = partial(every, map, size)
        if size < ITEMS:
            ways[f"side by side, {size} each"] = partial(every, pool.map, size)
    return ways


def of_folder(bundle: Path, device: str, folder: Path) -> dict[str, dict[str, Way]]:
    predictor, files = load(bundle, device), files_below(folder)[0]

    def embed() -> Any:
        return [x.tobytes() if isinstance(x, np.ndarray) else str(x) for x in predictor.embeddings_of_images(files)]

    def ask() -> Any:
        answers = side_by_side(lambda file: predictor.ask(file, QUESTION), files)
        return [str(x) if isinstance(x, PmclipError) else (x.answer, x.probability, x.reason) for x in answers]

    def by(most: int, work: Way) -> Any:
        beside.MOST, before = most, beside.MOST
        try:
            return work()
        finally:
            beside.MOST = before

    works = {f"embed {len(files)} files": embed, **({f"ask about {len(files)} files": ask} if predictor.manifest.head else {})}
    return {what: {"one by one": partial(by, 1, work), "side by side": partial(by, beside.MOST, work)} for what, work in works.items()}


def said(ways: Mapping[str, Way], repeats: int) -> None:
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    alone, equal = ways["one by one"](), {}

    def once(name: str) -> harness.Measurement:
        before, start = time.process_time(), time.perf_counter()
        found = ways[name]()
        seconds = time.perf_counter() - start
        cpu[name].append(time.process_time() - before)
        equal[name] = np.array_equal(found, alone) if isinstance(found, np.ndarray) else found == alone
        return harness.measurement("batches", 1, np.array([seconds]), seconds)

    measured = harness.interleaved({name: partial(once, name) for name in ways}, repeats)
    for name, of in measured.items():
        r = harness.ratio(of, measured["one by one"])
        median = 1e3 * float(np.median([x.seconds for x in of]))
        print(
            f"  {name:22} {median:8.1f} ms  ratio {r['ratio']:.2f} ({r['ratio_p25']:.2f} to {r['ratio_p75']:.2f})  "
            f"processor {1e3 * float(np.median(cpu[name])):8.1f} ms  {'same bits' if equal[name] else 'other bits'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
