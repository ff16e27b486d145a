"""The processes that decode: what ends one ends one request."""

import asyncio
import io
import os
import signal
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest
from pydicom import dcmread

from pmclip_deploy.errors import InputError
from pmclip_deploy.models import DEMO
from tests.serve.running import Running, running

pytest.importorskip("fastapi", reason="serving needs the extra `ward`")
pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks at processes in /proc")

from pmclip_deploy.serve.problems import Problem
from pmclip_deploy.serve.readers import Reader, Readers

LEG = (DEMO / "leg-1.dcm").read_bytes()
FRACTURE = "is there a fracture?"
MEMORY = 4 << 30


def test_a_reader_that_dies_ends_one_call() -> None:
    async def scenario() -> None:
        readers = Readers(2, MEMORY, 20)
        await readers.open()
        before = {reader.process.pid for reader in readers._all}
        for reader in readers._all:
            os.kill(reader.process.pid, signal.SIGSTOP)
        waiting = [asyncio.ensure_future(readers.call("picture", LEG, None, None)) for _ in range(2)]
        await asyncio.sleep(0.2)  # until both are at work
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        ends = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(end, InputError) and "decoder ended" in str(end) for end in ends)
        assert (await readers.call("picture", LEG, None, None)).pixels.shape == (389, 320)
        assert readers.restarts >= 1 and not before & {reader.process.pid for reader in readers._all}
        readers.close()

    asyncio.run(scenario())


def test_a_reader_that_hangs_is_ended() -> None:
    reader = Reader(MEMORY)
    reader.call(60, "warm_up")
    os.kill(reader.process.pid, signal.SIGSTOP)
    with pytest.raises(Problem) as ended:
        reader.call(1, "picture", LEG, None, None)
    assert ended.value.status_code == 504 and not reader.is_alive


def test_a_reader_takes_no_more_memory_than_it_may() -> None:
    import io

    import PIL.Image

    reader = Reader(1 << 30)
    file = io.BytesIO()
    PIL.Image.new("RGB", (8000, 8000)).save(file, "PNG")
    assert len(file.getvalue()) < 1 << 20
    tight = Reader(400 << 20)
    with pytest.raises(InputError):
        tight.call(60, "picture", file.getvalue(), None, None)
    assert reader.call(60, "picture", LEG, None, None).pixels.shape == (389, 320)
    for each in (reader, tight):
        each.close()


def test_a_reader_ends_with_its_parent(tmp_path: Path) -> None:
    with running(tmp_path) as service:
        pids = service.readers()
        service.process.kill()
        service.process.wait()
        until = time.monotonic() + 10
        while time.monotonic() < until and any(_runs(pid) for pid in pids):
            time.sleep(0.05)
        assert len(pids) == 3 and not any(_runs(pid) for pid in pids)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_others_are_served_while_two_pictures_hang(tmp_path: Path) -> None:
    with running(tmp_path, "--timeout-s", "4") as service:
        stopped = set(service.readers()[:2])
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        replies = list[int]()
        threads = [threading.Thread(target=lambda: replies.append(service.ask(LEG, FRACTURE).status_code)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sorted(replies) == [200, 504, 504]
        assert service.ask(LEG, FRACTURE).status_code == 200 and not stopped & set(service.readers())


@pytest.fixture(scope="module")
def hostile() -> dict[str, bytes]:
    """Bombs and lies, small as files."""
    size = (60000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    huge = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", size) + _chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
    return {
        "a PNG of 60,000 x 60,000": huge + _chunk(b"IEND", b""),
        "a preamble alone": bytes(128) + b"DICM",
        "zeros": bytes(1 << 20),
        "a cut file": LEG[: len(LEG) // 2],
        "rows that lie": rows_that_lie(),
        "a name of an attack": b"../../etc/passwd",
    }


def rows_that_lie() -> bytes:
    dataset, out = dcmread(io.BytesIO(LEG)), io.BytesIO()
    dataset.Rows = 65535
    dataset.save_as(out, enforce_file_format=True)
    return out.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def test_hostile_files_give_one_clear_message(service: Running, hostile: dict[str, bytes]) -> None:
    for name, data in hostile.items():
        for reply in (service.ask(data, FRACTURE), service.keep(data)):
            assert reply.status_code in (415, 422), (name, reply.text)
            assert reply.json()["detail"].startswith("the upload: ") and "\n" not in reply.json()["detail"], name
    assert service.ask(LEG, FRACTURE).status_code == 200


def test_nothing_of_an_upload_is_written_to_disk(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with running(tmp_path, TMPDIR=str(scratch)) as service:
        service.keep(LEG + bytes(3 << 20))
        opened = [str(link.readlink()) for link in Path(f"/proc/{service.process.pid}/fd").iterdir() if link.is_symlink()]
        assert not list(scratch.iterdir()) and not [path for path in opened if "scratch" in path], sys.platform
