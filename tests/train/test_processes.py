"""Training by several processes over gloo: the curve of one process, and what a process that is killed leaves.

As a script this file is where those processes are forked from, so that torch is imported once. They find each other as torchrun's do.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="training needs the extra `train`")
pytest.importorskip("open_clip", reason="training needs the extra `train`")

from pmclip_deploy.cli.app import main
from pmclip_deploy.train import loop
from pmclip_deploy.train.clip.pairs import train_clip_on_pairs
from pmclip_deploy.train.clip.recipes import recipe_named
from pmclip_deploy.train.heads.plan import Plan, settings_of_head
from pmclip_deploy.train.heads.training import train_head
from tests.sources import ROOT
from tests.tiny import clip as tiny_clip
from tests.tiny.slake import slake

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="forks, and looks at processes in /proc")

STAGES = ("clip", "mevf", "qcr")
CPU = {"seed": 3, "threads": 1, "device": "cpu"}
EPOCHS, STEPS = 8, 2  # of `train vqa` as a command
ENDED = "error: another process of this run ended; go on with --resume from the last whole epoch"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is trained on, and what the forked processes leave."""
    folder = tmp_path_factory.mktemp("home")
    fork_in(folder, "prepare", "1", "2", "kill")
    return folder


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}


def fork_in(home: Path, *tasks: str) -> None:
    arguments = [sys.executable, "-m", __name__, str(home), *tasks]
    done = subprocess.run(arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def forked(count: int, task: Callable[[int], object], output: Path) -> list[int]:
    """The exit codes of ``count`` processes that do ``task(rank)``; what process r prints is in ``output/r.txt``."""
    output.mkdir()
    port, pids = free_port(), list[int]()
    for rank in range(count):
        if pid := os.fork():
            pids.append(pid)
            continue
        code = 1
        try:
            printed = os.open(output / f"{rank}.txt", os.O_WRONLY | os.O_CREAT)
            os.dup2(printed, 1), os.dup2(printed, 2)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            task(rank)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.stderr.flush(), os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def curve(stage: str, home: Path, output: Path) -> None:
    """Two epochs without dropout, which each process draws for itself. Writes each step's loss, as this process has it."""
    torch.nn.Dropout.forward = lambda self, x: x  # type: ignore[method-assign,assignment]
    losses, summed = list[float](), loop.sum_over_processes
    loop.sum_over_processes = lambda *of: losses.append(summed(*of)) or losses[-1]  # type: ignore[func-returns-value]
    if stage == "clip":
        train_clip_on_pairs([home / "captions"], home / "tiny", output, recipe_named("paper", epochs=2, batch_size=8, **CPU))
    else:  # QCR's classifier of questions has batches of 30, which four processes cannot share evenly
        plan = Plan(stage, home / "slake" / "glove.txt", ("clip",), hidden=16, depth=2, type_epochs=2, fine_tune=stage == "mevf")
        train_head(home / "slake", home / "tiny", output, plan, settings_of_head(stage, epochs=2, batch_size=12, **CPU))
    (output / f"losses-{os.environ['RANK']}.json").write_text(json.dumps(losses))


def command(home: Path, output: Path, *options: str) -> list[str]:
    paths = ["--data", home / "slake", "--clip", home / "tiny", "--glove", home / "slake" / "glove.txt", "--output", output]
    settings = ["--hidden", 16, "--batch-size", 12, "--epochs", EPOCHS, "--threads", 1, "--device", "cpu"]
    return [*map(str, ["train", "vqa", "--head", "mevf", *paths, *settings]), *options]


def run(home: Path, output: Path, *options: str, killed: int | None = None) -> None:
    """The command, in which the process ``killed`` kills itself in the second step of the third epoch."""
    summed, steps = loop.sum_over_processes, list[int]()

    def sum_or_die(*of: Any) -> float:
        steps.append(1)
        if len(steps) == 2 * STEPS + 2 and int(os.environ["RANK"]) == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        return summed(*of)

    loop.sum_over_processes = sum_or_die
    sys.argv[1:] = command(home, output, *options)
    main()


def prepare(home: Path) -> None:
    tiny_clip.add_tiny(home)
    tiny_clip.checkpoint(home / "tiny")
    tiny_clip.captions(home / "captions")
    slake(home / "slake", {"train": 17, "validate": 2, "test": 2})


def curves(home: Path, count: int) -> None:
    for stage in STAGES:
        output = home / f"{stage}-{count}"
        assert set(forked(count, lambda rank: curve(stage, home, output), output)) == {0}  # noqa: B023


def kills(home: Path) -> None:
    """Writes the exit codes of a whole run, of two that are killed, of one that goes on, and of one whose processes have other states."""
    codes = {"whole": forked(2, lambda rank: run(home, home / "whole"), home / "whole")}
    for killed in (0, 1):
        output = home / f"killed-{killed}"
        codes[output.name] = forked(2, lambda rank: run(home, output, killed=killed), output)  # noqa: B023
    shutil.copytree(home / "killed-1", home / "parts")
    codes["resumed"] = forked(2, lambda rank: run(home, home / "parts", "--resume"), home / "resumed")
    codes["apart"] = forked(2, lambda rank: run(home, home / ("killed-0" if rank else "apart"), "--resume"), home / "apart")
    (home / "codes.json").write_text(json.dumps(codes))


def losses(home: Path, stage: str, count: int) -> list[float]:
    """Of each step. All processes have the same ones."""
    (every,) = {(home / f"{stage}-{count}" / f"losses-{rank}.json").read_text() for rank in range(count)}
    return list(json.loads(every))


@pytest.mark.slow("imports torch in a new process, and forks it")
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_have_the_loss_curve_of_one(home: Path, stage: str) -> None:
    alone = losses(home, stage, 1)
    assert len(alone) == {"clip": 4, "mevf": 4, "qcr": 6}[stage] and len(set(alone)) == len(alone)
    assert losses(home, stage, 2) == pytest.approx(alone, abs=1e-5)


@pytest.mark.nightly
def test_four_processes_have_the_loss_curve_of_one(home: Path) -> None:
    fork_in(home, "4")
    for stage in STAGES:
        assert losses(home, stage, 4) == pytest.approx(losses(home, stage, 1), abs=1e-5)


def said(home: Path, name: str, rank: int) -> list[str]:
    return (home / name / f"{rank}.txt").read_text().splitlines()


@pytest.mark.parametrize("killed", [0, 1])
def test_where_a_process_is_killed_the_other_ends_in_one_line_and_the_state_is_whole(home: Path, killed: int) -> None:
    name, codes = f"killed-{killed}", json.loads((home / "codes.json").read_text())
    assert codes[name] == [(-signal.SIGKILL, 1)[rank != killed] for rank in (0, 1)]
    assert [line for line in said(home, name, 1 - killed) if "epoch " not in line or line.startswith("error")] == [ENDED]
    state = torch.load(home / name / "state.pt", weights_only=True)
    assert state["epoch"] == len(state["history"]) == 2
    assert not (home / name / "model.safetensors").exists()


def test_a_killed_run_goes_on_to_the_bytes_of_a_whole_one(home: Path) -> None:
    codes = json.loads((home / "codes.json").read_text())
    assert codes["whole"] == codes["resumed"] == [0, 0]
    assert (home / "parts" / "model.safetensors").read_bytes() == (home / "whole" / "model.safetensors").read_bytes()
    assert said(home, "whole", 1) == said(home, "resumed", 1) == []
    about = json.loads((home / "parts" / "checkpoint.json").read_text())
    assert about["provenance"]["head"]["processes"] == 2 and len(about["metrics"]["history"]) == EPOCHS


def test_processes_that_have_other_states_are_refused(home: Path) -> None:
    assert json.loads((home / "codes.json").read_text())["apart"] == [2, 2]
    assert all("differ in version, data, options or state; give every node" in said(home, "apart", rank)[-1] for rank in (0, 1))


def launched(home: Path, log: Path, *options: str, arguments: list[str]) -> "subprocess.Popen[bytes]":
    """torchrun with the command line that knows "tiny". What it and its processes say goes to the end of ``log``."""
    words = [sys.executable, "-m", "torch.distributed.run", *options, tiny_clip.__file__, str(home), *arguments]
    with log.open("ab") as file:
        return subprocess.Popen(words, env=environment(), stderr=file, stdout=file)


def workers(launcher: "subprocess.Popen[bytes]") -> dict[int, int]:
    """The process ids of a launcher's processes by their rank."""
    found = {}
    for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        rank = re.search(rb"\0RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes())
        found |= {int(rank[1]): int(pid)} if rank else {}
    return found


def wait_for_epoch(number: int, log: Path) -> None:
    end = time.monotonic() + 120
    while f"epoch {number}/" not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.02)


def assert_nothing_is_left(output: Path) -> None:
    """No process has ``output`` among its arguments, ten seconds later at most."""
    end, left = time.monotonic() + 10, [0]
    while left and time.monotonic() < end:
        time.sleep(0.1)
        left = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and os.fsencode(output) in _arguments(p)]
    assert not left


def _arguments(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:  # it ended
        return b""


@pytest.mark.slow("starts torchrun: three processes that import torch")
def test_torchrun_ends_with_a_killed_process_and_leaves_none(home: Path, tmp_path: Path) -> None:
    output, log = tmp_path / "output", tmp_path / "log"
    launcher = launched(home, log, "--standalone", "--nproc-per-node", "2", arguments=command(home, output, "--epochs", "5000"))
    wait_for_epoch(2, log)
    os.kill(workers(launcher)[1], signal.SIGKILL)
    assert launcher.wait(60) == 1
    said = log.read_text()
    assert "exitcode  : -9" in said and said.count("error: ") == said.count(ENDED) <= 1  # the launcher may end the other one first
    assert_nothing_is_left(output)
    assert torch.load(output / "state.pt", weights_only=True)["epoch"] >= 2


@pytest.mark.nightly  # starts eight processes that import torch
@pytest.mark.parametrize("dead", [0, 1], ids=["the meeting point's", "the other"])
def test_two_nodes_of_which_one_dies_go_on_to_the_bytes_of_a_whole_run(home: Path, tmp_path: Path, dead: int) -> None:
    output = tmp_path / "output"

    def nodes(log: Path, *more: str) -> list["subprocess.Popen[bytes]"]:
        common = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", end]
        conf = ("is_host=1", "is_host=0")
        return [launched(home, log, *common, "--rdzv-conf", host, arguments=command(home, output, *more)) for host in conf]

    end = f"127.0.0.1:{free_port()}"
    both = nodes(tmp_path / "log", "--epochs", "5000")
    wait_for_epoch(2, tmp_path / "log")
    for pid in [both[dead].pid, *workers(both[dead]).values()]:
        os.kill(pid, signal.SIGKILL)
    assert both[1 - dead].wait(120) == 1
    both[dead].wait()
    assert_nothing_is_left(output)
    assert (tmp_path / "log").read_text().count(ENDED) <= 1

    shutil.rmtree(output)
    shutil.copytree(home / "killed-1", output)
    end = f"127.0.0.1:{free_port()}"
    assert [node.wait(240) for node in nodes(tmp_path / "log2", "--resume")] == [0, 0], (tmp_path / "log2").read_text()
    assert (output / "model.safetensors").read_bytes() == (home / "whole" / "model.safetensors").read_bytes()


if __name__ == "__main__":
    home_of_forks, *tasks = Path(sys.argv[1]), *sys.argv[2:]
    if "prepare" in tasks:
        prepare(home_of_forks)
    else:
        tiny_clip.add_tiny(home_of_forks)
    for number in filter(str.isdigit, tasks):
        curves(home_of_forks, int(number))
    if "kill" in tasks:
        kills(home_of_forks)
