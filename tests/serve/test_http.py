"""The HTTP interface: what each route gives, and what is refused."""

import http.client
import io
import json
import re
import socket
import ssl
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.certificates import certificates
from tests.command import process
from tests.serve.running import TOKEN, Running, running

pytest.importorskip("fastapi", reason="serving needs the extra `ward`")

from pmclip_deploy.models import DEMO

LEG = (DEMO / "leg-1.dcm").read_bytes()
FRACTURE = "is there a fracture?"
PROBLEM = {"type", "title", "status", "detail", "code", "exit_code", "request_id"}


def _problem(reply: httpx.Response, status: int, code: str) -> dict[str, Any]:
    found = reply.json()
    assert reply.headers["content-type"] == "application/problem+json" and set(found) == PROBLEM
    assert (reply.status_code, found["status"], found["code"]) == (status, status, code), found
    assert "\n" not in found["detail"] and found["request_id"] == reply.headers["x-request-id"]
    return found


def _same(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without what differs from call to call."""
    return {key: value for key, value in answer.items() if key not in ("timings_ms", "image")}


def test_answers_are_those_of_infer(service: Running) -> None:
    questions = [FRACTURE, "which plane?", "how old is the patient?"]
    reply = service.ask(LEG, *questions)
    infer = process("infer", DEMO / "leg-1.dcm", *questions, "--json").json
    assert reply.status_code == 200 and set(reply.json()) == set(infer) and reply.json()["schema"] == infer["schema"]
    assert [_same(answer) for answer in reply.json()["answers"]] == [_same(answer) for answer in infer["answers"]]


def test_a_kept_picture_is_asked_as_one_that_is_sent(service: Running) -> None:
    kept = service.keep(LEG)
    assert kept.status_code == 201 and kept.json()["rows"] == 389 and kept.json()["window"] == [128, 256]
    here = f"/v1/images/{kept.json()['id']}"
    asked = service.client.post(f"{here}/answers", json={"questions": [FRACTURE], "window": [100, 50]})
    sent = service.ask(LEG, FRACTURE, window_center=100, window_width=50)
    assert [_same(a) for a in asked.json()["answers"]] == [_same(a) for a in sent.json()["answers"]]
    assert asked.json()["answers"][0]["image"]["window"] == [100, 50]
    assert service.client.delete(here).status_code == 204
    _problem(service.client.post(f"{here}/answers", json={"questions": [FRACTURE]}), 404, "image.gone")


def test_a_report_is_that_of_infer(service: Running, tmp_path: Path) -> None:
    dcmread = pytest.importorskip("pydicom").dcmread
    pytest.importorskip("highdicom", reason="reports need the extra `ward`")
    process("infer", DEMO / "leg-1.dcm", FRACTURE, "--sr", tmp_path / "out.dcm")
    kept = service.keep(LEG).json()["id"]
    asked = service.client.post(f"/v1/images/{kept}/report", json={"questions": [FRACTURE]})
    for reply in (service.ask(LEG, FRACTURE, format="sr"), asked):
        assert reply.headers["content-type"] == "application/dicom" and reply.headers["content-disposition"].endswith('"report.dcm"')
        assert dcmread(io.BytesIO(reply.content)).SOPInstanceUID == dcmread(tmp_path / "out.dcm").SOPInstanceUID
    png = service.client.get(f"/v1/images/{kept}/thumbnail").content
    assert "no study" in _problem(service.ask(png, FRACTURE, format="sr"), 422, "input")["detail"]


def test_labels_are_compared(service: Running) -> None:
    reply = service.client.post("/v1/classify", files={"image": LEG}, data={"labels": ["ct", "plain film"]})
    infer = process("classify", DEMO / "leg-1.dcm", "ct", "plain film", "--json").json
    assert [one["labels"] for one in reply.json()["classifications"]] == [one["labels"] for one in infer["classifications"]]


def test_samples_and_table_show_what_python_shows(service: Running) -> None:
    from pmclip_deploy.imaging.read import picture_from_bytes

    here = f"/v1/images/{service.keep(LEG).json()['id']}/frames/0"
    frame = service.client.get(here)
    samples = np.frombuffer(frame.content, "<u2").reshape(int(frame.headers["x-rows"]), int(frame.headers["x-columns"]))
    for window, query in ((None, ""), ((90.0, 40.0), "?center=90&width=40")):
        table = np.frombuffer(service.client.get(f"{here}/table{query}").content, np.uint8)
        assert (table[samples] == picture_from_bytes("it", LEG, 0, window).pixels).all()


def test_views_and_thumbnails_are_png(service: Running) -> None:
    here = f"/v1/images/{service.keep(LEG).json()['id']}"
    for path in ("thumbnail", "view", "view?finding=fracture", "view?center=90&width=40"):
        reply = service.client.get(f"{here}/{path}")
        assert reply.headers["content-type"] == "image/png" and reply.content.startswith(b"\x89PNG"), path
    _problem(service.client.get(f"{here}/view?finding=dragon"), 400, "usage")


def test_the_model_says_what_can_be_asked(service: Running) -> None:
    model = service.client.get("/v1/model").json()
    listed = process("questions", "--json").json
    assert model["questions"] == listed["questions"] and model["bundle"] == listed["bundle"] and len(model["sha256"]) == 64
    assert model["limits"]["upload_bytes"] == 256 << 20 and model["maps"] == ["fracture"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"questions": [""]}, "questions.0"),
        ({"questions": ["x" * 513]}, "questions.0"),
        ({"questions": [FRACTURE] * 33}, "questions"),
        ({}, "questions"),
        ({"questions": ["  "]}, "empty"),
        ({"questions": [FRACTURE], "frame": "-1"}, "frame"),
        ({"questions": [FRACTURE], "frame": "one"}, "frame"),
        ({"questions": [FRACTURE], "window_center": "4"}, "center"),
        ({"questions": [FRACTURE], "window_center": "4", "window_width": "0"}, "window_width"),
        ({"questions": [FRACTURE], "window_center": "nan", "window_width": "1"}, "window_center"),
        ({"questions": [FRACTURE], "age": "151"}, "age"),
    ],
)
def test_fields_that_do_not_fit(service: Running, fields: dict[str, Any], words: str) -> None:
    found = _problem(service.client.post("/v1/answers", files={"image": LEG}, data=fields), 400, "usage")
    assert words in found["detail"] and found["exit_code"] == 2


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"<html>not a picture</html>", 415, "input.no_picture"),
        (b"", 422, "input"),
        (LEG[:3000], 422, "input"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, 422, "input"),
    ],
    ids=["html", "empty", "cut", "png"],
)
def test_files_that_cannot_be_read(service: Running, data: bytes, status: int, code: str) -> None:
    for reply in (
        service.ask(data, FRACTURE),
        service.keep(data),
        service.client.post("/v1/classify", files={"image": data}, data={"labels": ["a", "b"]}),
    ):
        assert _problem(reply, status, code)["exit_code"] == 3
    assert service.ask(LEG, FRACTURE).status_code == 200


def test_what_is_no_request_of_ours(service: Running) -> None:
    client = service.client
    _problem(client.get("/nothing"), 404, "http")
    _problem(client.get("/v1/answers"), 405, "http")
    _problem(client.post("/v1/answers", content=b"{", headers={"Content-Type": "application/json"}), 400, "usage")
    _problem(client.post("/v1/answers", content=b"--x", headers={"Content-Type": "multipart/form-data; boundary=y"}), 400, "usage")
    here = f"/v1/images/{service.keep(LEG).json()['id']}"
    for body in ({"questions": "one"}, {"questions": [FRACTURE], "ZQXKEY": 1}, {"questions": [FRACTURE], "window": [1]}, []):
        assert "ZQX" not in _problem(client.post(f"{here}/answers", json=body), 400, "usage")["detail"]
    for path in ("frames/1", "frames/-1", f"frames/{1 << 31}"):
        _problem(client.get(f"{here}/{path}"), 422, "input")
    _problem(client.get(f"{here}/frames/x"), 400, "usage")
    _problem(client.get(f"{here}/frames/0/table?center=1"), 400, "usage")
    _problem(client.get("/v1/images/none/thumbnail"), 404, "image.gone")
    _problem(client.post(f"{here}/similar", json={}), 409, "no_index")


def test_who_may_ask(service: Running) -> None:
    port = httpx.URL(service.url).port
    with httpx.Client(base_url=service.url, trust_env=False) as anyone:
        for path in ("/v1/model", "/metrics", "/openapi.json", "/health/ready", "/v1/images/x/thumbnail"):
            assert _problem(anyone.get(path), 401, "token")["detail"] and anyone.get(path).headers["www-authenticate"] == "Bearer"
        for path in ("/", "/health/live", "/docs", "/page/app.js"):
            assert anyone.get(path).status_code == 200
        for given in ("Bearer x", f"Basic {TOKEN}", TOKEN, "Bearer", f"Bearer {TOKEN}x", "Bearer \xe9"):
            _problem(anyone.get("/v1/model", headers={"Authorization": given.encode("latin-1")}), 401, "token")
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "[::2]", "localhost@evil.example"):
        _problem(service.client.get("/health/live", headers={"Host": host}), 403, "host")
    for host in ("localhost", f"LOCALHOST:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
        assert service.client.get("/v1/model", headers={"Host": host}).status_code == 200
    for origin in ("https://evil.example", "null", f"https://127.0.0.1:{port}", "http://127.0.0.1:1"):
        _problem(service.client.get("/v1/model", headers={"Origin": origin}), 403, "origin")
    assert service.client.get("/v1/model", headers={"Origin": service.url.rstrip("/")}).status_code == 200


def test_what_every_reply_says(service: Running) -> None:
    replies = [service.client.get(path) for path in ("/", "/v1/model", "/nothing", "/metrics", "/page/app.js", "/docs")]
    replies += [service.ask(LEG, FRACTURE), service.ask(b"x", FRACTURE)]
    for reply in replies:
        assert reply.headers["cache-control"] == "no-store" and reply.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'self'" in reply.headers["content-security-policy"] and "server" not in reply.headers
    assert len({reply.headers["x-request-id"] for reply in replies}) == len(replies)


def test_the_description_names_no_other_host(service: Running) -> None:
    pytest.importorskip("fastapi_offline", reason="serving needs the extra `ward`")
    described = service.client.get("/openapi.json").json()
    assert {"/v1/answers", "/v1/classify", "/v1/images", "/v1/model", "/metrics"} <= set(described["paths"])
    page = service.client.get("/docs").text
    assert "http" not in page.replace('content="', "") and service.client.get("/page/swagger/swagger-ui-bundle.js").status_code == 200


def test_metrics_count(service: Running) -> None:
    service.ask(LEG, FRACTURE)
    text = service.client.get("/metrics").text
    assert 'pmclip_http_requests_total{route="/v1/answers",status="200"}' in text and 'bundle="pmclip-lite"' in text
    assert 'pmclip_answers_total{abstained="false",kind="finding"}' in text


def test_an_upload_that_is_too_large(tmp_path: Path) -> None:
    with running(tmp_path, "--max-upload-mb", "1", "--timeout-s", "2") as service:
        _problem(service.ask(bytes(1 << 20), FRACTURE), 413, "too_large")
        boundary = b"--x\r\nContent-Disposition: form-data; name=image; filename=i\r\n\r\n"
        parts = (boundary if i == 0 else bytes(1 << 16) for i in range(40))
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        _problem(service.client.post("/v1/answers", content=parts, headers=kind), 413, "too_large")

        begun = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", httpx.URL(service.url).port, timeout=20)
        connection.putrequest("POST", "/v1/answers")
        for name, value in {"Authorization": f"Bearer {TOKEN}", "Content-Length": "1000", **kind}.items():
            connection.putheader(name, value)
        connection.endheaders(boundary)  # and no more
        reply = connection.getresponse()
        assert reply.status == 408 and json.loads(reply.read())["code"] == "slow" and time.monotonic() - begun < 15
        assert service.ask(LEG, FRACTURE).status_code == 200


def test_a_head_without_end_is_refused(service: Running) -> None:
    with socket.create_connection(("127.0.0.1", httpx.URL(service.url).port), timeout=20) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
        reply = b""
        try:
            for _ in range(64):
                connection.sendall(b"X-A: " + b"a" * 1000 + b"\r\n")
            reply = connection.recv(100)
        except OSError:
            pass
    assert reply in (b"",) or b" 400 " in reply or b" 431 " in reply
    assert service.client.get("/health/live").status_code == 200


def test_signals_end_it_in_order(tmp_path: Path) -> None:
    with running(tmp_path) as service:
        assert service.ask(LEG, FRACTURE).status_code == 200
        readers = service.readers()
        service.process.terminate()
        assert service.process.wait(20) == 0
        assert len(readers) == 3 and not any(Path(f"/proc/{pid}").exists() for pid in readers)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "needs TLS"),
        (["--tls-cert", "c.pem"], "go together"),
        (["--tls-cert", "c.pem", "--tls-key", "k.pem"], "no such file"),
        (["--client-ca", "c.pem"], "needs TLS"),
        (["--token-file", "no-such-file"], "cannot be read"),
        (["--index", "no-such-file"], "no-such-file"),
        (["--host", "256.1.1.1"], "TLS"),
    ],
)
def test_what_is_not_started(options: list[str], words: str) -> None:
    done = process("serve", "--port", "0", *options)
    assert done.code in (2, 4) and words in done.err and done.err.count("\n") == 1


def test_a_token_that_others_can_read_is_refused(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o644)
    assert "chmod 600" in process("serve", "--port", "0", "--token-file", token).err
    token.chmod(0o440)  # as systemd shows a credential that an ACL opens to the unit's user
    assert "chmod 600" in process("serve", "--port", "0", "--token-file", token).err
    bad = ("--port", "0", "--index", "no-such-file")  # refused after the token
    assert "no-such-file" in process("serve", *bad, "--token-file", token, CREDENTIALS_DIRECTORY=str(tmp_path)).err
    token.chmod(0o600)
    token.write_text("short")
    assert "under 16" in process("serve", "--port", "0", "--token-file", token).err


def test_tls_and_certificates_of_clients(tmp_path: Path) -> None:
    certificates(tmp_path)
    options = [
        "--tls-cert",
        tmp_path / "server.pem",
        "--tls-key",
        tmp_path / "server.key",
        "--client-ca",
        tmp_path / "ca.pem",
        "--host",
        "0.0.0.0",
    ]
    with running(tmp_path, *options) as service:
        port = httpx.URL(service.url).port
        trusted = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
        address = f"https://localhost:{port}/v1/model"
        with (
            httpx.Client(verify=trusted, headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False) as nameless,
            pytest.raises(httpx.TransportError),
        ):
            nameless.get(address)
        trusted.load_cert_chain(tmp_path / "client.pem", tmp_path / "client.key")
        with httpx.Client(verify=trusted, headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False) as known:
            assert known.get(address).json()["bundle"] == "pmclip-lite"
            told = re.search(r"(?m)^pmclip_cert_expiry_seconds (\S+)", known.get(f"https://localhost:{port}/metrics").text)
            assert told and 86400 < float(told[1]) < 2 * 86400


def test_a_wrong_method_is_told_all_that_the_path_takes(service: Running) -> None:
    reply = service.client.options("/v1/images")
    _problem(reply, 405, "http")
    assert reply.headers["allow"] == "DELETE, POST"
