"""The training loop: optimiser and schedule, resuming, and the ways in which training ends early."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="training needs the extra `train`")
pytest.importorskip("open_clip", reason="training needs the extra `train`")

from torch import Generator, Tensor, nn

from pmclip_deploy.errors import BundleError, TrainingError, UsageError
from pmclip_deploy.train.loop import Averaged, Optimiser, Row, Settings, fit
from tests.full_disk import files_no_longer_than, nothing_reaches_the_disk

SETTINGS = Settings(epochs=3, learning_rate=0.05, batch_size=4, seed=5)


class Line:
    """A line through 18 points, with noise drawn in each step; ``spoil(step)`` may do anything to a step's loss."""

    def __init__(self, folder: Path, settings: Settings = SETTINGS) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Dropout(0.2), nn.Linear(3, 1))
        self.x = torch.randn(18, 3, generator=torch.Generator().manual_seed(1))
        self.settings, self.state, self.history = settings, folder / "state.pt", list[Row]()
        self.steps = 0

    def spoil(self, loss: Tensor) -> Tensor:
        return loss

    def loss_of(self, indices: Tensor, generator: Generator, epoch: int) -> Tensor:
        x = self.x[indices] + 0.1 * torch.randn(len(indices), 3, generator=generator)
        loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
        self.steps += 1
        return self.spoil(loss)

    def train(self) -> None:
        groups = [(list(self.model.parameters()), self.settings.learning_rate)]
        made_with = {"seed": self.settings.seed}
        measure = lambda history: {"seen": len(history)}  # noqa: E731
        fit("line", self.model, self.loss_of, 18, groups, self.settings, made_with, self.state, measure=measure, history=self.history)


def test_resuming_gives_the_weights_and_the_history_of_an_uninterrupted_run(tmp_path: Path) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole, parts = Line(tmp_path / "whole"), Line(tmp_path / "parts")
    whole.train()

    def interrupt(loss: Tensor) -> Tensor:
        if parts.steps == 7:  # of four in an epoch
            raise KeyboardInterrupt
        return loss

    parts.spoil = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        parts.train()
    rest = Line(tmp_path / "parts", replace(SETTINGS, resume=True))
    rest.train()
    assert rest.steps == 8
    assert rest.history == whole.history and [row["seen"] for row in rest.history] == [0, 1, 2]
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True))
    with pytest.raises(BundleError, match="other settings"):
        Line(tmp_path / "parts", replace(SETTINGS, resume=True, seed=6)).train()


def test_what_is_no_state_is_refused_and_no_state_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = Line(tmp_path, replace(SETTINGS, epochs=1, resume=True))
    line.train()
    assert capfd.readouterr().err.splitlines()[0] == f"line: no state in {tmp_path}, starting at epoch 1"
    lacking = {k: v for k, v in torch.load(line.state, weights_only=True).items() if k != "schedule"}
    for content in (b"no state", {}, [1], lacking):
        if isinstance(content, bytes):
            line.state.write_bytes(content)
        else:
            torch.save(content, line.state)
        with pytest.raises(BundleError, match="not a readable training state"):
            line.train()


def test_an_interruption_is_one_line_that_says_how_to_go_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = Line(tmp_path)

    def interrupt(loss: Tensor) -> Tensor:
        if line.steps == 6:
            raise KeyboardInterrupt
        return loss

    line.spoil = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        line.train()
    assert capfd.readouterr().err.splitlines()[-1] == f"line: interrupted; {line.state} keeps epoch 1; go on with --resume"


@pytest.mark.parametrize(
    ("factor", "said"), [(math.nan, "the loss is nan"), (math.inf, "the loss is inf")], ids=["not a number", "infinite"]
)
def test_a_loss_that_is_no_number_stops_and_keeps_the_last_epoch(tmp_path: Path, factor: float, said: str) -> None:
    line = Line(tmp_path)
    line.spoil = lambda loss: loss * factor if line.steps == 10 else loss  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=rf"{said} .* at step 10 \(epoch 3\); .*keeps epoch 2; .*--learning-rate") as error:
        line.train()
    assert error.value.exit_code == 1
    saved = torch.load(line.state, weights_only=True)
    assert saved["epoch"] == 2 and all(x.isfinite().all() for x in saved["model"].values())


def test_a_gradient_that_is_no_number_is_not_learned_from(tmp_path: Path) -> None:
    line = Line(tmp_path)

    def spoil(loss: Tensor) -> Tensor:
        """A finite loss whose gradient is infinite."""
        return loss + (0 * loss).sqrt() if line.steps == 2 else loss

    line.spoil = spoil  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"at step 2 \(epoch 1\); no epoch was finished"):
        line.train()
    assert all(p.isfinite().all() for p in line.model.parameters()) and not line.state.exists()


def test_a_full_device_is_one_line(tmp_path: Path) -> None:
    line = Line(tmp_path)

    def spoil(loss: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    line.spoil = spoil  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"^line: the device's memory is full; no epoch was finished; give a smaller --batch-size"):
        line.train()


def test_a_full_disk_is_one_line_and_keeps_the_last_state(tmp_path: Path) -> None:
    Line(tmp_path, replace(SETTINGS, epochs=1)).train()
    before = (tmp_path / "state.pt").read_bytes()
    (tmp_path / "state.partial").write_bytes(b"of a run that was killed")
    with nothing_reaches_the_disk(), pytest.raises(UsageError, match=r"cannot be written \(No space left on device\); .*make room"):
        Line(tmp_path).train()
    assert (tmp_path / "state.pt").read_bytes() == before
    assert not (tmp_path / "state.partial").exists()


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's thread, whose files fill first
@pytest.mark.parametrize("size", [10, 300, 3_000, 30_000, 300_000])
def test_a_disk_that_fills_is_one_line_and_keeps_the_last_state(tmp_path: Path, size: int, capfd: pytest.CaptureFixture[str]) -> None:
    line = Line(tmp_path)
    line.train()
    before, line = line.state.read_bytes(), Line(tmp_path)
    line.model.register_buffer("large", torch.zeros(100_000))  # over the file's buffer, so that torch's zip writer meets the error
    with files_no_longer_than(size), pytest.raises(UsageError, match=r"cannot be written \(File too large\); .*; make room") as error:
        line.train()
    assert "\n" not in str(error.value) and "Traceback" not in capfd.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} - {"tensorboard"} == {"state.pt"} and line.state.read_bytes() == before


def test_the_curves_are_there_for_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    line = Line(tmp_path)
    line.train()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss/training")] == list(range(12))
    assert [(e.step, e.value) for e in events.Scalars("validation/seen")] == [(4, 0), (8, 1), (12, 2)]
    mean = sum(e.value for e in events.Scalars("loss/training")[:4]) / 4
    assert line.history[0]["loss"] == pytest.approx(mean, abs=1e-4)


def test_torchrun_is_refused_where_a_stage_takes_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="this stage trains in one process; start it without torchrun"):
        SETTINGS.start()


def test_adamw_decays_matrices_and_adam_everything() -> None:
    layer = nn.Linear(2, 2)
    for kind, decays in (("AdamW", [0.1, 0.0]), ("Adam", [0.1, 0.1])):
        groups = Optimiser(kind, weight_decay=0.1).of([(list(layer.parameters()), 1.0)]).param_groups  # type: ignore[arg-type]
        of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        assert [of[id(p)] for p in (layer.weight, layer.bias)] == decays


def test_learning_rates_warm_up_and_fall_or_stay() -> None:
    warm = [Optimiser(warmup=4).rate(step, 24) for step in range(25)]
    assert warm[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and warm[14] == pytest.approx(0.5) and warm[24] == pytest.approx(0)
    assert {Optimiser(warmup=None).rate(step, 24) for step in range(25)} == {1.0}


def test_the_mean_of_weights_follows_them_and_settles_in_their_place() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    averaged = Averaged(net, every=2, decay=0.9)
    before = net[0].weight.detach().clone()
    for _ in averaged.following(range(3), done=10_000):  # the mean follows after the second step alone
        with torch.no_grad():
            net[0].weight += 1
    averaged.settle()
    assert torch.allclose(net[0].weight, before + 2 * 0.1, atol=1e-6)


def test_the_mean_of_weights_is_part_of_the_state() -> None:
    averaged = Averaged(nn.Linear(3, 2))
    fresh = Averaged(nn.Linear(3, 2))
    fresh.load_state_dict(averaged.state_dict())
    fresh.settle()
    assert torch.equal(fresh.model.weight, averaged.model.weight)  # type: ignore[arg-type]
