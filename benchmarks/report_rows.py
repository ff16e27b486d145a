"""Which rows the benchmark report counts, and how it reads and prints their figures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pmclip_deploy.benchmarks.results import Row
from pmclip_deploy.export.page import NOT_MEASURED, finite, number

BENCH, COMPARE, PREPROCESSING, COLD = "bench", "compare", "preprocessing", "cold_start"  # the last word of a command's program
PARTS = ("image", "text")
REFERENCE, OURS = "open_clip-eager", "pmclip-deploy"  # PyTorch eager, and how our own systems' names begin
MLPERF = (0.99, 0.999)  # of fp32's accuracy: the lines that MLPerf Inference draws

Figures = Mapping[str, Any]
Rows = Sequence[Row]


def newest(rows: Iterable[Row]) -> list[Row]:
    """Each row once, the oldest run first; none that a newer run of the same kind, model and machine has replaced."""
    each = {json.dumps(row, sort_keys=True): row for row in rows}
    ordered = sorted(each.values(), key=lambda row: (row["time"], row["run"]))
    last = {_kind(row): row["run"] for row in ordered}
    return [row for row in ordered if last[_kind(row)] == row["run"]]


def _kind(row: Row) -> tuple[Any, ...]:
    environment = row["environment"]
    bundle = dict_of(environment.get("bundle"))
    picture = row["part"].rpartition(", ")[2] if program(row) == PREPROCESSING else ""  # real or synthetic
    about = (bundle.get("name"), bundle.get("precision"), bundle.get("target"), environment.get("device"))
    return machine_name(environment), program(row), row["model"], *map(str, about), picture, "accuracy" in row["figures"]


def program(row: Row) -> str:
    """The last word of the command: "bench", "compare", "cold_start", ...; of `bench --gpu-proof` its option."""
    if " --gpu-proof" in row["command"]:
        return "gpu-proof"
    words = row["command"].partition(" -")[0] if row["command"].startswith("pmclip-deploy") else row["command"].partition(" -m ")[2]
    return str(re.split(r"[ .]", words.partition(" -")[0].strip())[-1])


def machine_name(environment: Figures) -> str:
    """What a reader knows a machine by: model and power mode, GPUs, processor, cores and instruction sets."""
    cpu, jetson = dict_of(environment.get("cpu")), dict_of(environment.get("jetson"))
    gpus = [gpu.get("name") for gpu in environment.get("gpus") or () if isinstance(gpu, dict)]
    flags = " ".join(map(str, cpu.get("flags") or ()))
    said = [jetson.get("model"), jetson.get("power_mode"), *gpus, cpu.get("name"), f"{cpu.get('usable')} cores", flags]
    return ", ".join(str(word) for word in said if word)


def runs(rows: Rows, which: str, model: str | None = None) -> list[list[Row]]:
    """The rows of each run of a program, about one model or all of them."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if program(row) == which and model in (None, row["model"]):
            found.setdefault(row["run"], []).append(row)
    return list(found.values())


def timed(rows: Rows) -> list[list[Row]]:
    """The runs of `bench` of which more than accuracy counts: a newer one may have replaced the rest."""
    return [run for run in runs(rows, BENCH) if any(row["scenario"] != "parity" for row in run)]


def find(rows: Rows, system: str, part: str, scenario: str) -> Figures:
    """The figures of one run's row; empty where it was not measured."""
    return next((r["figures"] for r in reversed(rows) if (r["system"], r["part"], r["scenario"]) == (system, part, scenario)), {})


def quotient(of: Figures, to: Figures, key: str) -> float | None:
    """Both must be of one run."""
    a, b = of.get(key), to.get(key)
    return a / b if finite(a) and finite(b) and b else None


def least_cosine(parity: Figures) -> Any:
    """Of the pairs, also of the centred ones where there are some: random weights embed all pictures much alike."""
    return min((x for key in ("cosine", "centred_cosine") if finite(x := parity.get(key))), default=None)


def pair_of(figures: Figures, key: str) -> tuple[Any, Any, Any]:
    """(median, quartile, quartile) of the rounds."""
    median, low, high = (figures.get(key.format(of)) for of in ("", "_p25", "_p75"))
    return median, low, high


def as_spread(paired: tuple[Any, Any, Any]) -> str | None:
    """As "median (quartile to quartile)"; None without a median."""
    return f"{paired[0]:.3g} ({number(paired[1], '.3g')} to {number(paired[2], '.3g')})" if finite(paired[0]) else None


def at_most(value: Any, limit: float) -> bool | None:
    """None where nothing was measured."""
    return bool(value <= limit) if finite(value) else None


def at_least(value: Any, limit: float) -> bool | None:
    """None where nothing was measured."""
    return bool(value >= limit) if finite(value) else None


def as_quartiles(figures: Figures, key: str = "p{}_ms") -> str:
    """As "p25 to p75", in ms."""
    low, high = (figures.get(key.format(of)) for of in (25, 75))
    return f"{as_ms(low)} to {as_ms(high)}" if finite(low) and finite(high) else NOT_MEASURED


def as_ms(value: Any) -> str:
    return number(value, ",.0f" if finite(value) and abs(value) >= 1000 else ".4g")


def as_ratio(value: Any) -> str:
    return number(value, ".3f" if finite(value) and abs(value) < 10 else ".1f")


def as_cosine(value: Any) -> str:
    return number(value, ".6f")


def as_mb(value: Any) -> str:
    """Bytes as MB: millions."""
    return number(value / 1e6 if finite(value) else None, ",.0f")


def as_text(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} {as_text(of)}" for name, of in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(as_text, value)) or "none"
    return "unknown" if value is None else str(value)


def dict_of(value: Any) -> Figures:
    return value if isinstance(value, dict) else {}
