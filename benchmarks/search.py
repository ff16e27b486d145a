"""A text searched for in a large index by a new process, beside reading the index's file once.

    python -m pmclip_deploy.benchmarks.search [--rows 1000000] [--repeats 5] [--from-disk] [--output FILE.csv]

Rows are random, 512 numbers each, in an index of the embedded model. ``--from-disk`` (Linux) drops the file from the system's cache before
each process. Runs are interleaved; medians are printed, with the peak resident memory that the kernel counted.
"""

import argparse
import csv
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from pmclip_deploy.benchmarks.harness import process

TEXT = "ct of the chest"
READ = """
import sys
block = bytearray(1 << 20)
with open(sys.argv[1], "rb", buffering=0) as file:
    while file.readinto(block):
        pass
"""


def random_index(path: Path, rows: int) -> None:
    """Writes an index of so many rows of random directions, in the embedded bundle's width."""
    import numpy as np

    from pmclip_deploy.bundle.files import manifest_from_bundle, sha256_of_file
    from pmclip_deploy.bundle.names import MANIFEST
    from pmclip_deploy.models import DEFAULT_BUNDLE
    from pmclip_deploy.search.index import ROWS, About, Chunk, write_index

    manifest, rng = manifest_from_bundle(DEFAULT_BUNDLE), np.random.default_rng(0)
    dim = manifest.embed_dim

    def chunks() -> Iterator[Chunk]:
        for start in range(0, rows, ROWS):
            ids = [f"archive/study-{row // 300:05}/series-1/image-{row:08}.dcm" for row in range(start, min(start + ROWS, rows))]
            wide = rng.normal(size=(len(ids), dim)).astype(np.float32)
            yield (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float16), ids

    write_index(path, About(manifest.name, sha256_of_file(DEFAULT_BUNDLE / MANIFEST), "image", "path"), dim, chunks())


def drop_from_cache(path: Path) -> None:
    """The next read of the file comes from the disk (POSIX)."""
    handle = os.open(path, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--from-disk", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    measured: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        index = Path(scratch) / "x.index"
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # a process begins with the peak memory of the one that starts it
            pool.submit(random_index, index, options.rows).result()
        query = [str(Path(sys.executable).with_name("pmclip-deploy")), "search", "query", str(index), TEXT, "--json"]
        for repeat in range(-1, options.repeats):  # the first round warms the file cache
            for job, command in (("search query", query), ("reading the file", [sys.executable, "-c", READ, str(index)])):
                if options.from_disk:
                    drop_from_cache(index)
                seconds, memory, out = process(command)
                steps = json.loads(out)["timings_ms"] if out else {"index": 0, "search": 0}
                row = {"job": job, "from_disk": options.from_disk, "rows": options.rows, "file_mib": round(index.stat().st_size / 2**20, 1)}
                row |= {"repeat": repeat, "seconds": round(seconds, 4), "peak_mib": round(memory or 0, 1)}
                row |= {"verify_seconds": steps["index"] / 1e3, "search_seconds": steps["search"] / 1e3}
                measured += [row] if repeat >= 0 else []
    for job in ("search query", "reading the file"):
        figures = ("seconds", "peak_mib", "verify_seconds", "search_seconds")
        seconds, memory, verify, search = (statistics.median(float(str(r[key])) for r in measured if r["job"] == job) for key in figures)
        print(f"{job:18}  {seconds:6.2f} s  {memory:6.0f} MiB" + (f"  verified {verify:.2f} s, searched {search:.3f} s" if verify else ""))
    print(f"{options.rows:,} rows, {measured[0]['file_mib']} MiB (medians of {options.repeats} interleaved runs)")
    if options.output:
        known = list(csv.DictReader(options.output.open())) if options.output.is_file() else []
        kept = [row for row in known if (row["from_disk"], row["rows"]) != (str(options.from_disk), str(options.rows))]
        with options.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, measured[0])
            writer.writeheader()
            writer.writerows(kept + measured)


if __name__ == "__main__":
    main()
