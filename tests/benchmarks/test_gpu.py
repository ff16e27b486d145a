"""`benchmarks.gpu`: its rehearsal on a CPU, stages that fail, what it takes for wrong, and its part of the report."""

import importlib.util
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pmclip_deploy.benchmarks import gpu, report, report_writing, results
from pmclip_deploy.benchmarks.gpu_stage import NotMeasuredError, Stage, reason
from pmclip_deploy.sessions.engines import engine_backends
from tests.command import MAIN
from tests.sources import ROOT
from tests.tiny.slake import slake

LATE = ("the time of its stage was over", "it was stopped ")  # a machine that is busy with other things gets less far
LACKS = ("needs an NVIDIA GPU",)
MACHINE = {"cpu": {"name": "A", "usable": 2, "flags": []}, "gpus": [{"name": "NVIDIA H100", "driver_version": "580.1"}], "jetson": None,
           "device": "cuda", "nvidia_driver": "580.1", "packages": {"torch": "2.11.0", "triton": "3.6.0"}}  # fmt: skip


def stage(path: Path, seconds: float = 60, name: str = "fast") -> Stage:
    return Stage(name, results.Run("python -m pmclip_deploy.benchmarks.gpu --output PATH", {}), path, "cpu", time.monotonic() + seconds)


@pytest.mark.nightly  # Triton's interpreter, three imports of torch
def test_a_rehearsal(tmp_path: Path) -> None:
    """Every row is measured, but for those that need a GPU, and for those that a busy machine has no time for."""
    for name in ("torch", "open_clip"):
        pytest.importorskip(name, reason="needs the extra `train`")
    lacks = (*LACKS, *(f"needs {name}," for name in ("triton", "torchao") if importlib.util.find_spec(name) is None))
    file = tmp_path / "gpu.jsonl"
    data = slake(tmp_path / "slake", {"train": 8, "validate": 2, "test": 4})
    command = ["pmclip_deploy.benchmarks.gpu", "--output", str(file), "--device", "cpu", "--budget", "40"]
    command += ["--slake", str(data), "--glove", str(data / "glove.txt")]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    rows = results.read(file)
    stages = [*gpu.STAGES, gpu.HEADS]
    assert list(dict.fromkeys(row["scenario"] for row in rows)) == stages
    assert len({row["run"] for row in rows}) == 1 and {row["environment"]["device"] for row in rows} == {"cpu"}
    assert [row for row in rows if (row["not_measured"] or "") and not row["not_measured"].startswith((*LATE, *lacks))] == []
    assert [row for row in rows if row["figures"].get("wrong")] == []
    assert all(bool(row["figures"]) != bool(row["not_measured"]) for row in rows)
    assert not any(str(tmp_path) in line for line in file.read_text().splitlines())
    text = report_writing.markdown(report.document(rows))
    assert all(f"### Stage {name}" in text for name in stages) and "A rehearsal on a CPU" in text


MODULES = {
    "raises": "def measure(stage):\n    raise ValueError('no file /home/someone/secret.txt')",
    "crashes": "import os\n\ndef measure(stage):\n    stage.write('one', 's', {'a': 1})\n    os._exit(9)",
    "hangs": "import time\n\ndef measure(stage):\n    stage.write('one', 's', {'a': 1})\n    time.sleep(600)",
}
SAID = {
    "raises": "ValueError: no file PATH",
    "crashes": "its process ended with status 9; rows before this one are whole",
    "hangs": "it was stopped 0 s after its deadline; rows before this one are whole",
}


@pytest.mark.skipif(sys.platform != "linux", reason="the module is on the path of this process alone")
@pytest.mark.parametrize("module", MODULES)
def test_a_stage_that_fails_says_so_in_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    (tmp_path / f"stage_{module}.py").write_text(MODULES[module])
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "gpu.jsonl"
    gpu.run_stage(stage(file, 1.5 if module == "hangs" else 60), f"stage_{module}", 0.1)
    *before, last = results.read(file)
    assert [row["figures"] for row in before] == ([] if module == "raises" else [{"a": 1}])
    assert (last["part"], last["figures"], last["not_measured"]) == (gpu.WHOLE, {}, SAID[module])


def test_rows_of_a_stage(tmp_path: Path) -> None:
    here = stage(tmp_path / "gpu.jsonl")

    def lacks() -> dict[str, Any]:
        import a_package_that_is_nowhere  # type: ignore[import-not-found] # noqa: F401

        return {}

    assert here.measure("part", "ours", lambda: {"gb_per_s": 2.0, "nan": float("nan"), "samples": 3})["gb_per_s"] == 2.0
    assert here.measure("part", "theirs", lacks) == here.measure("part", "others", here.need_gpu) == {}  # type: ignore[arg-type]
    here.deadline = 0
    here.measure("part", "late", dict)
    found = [(row["figures"], row["samples"], row["not_measured"]) for row in results.read(here.output)]
    assert found == [
        ({"gb_per_s": 2.0, "nan": None}, 3, None),
        ({}, 0, "needs a_package_that_is_nowhere, which cannot be imported here"),
        ({}, 0, "needs an NVIDIA GPU"),
        ({}, 0, "the time of its stage was over"),
    ]
    assert here.known("part", "gb_per_s") == [2.0]


def test_reasons_hold_no_path() -> None:
    for path in ("/home/someone/x.py", r"C:\Users\someone\x.py", "/opt/nvidia/cuda-13.0/"):
        assert reason(ValueError(f"cannot read {path}: 3 of 4 f32/f16 failed\nagain")) == (
            "ValueError: cannot read PATH: 3 of 4 f32/f16 failed again"
        )
    assert reason(NotMeasuredError("why")) == "why" and reason(ZeroDivisionError()) == "ZeroDivisionError"


@pytest.mark.parametrize(
    "arguments", [["--budget", "0"], ["--kernels", "nowhere"], ["--slake", "nowhere"], ["--glove", "nowhere"], ["--stage", "heads"], []]
)
def test_bad_arguments_are_one_line(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / ("gpu.jsonl" if arguments else "none/gpu.jsonl")
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--output", str(output), "--device", "cpu", *arguments])
    assert ended.value.code == 2 and re.fullmatch(r"error: [^\n]+\n", capsys.readouterr().err) and not output.exists()


# --- what it takes for wrong ----------------------------------------------------------------------------------------------------


def test_wrong_answers_are_found(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs the extra `train`")
    from pmclip_deploy.benchmarks.gpu_kernels import Given, expected_scores, fault, random_bank, random_images
    from pmclip_deploy.kernels.reference import contrastive_similarity

    here = stage(tmp_path / "gpu.jsonl")
    for bank in ("f32", "f16", "i8"):
        made, scales = random_bank(here, bank, 40, 16)
        made[7] = made[3]
        made[9] = 0
        given = Given(torch.cat([made[3:4].float(), random_images(here, 2, 16)]), made, 100.0, 45, scales)
        numbers = None if scales is None else scales.numpy()
        wanted = contrastive_similarity(given.image.numpy(), made.numpy(), 100.0, 45, numbers)
        right = tuple(torch.from_numpy(np.asarray(x)) for x in wanted)
        assert fault(given, right) is None and expected_scores(given).shape == (3, 40)

        def spoilt(which: int, place: Any, value: Any, right: Any = right, given: Any = given) -> str | None:
            answer = [x.clone() for x in right]
            answer[which][place] = value
            return fault(given, tuple(answer))

        score, index, _ = right
        assert spoilt(0, (0, 0), score[0, 0] + 1e-2) and spoilt(0, (1, 2), float("nan")) and spoilt(0, (1, 44), 0.0)
        assert spoilt(1, (1, 0), index[1, 1]) and spoilt(1, (1, 0), -1) and spoilt(1, (1, 44), 3) and spoilt(1, (1, 44), -7)
        assert spoilt(1, (1, 0), 40)
        assert spoilt(1, (0, slice(0, 2)), index[0, [1, 0]])  # equal scores, the higher row first
        assert spoilt(2, 0, float("nan")) and spoilt(2, 1, right[2][1] + 0.01)


# --- the report -----------------------------------------------------------------------------------------------------------------


def row(part: str, system: str, scenario: str, why: str | None = None, machine: Any = MACHINE, **figures: Any) -> dict[str, Any]:
    run = results.Run("python -m pmclip_deploy.benchmarks.gpu --output PATH", machine, "1", "2026-01-01")
    return run.row("any", system, part, scenario, figures, threads=None, samples=50, not_measured=why)


def test_the_report_shows_a_gpu() -> None:
    rows = [
        row("search f16, B 1, N 1,000,000", "CudaSimilarity", "fast", p50_ms=0.4, p25_ms=0.39, p75_ms=0.41, share_of_read=0.85),
        row("search f32, B 1, N 1,000,000", "CudaSimilarity", "fast", p50_ms=0.9, share_of_read=0.7),
        row("search i8, B 16, N 1,000,000", "CudaSimilarity", "fast", p50_ms=1.0),
        row("search i8, B 16, N 1,000,000", "torch, product and topk", "fast", p50_ms=1.5),
        row("contrastive loss, B 32,768", "pmclip-deploy", "training", p50_ms=13.0, peak_mib=500.0),
        row("contrastive loss, B 32,768", "open_clip.ClipLoss", "training", p50_ms=10.0, peak_mib=8000.0),
        row("image, B 1", "torch.compile f16", "towers", "needs torchao, which cannot be imported here"),
    ]
    made = report.document(rows)
    text = report_writing.markdown(made)
    assert "NVIDIA H100" in text and "Driver 580.1; torch 2.11.0, triton 3.6.0." in text
    assert "needs torchao" in text and "| 0.4 | 0.39 to 0.41 | 50 | share of read 0.85 |" in text
    table = next(block for block in made["Aims"] if isinstance(block, report_writing.Table))
    said = {str(line[0]).removeprefix("GPU: "): line[1:4] for line in table.rows if str(line[0]).startswith("GPU: ")}
    share = "a million rows of {}, one image: share of the measured bandwidth"
    assert said[share.format("f16")] == ["at least 0.8", "0.85", "met"] and said[share.format("f32")][2] == "missed"
    assert said[share.format("i8")][1:] == ["not measured", "not measured"]
    assert said["a million rows of i8, 16 images: time of torch's product and topk to ours"][1:] == ["1.5", "met"]
    assert said["the contrastive loss at batch 32k: memory to open_clip's"][1:] == ["0.0625", "met"]
    assert said["the contrastive loss at batch 32k: time to open_clip's"][1:] == ["1.3", "met"]
    rehearsed = [{**one, "environment": {**MACHINE, "device": "cpu"}} for one in rows]
    assert "at least 0.8 | not measured" in report_writing.markdown(report.document(rehearsed))  # a rehearsal meets no aim


# --- bench --gpu-proof ------------------------------------------------------------------------------------------------------------


def prove(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", MAIN, "bench", "--gpu-proof", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.nightly  # two exports, two runs of `bench`, Triton's interpreter
def test_a_rehearsal_of_the_proof(tmp_path: Path) -> None:
    """A row of each step: bundles are exported, with engines where TensorRT-RTX is, opened, measured, and right; then the stages follow."""
    for name in ("torch", "open_clip", "onnx"):
        pytest.importorskip(name, reason="needs the extras `train` and `export`")
    file = tmp_path / "proof.jsonl"
    done = prove("--device", "cpu", "--seconds", 2, "--submit-file", file)
    assert done.returncode == 0, done.stderr
    rows = results.read(file)
    steps = {row["part"]: row for row in rows if row["scenario"] == "proof"}
    assert list(steps) == ["export fp16", "bench fp16", "export int8", "bench int8", "benchmarks.gpu"]
    assert [row["not_measured"] for row in steps.values()] == [None] * 5
    graphs = ("image", "text", "head", "findings") if engine_backends()["tensorrt_rtx"].version() else ()
    assert {name for row in steps.values() for name in row["figures"]} == {"seconds", *(f"{graph}.plan_bytes" for graph in graphs)}
    checked = [row["figures"] for row in rows if row["scenario"] == "parity"]
    assert len(checked) == 2 and all(figures["pixels_equal"] == 1 for figures in checked)
    assert set(gpu.STAGES) <= {row["scenario"] for row in rows}
    assert "bench --gpu-proof" in report_writing.markdown(report.document(rows))
    assert not [text for text in (str(tmp_path), str(Path.home()), sys.prefix, socket.gethostname()) if text in file.read_text()]


@pytest.mark.nightly  # a run of `bench`, Triton's interpreter
def test_a_rehearsal_with_a_bundle(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "proof.jsonl"
    done = prove("--device", "cpu", "--seconds", 2, "--bundle", bundle, "--submit-file", file)
    assert done.returncode == 0, done.stderr
    rows = results.read(file)
    assert [(row["part"], row["not_measured"]) for row in rows if row["scenario"] == "proof"] == [("bench", None), ("benchmarks.gpu", None)]
    assert ("infer", "single-stream") in {(row["part"], row["scenario"]) for row in rows}
    assert str(bundle) not in file.read_text() and "bench --gpu-proof" in report_writing.markdown(report.document(rows))


def test_a_step_of_the_proof_that_fails(tmp_path: Path) -> None:
    """Its reason is in the file, the next step begins, and the exit code is its own."""
    file = tmp_path / "proof.jsonl"
    done = prove("--device", "cpu", "--seconds", 1, "--bundle", tmp_path / "nowhere", "--submit-file", file)
    rows = [row for row in results.read(file) if row["scenario"] == "proof"]
    assert done.returncode == 4 and "failed: bench, with status 4" in done.stderr
    assert [row["part"] for row in rows] == ["bench", "benchmarks.gpu"]
    assert "no such bundle folder" in rows[0]["not_measured"] and str(tmp_path) not in file.read_text()


@pytest.mark.parametrize(("given", "code", "said"), [
    ([], 2, "needs --submit-file"),
    (["--submit-file", "x.jsonl", "--json"], 2, "takes only --bundle"),
    (["--submit-file", "x.jsonl", "--device", "cuda"], 2, "choose one of auto, tensorrt_rtx, tensorrt and cpu"),
    (["--submit-file", "nowhere/x.jsonl"], 2, "cannot be written"),
])  # fmt: skip
def test_what_the_proof_does_not_take(given: list[str], code: int, said: str) -> None:
    done = prove(*given)
    assert done.returncode == code and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_no_proof_without_a_gpu(tmp_path: Path) -> None:
    if any(backend.available() for backend in engine_backends().values()):
        pytest.skip("an engine can run here")
    done = prove("--submit-file", tmp_path / "proof.jsonl")
    assert done.returncode == 6 and "no engine can run here (tensorrt_rtx: " in done.stderr and "--device cpu" in done.stderr
    assert not (tmp_path / "proof.jsonl").exists()
