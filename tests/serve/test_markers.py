"""What names a patient comes out nowhere: not in logs, metrics or errors, nor in the names of files."""

import io
from pathlib import Path

import pytest

from pmclip_deploy.models import DEMO
from tests.patient import PATIENT
from tests.serve.running import Running, running

pytest.importorskip("fastapi", reason="serving needs the extra `ward`")
dcmread = pytest.importorskip("pydicom").dcmread


@pytest.fixture(scope="module")
def marked() -> bytes:
    """A radiograph with a marker in each element of a patient, in private ones, and in every other text."""
    dataset = dcmread(DEMO / "leg-1.dcm")
    for keyword, value in PATIENT.items():
        setattr(dataset, keyword, value)
    dataset.add_new(0x00091001, "LO", "ZQXPRIVATE")
    dataset.add_new(0x00090010, "LO", "ZQXCREATOR")
    for keyword in (
        "SeriesDescription",
        "ProtocolName",
        "OperatorsName",
        "StationName",
        "ImageComments",
        "SeriesInstanceUID",
        "FrameOfReferenceUID",
    ):
        setattr(dataset, keyword, f"ZQX{keyword.upper()}")
    out = io.BytesIO()
    dataset.save_as(out, enforce_file_format=False)
    return out.getvalue()


def test_markers_come_out_nowhere(tmp_path: Path, marked: bytes) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with running(tmp_path, TMPDIR=str(scratch), PYTHONASYNCIODEBUG="1") as service:
        said = list(_everything(service, marked))
        said.append(service.client.get("/metrics").text)
        names = [str(path) for path in tmp_path.rglob("*")]
    assert len(said) > 40
    for text in (*said, service.log, *names):
        assert "ZQX" not in text.upper(), text[:2000]


def _everything(service: Running, marked: bytes) -> "list[str]":
    """Each route, asked well and badly; what came back, without what the user asked for."""
    client, said = service.connect(**{"User-Agent": "ZQXAGENT", "X-ZQXHEADER": "ZQXVALUE", "Cookie": "a=ZQXCOOKIE"}), list[str]()
    broken = [marked[: len(marked) // 2], marked[:2000], marked.replace(b"\x85\x01", b"\xff\xff", 1), b"ZQXNOFILE"]
    for data in (marked, *broken):
        upload = {"image": ("ZQXFILE.dcm", data, "text/ZQXTYPE")}
        said.append(client.post("/v1/answers", files=upload, data={"questions": "is there a fracture?"}).text)
        said.append(client.post("/v1/answers", files=upload, data={"questions": "is there a fracture?", "frame": "7"}).text)
        said.append(client.post("/v1/classify", files=upload, data={"labels": ["ct", "mr"]}).text)
        said.append(client.post("/v1/images", files=upload).text)
    here = f"/v1/images/{client.post('/v1/images', files={'image': ('ZQXFILE', marked)}).json()['id']}"
    for path in ("", "/frames/0", "/frames/9", "/frames/0/table", "/thumbnail", "/view?finding=ZQXFINDING", "/ZQXPATH", "/frames/ZQX"):
        reply = client.get(here + path)
        said += [reply.text if "json" in reply.headers["content-type"] else "", str(reply.headers)]
    for body in (
        {"questions": ["is there a fracture?"]},
        {"questions": ["is there a fracture?"], "ZQXKEY": "ZQX"},
        {"questions": "ZQX"},
        {"ZQX": 1},
    ):
        said.append(client.post(f"{here}/answers", json=body).text)
    said.append(client.post(f"{here}/similar", json={"k": "ZQX"}).text)
    for method, path in (("GET", "/ZQXROUTE"), ("PUT", "/v1/answers"), ("GET", "/v1/images/ZQXID/thumbnail"), ("GET", "/page/ZQXFILE")):
        said.append(client.request(method, path).text)
    for headers in ({"Authorization": "Bearer ZQXTOKEN"}, {"Host": "ZQXHOST"}, {"Origin": "ZQXORIGIN"}):
        said.append(client.get("/v1/model?ZQX=1", headers=headers).text)
    assert client.get(f"{here}/patient").json()["name"] == PATIENT["PatientName"]  # a person's switch
    return said
