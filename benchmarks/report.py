"""The benchmark report: rows of results.py as Markdown and as one page of HTML. No figure in it is typed by hand.

    python -m pmclip_deploy.benchmarks.report [benchmarks/results/bench.jsonl.gz ...] --markdown docs/measured/report.md --html report.html

Of each kind of run, model and machine the newest counts. What is divided by what comes from one run. The same rows give the same bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pmclip_deploy.benchmarks.peers import MODELS
from pmclip_deploy.benchmarks.report_aims import aims
from pmclip_deploy.benchmarks.report_gpu import gpu_stages, is_gpu
from pmclip_deploy.benchmarks.report_rows import (
    BENCH,
    COLD,
    COMPARE,
    MLPERF,
    PARTS,
    PREPROCESSING,
    REFERENCE,
    Figures,
    Rows,
    as_cosine,
    as_mb,
    as_ms,
    as_quartiles,
    as_ratio,
    as_text,
    dict_of,
    find,
    machine_name,
    newest,
    program,
    quotient,
    runs,
    timed,
)
from pmclip_deploy.benchmarks.report_tuned import after_tune
from pmclip_deploy.benchmarks.report_writing import Block, Code, Document, Heading, Plot, Table, html, markdown
from pmclip_deploy.benchmarks.results import Row, read
from pmclip_deploy.errors import PmclipError, UsageError
from pmclip_deploy.export.page import NOT_MEASURED, finite, largest, number, percent
from pmclip_deploy.sessions import backends

ROWS = Path("benchmarks/results/bench.jsonl.gz")


def document(rows: Iterable[Row]) -> Document:
    """The whole page, of the newest rows of each kind."""
    used = newest(rows)
    models = dict.fromkeys([*MODELS, *(row["model"] for row in used if program(row) == COMPARE)])
    return {
        "Aims": aims(used),
        "Machines": machines([row for row in used if not is_gpu(row)]),
        **{model: comparisons(runs(used, COMPARE, model)) for model in models},
        "Accuracy": accuracy(used),
        "Cold start": cold_starts(used),
        "Scenarios": scenarios(timed(used)),
        "Stages": stages(timed(used)),
        "Radiographs": radiographs(runs(used, PREPROCESSING)),
        "GPU": gpu_stages(used, _about),
        "Runs": environments(used),
    }


def machines(rows: Rows) -> list[Block]:
    """One line for each machine of `bench`; a Jetson and an RTX workstation are named also where none was measured."""
    table: list[list[str | Plot]] = []
    for run in timed(rows):
        system = next((r["system"] for r in run if r["system"] != "null"), "")
        single = [as_ms(find(run, system, part, "single-stream").get("p50_ms")) for part in ("infer", "image")]
        cold = as_ms(find(run, system, "infer", "cold").get("p50_ms"))
        table.append([machine_name(run[0]["environment"]), run[0]["model"], system, *single, cold, run[0]["run"][:8]])
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
    device, target = environment.get("device"), dict_of(environment.get("bundle")).get("target")
    used = device not in (None, "cpu", "auto") or (device == "auto" and target not in (None, "cpu"))
    on_gpu = tuple(f" {device.name}" for backend in backends().values() for device in backend.devices if device.nvidia)
    return bool((used or row["system"].endswith(on_gpu)) and "RTX" in machine_name(environment))


def comparisons(of: Sequence[Rows]) -> list[Block]:
    return [block for run in of for block in (*_about(run), *comparison(run))]


def comparison(run: Rows) -> list[Block]:
    """One run beside its peers: each part, then new processes."""
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
            f"The harness itself adds {as_ms(null)} ms."
            + tokens * " Tokens: of each text, on the mean, as the system pads or cuts it.",
            Table(
                ["system", "p50, ms", "quartiles", "to eager", *tokens * ["tokens"], f"p50, 0 to {as_ms(most)} ms"],
                [
                    [system, as_ms(f.get("p50_ms")), as_quartiles(f), as_ratio(quotient(f, eager["single-stream"], "p50_ms")),
                     *tokens * [number(f.get("tokens"), ".3g")], Plot(f.get("p50_ms"), most, f.get("p25_ms"), f.get("p75_ms"))]
                    for system, f in single.items()
                ],
            ),
            Heading(f"Many {part}s, and how near they are to fp32"),
            "Offline, in batches. Least cosine to fp32; centred: with what all inputs share taken off.",
            Table(
                ["system", "a second", "to eager", "cosine", "centred cosine"],
                [
                    [system, as_ms(f.get("samples_per_s")), as_ratio(quotient(f, eager["offline"], "samples_per_s")),
                     *(as_cosine(parity[system].get(key)) for key in ("cosine", "centred_cosine"))]
                    for system, f in offline.items()
                ],
            ),
        ]  # fmt: skip
    cold = {system: find(run, system, "both", "cold") for system in systems}
    most = largest(f.get("p75_ms") for f in cold.values())
    table, sizes = [], []
    for system, f in cold.items():
        table.append([system, as_ms(f.get("p50_ms")), as_quartiles(f), as_ratio(quotient(f, cold.get(REFERENCE, {}), "p50_ms")),
                      as_ms(f.get("open_ms")), Plot(f.get("p50_ms"), most, f.get("p25_ms"), f.get("p75_ms"))])  # fmt: skip
        size = find(run, system, "both", "size")
        sizes.append([system, number(f.get("peak_mib"), ",.0f"), *(as_mb(size.get(f"{of}_bytes")) for of in ("model", "environment")),
                      str(f.get("versions", NOT_MEASURED))])  # fmt: skip
    return [
        *out,
        Heading("A new process"),
        "From nothing to the first image's and text's embedding, the file cache warm. Load: what of it opens the model. Memory: the peak. "
        "Installed: all that the system needs beside Python, where its environment holds nothing else.",
        Table(["system", "p50, ms", "quartiles", "to eager", "load, ms", f"p50, 0 to {as_ms(most)} ms"], table),
        Table(["system", "memory, MiB", "model, MB", "installed, MB", "versions"], sizes),
        *after_tune(run),
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
                          percent(f.get("pixels_equal")), *(as_cosine(f.get(f"{tower}_cosine")) for tower in PARTS)])  # fmt: skip
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
    """From a new process to its answer, of all runs that timed one."""
    out: list[list[str | Plot]] = []
    of = [(run, row) for run in (*runs(rows, COLD), *runs(rows, BENCH)) for row in run if row["scenario"] == "cold"]
    most = largest(row["figures"].get("p75_ms") for _, row in of)
    for run, row in of:
        f, to = row["figures"], find([r for r in run if r["model"] == row["model"]], REFERENCE, row["part"], "cold")
        out.append([row["model"], row["system"], row["part"], as_ms(f.get("p50_ms")), as_quartiles(f), as_ratio(quotient(f, to, "p50_ms")),
                    number(f.get("peak_mib"), ",.0f"), number(row["samples"]), run[0]["run"][:8],
                    Plot(f.get("p50_ms"), most, f.get("p25_ms"), f.get("p75_ms"))])  # fmt: skip
    header = ["model", "system", "part", "p50, ms", "quartiles", "to eager", "memory, MiB", "processes", "run", f"0 to {as_ms(most)} ms"]
    return ["A new process from nothing to its answer (infer), or to its embeddings (both).", Table(header, out, left=3)] if out else []


def scenarios(of: Sequence[Rows]) -> list[Block]:
    """MLPerf's, run by run, with size, memory and energy."""
    out: list[Block] = []
    for run in of:
        timed = [r for r in run if r["scenario"] in ("single-stream", "multi-stream", "offline", "server") and r["system"] != "null"]
        null = find(run, "null", "image", "single-stream").get("p50_ms")
        table = [
            [r["part"], r["scenario"], number(f.get("batch")), *(as_ms(f.get(key)) for key in KEYS),
             as_ms(f.get("bound_ms")) if r["scenario"] == "server" else "",
             as_ms(f.get("queries_per_s" if r["scenario"] == "server" else "samples_per_s")), number(r["samples"])]
            for r in timed for f in [r["figures"]]
        ]  # fmt: skip
        other = [
            [r["part"], r["scenario"], name, NOT_MEASURED if value is None else as_ms(value) if finite(value) else str(value)]
            for r in run if r["scenario"] in ("size", "memory", "energy") for name, value in r["figures"].items()
        ]  # fmt: skip
        out += [
            *_about(run),
            f"MLPerf Inference's scenarios. At most: its early-stopping estimate, at 99% confidence, where there were queries enough. "
            f"Server: the rate of Poisson arrivals at which 99% are answered in the bound. The harness itself adds {as_ms(null)} ms.",
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
            [r["part"], as_ms(f.get("p50_ms")), as_quartiles(f), number(r["samples"]),
             Plot(f.get("p50_ms"), most, f.get("p25_ms"), f.get("p75_ms"))]
            for r in staged for f in [r["figures"]]
        ]  # fmt: skip
        header = ["stage", "p50, ms", "quartiles", "samples", f"p50, 0 to {as_ms(most)} ms"]
        out += [*_about(run), "Each stage alone, warm, in one process.", Table(header, table), *_reasons(staged)] if staged else []
    return out


def radiographs(of: Sequence[Rows]) -> list[Block]:
    """Windowing, preprocessing and decoding of DICOM files beside other libraries."""
    out: list[Block] = []
    for run in of:
        out += _about(run)
        for model, part in dict.fromkeys((r["model"], r["part"]) for r in run):
            figures = {r["system"]: r["figures"] for r in run if (r["model"], r["part"]) == (model, part)}
            most = max(largest(f.get("times_ours_p75") for f in figures.values()), 1.0)
            table = [
                [system, as_ms(f.get("p50_ms")), as_quartiles(f), as_ratio(f.get("times_ours")), as_quartiles(f, "times_ours_p{}"),
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
        out.append(Table(["environment", ""], [[name, as_text(value)] for name, value in run[0]["environment"].items()], left=2))
    return out


def _about(run: Rows) -> list[Block]:
    first = run[0]
    threads = f", {first['threads']} threads" if first["threads"] else ""
    return [f"{_models(run)}, run {first['run'][:8]}, {machine_name(first['environment'])}{threads}:", Code(first["command"])]


def _models(run: Rows) -> str:
    return ", ".join(dict.fromkeys(row["model"] for row in run if row["model"] != "any"))


def _reasons(run: Rows) -> list[Block]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in run:
        if row["not_measured"]:
            reasons.setdefault((row["system"], row["not_measured"]), []).append(f"{row['part']} {row['scenario']}")
    table = [[system, ", ".join(what), why] for (system, why), what in reasons.items()]
    return [Table(["not measured", "what", "why"], table, left=3)] if table else []


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
        raise UsageError(f"{path}: cannot be written ({error.strerror})", "give a file in a folder that exists") from None


if __name__ == "__main__":
    main()
