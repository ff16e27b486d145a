"""`serve --engine triton` against a server of Triton's protobuf that runs the repository's graphs by onnxruntime."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="serving needs the extra `ward`")
pytest.importorskip("tritonclient", reason="needs the extra `triton`")

import grpc

import pmclip_deploy as pm
from pmclip_deploy.export.triton import repository_from_bundle
from pmclip_deploy.models import DEFAULT_BUNDLE, DEMO
from pmclip_deploy.serve.model import DEADLINE
from pmclip_deploy.serve.problems import Problem
from pmclip_deploy.serve.triton import predictor_from_triton
from tests.certificates import certificates
from tests.command import process
from tests.serve.running import running
from tests.tiny.bundle import tiny_bundle
from tests.triton_server import Server, triton_server

LEG = (DEMO / "leg-1.dcm").read_bytes()
FRACTURE = "is there a fracture?"
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 30), np.uint8)


@pytest.fixture(scope="module")
def tiny(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """A server of the tiny bundle."""
    repository_from_bundle(bundle, folder := tmp_path_factory.mktemp("triton") / "repository")
    with triton_server(folder) as started:
        yield started


@pytest.fixture
def server(tiny: tuple[Server, str]) -> Iterator[tuple[Server, str]]:
    yield tiny
    tiny[0].fault = ""
    tiny[0].ends.set()
    tiny[0].ends = threading.Event()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """A server of the embedded model."""
    repository_from_bundle(DEFAULT_BUNDLE, folder := tmp_path_factory.mktemp("triton") / "repository")
    with triton_server(folder) as started:
        yield started


def _same(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without what differs from call to call, and from engine to engine."""
    model = {key: value for key, value in answer["model"].items() if key not in ("backend", "device")}
    return {**{key: value for key, value in answer.items() if key not in ("timings_ms", "image")}, "model": model}


def test_the_service_answers_as_without_a_server(real: tuple[Server, str], tmp_path: Path) -> None:
    triton, url = real
    questions = [FRACTURE, "which plane?", "how old is the patient?"]
    with running(tmp_path, "--engine", "triton", "--triton-url", url) as service:
        before = len(triton.asked)
        asked = service.ask(LEG, *questions)
        models = triton.asked[before:]
        classified = service.client.post("/v1/classify", files={"image": ("image", LEG)}, data={"labels": ["an x-ray", "a CT"]})
        told = service.client.get("/v1/model").json()
        later = ("queue full", "unavailable", "exhausted")
        for fault, status in (*((fault, 503) for fault in (*later, "unloaded")), ("expired", 504), ("internal", 500)):
            triton.fault = fault
            refused = service.ask(LEG, FRACTURE)
            found = refused.json()
            assert (refused.status_code, found["status"]) == (status, status), (fault, found)
            assert ("retry-after" in refused.headers) == (fault in later), fault
            assert "\n" not in found["detail"] and "Triton" in found["detail"]
        triton.fault = ""
        assert service.ask(LEG, FRACTURE).status_code == 200
    here = process("infer", DEMO / "leg-1.dcm", *questions, "--json").json["answers"]
    assert asked.status_code == 200 and [_same(answer) for answer in asked.json()["answers"]] == [_same(answer) for answer in here]
    assert {*models} == {"pmclip_image", "pmclip_head", "pmclip_findings"} and models.count("pmclip_findings") == 2
    label = classified.json()["classifications"][0]["labels"][0]["label"]
    assert label == pm.load().classify(LEG, ["an x-ray", "a CT"]).labels[0].label
    assert (told["backend"], told["device"], told["sha256"]) == ("triton", "cpu", pm.load().model.sha256)


@pytest.mark.parametrize("kind", [None, "mevf", "qcr", "blind"])
def test_other_bundles_answer_the_same(kind: str | None, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", kind)
    repository_from_bundle(bundle, tmp_path / "repository")
    with triton_server(tmp_path / "repository") as (_, url):
        there, here = predictor_from_triton(bundle, url, 30), pm.load(bundle)
        assert np.array_equal(there.embed_image(PICTURE), here.embed_image(PICTURE))
        texts = [f"a plane {'the ' * (i % 3)}?" for i in range(20)]
        assert np.array_equal(there.embed_texts(texts), here.embed_texts(texts))
        if kind:
            one, other = (predictor.ask(PICTURE, "is there a fracture?") for predictor in (there, here))
            assert (one.answer, one.probability, one.candidates) == (other.answer, other.probability, other.candidates)


def test_more_rows_than_a_batch_are_asked_in_parts(server: tuple[Server, str], bundle: Path) -> None:
    there, here = predictor_from_triton(bundle, server[1], 30), pm.load(bundle)
    image, question = np.tile(here.image_features(PICTURE), (40, 1)), np.tile(here.question_features(["which plane?"]), (40, 1))
    server[0].asked.clear()
    assert np.allclose(there.head_logits(image, question).answer, here.head_logits(image, question).answer, atol=1e-6)
    assert server[0].asked == ["pmclip_head"] * 3  # 16, 16 and 8


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("internal", r"refused a request \(INTERNAL: onnx runtime error 1\)"),
        ("shape", "gave embedding as float32"),
        ("missing", "gave no embedding"),
        ("version", "answered as version 7, not 1"),
        ("bytes", "sent a tensor whose bytes do not fit its shape"),
    ],
)
def test_what_is_no_answer(server: tuple[Server, str], bundle: Path, fault: str, said: str) -> None:
    predictor = predictor_from_triton(bundle, server[1], 30)
    server[0].fault = fault
    with pytest.raises(pm.BundleError, match=f"the Triton server's pmclip_image {said}"):
        predictor.ask(PICTURE, "which plane?")


@pytest.mark.parametrize("by", ["timeout", "deadline"])
def test_a_server_that_hangs_is_given_up(server: tuple[Server, str], bundle: Path, by: str) -> None:
    predictor = predictor_from_triton(bundle, server[1], 0.3 if by == "timeout" else 30)
    token = DEADLINE.set(time.monotonic() + (0.3 if by == "deadline" else 60))
    server[0].fault = "hang"
    try:
        start = time.monotonic()
        with pytest.raises(Problem) as raised:
            predictor.ask(PICTURE, "which plane?")
        assert raised.value.status_code == 504 and time.monotonic() - start < 20
    finally:
        DEADLINE.reset(token)


def test_what_is_refused_at_the_start(server: tuple[Server, str], tmp_path: Path) -> None:
    other = tiny_bundle(tmp_path / "other", logit_scale=11.0)
    with pytest.raises(pm.BundleError, match="was written from a bundle whose manifest has the sha256"):
        predictor_from_triton(other, server[1], 30)
    with pytest.raises(pm.BundleError, match="does not serve pmclip_image, version 3000"):
        predictor_from_triton(tiny_bundle(tmp_path / "later", version="0.3.0"), server[1], 30)
    with pytest.raises(pm.DeviceError, match="no Triton server that is ready answers there"):
        predictor_from_triton(other, "127.0.0.1:9", 30)


def test_the_command_line_refuses_in_one_line(server: tuple[Server, str], tmp_path: Path) -> None:
    for options, code in (
        (("--engine", "triton"), 2),
        (("--triton-url", "127.0.0.1:8001"), 2),
        (("--engine", "triton", "--triton-url", "http://127.0.0.1:8001"), 2),
        (("--engine", "triton", "--triton-url", "127.0.0.1:8001", "--device", "cpu"), 2),
        (("--engine", "triton", "--triton-url", "127.0.0.1:8001", "--triton-ca", tmp_path / "none"), 2),
        (("--engine", "other"), 2),
        (("--engine", "triton", "--triton-url", server[1]), 4),  # which has another bundle
    ):
        ended = process("serve", "--port", "0", *options)
        assert ended.code == code and ended.err.startswith("error: ") and ended.err.count("\n") == 1, (options, ended)


def test_tls(bundle: Path, tmp_path: Path) -> None:
    certificates(tmp_path)
    repository_from_bundle(bundle, tmp_path / "repository")
    pair = (tmp_path / "server.key").read_bytes(), (tmp_path / "server.pem").read_bytes()
    with triton_server(tmp_path / "repository", grpc.ssl_server_credentials([pair])) as (_, url):
        there = predictor_from_triton(bundle, url, 30, tmp_path / "ca.pem")
        assert there.ask(PICTURE, "which plane?").answer == pm.load(bundle).ask(PICTURE, "which plane?").answer
        with pytest.raises(pm.DeviceError, match="no Triton server that is ready answers there"):
            predictor_from_triton(bundle, url, 30)
