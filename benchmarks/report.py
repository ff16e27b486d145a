"""The benchmark report: rows of results.py as Markdown and as one page of HTML. No figure in it is typed by hand.

    python -m pmclip_deploy.benchmarks.report [benchmarks/results/bench.jsonl ...] --markdown docs/measured/report.md --html report.html

Of each kind of run, model and machine the newest counts. What is divided by what comes from one run. The same rows give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from pmclip_deploy.benchmarks.peers import LITE, MODELS, VIT
from pmclip_deploy.benchmarks.results import Row, read
from pmclip_deploy.errors import PmclipError, UsageError
from pmclip_deploy.export import page
from pmclip_deploy.export.page import NOT_MEASURED, bar, finite, largest, line, number, one_line, percent
from pmclip_deploy.sessions import backends

ROWS = Path("benchmarks/results/bench.jsonl")
BENCH, COMPARE, PREPROCESSING, COLD = "bench", "compare", "preprocessing", "cold_start"  # the last word of a command's program
PARTS = ("image", "text")
REFERENCE, OURS = "open_clip-eager", "pmclip-deploy"  # PyTorch eager, and how our own systems' names begin
MLPERF = (0.99, 0.999)  # of fp32's accuracy: the lines that MLPerf Inference draws
EAGER, OPENVINO, COLD_LIMIT, PIXELS, PIXELS_HOPED = 0.6, 1.0, 0.07, 4.0, 10.0  # the aims

Figures = Mapping[str, Any]
Rows = Sequence[Row]


@dataclass(frozen=True)
class Plot:
    """A bar from 0 with its quartiles and lines to compare it with; in HTML alone."""

    value: Any
    most: float
    low: Any = None
    high: Any = None
    lines: tuple[float, ...] = ()


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str | Plot]]
    left: int = 1  # so many columns are text


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Code:
    text: str


Block = str | Table | Heading | Code  # a str is a paragraph, without any markup
Document = Mapping[str, Sequence[Block]]


# --- which rows count -----------------------------------------------------------------------------------------------------------


def newest(rows: Iterable[Row]) -> list[Row]:
    """Each row once, the oldest run first; none that a newer run of the same kind, model and machine has replaced."""
    each = {json.dumps(row, sort_keys=True): row for row in rows}
    ordered = sorted(each.values(), key=lambda row: (row["time"], row["run"]))
    last = {_kind(row): row["run"] for row in ordered}
    return [row for row in ordered if last[_kind(row)] == row["run"]]


def _kind(row: Row) -> tuple[Any, ...]:
    environment = row["environment"]
    bundle = _dict(environment.get("bundle"))
    picture = row["part"].rpartition(", ")[2] if program(row) == PREPROCESSING else ""  # real or synthetic
    about = (bundle.get("name"), bundle.get("precision"), bundle.get("target"), environment.get("device"))
    return machine(environment), program(row), row["model"], *map(str, about), picture, "accuracy" in row["figures"]


def program(row: Row) -> str:
    words = row["command"].partition(" -")[0] if row["command"].startswith("pmclip-deploy") else row["command"].partition(" -m ")[2]
    return str(re.split(r"[ .]", words.partition(" -")[0].strip())[-1])


def machine(environment: Figures) -> str:
    cpu, jetson = _dict(environment.get("cpu")), _dict(environment.get("jetson"))
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


# --- what it says ---------------------------------------------------------------------------------------------------------------


def document(rows: Iterable[Row]) -> Document:
    used = newest(rows)
    models = dict.fromkeys([*MODELS, *(row["model"] for row in used if program(row) == COMPARE)])
    return {
        "Aims": aims(used),
        "Machines": machines(used),
        **{model: comparisons(runs(used, COMPARE, model)) for model in models},
        "Accuracy": accuracy(used),
        "Cold start": cold_starts(used),
        "Scenarios": scenarios(timed(used)),
        "Stages": stages(timed(used)),
        "Radiographs": radiographs(runs(used, PREPROCESSING)),
        "Runs": environments(used),
    }


LEAD = (
    "Made from rows of results by python -m pmclip_deploy.benchmarks.report; nothing here is typed by hand. Ratios are of one run, in "
    "which systems took turns on the same weights, inputs and threads after their outputs were compared. Absolute times belong to their "
    "machine alone. Quartiles are the 25th and the 75th percentile. In comparisons ViT-B/32 and RN50 have random weights in the "
    "published layout; the ViT-B/32 that answers is the trained one of docs/howto/make-a-trained-vit.md."
)


def aims(rows: Rows) -> list[Block]:
    found: list[list[str]] = []

    def say(run: Rows, what: str, limit: str, measured: str | None, met: bool | None, more: str = "") -> None:
        verdict = NOT_MEASURED if met is None or measured is None else ("met" if met else "missed") + more
        found.append([what, limit, measured or NOT_MEASURED, verdict, run[0]["run"][:8] if run else ""])

    for run in runs(rows, COMPARE, VIT) or [[]]:
        for part in PARTS:
            for other, limit in ((REFERENCE, EAGER), ("openvino-fp32", OPENVINO)):
                paired = _paired(find(run, f"{OURS} fp32", part, "single-stream"), f"ratio{{}} to {other}")
                what = f"{VIT} fp32, one {part}: time to that of {other}"
                say(run, what, f"at most {limit:g}", _spread(paired), _at_most(paired[0], limit))
    for model in MODELS:  # measured or not
        for run in runs(rows, COMPARE, model) or [[]]:
            peers = list(dict.fromkeys(r["system"] for r in run if r["system"].endswith("int8") and not r["system"].startswith(OURS)))
            for part in PARTS:
                ours = find(run, f"{OURS} int8", part, "single-stream")
                cosine = least_cosine(find(run, f"{OURS} int8", part, "parity"))
                for peer in peers or ["every peer's INT8"]:
                    paired, theirs = _paired(ours, f"ratio{{}} to {peer}"), least_cosine(find(run, peer, part, "parity"))
                    known = finite(paired[0]) and finite(cosine) and finite(theirs)
                    measured = f"{_spread(paired)}; {_cosine(cosine)} against {_cosine(theirs)}" if known else None
                    met = bool(paired[0] < 1 and cosine >= theirs) if known else None
                    say(run, f"{model} INT8, one {part}: time to that of {peer}; least cosine to fp32", "under 1; not less", measured, met)
    for which, part, until in ((COLD, "infer", "infer's answer"), (COMPARE, "both", "its first embeddings")):
        for run in runs(rows, which, LITE) or [[]]:
            ratio = quotient(find(run, f"{OURS} int8", part, "cold"), find(run, REFERENCE, part, "cold"), "p50_ms")
            what = f"{LITE} INT8, from a new process to {until}: time to that of {REFERENCE}"
            met = None if ratio is None else ratio < COLD_LIMIT
            say(run, what, f"under {COLD_LIMIT:g}", None if ratio is None else f"{ratio:.3f}", met)
    for run in runs(rows, PREPROCESSING) or [[]]:
        others = [r for r in run if r["system"] != OURS]
        windowing = [r for r in others if r["part"].startswith("window")]
        hoped = f"at least {PIXELS:g} times, {PIXELS_HOPED:g} hoped for"
        for row in windowing:
            paired = _paired(row["figures"], "times_ours{}")
            more = f", {PIXELS_HOPED:g} too" if finite(paired[0]) and paired[0] >= PIXELS_HOPED else ""
            say(run, f"{row['model']}, {row['part']}: {row['system']}, to ours", hoped, _spread(paired), _at_least(paired[0], PIXELS), more)
        if not windowing:
            say(run, "window and preprocess a radiograph: open_clip's path, to ours", hoped, None, None)
        reach = "not faster: its quartiles reach 1"
        decoded = [r for r in others if r["part"].startswith("decode") and finite(r["figures"].get("times_ours"))]
        for part in dict.fromkeys(r["part"] for r in decoded):
            fastest = min((r for r in decoded if r["part"] == part), key=lambda r: float(r["figures"]["times_ours"]))
            paired = _paired(fastest["figures"], "times_ours{}")
            say(run, f"{part}: the fastest other, {fastest['system']}, to ours", reach, _spread(paired), _at_least(paired[2], 1))
        if not decoded:
            say(run, "decode JPEG 2000, JPEG-LS and RLE: the fastest other, to ours", reach, None, None)
    return [
        "Met or missed by the median of the rounds, with its quartiles in brackets. Radiographs' pixels were compared before they were "
        "timed, as were decoders' samples. Where a peer's INT8 is faster and its cosine less, the aim is missed all the same.",
        Table(["aim", "limit", "measured", "", "run"], found, left=5),
    ]


def machines(rows: Rows) -> list[Block]:
    table: list[list[str | Plot]] = []
    for run in timed(rows):
        system = next((r["system"] for r in run if r["system"] != "null"), "")
        single = [_ms(find(run, system, part, "single-stream").get("p50_ms")) for part in ("infer", "image")]
        cold = _ms(find(run, system, "infer", "cold").get("p50_ms"))
        table.append([machine(run[0]["environment"]), run[0]["model"], system, *single, cold, run[0]["run"][:8]])
    for name, there in (("NVIDIA Jetson", _on_jetson), ("NVIDIA RTX workstation", _on_rtx)):
        if not any(there(row) for row in rows):
            table.append([name, "", "", *[NOT_MEASURED] * 3, ""])
    return [
        "One sample at a time. How to measure a Jetson or an RTX workstation, and hand in the file: docs/howto/bench-your-machine.md.",
        Table(["machine", "model", "system", "infer, ms", "image tower, ms", "cold infer, ms", "run"], table, left=3),
    ]


def _on_jetson(row: Row) -> bool:
    return bool(row["environment"].get("jetson"))


def _on_rtx(row: Row) -> bool:
    """A GPU that stands idle beside a CPU's run is not measured."""
    environment = row["environment"]
    device, target = environment.get("device"), _dict(environment.get("bundle")).get("target")
    used = device not in (None, "cpu", "auto") or (device == "auto" and target not in (None, "cpu"))
    on_gpu = tuple(f" {device.name}" for backend in backends().values() for device in backend.devices if device.nvidia)
    return bool((used or row["system"].endswith(on_gpu)) and "RTX" in machine(environment))


def comparisons(of: Sequence[Rows]) -> list[Block]:
    return [block for run in of for block in (*_about(run), *comparison(run))]


def comparison(run: Rows) -> list[Block]:
    systems = list(dict.fromkeys(row["system"] for row in run if row["system"] != "null"))
    out: list[Block] = []
    for part in PARTS:
        single = {system: find(run, system, part, "single-stream") for system in systems}
        offline = {system: find(run, system, part, "offline") for system in systems}
        parity = {system: find(run, system, part, "parity") for system in systems}
        most = largest(of.get("p75_ms") for of in single.values())
        null = find(run, "null", part, "single-stream").get("p50_ms")
        tokens = part == "text"
        eager = {scenario: find(run, REFERENCE, part, scenario) for scenario in ("single-stream", "offline")}
        out += [
            Heading(f"One {part}"),
            f"The harness itself adds {_ms(null)} ms."
            + tokens * " Tokens: of each text, on the mean, as the system pads or cuts it.",
            Table(
                ["system", "p50, ms", "quartiles", "to eager", *tokens * ["tokens"], f"p50, 0 to {_ms(most)} ms"],
                [
                    [system, _ms(f.get("p50_ms")), _quartiles(f), _ratio(quotient(f, eager["single-stream"], "p50_ms")),
                     *tokens * [number(f.get("tokens"), ".3g")], Plot(f.get("p50_ms"), most, f.get("p25_ms"), f.get("p75_ms"))]
                    for system, f in single.items()
                ],
            ),
            Heading(f"Many {part}s, and how near they are to fp32"),
            "Offline, in batches. Least cosine to fp32; centred: with what all inputs share taken off.",
            Table(
                ["system", "a second", "to eager", "cosine", "centred cosine"],
                [
                    [system, _ms(f.get("samples_per_s")), _ratio(quotient(f, eager["offline"], "samples_per_s")),
                     *(_cosine(parity[system].get(key)) for key in ("cosine", "centred_cosine"))]
                    for system, f in offline.items()
                ],
            ),
        ]  # fmt: skip
    cold = {system: find(run, system, "both", "cold") for system in systems}
    most = largest(f.get("p75_ms") for f in cold.values())
    table, sizes = [], []
    for system, f in cold.items():
        table.append([system, _ms(f.get("p50_ms")), _quartiles(f), _ratio(quotient(f, cold.get(REFERENCE, {}), "p50_ms")),
                      _ms(f.get("open_ms")), Plot(f.get("p50_ms"), most, f.get("p25_ms"), f.get("p75_ms"))])  # fmt: skip
        size = find(run, system, "both", "size")
        sizes.append([system, number(f.get("peak_mib"), ",.0f"), *(_megabytes(size.get(f"{of}_bytes")) for of in ("model", "environment")),
                      str(f.get("versions", NOT_MEASURED))])  # fmt: skip
    return [
        *out,
        Heading("A new process"),
        "From nothing to the first image's and text's embedding, the file cache warm. Load: what of it opens the model. Memory: the peak. "
        "Installed: all that the system needs beside Python, where its environment holds nothing else.",
        Table(["system", "p50, ms", "quartiles", "to eager", "load, ms", f"p50, 0 to {_ms(most)} ms"], table),
        Table(["system", "memory, MiB", "model, MB", "installed, MB", "versions"], sizes),
        *_reasons(run),
    ]


def accuracy(rows: Rows) -> list[Block]:
    right: list[list[str | Plot]] = []
    more, agree, by = [], [], []
    parts = list(dict.fromkeys(key for row in rows for key in row["figures"] if key.startswith("accuracy_of_")))
    start, end = 0.95, 1.01
    for row in rows:
        f, about = row["figures"], [row["model"], row["system"], row["run"][:8]]
        if row["scenario"] != "parity" or row["part"] != "infer" or row["not_measured"]:
            continue
        if "accuracy" in f:
            share = quotient(f, {"accuracy": f.get("accuracy_fp32")}, "accuracy")
            reached = NOT_MEASURED if share is None else ", ".join(f"{limit:.1%}" for limit in MLPERF if share >= limit) or "neither"
            lines = tuple(limit - start for limit in MLPERF)
            change = [f.get(f"difference_ci95_{end}") for end in ("low", "high")]
            by.append([*about, *(number(f.get(part), ".4f") for part in parts), number(f["accuracy"], ".4f")])
            right.append([*about, number(f["accuracy"], ".4f"), number(f.get("accuracy_fp32"), ".4f"), percent(share), reached,
                          percent(f.get("agreement")), " to ".join(number(x, "+.4f") for x in change),
                          Plot(None if share is None else share - start, end - start, lines=lines)])  # fmt: skip
            others = ("ci95_low", "ci95_high", *(f"baseline_{name}" for name in ("majority", "question_only", "shuffled_image")))
            more.append([*about, number(row["samples"]), *(number(f.get(key), ".4f") for key in others),
                         percent(f.get("coverage")), number(f.get("selective_accuracy"), ".4f")])  # fmt: skip
        else:
            agree.append([*about, number(row["samples"]), *(percent(_agreement(f, kind)) for kind in ("given", "best")),
                          percent(f.get("pixels_equal")), *(_cosine(f.get(f"{tower}_cosine")) for tower in PARTS)])  # fmt: skip
    about = ["model", "system", "run"]
    return [
        Heading("Answers to questions that have one"),
        "Share: of fp32 PyTorch's accuracy on the same rows. MLPerf Inference draws lines at 99% of it, and at 99.9%. Agree, and the "
        "difference's 95% interval: with fp32's answers, as counted when the bundle was exported.",
        Table(
            [*about, "accuracy", "fp32's", "share", "reaches", "agree", "difference", "share, 95% to 101%; lines at 99% and 99.9%"],
            right,
            left=3,
        ),
        Table([*about, *(part.removeprefix("accuracy_of_") for part in parts), "overall"], by, left=3),
        Table(
            [*about, "questions", "95% from", "to", "majority", "question alone", "other images", "answered", "right of these"],
            more,
            left=3,
        ),
        Heading("Agreement with fp32 PyTorch on fixed pictures and questions"),
        Table([*about, "answers", "given agree", "best agree", "pixels equal", "image cosine", "text cosine"], agree, left=3),
    ]


def _agreement(figures: Figures, kind: str) -> float | None:
    differ = quotient({"n": figures.get(f"{kind}_differ")}, {"n": figures.get(f"{kind}_answers")}, "n")
    return None if differ is None else 1 - differ


def cold_starts(rows: Rows) -> list[Block]:
    out: list[list[str | Plot]] = []
    of = [(run, row) for run in (*runs(rows, COLD), *runs(rows, BENCH)) for row in run if row["scenario"] == "cold"]
    most = largest(row["figures"].get("p75_ms") for _, row in of)
    for run, row in of:
        f, to = row["figures"], find([r for r in run if r["model"] == row["model"]], REFERENCE, row["part"], "cold")
        out.append([row["model"], row["system"], row["part"], _ms(f.get("p50_ms")), _quartiles(f), _ratio(quotient(f, to, "p50_ms")),
                    number(f.get("peak_mib"), ",.0f"), number(row["samples"]), run[0]["run"][:8],
                    Plot(f.get("p50_ms"), most, f.get("p25_ms"), f.get("p75_ms"))])  # fmt: skip
    header = ["model", "system", "part", "p50, ms", "quartiles", "to eager", "memory, MiB", "processes", "run", f"0 to {_ms(most)} ms"]
    return ["A new process from nothing to its answer (infer), or to its embeddings (both).", Table(header, out, left=3)] if out else []


def scenarios(of: Sequence[Rows]) -> list[Block]:
    out: list[Block] = []
    for run in of:
        timed = [r for r in run if r["scenario"] in ("single-stream", "multi-stream", "offline", "server") and r["system"] != "null"]
        null = find(run, "null", "image", "single-stream").get("p50_ms")
        table = [
            [r["part"], r["scenario"], number(f.get("batch")), *(_ms(f.get(key)) for key in KEYS),
             _ms(f.get("bound_ms")) if r["scenario"] == "server" else "",
             _ms(f.get("queries_per_s" if r["scenario"] == "server" else "samples_per_s")), number(r["samples"])]
            for r in timed for f in [r["figures"]]
        ]  # fmt: skip
        other = [
            [r["part"], r["scenario"], name, NOT_MEASURED if value is None else _ms(value) if finite(value) else str(value)]
            for r in run if r["scenario"] in ("size", "memory", "energy") for name, value in r["figures"].items()
        ]  # fmt: skip
        out += [
            *_about(run),
            f"MLPerf Inference's scenarios. At most: its early-stopping estimate, at 99% confidence, where there were queries enough. "
            f"Server: the rate of Poisson arrivals at which 99% are answered in the bound. The harness itself adds {_ms(null)} ms.",
            Table(
                ["part", "scenario", "batch", "p50, ms", "p90", "at most", "p99", "at most", "bound", "a second", "samples"], table, left=2
            ),
            *([Table(["part", "", "figure", "value"], other, left=3)] if other else []),
            *_reasons([r for r in run if r["scenario"] != "stage"]),
        ]
    return out


KEYS = ("p50_ms", "p90_ms", "p90_bound_ms", "p99_ms", "p99_bound_ms")


def stages(of: Sequence[Rows]) -> list[Block]:
    out: list[Block] = []
    for run in of:
        staged = [r for r in run if r["scenario"] == "stage"]
        most = largest(r["figures"].get("p75_ms") for r in staged)
        table = [
            [r["part"], _ms(f.get("p50_ms")), _quartiles(f), number(r["samples"]),
             Plot(f.get("p50_ms"), most, f.get("p25_ms"), f.get("p75_ms"))]
            for r in staged for f in [r["figures"]]
        ]  # fmt: skip
        header = ["stage", "p50, ms", "quartiles", "samples", f"p50, 0 to {_ms(most)} ms"]
        out += [*_about(run), "Each stage alone, warm, in one process.", Table(header, table), *_reasons(staged)] if staged else []
    return out


def radiographs(of: Sequence[Rows]) -> list[Block]:
    out: list[Block] = []
    for run in of:
        out += _about(run)
        for model, part in dict.fromkeys((r["model"], r["part"]) for r in run):
            figures = {r["system"]: r["figures"] for r in run if (r["model"], r["part"]) == (model, part)}
            most = max(largest(f.get("times_ours_p75") for f in figures.values()), 1.0)
            table = [
                [system, _ms(f.get("p50_ms")), _quartiles(f), _ratio(f.get("times_ours")), _quartiles(f, "times_ours_p{}"),
                 Plot(f.get("times_ours"), most, f.get("times_ours_p25"), f.get("times_ours_p75"), (1.0,))]
                for system, f in figures.items()
            ]  # fmt: skip
            header = ["system", "p50, ms", "quartiles", "times ours", "quartiles", f"times ours, 0 to {most:.3g}; line at 1"]
            out += [Heading(part if model == "any" else f"{model}: {part}"), Table(header, table)]
    return out


def environments(rows: Rows) -> list[Block]:
    """Every run's command, and under those of one environment what that was."""
    same: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        same.setdefault(json.dumps(row["environment"], sort_keys=True), {}).setdefault(row["run"], []).append(row)
    out: list[Block] = []
    for group in same.values():
        for run in group.values():
            out += [f"Run {run[0]['run'][:8]}, {run[0]['time']}, {_models(run)}:", Code(run[0]["command"])]
        out.append(Table(["environment", ""], [[name, _said(value)] for name, value in run[0]["environment"].items()], left=2))
    return out


def _about(run: Rows) -> list[Block]:
    first = run[0]
    threads = f", {first['threads']} threads" if first["threads"] else ""
    return [f"{_models(run)}, run {first['run'][:8]}, {machine(first['environment'])}{threads}:", Code(first["command"])]


def _models(run: Rows) -> str:
    return ", ".join(dict.fromkeys(row["model"] for row in run if row["model"] != "any"))


def _reasons(run: Rows) -> list[Block]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in run:
        if row["not_measured"]:
            reasons.setdefault((row["system"], row["not_measured"]), []).append(f"{row['part']} {row['scenario']}")
    table = [[system, ", ".join(what), why] for (system, why), what in reasons.items()]
    return [Table(["not measured", "what", "why"], table, left=3)] if table else []


def least_cosine(parity: Figures) -> Any:
    """Of the pairs, also of the centred ones where there are some: random weights embed all pictures much alike."""
    return min((x for key in ("cosine", "centred_cosine") if finite(x := parity.get(key))), default=None)


def _paired(figures: Figures, key: str) -> tuple[Any, Any, Any]:
    """(median, quartile, quartile) of the rounds."""
    median, low, high = (figures.get(key.format(of)) for of in ("", "_p25", "_p75"))
    return median, low, high


def _spread(paired: tuple[Any, Any, Any]) -> str | None:
    return f"{paired[0]:.3g} ({number(paired[1], '.3g')} to {number(paired[2], '.3g')})" if finite(paired[0]) else None


def _at_most(value: Any, limit: float) -> bool | None:
    return bool(value <= limit) if finite(value) else None


def _at_least(value: Any, limit: float) -> bool | None:
    return bool(value >= limit) if finite(value) else None


def _quartiles(figures: Figures, key: str = "p{}_ms") -> str:
    low, high = (figures.get(key.format(of)) for of in (25, 75))
    return f"{_ms(low)} to {_ms(high)}" if finite(low) and finite(high) else NOT_MEASURED


def _ms(value: Any) -> str:
    return number(value, ",.0f" if finite(value) and abs(value) >= 1000 else ".4g")


def _ratio(value: Any) -> str:
    return number(value, ".3f" if finite(value) and abs(value) < 10 else ".1f")


def _cosine(value: Any) -> str:
    return number(value, ".6f")


def _megabytes(value: Any) -> str:
    return number(value / 1e6 if finite(value) else None, ",.0f")


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} {_said(of)}" for name, of in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_said, value)) or "none"
    return "unknown" if value is None else str(value)


def _dict(value: Any) -> Figures:
    return value if isinstance(value, dict) else {}


# --- how it is written ----------------------------------------------------------------------------------------------------------


def html(of: Document) -> str:
    return page.page("Benchmarks", f"<p>{page.text(LEAD)}</p>", {name: "".join(map(_html, blocks)) for name, blocks in of.items()})


def _html(block: Block) -> str:
    if isinstance(block, str):
        return f"<p>{page.text(block)}</p>\n"
    if isinstance(block, Heading):
        return f"<h3>{page.text(block.text)}</h3>\n"
    if isinstance(block, Code):
        return f"<p><code>{page.text(block.text)}</code></p>\n"
    if not block.rows:
        return page.missing()
    return page.table(block.header, [[_cell(cell) for cell in row] for row in block.rows], block.left) + "\n"


def _cell(cell: str | Plot) -> str:
    if isinstance(cell, str):
        return page.text(cell)
    low, high = (f"{100 * min(max(x, 0), cell.most) / cell.most:.2f}%" if finite(x) else None for x in (cell.low, cell.high))
    ends = f'<line class="spread" x1="{low}" x2="{high}" y1="50%" y2="50%"/>' if low and high else ""
    return page.svg(bar(cell.value, cell.most) + ends + "".join(line(f"{100 * x / cell.most:.2f}%") for x in cell.lines))


def markdown(of: Document) -> str:
    sections = [f"## {_plain(name)}\n\n" + "\n\n".join(map(_markdown, blocks or [NOT_MEASURED])) for name, blocks in of.items()]
    return "\n\n".join(["# Benchmarks", _plain(LEAD), *sections]) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, str):
        return _plain(block)
    if isinstance(block, Heading):
        return f"### {_plain(block.text)}"
    if isinstance(block, Code):
        return f"    {one_line(block.text)}"
    if not block.rows:
        return NOT_MEASURED
    shown = [i for i, cell in enumerate(block.rows[0]) if isinstance(cell, str)]
    rules = ["---" if i < block.left else "---:" for i in shown]
    rows = [[_plain(row[i]) for i in shown] for row in (block.header, *block.rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (rows[0], rules, *rows[1:]))


MARKUP = re.compile(r"[\\`*\[\]|~$#@]|(?<!\w)_|_(?!\w)|:(?=//)|(?<=www)\.")


def _plain(value: object) -> str:
    """Text that Markdown leaves as it is: no markup, no HTML and no link."""
    return escape(MARKUP.sub(lambda found: "\\" + found.group(), one_line(value)), quote=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", type=Path, default=[ROWS], help="files of JSON lines")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--html", type=Path)
    options = parser.parse_args()
    try:
        made = document([row for path in options.rows for row in read(path)])
        writers: dict[Path | None, Callable[[Document], str]] = {options.markdown: markdown, options.html: html}
        for path, write in writers.items():
            if path is not None:
                _store(path, write(made))
        if options.markdown is options.html is None:
            print(markdown(made), end="")
    except PmclipError as error:
        parser.exit(error.exit_code, f"error: {error}\n")


def _store(path: Path, content: str) -> None:
    try:
        path.write_text(content, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror}); give a file in a folder that exists") from None


if __name__ == "__main__":
    main()
