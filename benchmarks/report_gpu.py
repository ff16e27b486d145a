"""The report's part about GPUs: the steps of `bench --gpu-proof`, a table for each stage of `benchmarks.gpu`, and the aims."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from pmclip_deploy.benchmarks.report_rows import Figures, Rows, as_ms, as_quartiles, find, program, quotient, runs
from pmclip_deploy.benchmarks.report_writing import Block, Heading, Table
from pmclip_deploy.benchmarks.results import Row
from pmclip_deploy.export.page import NOT_MEASURED, finite, number

GPU, PROOF = "gpu", "gpu-proof"  # program() of their rows
SYSTEM, PRODUCT, LOSS, THEIR_LOSS = "CudaSimilarity", "torch, product and topk", "pmclip-deploy", "open_clip.ClipLoss"  # systems in rows
SHARES = {"f16": 0.8, "f32": 0.75, "i8": 0.75}  # of the bandwidth that was measured, for one image and a million rows
HOST_US, MEMORY, TIME = 30.0, 0.25, 1.3  # of a call; of the loss, to open_clip's

UNITS = (  # that end a figure's name
    ("_ms", "ms"), ("_us", "µs"), ("_mib", "MiB"), ("_gib", "GiB"), ("_per_s", "a second"), ("_bytes", "bytes"),
)  # fmt: skip


class GpuAim(NamedTuple):
    """What was measured is met if it is at least, or else at most, the limit."""

    what: str
    limit: float
    measured: float | None
    is_least: bool


def gpu_aims(run: Rows) -> Iterator[GpuAim]:
    """Of one run on a GPU, or of none."""
    for bank, limit in SHARES.items():
        found = find(run, SYSTEM, f"search {bank}, B 1, N 1,000,000", "fast")
        yield GpuAim(f"a million rows of {bank}, one image: share of the measured bandwidth", limit, _number(found, "share_of_read"), True)
    for bank in SHARES:
        part = f"search {bank}, B 16, N 1,000,000"
        times = quotient(find(run, PRODUCT, part, "fast"), find(run, SYSTEM, part, "fast"), "p50_ms")
        yield GpuAim(f"a million rows of {bank}, 16 images: time of torch's product and topk to ours", 1.0, times, True)
    host = _number(find(run, SYSTEM, "search f16, B 1, N 10,000", "fast"), "host_us")
    yield GpuAim("a search's time on the host, µs", HOST_US, host, False)
    loss = "contrastive loss, B 32,768"
    ours, theirs = find(run, LOSS, loss, "training"), find(run, THEIR_LOSS, loss, "training")
    yield GpuAim("the contrastive loss at batch 32k: memory to open_clip's", MEMORY, quotient(ours, theirs, "peak_mib"), False)
    yield GpuAim("the contrastive loss at batch 32k: time to open_clip's", TIME, quotient(ours, theirs, "p50_ms"), False)


def _number(figures: Figures, name: str) -> float | None:
    value = figures.get(name)
    return float(value) if finite(value) else None


def on_a_gpu(rows: Rows) -> list[list[Row]]:
    """Runs that are no rehearsal."""
    return [run for run in runs(rows, GPU) if run[0]["environment"].get("device") == "cuda"]


def is_gpu(row: Row) -> bool:
    return program(row) in (GPU, PROOF)


def gpu_stages(rows: Rows, about: Any) -> list[Block]:
    """Each run with a table for each stage; ``about`` heads a run."""
    out: list[Block] = []
    for run in runs(rows, PROOF):
        table = [[row["part"], row["not_measured"] or "done", _rest(row["figures"])] for row in run]
        out += [*about(run), "The steps of `pmclip-deploy bench --gpu-proof`:", Table(["step", "outcome", "figures"], table, left=3)]
    for run in runs(rows, GPU):
        packages = run[0]["environment"].get("packages") or {}
        shown = [f"{name} {packages[name]}" for name in ("torch", "triton", "cuda-core", "cupy-cuda13x") if name in packages]
        driver = run[0]["environment"].get("nvidia_driver") or next((g.get("driver_version") for g in run[0]["environment"]["gpus"]), None)
        if run[0]["environment"].get("device") != "cuda":
            out.append("A rehearsal on a CPU with tiny sizes: its figures say nothing of any machine.")
        out += [*about(run), f"Driver {driver or 'unknown'}; {', '.join(shown) or 'no packages'}."]
        for stage in dict.fromkeys(row["scenario"] for row in run):
            of = [row for row in run if row["scenario"] == stage]
            measured = [row for row in of if not row["not_measured"]]
            is_timed = any("p50_ms" in row["figures"] for row in measured)
            table = [
                [row["part"], row["model"], row["system"], *([as_ms(f.get("p50_ms")), as_quartiles(f)] if is_timed else []),
                 number(row["samples"]), _rest(f)]
                for row in measured for f in [row["figures"]]
            ]  # fmt: skip
            header = ["what", "model", "system", *(["p50, ms", "quartiles"] if is_timed else []), "samples", "figures"]
            out += [Heading(f"Stage {stage}"), Table(header, table, left=3)] if table else [Heading(f"Stage {stage}")]
            out += _reasons(of)
    return out


def _rest(figures: Figures) -> str:
    """The figures that have no column."""
    said = []
    for name, value in figures.items():
        if name not in ("p50_ms", "p25_ms", "p75_ms"):
            unit = next(((name.removesuffix(end), word) for end, word in UNITS if name.endswith(end)), (name, ""))
            shown = number(value, ".4g") if finite(value) else NOT_MEASURED if value is None else str(value)
            said.append(f"{unit[0].replace('_', ' ')} {shown} {unit[1]}".strip())
    return "; ".join(said)


def _reasons(rows: Rows) -> list[Block]:
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["not_measured"]:
            reasons.setdefault(row["not_measured"], []).append(f"{row['part']} ({row['system'] or 'all'})")
    table = [[why, "; ".join(dict.fromkeys(what))] for why, what in reasons.items()]
    return [Table(["not measured because", "what"], table, left=2)] if table else []
