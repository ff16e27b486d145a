"""The engines of `archive` side by side: their rates, whether their rows are equal, and what kills leave.

    python -m pmclip_deploy.benchmarks.archive --images FOLDER [--count 5000] [--repeats 1] [--engines one local ray] [--kill 0.3 0.6 0.9]
        [--files 1000 100000]

Each of ``--count`` names is a link to a real image of FOLDER. "one" is the local engine with one worker on one core: its driver and its
decoder are there too. A rate includes the start of the processes.

With ``--kill`` each engine's driver is ended by SIGKILL when such shares of the batches lie on the disk; the command is then run again
until it ends. The workers note each image before they compute it, so that the images that were computed again are counted.

With ``--files`` the driver's peak memory is measured over so many files. They are empty, and each is a row that says so.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pmclip_deploy.archive.output import MERGED, parts_of
from pmclip_deploy.benchmarks import archive_noting
from pmclip_deploy.files import PICTURES
from pmclip_deploy.threads import affinity, cpu_threads, processor

MAIN = "from pmclip_deploy.cli.app import program; program()"
BATCH = 64
ENGINES = {
    "one": ("--workers", "1"),
    "local": ("--workers", str(cpu_threads())),
    "ray": ("--engine", "ray", "--workers", str(cpu_threads())),
}


def linked(images: Path, folder: Path, count: int) -> None:
    real = sorted(path for path in images.rglob("*") if path.name.lower().endswith(PICTURES))
    folder.mkdir()
    for number in range(count):
        file = real[number % len(real)]
        (folder / f"{number:07}{file.suffix}").symlink_to(file.absolute())


def command(source: Path, out: Path, engine: str, main: str = MAIN) -> list[str]:
    given = ["archive", "embed", str(source), "--out", str(out), "--batch", str(BATCH), *ENGINES[engine], "--json", "--quiet"]
    return [sys.executable, "-c", main, *given]


def rate(source: Path, out: Path, engine: str, count: int) -> float:
    begun, cores = time.monotonic(), affinity()
    if engine == "one":
        os.sched_setaffinity(0, {min(cores)})  # children inherit it
    done = subprocess.run(command(source, out, engine), capture_output=True, text=True)
    os.sched_setaffinity(0, cores)
    if done.returncode:
        raise SystemExit(done.stderr)
    return count / (time.monotonic() - begun)


def batches(out: Path) -> int:
    """How many lie on the disk. A batch that was just merged may lie there twice."""
    merged = {name for part in parts_of(out) for name in json.loads(pq.read_schema(part).metadata[MERGED])}
    return len(merged | {f"{file.parent.name}/{file.name}" for file in out.glob(".run/*/*.parquet") if file.parent.name != "listing"})


def killed(source: Path, out: Path, engine: str, count: int, shares: Sequence[float]) -> str:
    noting, null = command(source, out, engine, archive_noting.MAIN), subprocess.DEVNULL
    for share in shares:
        with subprocess.Popen(noting, stdout=null, stderr=null) as process:
            while process.poll() is None and batches(out) < share * count / BATCH:
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
    subprocess.run(noting, capture_output=True, check=True)
    rows = pq.read_table(out, columns=["id"])["id"].to_pylist()
    images = [key for key, _ in archive_noting.noted(out)]
    return f"{len(rows):,} rows, {len(set(rows)):,} ids; {len(images) - len(set(images)):,} images were computed again"


def peak(source: Path, out: Path, engine: str) -> int:
    """MiB of the driver, by the kernel's count."""
    most = 0
    with subprocess.Popen(command(source, out, engine), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            said = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
            most = max(most, int(said[1])) if said else most
            time.sleep(0.05)
    return most >> 10


def rows(out: Path) -> pa.Table:
    return pq.read_table(out).replace_schema_metadata().sort_by("id").drop_columns(["key"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--kill", nargs="*", type=float, default=[])
    parser.add_argument("--files", nargs="*", type=int, default=[])
    options = parser.parse_args()
    print(processor())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        linked(options.images, folder / "source", options.count)
        rates: dict[str, list[float]] = {engine: [] for engine in options.engines}
        for repeat in range(options.repeats):
            for engine in options.engines:
                rates[engine].append(rate(folder / "source", folder / f"{engine}-{repeat}", engine, options.count))
        first = rows(folder / f"{options.engines[0]}-0")
        for engine, of in rates.items():
            same = rows(folder / f"{engine}-0").equals(first)
            print(f"{engine}: {statistics.median(of):.1f} images a second; rows equal those of {options.engines[0]}: {same}", flush=True)
        for engine in options.engines if options.kill else ():
            said = killed(folder / "source", folder / f"{engine}-killed", engine, options.count, options.kill)
            print(f"{engine}, killed {len(options.kill)} times: {said}; rows equal: {rows(folder / f'{engine}-killed').equals(first)}")
        for count in options.files:
            for number in range(count):
                file = folder / f"{count}-empty" / f"{number // 1000:04}" / f"{number:08}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
            for engine in options.engines:
                out = folder / f"{engine}-{count}"
                most = peak(folder / f"{count}-empty", out, engine)
                print(f"{engine}, {count:,} files: the driver's peak is {most} MiB; {rows(out).num_rows:,} rows", flush=True)


if __name__ == "__main__":
    main()
