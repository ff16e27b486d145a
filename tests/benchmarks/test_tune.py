"""`tune`: which candidates keep the gates, what is made of the measurements, and that a command of its own leaves only its tuning."""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import sleep
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pmclip_deploy as pm
from pmclip_deploy.benchmarks import tune
from pmclip_deploy.benchmarks.tune import Row, graphs_of_plans, next_ms, thread_counts
from pmclip_deploy.bundle.files import manifest_from_bundle
from pmclip_deploy.errors import DeviceError
from pmclip_deploy.models import DEFAULT_BUNDLE
from pmclip_deploy.sessions import Backend, Device, GraphFile, Session, SessionOptions, backends
from pmclip_deploy.sessions import openvino as openvino_module
from pmclip_deploy.tuning import Choice, Plan, plan_for, save_own
from tests.imports import TRAINING, loaded
from tests.tiny.bundle import facets_bundle, tiny_bundle
from tests.tiny.findings import FINDINGS

CACHE = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"
A, B, C, D = Choice("cpu", threads=2), Choice("openvino"), Choice("openvino", "bf16"), Choice("openvino", "bf16", batch=16)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "pmclip-deploy"


def content_of(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


# --- what is made of measurements -----------------------------------------------------------------------------------------------

ROWS = [
    Row("image", None, 1.0, 8.0), Row("image", A, 0.98, 7.9), Row("image", B, 0.6, 5.0), Row("image", C, None, None, "image cosine 0.9"),
    Row("head", None, 1.0, 2.0), Row("head", B, 1.2, 2.4), Row("head", C, 1.1, 2.2),
    Row("text", None, 1.0, 1.0, None, 1.0, 2.0), Row("text", B, 0.5, 0.5), Row("text", C, 0.4, 0.4, None, 1.6, 3.2),
    Row("text", D, 0.4, 0.4, None, 0.1, 0.2),
]  # fmt: skip


def test_rows_become_plans_and_plans_a_choice(tmp_path: Path) -> None:
    plans = graphs_of_plans(ROWS)
    assert plans == {
        "default": {},
        "cpu": {"image": A},
        "openvino": {"image": B, "head": C, "text": D},  # what the gate dropped is in none
        "fastest": {"image": B, "text": D},  # the head stays, and so does what gains 2%
    }
    assert graphs_of_plans([row for row in ROWS if row.choice is None]) == {"default": {}}
    manifest = manifest_from_bundle(tiny_bundle(tmp_path / "bundle"))
    times = {title: next_ms(manifest, graphs, ROWS) for title, graphs in plans.items()}
    one, many = ({title: of[i] for title, of in times.items()} for i in (0, 1))
    assert one == pytest.approx({"default": 11, "cpu": 10.84, "openvino": 4.8 + 2.2 + 0.4, "fastest": 4.8 + 2 + 0.4})
    assert many == pytest.approx({"default": 12, "cpu": 11.84, "openvino": 4.8 + 2.2 + 0.2, "fastest": 4.8 + 2 + 0.2})
    measured = [Plan(plans[title], first, *times[title]) for title, first in (("default", 600.0), ("openvino", 500.0), ("fastest", 800.0))]
    assert [plan_for(measured, items).graphs for items in (1, 2000, None)] == [plans["openvino"], plans["fastest"], plans["fastest"]]


@pytest.mark.parametrize(("most", "fast", "counts"), [(1, 1, []), (2, 2, [1]), (16, 8, [1, 2, 4, 8]), (12, 6, [1, 2, 4, 6, 8])])
def test_threads_that_are_worth_a_try(monkeypatch: pytest.MonkeyPatch, most: int, fast: int, counts: list[int]) -> None:
    monkeypatch.setattr(tune, "cpu_threads", lambda: most)
    monkeypatch.setattr(tune, "performance_cores", lambda: fast)
    assert thread_counts() == counts


def test_only_the_runtime_is_needed() -> None:
    assert not loaded("import pmclip_deploy.benchmarks.tune") & TRAINING


# --- the gate -------------------------------------------------------------------------------------------------------------------


class Rounded:
    """A session whose outputs keep so many bits of their fraction."""

    device = "cpu"

    def __init__(self, session: Session, bits: int) -> None:
        self.backend, self.inputs, self.outputs, self._session, self._bits = "toy", session.inputs, session.outputs, session, bits

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        step = np.uint32(1 << 23 - self._bits)
        found = self._session.run(inputs)
        return {name: ((x.view(np.uint32) + step // 2) // step * step).view(np.float32) for name, x in found.items()}


class Toy(Backend):
    """In f32 exact, in bf16 with 7 bits, as a processor would."""

    name, title, devices, packages = "toy", "Toy", (Device("toy", "a toy", "play"),), ()

    def check(self) -> None: ...

    def version(self) -> str:
        return "1.0"

    def between(self) -> tuple[str, ...]:
        return ("f32", "bf16")

    def open(self, graph: GraphFile, options: SessionOptions) -> Session:
        if graph.name == "head":
            raise DeviceError("a toy has no head", "look elsewhere")
        session = backends()["onnxruntime"].open(graph, SessionOptions("cpu"))
        return Rounded(session, {"f32": 23, "bf16": 7}[options.between])


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside onnxruntime, the only backend."""
    known = {"onnxruntime": backends()["onnxruntime"], "toy": Toy()}
    monkeypatch.setattr("pmclip_deploy.sessions.backends", lambda: known)


@pytest.mark.slow("measures a bundle, and in new processes")
def test_a_precision_that_misses_the_gate_is_dropped(toy: None, tmp_path: Path) -> None:
    """Of an fp32 bundle, bf16: by far too coarse. What the gate lets through and what cannot be opened are told apart."""
    before = content_of(facets_bundle(tmp_path / "bundle", FINDINGS))
    found = tune.measure(tmp_path / "bundle", rounds=1, cold=1)
    of = {(row.graph, row.choice): row for row in found.rows if row.choice is None or row.choice.threads is None}
    for graph in ("image", "text", "findings"):
        exact, coarse = of[graph, Choice("toy")], of[graph, Choice("toy", "bf16")]
        assert exact.dropped is None and exact.ratio is not None and exact.ms is not None
        if graph != "text":  # whose numbers are whole
            assert coarse.ratio is None and coarse.dropped and f"{graph}" in coarse.dropped and "limit" in coarse.dropped
    assert of["head", Choice("toy")].dropped == "a toy has no head"
    assert {row.graph for row in found.rows if row.choice is None} == {"image", "text", "head", "findings"}
    assert found.plans[0].graphs == {} and all(plan.first_ms > 0 and plan.next_ms > 0 for plan in found.plans)
    assert Choice("toy", "bf16") not in [plan.graphs.get(name) for plan in found.plans for name in ("image", "findings")]
    assert content_of(tmp_path / "bundle") == before


def test_what_is_far_slower_is_not_checked() -> None:
    """OpenVINO runs an INT8 transformer in f16 by its reference code on some processors: 36 s a picture."""

    def taking(seconds: float) -> Any:
        return SimpleNamespace(run=lambda feed: sleep(seconds))

    assert tune.far_slower(taking(0.08), taking(0.001), {}) and not tune.far_slower(taking(0.01), taking(0.0001), {})
    assert not tune.far_slower(taking(0.08), taking(0.01), {})


@pytest.mark.parametrize(("head", "graphs"), [(None, {"image", "text"}), ("mevf", {"image", "text", "features", "head"})])
def test_a_plan_is_judged_as_a_whole(
    toy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: str | None, graphs: set[str]
) -> None:
    """Graphs that pass one by one may miss together."""
    path = tiny_bundle(tmp_path / "bundle", head)
    monkeypatch.setattr(tune, "missed", lambda known, sessions: "they miss together" if len(sessions) > 1 else None)
    found = tune.measure(path, rounds=1, cold=1)
    assert {row.graph for row in found.rows} == graphs
    assert found.dropped and all(line.endswith(": they miss together") for line in found.dropped)
    assert all(len(plan.graphs) < 2 for plan in found.plans)


@pytest.fixture
def openvino() -> Any:
    if not find_spec("openvino"):
        pytest.skip("needs the extra `openvino`")
    return openvino_module.import_openvino()


def test_each_precision_that_openvino_names_is_what_it_computes_in(openvino: Any, cache: Path) -> None:
    between = openvino_module.BACKEND.between()
    for name in between:
        for threads in (1, None):  # the second time from what was kept
            graph = GraphFile(DEFAULT_BUNDLE / "head.onnx", "a" * 64)
            model = openvino_module.BACKEND.open(graph, SessionOptions("openvino", between=name, threads=threads))._first.model
            assert model.get_property("INFERENCE_PRECISION_HINT") == getattr(openvino.Type, name)
            assert threads is None or model.get_property("INFERENCE_NUM_THREADS") == threads
    assert between[0] == "f32" and len(list(cache.rglob("*.blob"))) == len(between)  # one for each


def test_infer_uses_what_was_chosen_and_says_so(openvino: Any, command: Callable[..., Any], tmp_path: Path) -> None:
    """The embedded bundle: OpenVINO for all graphs, the head in bf16 if this processor has it."""
    reduced = "bf16" if "bf16" in openvino_module.BACKEND.between() else "f32"
    graphs = {name: Choice("openvino") for name in ("image", "findings", "text")} | {"head": Choice("openvino", reduced, 1)}
    film = DEFAULT_BUNDLE.parents[1] / "demo" / "leg-1.dcm"
    asked = ("infer", film, "is there a fracture?", "what body part is shown?", "--json")
    plain = command(*asked).json["answers"]
    save_own(DEFAULT_BUNDLE, [Plan({}, 9.0, 9.0, 9.0), Plan(graphs, 1.0, 1.0, 1.0)])
    tuned, by_name = (command(*asked, *more).json["answers"] for more in ((), ("--device", "cpu")))
    assert [(a["answer"], a["source"]) for a in tuned] == [(a["answer"], a["source"]) for a in plain]
    assert tuned[0]["model"] == {**plain[0]["model"], "backend": "openvino", "between": "f32, bf16" if reduced == "bf16" else "f32"}
    assert by_name[0]["model"] == plain[0]["model"] and plain[0]["model"]["between"] == "f32"
    said = command("doctor").out
    assert f"head openvino {reduced} 1 threads" in said and "image openvino f32 all threads" in said
    assert command("doctor", "--json").json["tuning"]["many"]["head"] == graphs["head"]._asdict()
    known = tune.computing_nothing_twice(pm.load(device="cpu"))
    assert tune.missed(known, {name: tune._opened(known, name, choice) for name, choice in graphs.items()}) is None


@pytest.mark.slow("measures a bundle, and in new processes")
def test_the_command_writes_its_tuning_and_nothing_else(
    command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr(tune, "measure", partial(tune.measure, rounds=1, cold=1))
    path = tiny_bundle(tmp_path / "bundle")
    before, plain = content_of(path), pm.load(path).ask(np.zeros((20, 20), np.uint8), "is there a fracture?")
    done = command("tune", path, "--json")
    assert done.code == 0 and done.json["schema"] == "pmclip-deploy/tune/1"
    assert {row["graph"] for row in done.json["graphs"]} == {"image", "text", "head"} and done.json["default"]["graphs"] == {}
    (file,) = (tmp_path / "bundle.tuning").iterdir()
    assert done.json["file"] == str(file) and content_of(path) == before
    assert json.loads(file.read_text())["plans"][0] == done.json["default"]
    kept = {other.relative_to(cache).parts[0] for other in cache.rglob("*")} if cache.is_dir() else set()
    assert kept <= {"openvino"}  # what the plans compiled
    tuned = pm.load(path).ask(np.zeros((20, 20), np.uint8), "is there a fracture?")
    assert tuned.answer == plain.answer and tuned.probability == pytest.approx(plain.probability, abs=1e-3)
    said = command("tune", path)
    assert said.code == 0 and "default" in said.out and f"wrote {file}" in said.out
    assert command("tune", tmp_path).code == 4
