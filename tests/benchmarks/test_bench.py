"""`bench`: statistics by hand-computed values, real workers, the command on a tiny bundle. Nothing here says how fast anything is."""

import getpass
import importlib
import json
import math
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmclip_deploy import machine
from pmclip_deploy.benchmarks import energy, harness, reference, results, stages
from pmclip_deploy.benchmarks.harness import Worker, least_queries, overs_allowed, percentile_bound
from pmclip_deploy.errors import InputError, ParityError, UsageError
from pmclip_deploy.export.precisions import PRECISIONS
from pmclip_deploy.opening import load
from tests.command import MAIN, Result
from tests.tiny.bundle import tiny_bundle

BENCHMARKS = sorted(path.stem for path in Path(harness.__file__).parent.glob("[a-z]*.py"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_can_be_imported(name: str) -> None:
    try:
        importlib.import_module(f"pmclip_deploy.benchmarks.{name}")
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "open_clip", "onnx", "PIL"):
            raise
        pytest.skip(f"needs {error.name}")


# --- statistics -----------------------------------------------------------------------------------------------------------------


def test_least_queries_are_loadgens() -> None:
    assert [least_queries(p) for p in (0.5, 0.9, 0.99)] == [11, 64, 662]  # 64 and 662 stand in MLPerf's rules
    assert least_queries(0.99, over=0) == math.ceil(math.log(0.01) / math.log(0.99)) == 459
    assert overs_allowed(0, 0.9) == overs_allowed(458, 0.99) == -1 and overs_allowed(459, 0.99) == 0


@pytest.mark.parametrize("percentile", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("queries", [1, 5, 10, 11, 64, 100, 700])
def test_overs_allowed_by_exact_binomials(queries: int, percentile: float) -> None:
    over = overs_allowed(queries, percentile)

    def at_most(t: int) -> float:
        return math.fsum(math.comb(queries, k) * (1 - percentile) ** k * percentile ** (queries - k) for k in range(t + 1))

    assert (over == -1 or at_most(over) <= 0.01 + 1e-12) and at_most(over + 1) > 0.01


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.sampled_from([0.5, 0.9, 0.99]), st.integers(0, 99))
def test_a_bound_is_one_of_the_latencies_and_above_its_percentile(queries: int, percentile: float, seed: int) -> None:
    latencies = np.random.default_rng(seed).exponential(size=queries)
    bound = percentile_bound(latencies, percentile)
    if queries < least_queries(percentile):
        assert bound is None
    else:
        assert bound in latencies and bound >= np.quantile(latencies, percentile)


def test_a_bound_holds_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    bounds = [percentile_bound(rng.uniform(size=200), 0.9) for _ in range(2000)]
    assert np.mean([bound is not None and bound >= 0.9 for bound in bounds]) >= 0.985


def test_figures_by_hand() -> None:
    latencies = np.arange(1, 101) / 1e3  # 1 to 100 ms
    figures = harness.measurement("single-stream", 1, latencies, 5.05).figures
    assert figures["p50_ms"] == pytest.approx(50.5) and figures["p25_ms"] == pytest.approx(25.75)
    over = overs_allowed(100, 0.9)
    assert over == 3 and figures["p90_bound_ms"] == pytest.approx(98) and figures["p99_bound_ms"] is None
    assert figures["samples_per_s"] == pytest.approx(100 / 5.05)


def test_a_queue_by_hand() -> None:
    got = harness.queue_latencies(np.array([0.0, 1.0, 1.5, 9.0]), np.array([2.0, 2.0, 1.0, 3.0]))
    np.testing.assert_allclose(got, [2, 3, 3.5, 3])


def test_ratios_and_pools() -> None:
    def of(*latencies: float, batch: int = 1) -> harness.Measurement:
        return harness.measurement("x", batch, np.array(latencies), sum(latencies))

    ratio = harness.ratio([of(8.0, batch=4), of(2.0), of(4.0)], [of(1.0), of(1.0), of(1.0)])
    assert ratio == {"ratio": 2.0, "ratio_p25": 2.0, "ratio_p75": 3.0}
    both = harness.pooled([of(1.0, 3.0), of(5.0)])
    assert both.samples == 3 and both.figures["p50_ms"] == 3000 and both.seconds == 9


def test_interleaved_takes_turns() -> None:
    turns: list[str] = []

    def job(name: str) -> Any:
        def run() -> harness.Measurement:
            turns.append(name)
            return harness.measurement(name, 1, np.ones(1), 1.0)

        return run

    made = harness.interleaved({"a": job("a"), "b": job("b")}, 3)
    assert turns == ["a", "b"] * 3 and [len(of) for of in made.values()] == [3, 3]


# --- workers --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    np.save(tmp_path / "rows.npy", np.zeros((5, 3, 32, 32), np.float32))
    return tmp_path / "rows.npy"


def test_a_null_worker_in_every_scenario(rows: Path) -> None:
    with Worker("null") as worker:
        worker.open("none", "", 1)
        single = harness.single_stream(worker, "image", rows, 0.2, queries=70, warm_up=0.01)
        assert single.samples == 70 and single.figures["p90_bound_ms"] is not None and single.figures["p99_bound_ms"] is None
        several = harness.multi_stream(worker, "image", rows, 0.2, streams=2, queries=10, warm_up=0.01)
        assert several.samples == 20 and several.batch == 2
        whole = harness.offline(worker, "image", rows, 0.01, batch=3, warm_up=0.01)
        assert whole.samples % 3 == 0 and whole.figures["samples_per_s"]
        assert worker.memory() > 1
    assert worker._process.returncode is not None


def test_starts_are_kept(rows: Path) -> None:
    starts = np.array([0.0, 0.05, 0.1])
    with Worker("null") as worker:
        worker.open("none", "", 1)
        times = worker.run("image", rows, 1, 3, starts)
    assert (times[:, 0] >= starts).all() and (times[:, 1] >= times[:, 0]).all()


def test_the_server_scenario(rows: Path) -> None:
    with Worker("null") as worker:
        worker.open("none", "", 1)
        service = np.full(100, 0.002)
        held = harness.server(worker, "image", rows, service, 30.0, 60.0)  # no machine is that slow
        assert held.not_measured is None and held.figures["queries_per_s"] and held.figures["over_bound"] == 0
        assert held.samples >= least_queries(0.99, over=0)
        short = harness.server(worker, "image", rows, service, 30.0, 0.1)
        assert short.not_measured and "459 are needed" in short.not_measured and short.figures["queries_per_s"] is None
        slow = harness.server(worker, "image", rows, service, 0.001, 60.0)
        assert slow.not_measured and "alone takes longer" in slow.not_measured


def test_a_real_bundle_embeds_in_a_worker_as_here(bundle: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
    np.save(tmp_path / "x.npy", pixels)
    with Worker(stages.OURS) as worker:
        worker.open("tiny", bundle, 1)
        assert worker.versions
        got = worker.embed("image", tmp_path / "x.npy")
    predictor = load(bundle)
    np.testing.assert_allclose(got, np.stack([predictor.embedding_from_tensor(x) for x in pixels]), rtol=1e-5)


def test_what_workers_say_when_they_fail(rows: Path, tmp_path: Path) -> None:
    with Worker("null") as worker:
        worker.open("none", "", 1)
        with pytest.raises(harness.SystemFailed, match=r"null: run: \w+"):
            worker.run("nothing", rows, 1, 1)
        assert len(worker.run("image", rows, 1, 2)) == 2  # it lives on
        worker._process.kill()
        with pytest.raises(harness.SystemFailed, match=r"null: run: ended with status -9"):
            worker.run("image", rows, 1, 1)
    for code, said in (
        ("import sys; sys.exit('no such wheel')", "python: open: ended with status 1; its last line: no such wheel"),
        ("input(); print('hello')", "no line of JSON"),
    ):
        with Worker("python", [sys.executable, "-c", code]) as worker, pytest.raises(harness.SystemFailed, match=said):
            worker.open("none", "", 1)
    with pytest.raises(harness.SystemFailed, match="cannot be started"), Worker("absent", [str(tmp_path / "python")]):
        pass


def test_a_worker_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "ANSWER", 0.3)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with Worker("hangs", command) as hangs, pytest.raises(harness.SystemFailed, match="gave no answer in 0 s"):
        hangs.open("none", "", 1)


def test_a_process_gives_its_memory_and_its_own_error() -> None:
    seconds, peak, out = harness.process([sys.executable, "-c", "x = bytearray(200 << 20); print('done')"])
    assert seconds > 0 and out == "done\n" and (peak is None or peak > 200)
    with pytest.raises(harness.SystemFailed, match="no such file") as failed:
        harness.process([sys.executable, "-c", MAIN, "infer", "/nowhere.dcm", "is there a fracture?"])
    assert failed.value.exit_code == 3


# --- rows and stamp -------------------------------------------------------------------------------------------------------------


def test_rows_are_appended_and_read_back(tmp_path: Path) -> None:
    run = results.Run("bench", {"cpu": "x"})
    row = run.row("tiny", "null", "image", "offline", {"p50_ms": 1.23456789, "n": 7, "none": None}, threads=2, samples=3)
    assert row["figures"] == {"p50_ms": 1.23457, "n": 7, "none": None} and set(results.KEYS) < set(row)
    file = tmp_path / "rows.jsonl"
    text, other = {**row, "part": "text"}, results.Run("other", {}).row("tiny", "null", "image", "offline", {}, threads=2)
    results.append(file, [row, text, other])
    results.append(file, [row])
    assert results.read(file) == [row, text, other, row]
    assert [line.count('"environment"') for line in file.read_text().splitlines()] == [1, 0, 1, 1]  # a run names it once
    file.write_text(file.read_text().split("\n", 1)[1])
    with pytest.raises(InputError, match=r"rows\.jsonl, line 1: no row"):
        results.read(file)
    for broken in ("nonsense", "{}", '{"schema": "another"}'):
        file.write_text(json.dumps(row) + "\n" + broken + "\n")
        with pytest.raises(InputError, match=r"rows\.jsonl, line 2: no row"):
            results.read(file)
    with pytest.raises(UsageError, match="cannot be written"):
        results.append(tmp_path / "nowhere" / "rows.jsonl", [row])


def test_rows_of_a_compressed_file(tmp_path: Path) -> None:
    file, row = tmp_path / "rows.jsonl.gz", results.Run("bench", {}).row("tiny", "null", "image", "offline", {}, threads=2)
    results.append(file, [row])
    results.append(file, [row])
    assert results.read(file) == [row, row]
    for broken in (file.read_bytes()[:-9], b"plain"):
        file.write_bytes(broken)
        with pytest.raises(InputError, match="cannot be read"):
            results.read(file)


def test_a_command_line_has_no_paths(tmp_path: Path) -> None:
    given = ["bench", "--bundle", "smith", "--output=smith", f"--other={tmp_path}", "--seconds", "1.5", "--device", "cpu", "--json", "a\\b"]
    told = "pmclip-deploy bench --bundle PATH --output=PATH --other=PATH --seconds 1.5 --device cpu --json PATH"
    assert results.command_line("pmclip-deploy", given) == told


def test_a_jetson_and_its_power_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"/etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081", "/proc/device-tree/model": "Orin Nano\x00"}
    printed = {"nvpmodel": "NV Power Mode: MAXN_SUPER\n2", "dpkg-query": "6.2+b77"}
    assert machine.jetson() is None or Path("/etc/nv_tegra_release").exists()
    monkeypatch.setattr(machine, "_text", lambda path: texts.get(path, ""))
    monkeypatch.setattr(machine, "output_of", lambda command: printed[command[0]])
    assert machine.jetson() == {"model": "Orin Nano", "l4t": "36.4.3", "jetpack": "6.2+b77", "power_mode": "MAXN_SUPER"}


def test_the_stamp_leaves_out_who_built_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (root@ward7)  Thu Jan 23"
    monkeypatch.setattr(machine, "nvidia_driver", lambda: line)
    stamp = machine.stamp(2)
    assert stamp["nvidia_driver"] == "570.86.15" and stamp["threads"] == 2 and "ward7" not in json.dumps(stamp)
    assert stamp["cpu"]["name"] and stamp["packages"]["numpy"] == np.__version__


def test_a_program_that_is_not_there_or_fails_says_nothing() -> None:
    assert machine.output_of(["no-such-program"]) is None and machine.output_of([sys.executable, "-c", "raise"]) is None
    assert machine.output_of([sys.executable, "-c", "print(7)"]) == "7"


# --- energy ---------------------------------------------------------------------------------------------------------------------


def test_rapl_counts_packages_and_begins_again_at_its_end(tmp_path: Path) -> None:
    for i, (before, limit) in enumerate([(5_000_000, 9_999_999), (9_000_000, 9_999_999)]):
        package = tmp_path / f"intel-rapl:{i}"
        package.mkdir()
        (package / "max_energy_range_uj").write_text(str(limit))
        (package / "energy_uj").write_text(str(before))
    counter = energy.Rapl(tmp_path)
    with counter as running:
        assert running is counter
        (tmp_path / "intel-rapl:0" / "energy_uj").write_text("7000000\n")
        (tmp_path / "intel-rapl:1" / "energy_uj").write_text("1000000\n")  # 10 J is 0 again
    assert counter.joules(1.0) == {"cpu": pytest.approx(2.0 + 2.0)}
    with energy.Rapl(tmp_path / "nowhere") as absent:
        assert absent is None


@pytest.mark.parametrize(("made", "lines", "joules"), [
    (energy.Sampled.nvidia_smi, "70.00\n[N/A]\n90.00\n", {"gpu": 160.0}),
    (energy.Sampled.tegrastats, "RAM 1/2MB VDD_IN 4000mW/4000mW VDD_CPU 900mW\nRAM 1/2MB VDD_IN 6000mW/5000mW\n", {"board": 10.0}),
    (energy.Sampled.tegrastats, "nothing\n", {}),
])  # fmt: skip
def test_watts_over_time(made: Any, lines: str, joules: dict[str, float]) -> None:
    counter = made()
    counter.command = [sys.executable, "-c", f"import time; print({lines!r}, end='', flush=True); time.sleep(60)"]
    with counter as running:
        assert running is counter
        import time

        time.sleep(0.5)
    assert counter.joules(2.0) == joules


# --- is it still right ------------------------------------------------------------------------------------------------------------


def test_the_shipped_bundle_agrees_with_its_reference() -> None:
    figures, why = reference.agreement(load(None, "cpu"))
    assert figures is not None and why is None
    assert figures["pixels_equal"] == 1 and reference.misses("int8", figures) == []


def test_an_int8_bundle_is_no_fp32_bundle_and_a_worse_one_misses() -> None:
    good: dict[str, Any] = {"pixels_equal": 1.0, "given_answers": 32, "given_differ": 2, "best_answers": 63, "best_differ": 6}
    good |= {f"{t}_{name}": 1.0 for t in ("image", "text") for name in ("cosine", "cosine_mean")} | {"image_max_abs": 0, "text_max_abs": 0}
    for precision in PRECISIONS:
        assert reference.misses(precision, good) == []
        assert len(reference.misses(precision, {**good, "pixels_equal": 0.9})) == 1
        assert len(reference.misses(precision, {**good, "given_differ": 3, "best_differ": 7})) == 2
        assert reference.misses(precision, {**good, "image_cosine": math.nan, "image_cosine_mean": math.nan})
    assert reference.misses("fp32", {**good, "text_max_abs": 0.01}) == ["text_max_abs 0.01 (limit 0.001)"]


@pytest.mark.parametrize(("n", "limit"), [(32, 0.99), (63, 0.97), (1500, 0.99)])
def test_most_that_differ_by_exact_binomials(n: int, limit: float) -> None:
    def beyond(k: int) -> float:
        return 1 - math.fsum(math.comb(n, i) * (1 - limit) ** i * limit ** (n - i) for i in range(k + 1))

    most = reference.most_that_differ(n, limit)
    assert beyond(most) <= 0.01 + 1e-9 and beyond(most - 1) > 0.01


def test_a_bundle_of_another_checkpoint_has_no_reference(bundle: Path) -> None:
    figures, why = reference.agreement(load(bundle))
    assert figures is None and why is not None and "--data" in why


# --- the command ------------------------------------------------------------------------------------------------------------------


def bench(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", MAIN, "bench", "--seconds", "4", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow("measures every scenario")
def test_the_command(bundle: Path, tmp_path: Path) -> None:
    done = bench("--bundle", bundle, "--json", "--output", tmp_path / "rows.jsonl", "--submit-file", tmp_path / "submit.json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    rows = results.read(tmp_path / "rows.jsonl")
    parts = {(row["part"], row["scenario"]) for row in rows}
    assert {(part, s) for part in ("image", "infer") for s in ("single-stream", "multi-stream", "offline", "server", "memory")} <= parts
    assert {("infer", "cold"), ("infer", "size"), ("infer", "energy"), ("infer", "parity"), ("head", "stage"), ("infer", "stage")} <= parts
    assert len({row["run"] for row in rows}) == 1 and {row["model"] for row in rows} == {"tiny"}
    parity = next(row for row in rows if row["scenario"] == "parity")
    assert "no fp32 reference" in parity["not_measured"] and parity["figures"] == {}
    assert all(row["figures"] or row["not_measured"] for row in rows)
    handed_in = (tmp_path / "submit.json").read_text()
    assert json.loads(handed_in) == document and document["environment"]["bundle"]["sha256"]
    private = {socket.gethostname(), str(tmp_path), str(bundle), str(Path.home()), sys.prefix}
    private |= {f"/{getpass.getuser()}", "CT_small", "CompressedSamples"}
    assert not [text for text in private if text in handed_in]


def test_the_command_with_data(bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    for name, level in (("bright.png", 220), ("dark.png", 20)):
        pixels = np.full((40, 40), level, np.uint8)
        pixels[:20] //= 2
        Image.fromarray(pixels).save(tmp_path / name)
    data = tmp_path / "questions.jsonl"
    truth = {"bright.png": "yes", "dark.png": "no"}
    data.write_text("".join(json.dumps({"image": i, "question": "is there a fracture?", "answer": a}) + "\n" for i, a in truth.items()))
    done = bench("--bundle", bundle, "--scenario", "offline", "--data", data, "--images", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    rows = {(row["part"], row["scenario"]): row for row in json.loads(done.stdout)["rows"]}
    figures = rows["infer", "parity"]["figures"]
    assert figures["accuracy"] == figures["accuracy_of_none"] == 1
    assert figures["baseline_majority"] == 0.5 and figures["baseline_question_only"] is None
    assert ("image", "offline") in rows and ("image", "server") not in rows


def test_accuracy_below_what_the_export_measured_fails(bundle: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from PIL import Image

    from pmclip_deploy.evaluation.rows import rows_from_jsonl, sha256_of_rows

    Image.fromarray(np.arange(1600, dtype=np.uint8).reshape(40, 40)).save(tmp_path / "a.png")
    data = tmp_path / "questions.jsonl"
    data.write_text(json.dumps({"image": "a.png", "question": "is there a fracture?", "answer": "never"}) + "\n")
    predictor = load(bundle)
    predictor.manifest = replace(
        predictor.manifest, parity={"answers": {"data_sha256": sha256_of_rows(rows_from_jsonl(data)), "accuracy_fp32": 0.5}}
    )
    found, missed = stages.accuracy(predictor, data, tmp_path)
    assert found.figures["accuracy_fp32"] == 0.5 and missed == ["accuracy 0.0000, 50.00 points below fp32's (limit 1)"]


def test_a_failed_check_exits_with_5(bundle: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Result]) -> None:
    monkeypatch.setattr(
        stages, "agreement", lambda _: (stages.Found("infer", "parity", {"pixels_equal": 0.5}), ["pixels_equal 0.5 (limit 1)"])
    )
    said = command("bench", "--bundle", bundle, "--seconds", "1", "--scenario", "offline")
    assert said.code == ParityError.exit_code and "pixels_equal 0.5 (limit 1)" in said.err and "parity" in said.out


@pytest.mark.parametrize(("arguments", "code", "said"), [
    (["--scenario", "fast"], 2, "scenario 'fast' is unknown"),
    (["--data", "x.jsonl"], 2, "go together"),
    (["--output", "/nowhere/x.jsonl"], 2, "cannot be written"),
    (["--bundle", "/nowhere"], 4, "no such bundle"),
    (["--device", "gameboy"], 2, "unknown device"),
])  # fmt: skip
def test_errors_are_one_line_with_their_code(arguments: list[str], code: int, said: str) -> None:
    done = bench(*arguments)
    assert done.returncode == code and said in done.stderr and done.stderr.count("\n") == 1


def test_a_bundle_without_a_head(tmp_path: Path) -> None:
    done = bench("--bundle", tiny_bundle(tmp_path / "towers", None), "--scenario", "single-stream", "--json")
    assert done.returncode == 0, done.stderr
    rows = {(row["part"], row["scenario"]): row for row in json.loads(done.stdout)["rows"]}
    assert rows["infer", "single-stream"]["not_measured"] == "the bundle has no head" and rows["infer", "cold"]["samples"]
    assert rows["image", "single-stream"]["figures"]["p50_ms"]
