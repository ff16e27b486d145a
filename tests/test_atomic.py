"""What is written is whole or as it was: every writer on a disk that is full, and what a writer does to links and permissions."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pmclip_deploy.atomic import append, write, write_errors, written, written_folder, written_into
from pmclip_deploy.cli import bench as cli_bench
from pmclip_deploy.cli import demo as cli_demo
from pmclip_deploy.cli import export as cli_export
from pmclip_deploy.errors import BundleError, PmclipError, UsageError
from tests.full_disk import files_no_longer_than, nothing_reaches_the_disk
from tests.tiny.bundle import tiny_bundle

RESUME = "make room and go on with --resume"


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@dataclass(frozen=True)
class Writer:
    """``write(folder)`` writes into an empty folder, or over what it wrote there before."""

    name: str
    write: Callable[[Path], object]
    error: type[PmclipError]
    said: str
    syncs: bool = True


def train_parts() -> "tuple[Any, ...]":
    return tuple(pytest.importorskip(name, reason="training needs the extra `train`") for name in ("torch", "open_clip"))


def network() -> Any:
    torch, _ = train_parts()
    return torch.nn.Linear(30, 3)


def bundle(folder: Path) -> None:
    tiny_bundle(folder / "bundle")


def signature(folder: Path) -> None:
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519", reason="needs the extra `sign`")
    from pmclip_deploy.bundle.signing import sign_bundle

    if not (folder / "bundle").is_dir():
        tiny_bundle(folder / "bundle")
    sign_bundle(folder / "bundle", ed25519.Ed25519PrivateKey.generate())


def index(folder: Path) -> None:
    from pmclip_deploy.search.index import About, write_index

    about = About("b", "0" * 64, "image", "path")
    write_index(folder / "x.index", about, 8, [(np.ones((3, 8), np.float16), ["a", "b", "c"])])


def state(folder: Path) -> None:
    train_parts()
    from pmclip_deploy.train.loop import Settings, fit

    net = network()
    settings = Settings(epochs=1, learning_rate=0.1, batch_size=2)
    fit("line", net, lambda order, g, e: net.weight.square().sum(), 4, [(list(net.parameters()), 0.1)], settings, {}, folder / "state.pt")


def start_of_features(folder: Path) -> None:
    train_parts()
    from pmclip_deploy.train.autoencoder import save_network

    save_network(network(), folder / "weights.safetensors", {"metrics": {}})


def result_of_a_fold(folder: Path) -> None:
    train_parts()
    from pmclip_deploy.train.findings.training import write_result

    write_result(folder, "fold-1", network(), {"finding": np.zeros((2, 2))}, [], {})


def films_apart(folder: Path) -> None:
    train_parts()
    from pmclip_deploy.train.findings import crossval

    films = [SimpleNamespace(name=f"set/{i}", group=f"group{i}") for i in range(9)]
    (folder / "fold-1").mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crossval, "_write", lambda *_: {})
        crossval._write_fold(SimpleNamespace(output=folder), "1", {"1": (None, SimpleNamespace(films=films))})  # type: ignore[arg-type, dict-item]


def checkpoint(folder: Path) -> None:
    train_parts()
    from pmclip_deploy.train.checkpoint import write_checkpoint

    write_checkpoint(folder / "checkpoint", network(), {"name": "tiny"}, folder.with_name("tokenizer.json"))


def imported(folder: Path) -> None:
    train_parts()
    from pmclip_deploy.train import importing

    importing._write_folder(folder / "checkpoint", {"clip.x": network().weight.detach()}, {"name": "tiny"}, "{}")


def signatures_of_pictures(folder: Path) -> None:
    from pmclip_deploy.train.lookalikes import write_signatures

    write_signatures(folder, [np.random.default_rng(0).integers(0, 255, (60, 60), dtype=np.uint8)])


def calibration(folder: Path) -> None:
    pytest.importorskip("onnx", reason="needs the extra `export`")
    train_parts()
    from pmclip_deploy.export.records import _keep

    _keep(folder / "calibration.json.gz", b"x" * 300)


def timing_cache(folder: Path) -> None:
    pytest.importorskip("onnx", reason="needs the extra `export`")
    from pmclip_deploy.export.engine_from_onnx import _keep_timing_cache

    _keep_timing_cache(SimpleNamespace(get_timing_cache=lambda: SimpleNamespace(serialize=lambda: b"x" * 300)), folder / "cache")


def parity_report(folder: Path) -> None:
    pytest.importorskip("onnx", reason="needs the extra `export`")
    train_parts()
    from pmclip_deploy.export import gates, report

    manifest = SimpleNamespace(name="t", version="0", precision="int8", target="cpu", provenance={}, files={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gates, "gate", lambda *_: None)
        patch.setattr(report, "html_from_report", lambda of: of.title * 20)
        cli_export._write_report(folder / "report.html", manifest, {})  # type: ignore[arg-type]


def submission(folder: Path) -> None:
    cli_bench._write_submission(folder / "run.json", {"rows": ["x" * 300]})


def results_of_a_benchmark(folder: Path) -> None:
    from pmclip_deploy.benchmarks.results import append

    append(folder / "bench.jsonl", [{"run": "1", "n": "x" * 300}, {"run": "2"}])


def demo_film(folder: Path) -> None:
    cli_demo._copy(Path(__file__), folder / "below" / "film.dcm")


def picture_of_a_finding(folder: Path) -> None:
    from pmclip_deploy.imaging.overlay import save_png

    save_png(np.random.default_rng(0).integers(0, 255, (60, 60), dtype=np.uint8), folder / "seen.png")


WRITERS = (
    Writer("bundle", bundle, BundleError, "bundle: cannot be written ({}); check the space left and the permissions"),
    Writer("signature", signature, BundleError, "manifest.sig cannot be written ({}); check space and permissions"),
    Writer("index", index, BundleError, "x.index: cannot be written ({}); check the space left and the permissions"),
    Writer("training state", state, UsageError, "cannot be written ({}); no epoch was finished; make room and train again"),
    Writer("autoencoder or maml", start_of_features, UsageError, f"weights.safetensors: cannot be written ({{}}); {RESUME}"),
    Writer("result of a fold", result_of_a_fold, UsageError, f"cannot be written ({{}}); {RESUME}"),
    Writer("films apart", films_apart, UsageError, f"apart.txt: cannot be written ({{}}); {RESUME}"),
    Writer("checkpoint", checkpoint, UsageError, f"checkpoint: the checkpoint cannot be written ({{}}); {RESUME}"),
    Writer("import", imported, BundleError, "checkpoint: cannot be written ({}); check the space left and the permissions"),
    Writer("signatures of pictures", signatures_of_pictures, UsageError, f"seen.npy: cannot be written ({{}}); {RESUME}"),
    Writer("calibration", calibration, BundleError, "calibration.json.gz: cannot be written ({}); export a copy of the checkpoint"),
    Writer("timing cache", timing_cache, UsageError, "cache: the timing cache cannot be written ({}); name another file"),
    Writer("parity report", parity_report, UsageError, "report.html: the report cannot be written ({}); give another --report"),
    Writer("submission", submission, UsageError, "run.json: cannot be written ({}); give another --submit-file"),
    Writer("benchmark", results_of_a_benchmark, UsageError, "the results cannot be written ({}); give another --output", syncs=False),
    Writer("demo", demo_film, UsageError, "film.dcm: cannot be written ({}); give another --output"),
    Writer("picture", picture_of_a_finding, UsageError, "seen.png: cannot be written ({}); check the folder"),
)
DISKS = {
    "no room": partial(files_no_longer_than, 0),
    "room for a part": partial(files_no_longer_than, 40),
    "no sync": nothing_reaches_the_disk,
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread meets the limit too
@pytest.mark.parametrize("disk", DISKS)
@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.name)
def test_a_full_disk_is_one_line_and_keeps_what_was_there(writer: Writer, disk: str, tmp_path: Path) -> None:
    if disk == "no sync" and not writer.syncs:
        pytest.skip("an appended row is not synced")
    reason = "No space left on device" if disk == "no sync" else "File too large"
    for again in (False, True):
        (folder := tmp_path / str(again) / "folder").mkdir(parents=True)
        folder.with_name("tokenizer.json").write_text("{}" * 100)  # a checkpoint takes it over
        if again:
            writer.write(folder)
        elif writer.write is signature:
            tiny_bundle(folder / "bundle")  # what is to be signed
        before = tree(folder)
        with DISKS[disk](), pytest.raises(writer.error) as error:
            writer.write(folder)
        assert writer.said.format(reason) in str(error.value) and "\n" not in str(error.value)
        after = tree(folder)
        assert {name: after[name] for name in before} == before
        assert not [name for name in after.keys() - before.keys() if after[name] is not None and "tensorboard" not in name]
        assert not [path.name for path in folder.parent.iterdir() if path.name not in ("folder", "tokenizer.json")]
        writer.write(folder)  # once there is room


# --- the writers themselves --------------------------------------------------------------------------------------------------------


def test_a_file_keeps_its_permissions_and_a_new_one_takes_the_umask(tmp_path: Path) -> None:
    path, before = tmp_path / "x", os.umask(0o027)
    try:
        write(path, "new")
        assert path.stat().st_mode & 0o777 == 0o640
        path.chmod(0o604)
        write(path, "ö")
        assert path.stat().st_mode & 0o777 == 0o604 and path.read_bytes() == "ö".encode()
        with written(tmp_path / "y", mode=0o600) as new:
            assert new.stat().st_mode & 0o777 == 0o600
            new.write_bytes(b"private")
        assert (tmp_path / "y").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


@pytest.mark.skipif(os.name != "posix", reason="needs links and pipes")
def test_a_users_link_is_followed_and_a_device_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("old")
    (tmp_path / "link").symlink_to("there")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there").read_text() == "new"
    (tmp_path / "dangling").symlink_to("made")
    write(tmp_path / "dangling", "new")
    assert (tmp_path / "made").read_text() == "new"
    (tmp_path / "null").symlink_to(os.devnull)
    write(tmp_path / "null", "gone")
    append(tmp_path / "null", "gone")
    assert Path(os.devnull).is_char_device()


WRITES = "import sys; from pathlib import Path; from pmclip_deploy.atomic import write; write(Path(sys.argv[1]), 'ours\\n')"
OPEN = ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs the names of open files")
@pytest.mark.parametrize("name", OPEN)
def test_an_open_pipe_or_file_is_written_where_it_stands(tmp_path: Path, name: str) -> None:
    piped = subprocess.run([sys.executable, "-c", WRITES, name], capture_output=True, check=True, timeout=60)
    assert (piped.stdout, piped.stderr) == (b"ours\n", b"")
    script = 'echo before; "$0" -c "$1" "$2"; echo after'
    with (tmp_path / "log").open("wb") as log:
        subprocess.run(["sh", "-c", script, sys.executable, WRITES, name], stdout=log, check=True, timeout=60)
    assert (tmp_path / "log").read_text() == "before\nours\nafter\n" and [path.name for path in tmp_path.iterdir()] == ["log"]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs the names of open files")
def test_a_file_that_is_not_open_is_an_os_error() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        write(Path("/dev/fd/987654321"), "x")


def test_a_link_beside_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "new").symlink_to("theirs")
    with written(tmp_path / "x", tmp_path / "new") as new:
        new.write_text("ours")
    assert (tmp_path / "theirs").read_text() == "theirs" and (tmp_path / "x").read_text() == "ours"
    assert {path.name for path in tmp_path.iterdir()} == {"theirs", "x"}


@pytest.mark.parametrize("name", ["n" * 255, "ö" * 127])
def test_any_name_that_the_system_takes(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, "x")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("of", [written, written_folder, written_into], ids=lambda of: of.__name__)
def test_an_error_of_ours_goes_through_and_leaves_nothing(tmp_path: Path, of: Any) -> None:
    with pytest.raises(NameError), write_errors("x", "y"), of(tmp_path / "x") as new:
        (new / "part" if new.is_dir() else new).write_text("half")
        raise NameError("ours")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_error_of_ours_while_the_disk_is_full_is_not_the_disks() -> None:
    with pytest.raises(NameError), write_errors("x", "y"):
        try:
            raise OSError("full")
        except OSError:
            raise NameError("ours")  # noqa: B904


def test_a_folder_that_cannot_be_put_in_place_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").write_text("old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".new"):
            raise OSError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(UsageError, match=r"x: cannot be written \(Permission denied\); y"), write_errors("x:", "y"):  # noqa: SIM117
        with written_folder(tmp_path / "x") as new:
            (new / "new").write_text("new")
    assert tree(tmp_path) == {"x": None, "x/old": b"old"}


def test_only_whole_files_go_into_a_folder_that_holds_others(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("state")
    (tmp_path / "a").write_text("old a")
    with pytest.raises(KeyError), written_into(tmp_path) as new:
        (new / "a").write_text("new a")
        raise KeyError
    assert tree(tmp_path) == {"state": b"state", "a": b"old a"}
    with written_into(tmp_path) as new:
        (new / "a").write_text("new a")
        (new / "b").write_text("b")
    assert tree(tmp_path) == {"state": b"state", "a": b"new a", "b": b"b"}


def test_threads_that_write_one_file_each_write_a_whole_one(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: write(tmp_path / "x", f"{i}" * 100_000), range(8)))
    content = (tmp_path / "x").read_text()
    assert len(content) == 100_000 and len(set(content)) == 1 and len(list(tmp_path.iterdir())) == 1
