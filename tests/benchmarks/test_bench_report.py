"""The benchmark report and the guard: what is divided by what, what counts, and that nothing from outside becomes markup."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmclip_deploy.benchmarks import guard, harness, report, report_rows, report_writing, results
from pmclip_deploy.errors import InputError
from pmclip_deploy.machine import stamp

COMPARE = "python -m pmclip_deploy.benchmarks.compare --model RN50 --peers PATH"
PREPROCESSING = "python -m pmclip_deploy.benchmarks.preprocessing --output PATH"
HOSTILE = "</code></td><script>alert('x')</script>| a | b\n| <img src=\"http://x/\"> [x](http://y) `z` *w* __v__ \x1b[2J\0\ud800\u202e"
MACHINE = {"cpu": {"name": "A", "usable": 2, "flags": ["avx2"]}, "gpus": [], "jetson": None}

Row = dict[str, Any]


def row(
    system: str = "pmclip-deploy fp32", part: str = "image", scenario: str = "single-stream", *, run: str = "1", time: str = "2026-01-01",
    command: str = COMPARE, model: str = "ViT-B/32", environment: Any = MACHINE, why: str | None = None, **figures: Any,
) -> Row:  # fmt: skip
    made = results.Run(command, environment, run, time)
    return made.row(model, system, part, scenario, figures, threads=2, samples=9, not_measured=why)


def tables(blocks: Any) -> list[list[list[str]]]:
    return [[[c for c in r if isinstance(c, str)] for r in b.rows] for b in blocks if isinstance(b, report_writing.Table)]


def cells(rows: list[Row], section: str) -> list[list[str]]:
    return [r for table in tables(report.document(rows)[section]) for r in table]


def aim(rows: list[Row], start: str) -> tuple[str, str]:
    """(measured, verdict) of the only aim that begins so"""
    ((_, _, measured, verdict, _),) = [r for r in cells(rows, "Aims") if r[0].startswith(start)]
    return measured, verdict


def test_no_rows_are_not_measured() -> None:
    made = report.document([])
    verdicts = [r[3] for r in tables(made["Aims"])[0]]
    assert len(verdicts) >= 13 and set(verdicts) == {"not measured"}
    assert [r[0] for r in tables(made["Machines"])[0]] == ["NVIDIA Jetson", "NVIDIA RTX workstation"]
    for section in (*report.MODELS, "Scenarios", "Stages", "Radiographs", "Runs"):
        assert f"## {section}\n\nnot measured" in report_writing.markdown(made)
        assert f"<h2>{section}</h2><p>not measured</p>" in report_writing.html(made)


def test_ratios_are_of_one_run_and_the_newest_counts() -> None:
    old = [row("open_clip-eager", p50_ms=100.0), row(p50_ms=50.0)]
    assert next(r[3] for r in cells(old, "ViT-B/32") if r[0] == "pmclip-deploy fp32") == "0.500"
    new = [row(run="2", time="2026-01-02", p50_ms=40.0)]  # without the reference
    for rows in (old + new, new + old):
        assert next(r[1:4:2] for r in cells(rows, "ViT-B/32")) == ["40", "not measured"]
        assert "open_clip-eager" not in [r[0] for r in cells(rows, "ViT-B/32")]
    other = row(
        run="3", time="2026-01-03", environment={**MACHINE, "gpus": [{"name": "B"}]}, p50_ms=1.0
    )  # another machine replaces nothing
    assert len(report_rows.newest([*old, other])) == 3


def test_kinds_of_run_do_not_replace_each_other() -> None:
    bench = "pmclip-deploy bench --bundle PATH"
    fp32, int8 = ({**MACHINE, "device": "cpu", "bundle": {"name": "b", "precision": of, "target": "cpu"}} for of in ("fp32", "int8"))
    rows = [
        row(run="1", time="1", command=bench, environment=fp32),
        row(run="2", time="2", command=bench, environment=int8),
        row(run="3", time="3"),
        row(run="4", time="4", command=PREPROCESSING, part="decode RLE, 2 x 2, real"),
        row(run="5", time="5", command=PREPROCESSING, part="decode RLE, 2 x 2, synthetic"),
        row(run="6", time="6", command=PREPROCESSING, part="decode RLE, 2 x 2, real"),
    ]
    assert [r["run"] for r in report_rows.newest(rows)] == ["1", "2", "3", "5", "6"]
    assert [report_rows.program(r) for r in rows[1:4]] == ["bench", "compare", "preprocessing"]


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_the_same_rows_give_the_same_bytes(data: st.DataObject) -> None:
    """In whatever order files were given, and however often; a run's own rows stay in theirs."""
    groups = [[row("open_clip-eager", run=str(i), model=m, p50_ms=2.0), row(run=str(i), model=m, p50_ms=1.0)] for i, m in enumerate("abc")]
    shuffled = [r for group in data.draw(st.permutations([*groups, groups[0]])) for r in group]
    once = report.document([r for group in groups for r in group])
    assert report_writing.html(report.document(shuffled)) == report_writing.html(once)
    assert report_writing.markdown(report.document(shuffled)) == report_writing.markdown(once)


def test_after_tune_beside_the_fastest_peer_that_agrees_as_well() -> None:
    ours = "pmclip-deploy int8-tuned"
    peers = {"slow": (0.5, 0.999), "as good": (0.8, 0.999), "coarse": (1.5, 0.9)}  # our time to theirs, and their cosine
    ratios = {f"ratio{of} to {peer}": ratio for peer, (ratio, _) in peers.items() for of in ("", "_p25", "_p75")}
    rows = [row(ours, p50_ms=1.0, **ratios), row(ours, scenario="parity", cosine=0.999)]
    rows += [row(peer, scenario="parity", cosine=cosine) for peer, (_, cosine) in peers.items()]
    said = "0.8 (0.8 to 0.8)", "0.999000", "0.999000", "met"
    assert [r for r in cells(rows, "ViT-B/32") if r[0] == "int8-tuned"] == [["int8-tuned", "image", "single-stream", "as good", *said]]
    assert not [r for r in cells(rows[2:], "ViT-B/32") if r[0] == "int8-tuned"]


def test_aims_by_hand() -> None:
    def fp32(ratio: float) -> list[Row]:
        figures = {f"ratio{of} to open_clip-eager": ratio for of in ("", "_p25", "_p75")}
        return [row(part="text", p50_ms=1.0, **figures)]

    start = "ViT-B/32 fp32, one text: time to that of open_clip-eager"
    assert aim(fp32(0.6), start) == ("0.6 (0.6 to 0.6)", "met") and aim(fp32(0.601), start)[1] == "missed"
    assert aim(fp32(float("nan")), start)[1] == "not measured"

    def int8(ratio: float, ours: float, theirs: float) -> list[Row]:
        return [
            row("pmclip-deploy int8", **{"ratio to x-int8": ratio}),
            row("pmclip-deploy int8", scenario="parity", cosine=1.0, centred_cosine=ours),
            row("x-int8", scenario="parity", cosine=0.999, centred_cosine=theirs),
        ]

    start = "ViT-B/32 INT8, one image: time to that of x-int8"
    assert aim(int8(0.9, 0.99, 0.99), start)[1] == "met"
    assert aim(int8(0.9, 0.98, 0.99), start)[1] == aim(int8(1.1, 0.99, 0.5), start)[1] == "missed"
    assert aim(int8(0.9, 0.99, 0.99)[:2], "ViT-B/32 INT8, one image")[1] == "not measured"

    cold = [row(s, "both", "cold", model="pmclip-lite", p50_ms=x) for s, x in (("pmclip-deploy int8", 69.0), ("open_clip-eager", 1000.0))]
    assert aim(cold, "pmclip-lite INT8, from a new process to its first embeddings") == ("0.069", "met")
    assert aim(cold, "pmclip-lite INT8, from a new process to infer's answer")[1] == "not measured"

    def times(part: str, system: str, median: float, high: float) -> Row:
        figures = {"times_ours": median, "times_ours_p25": median, "times_ours_p75": high}
        return row(system, part, "stage", command=PREPROCESSING, model="any", **figures)

    rows = [times("decode RLE", "a", 0.9, 1.01), times("decode RLE", "b", 3.0, 3.0), times("decode JPEG", "c", 0.9, 0.99)]
    rows += [times("window, x", "d", 4.0, 5.0), times("window, y", "d", 10.0, 11.0), times("window, z", "d", 3.9, 11.0)]
    assert aim(rows, "decode RLE: the fastest other, a,")[1] == "met" and aim(rows, "decode JPEG")[1] == "missed"
    assert [aim(rows, f"any, window, {x}")[1] for x in "xyz"] == ["met", "met, 10 too", "missed"]


def test_mlperfs_lines() -> None:
    def reached(accuracy: float) -> list[str]:
        made = report.document([row(part="infer", scenario="parity", command="pmclip-deploy bench", accuracy=accuracy, accuracy_fp32=0.8)])
        return tables(made["Accuracy"])[0][0][5:]

    assert [reached(0.8 * share)[1] for share in (1.01, 0.9991, 0.995, 0.98)] == ["99.0%, 99.9%", "99.0%, 99.9%", "99.0%", "neither"]
    assert reached(0.4)[0] == "50.00%"
    known: Any = {"accuracy": 0.8, "accuracy_fp32": 0.8, "agreement": 0.99, "difference_ci95_low": -0.002, "difference_ci95_high": 0.001}
    made = report.document(
        [
            row(part="infer", scenario="parity", command="pmclip-deploy bench", **known, accuracy_of_open=0.7, accuracy_of_closed=0.9),
            row(part="infer", scenario="parity", command="pmclip-deploy bench", model="RN50", accuracy=0.5, accuracy_of_plane=0.4),
        ]
    )
    (first, _), by = tables(made["Accuracy"])[:2]
    assert first[-2:] == ["99.00%", "-0.0020 to +0.0010"]
    assert [r[3:] for r in by] == [["0.7000", "0.9000", "not measured", "0.8000"], ["not measured", "not measured", "0.4000", "0.5000"]]


@pytest.mark.parametrize(
    ("environment", "missing"),
    [
        ({**MACHINE, "jetson": {"model": "Orin", "power_mode": "MAXN"}}, ["NVIDIA RTX workstation"]),
        ({**MACHINE, "gpus": [{"name": "NVIDIA RTX 4090"}], "device": "tensorrt_rtx"}, ["NVIDIA Jetson"]),
        ({**MACHINE, "gpus": [{"name": "NVIDIA RTX 4090"}], "device": "cpu"}, ["NVIDIA Jetson", "NVIDIA RTX workstation"]),  # it stood idle
    ],
)
def test_machines_stand_as_not_measured_until_they_are(environment: Any, missing: list[str]) -> None:
    made = cells([row(part="infer", command="pmclip-deploy bench", environment=environment, p50_ms=7.0)], "Machines")
    assert made[0][3] == "7" and [r[0] for r in made[1:]] == missing


def test_nothing_becomes_markup() -> None:
    environment = {**MACHINE, HOSTILE: HOSTILE, "gpus": [{"name": HOSTILE}], "cpu": HOSTILE}
    rows = [
        row(HOSTILE, part, scenario, command=command, model=model, environment=environment, why=HOSTILE, run=str(i), p50_ms=1.0, x=HOSTILE)
        for model in ("RN50", HOSTILE)
        for i, command in enumerate((COMPARE, f"pmclip-deploy bench {HOSTILE}", PREPROCESSING))
        for part, scenario in (("image", "single-stream"), ("infer", "cold"), ("infer", "memory"), (HOSTILE, "stage"), ("infer", "parity"))
    ]
    made = report.document(rows)
    page, text = report_writing.html(made), report_writing.markdown(made)
    tags = {element.tag for element in ElementTree.fromstring(page).iter()}
    assert not tags & {"script", "img", "a", "iframe"} and "default-src 'none'" in page
    page.encode(), text.encode()
    prose = "\n".join(line for line in text.split("\n") if not line.startswith("    "))  # what is indented by four is code
    assert "<" not in prose and not re.search(r"(?<!\\)[`*\[]", prose) and not re.search(r"(?<!\\):(?=//)", prose)
    assert all(c == "\n" or c.isprintable() for c in page + text)
    for table in re.findall(r"(?:^\|.*\|$\n?)+", prose, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.strip().split("\n")}) == 1
    assert "alert" in prose


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=300, env=env, check=False)


@pytest.mark.parametrize("line", ["{", "[]", "{}", json.dumps({**row(), "figures": [1]}), json.dumps({**row(), "run": 7})])
def test_a_broken_line_is_one_error(tmp_path: Path, line: str) -> None:
    file = tmp_path / "rows.jsonl"
    results.append(file, [row()])
    file.write_text(file.read_text() + "\n" + line + "\n")
    with pytest.raises(InputError, match="line 3: no row of"):
        results.read(file)


def test_the_command(tmp_path: Path) -> None:
    """Rows of a real run, of the system that does nothing under the names of two."""
    rows, file = tmp_path / "rows.npy", tmp_path / "bench.jsonl"
    np.save(rows, np.zeros((4, 8), np.float32))
    run = results.Run(COMPARE, stamp(1))
    with harness.Worker("null") as worker:
        worker.open("none", "", 1)
        measured = {
            name: harness.single_stream(worker, "image", rows, 0.05, queries=70, warm_up=0.01) for name in ("null", "open_clip-eager")
        }
    results.append(
        file, [run.row("RN50", n, "image", "single-stream", m.figures, threads=1, samples=m.samples) for n, m in measured.items()]
    )
    main = "pmclip_deploy.benchmarks.report"
    for name in ("a", "b"):
        done = command(main, str(file), "--markdown", str(tmp_path / f"{name}.md"), "--html", str(tmp_path / f"{name}.html"))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    text, page = (tmp_path / "a.md").read_text(), (tmp_path / "a.html").read_text()
    p50 = f"{measured['open_clip-eager'].figures['p50_ms']:.4g}"
    assert f"| open_clip-eager | {p50} |" in text and p50 in page and run.run[:8] in text and f"    {COMPARE}\n" in text
    assert 'class="bar"' in page and 'class="spread"' in page and text == (tmp_path / "b.md").read_text()
    assert command(main, str(file)).stdout == text
    for arguments in ([str(tmp_path / "none.jsonl")], [str(file), "--html", str(tmp_path / "none" / "x.html")]):
        done = command(main, *arguments)
        assert done.returncode in (2, 3) and done.stderr.count("\n") == 1 and done.stderr.startswith(f"error: {tmp_path}")


def test_the_report_in_docs_is_what_its_rows_give() -> None:
    root = Path(__file__).parents[2]
    rows = results.read(root / report.ROWS)
    programs = report_rows.BENCH, report_rows.COMPARE, report_rows.PREPROCESSING, report_rows.COLD
    assert {report_rows.program(row) for row in rows} == {*programs}
    assert {row["model"] for row in rows if report_rows.program(row) == report_rows.COMPARE} == set(report.MODELS)
    assert (root / "docs" / "measured" / "report.md").read_text(encoding="utf-8") == report_writing.markdown(report.document(rows))


# --- the guard ------------------------------------------------------------------------------------------------------------------


def test_what_the_guard_says() -> None:
    now = {"unit": "instructions", "counter": "v", "versions": {"numpy": "2"}, "cpu_flags": [], "counts": {"a": 1019, "b": 1021, "c": 5}}
    before = {**now, "versions": {"numpy": "1"}, "counts": {"a": 1000, "b": 1000}}
    _, a, b, c, differ = guard.lines(now, before)
    assert a.endswith("+1.9%") and b.endswith("+2.1%  CHANGED") and c.endswith("no baseline") and differ.startswith("versions differ")
    assert "cannot be compared" in guard.lines(now, {**before, "unit": "time"})[1]


def test_the_guard_without_valgrind(tmp_path: Path) -> None:
    """It takes times, says so, and compares no times with instructions."""
    baseline = tmp_path / "guard.json"
    baseline.write_text(json.dumps({"schema": guard.SCHEMA, "unit": "instructions", "counts": {}}))
    done = command("pmclip_deploy.benchmarks.guard", "--baseline", str(baseline), "--update", PATH="")
    assert done.returncode == 0, done.stderr
    assert "valgrind counts nothing here" in done.stderr and "no valgrind here" in done.stdout and "cannot be compared" in done.stdout
    made = json.loads(baseline.read_text())
    assert made["unit"] == "time" and len(made["counts"]) == 9 and min(made["counts"].values()) > 0 and "numpy" in made["versions"]


def test_a_broken_baseline_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "guard.json").write_text("[]")
    done = command("pmclip_deploy.benchmarks.guard", "--baseline", str(tmp_path / "guard.json"))
    assert done.returncode == 3 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
