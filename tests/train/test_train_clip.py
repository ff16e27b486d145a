"""`train clip` on captions: recipes, reading, retrieval, resuming, several processes, interruptions and bad images, with a tiny CLIP."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.command import Result

torch = pytest.importorskip("torch", reason="training needs the extra `train`")
pytest.importorskip("open_clip", reason="training needs the extra `train`")

from pmclip_deploy.bundle.names import SIGNATURES
from pmclip_deploy.errors import BundleError, InputError, UsageError
from pmclip_deploy.imaging.preprocess import tensor_from_pixels
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.checkpoint import read_checkpoint
from pmclip_deploy.train.clip.embeddings import loss_over, recall_at
from pmclip_deploy.train.clip.pairs import pairs_for_training, train_clip_on_pairs
from pmclip_deploy.train.clip.recipes import RECIPES, Recipe, recipe_named
from pmclip_deploy.train.contrastive import contrastive_loss
from pmclip_deploy.train.images import Pairs, random_crop, readable
from pmclip_deploy.train.loop import Optimiser
from tests.tiny import clip as tiny_clip

TINY = {"batch_size": 8, "learning_rate": 1e-3, "threads": 1, "seed": 3}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the checkpoints "tiny" and "tiny-resnet" and the dataset "captions", which is also in "shards"."""
    folder = tmp_path_factory.mktemp("home")
    tiny_clip.add_tiny(folder)
    for name in ("tiny", "tiny-resnet"):
        tiny_clip.checkpoint(folder / name, name)
    tiny_clip.shards(folder / "shards", tiny_clip.captions(folder / "captions"))
    yield folder
    tiny_clip.remove_tiny()


def train(home: Path, output: Path, recipe: Recipe, source: str = "tiny", data: str = "captions") -> tuple[dict[str, Any], dict[str, Any]]:
    """(what the command reports, the state it leaves)"""
    meta = train_clip_on_pairs([home / data], home / source, output, recipe)
    return meta, torch.load(output / "state.pt", weights_only=True)


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Up to rounding, and but for the keys' biases: no loss depends on them, and Adam makes steps of their gradients' rounding."""
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        thirds = [0, 2] if name.endswith("in_proj_bias") else [0, 1, 2]
        for i in thirds:
            torch.testing.assert_close(found[name].view(-1).tensor_split(3)[i], x.view(-1).tensor_split(3)[i], rtol=1e-3, atol=3e-5)


def test_the_paper_recipe_is_the_papers() -> None:
    paper = RECIPES["paper"]
    assert (paper.epochs, paper.learning_rate, paper.batch_size, paper.augmentation) == (50, 1e-5, 64, "crop and flip")
    assert paper.optimiser == Optimiser("Adam", 5e-4, (0.9, 0.999), 1e-6, warmup=None, longest=None)
    assert not (paper.mixed or paper.micro_batch or paper.largest_scale or paper.lock_image or paper.lock_text)
    assert BACKBONES["ViT-B/32"].context_length == 77
    with pytest.raises(UsageError, match="choose one of paper, modern"):
        recipe_named("best")


@pytest.mark.parametrize(
    ("source", "recipe"),
    [
        ("tiny", recipe_named("paper", epochs=4, **TINY)),
        ("tiny", recipe_named("modern", epochs=4, **TINY, micro_batch=3, lock_text=True)),
        ("tiny", recipe_named("modern", epochs=4, **TINY, lock_image=True)),
        ("tiny-resnet", recipe_named("paper", epochs=4, **TINY, micro_batch=4)),
    ],
    ids=["paper", "modern, cached, text locked", "modern, image locked", "resnet, cached"],
)
def test_training_lowers_the_loss_and_keeps_best_and_last(home: Path, tmp_path: Path, source: str, recipe: Recipe) -> None:
    meta, state = train(home, tmp_path, recipe, source)
    history = state["history"]
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert history[-1]["loss"] < history[0]["loss"]
    assert meta["metrics"]["retrieval_validation"]["pool"] == 6
    assert {f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)} < history[0].keys()
    best, last = (read_checkpoint(folder)[0] for folder in (tmp_path / "best", tmp_path))
    assert best["metrics"]["retrieval_validation"]["epoch"] == min(history, key=lambda row: row["validation_loss"])["epoch"]
    assert last["metrics"]["retrieval_validation"]["epoch"] == 4
    assert last["provenance"]["import"] == "random" and last["provenance"]["clip"]["batch_size"] == 8

    (_, before), (_, after) = read_checkpoint(home / source), read_checkpoint(tmp_path)
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    locked = "clip.visual." if recipe.lock_image else "clip.transformer." if recipe.lock_text else "none"
    assert moved and not any(k.startswith(locked) for k in moved)


def test_micro_batches_train_to_the_same_weights(home: Path, tmp_path: Path) -> None:
    recipe = recipe_named("paper", epochs=2, **TINY)
    _, whole = train(home, tmp_path / "whole", recipe)
    _, cached = train(home, tmp_path / "cached", replace(recipe, micro_batch=3))
    assert [row["loss"] for row in cached["history"]] == pytest.approx([row["loss"] for row in whole["history"]], abs=1e-4)
    assert_same_weights(cached["model"], whole["model"])


def test_the_scale_is_held(home: Path, tmp_path: Path) -> None:
    meta, state = train(home, tmp_path, recipe_named("modern", epochs=1, **TINY, largest_scale=12.0))
    assert meta["logit_scale"] == pytest.approx(12.0, abs=1e-3)
    assert state["model"]["logit_scale"].exp().item() == pytest.approx(12.0, abs=1e-3)


def test_shards_train_to_the_bits_of_a_folder_and_go_on_to_them(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_named("modern", epochs=2, **TINY)
    (folder, whole), (packed, streamed) = (train(home, tmp_path / data, recipe, data=data) for data in ("captions", "shards"))
    assert streamed["history"] == whole["history"]
    assert all(torch.equal(streamed["model"][k], x) for k, x in whole["model"].items())
    assert packed["provenance"]["clip"]["data_sha256"] == folder["provenance"]["clip"]["data_sha256"]
    assert (tmp_path / "shards" / SIGNATURES).read_bytes() == (tmp_path / "captions" / SIGNATURES).read_bytes()

    read = Pairs.read

    def interrupted(self: Pairs, order: Any, epoch: int, *more: Any, **options: Any) -> Iterator[Any]:
        for i, batch in enumerate(read(self, order, epoch, *more, **options)):
            if (epoch, i) == (1, 1):
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Pairs, "read", interrupted)
        train(home, tmp_path / "parts", recipe, data="shards")
    assert torch.load(tmp_path / "parts" / "state.pt", weights_only=True)["epoch"] == 1
    _, parts = train(home, tmp_path / "parts", replace(recipe, resume=True), data="shards")
    assert parts["history"] == whole["history"] and all(torch.equal(parts["model"][k], x) for k, x in whole["model"].items())


def test_a_picture_of_a_shard_that_does_not_decode_is_left_out_by_name(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(home / "shards", tmp_path / "data")
    path = tmp_path / "data" / "train-000010.tar"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"IDAT", b"IDAX", 1))
    with pytest.raises(InputError, match=rf"^{path}: train5.png: the PNG file is broken;.*\(1 of 22 images cannot be read"):
        pairs_for_training([tmp_path / "data"], (), 0.01)
    training, _ = pairs_for_training([tmp_path / "data"], (), 0.05)
    assert [p.image.name for p in training] == [f"train{i}.png" for i in range(16) if i != 5]
    said = capfd.readouterr().err
    assert f"left out; the first: {path}: train5.png: the PNG file is broken" in said and said.isascii()


def command(home: Path, output: Path, *options: str, data: str = "captions") -> list[str]:
    paths = ["--data", str(home / data), "--from", str(home / "tiny"), "--output", str(output)]
    settings = ["--epochs", "12", "--batch-size", "8", "--learning-rate", "1e-3", "--seed", "3", "--threads", "1"]
    return [tiny_clip.__file__, str(home), "train", "clip", *paths, *settings, *options]


SEEN = """  # notes each pair that a process trains on
import os, runpy, sys
from pmclip_deploy.train.images import Pairs
read = Pairs.read
def noted(self, order, epoch, *more, **options):
    with open(os.environ["SEEN"], "a") as file:
        file.write("".join(f"{epoch} {self.images[i].name}\\n" for part in order for i in part if self.augmentation != "none"))
    return read(self, order, epoch, *more, **options)
Pairs.read = noted
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.nightly  # starts four processes that import torch
@pytest.mark.parametrize(("data", "end"), [("captions", signal.SIGINT), ("shards", signal.SIGKILL)])
def test_an_interrupted_run_goes_on_with_two_processes_to_the_same_curve_and_weights(
    home: Path, tmp_path: Path, data: str, end: signal.Signals
) -> None:
    _, whole = train(home, tmp_path / "whole", recipe_named("paper", epochs=12, **TINY))

    process = subprocess.Popen([sys.executable, *command(home, tmp_path / "parts", data=data)], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    for line in process.stderr:
        if "epoch 1/12" in line:
            process.send_signal(end)
            break
    said = process.stderr.read().splitlines()
    assert process.wait(60) == (130 if end == signal.SIGINT else -end)
    state = torch.load(tmp_path / "parts" / "state.pt", weights_only=True)
    assert 0 < state["epoch"] < 12
    if end == signal.SIGINT:
        kept = re.fullmatch(r"train clip tiny: interrupted; \S+state.pt keeps epoch (\d+); go on with --resume", said[-1])
        assert kept and all("epoch" in line for line in said) and int(kept[1]) == state["epoch"], said
    assert state["history"] == whole["history"][: state["epoch"]]

    shutil.copytree(tmp_path / "parts", tmp_path / "alone")
    rest = replace(recipe_named("paper", epochs=12, **TINY), resume=True)
    _, alone = train(home, tmp_path / "alone", rest, data=data)
    assert all(torch.equal(alone["model"][k], x) for k, x in whole["model"].items())

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "SEEN": str(tmp_path / "seen")}
    (tmp_path / "script.py").write_text(SEEN)
    arguments = command(home, tmp_path / "parts", "--resume", "--json", data=data)
    done = subprocess.run(
        [*launcher, str(tmp_path / "script.py"), *arguments], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["provenance"]["clip"]["processes"] == 2
    two = torch.load(tmp_path / "parts" / "state.pt", weights_only=True)
    assert len(two["history"]) == 12
    for ours, alone_row in zip(two["history"], whole["history"], strict=True):
        assert ours["loss"] == pytest.approx(alone_row["loss"], abs=2e-4)
        assert ours["validation_loss"] == pytest.approx(alone_row["validation_loss"], abs=2e-4)
    assert_same_weights(two["model"], whole["model"])
    seen = sorted((tmp_path / "seen").read_text().splitlines())
    assert seen == sorted(f"{epoch} train{i}.png" for epoch in range(state["epoch"], 12) for i in range(16))  # each pair once


def test_what_is_read_is_what_inference_sees_and_draws_depend_on_seed_epoch_and_index(home: Path) -> None:
    paths = sorted((home / "captions" / "images").iterdir())[:6]
    preprocess, tokens = BACKBONES["tiny"].preprocess, torch.arange(6).view(6, 1)
    clean = Pairs(paths, tokens, preprocess, "none", 0)
    pixels, read = next(clean.read([[4, 1]], 0, 0))
    assert torch.equal(pixels[1], torch.from_numpy(tensor_from_pixels(picture_from_path(paths[1]).pixels, preprocess)))
    assert read.tolist() == [[4], [1]]
    for augmentation in ("crop and flip", "radiology"):
        pairs = Pairs(paths, tokens, preprocess, augmentation, 7)  # type: ignore[arg-type]
        a = [x for x, _ in pairs.read([[0, 1], [2, 3]], 1, 0)]
        b = [x for x, _ in pairs.read([[3, 2, 1, 0]], 1, 2)]
        assert torch.equal(torch.cat(a), b[0].flip(0)) and a[0].shape == (2, 3, 32, 32)
        assert not torch.equal(a[0], next(pairs.read([[0, 1]], 2, 0))[0])
        assert not torch.equal(a[0], next(Pairs(paths, tokens, preprocess, augmentation, 8).read([[0, 1]], 1, 0))[0])  # type: ignore[arg-type]


@pytest.mark.parametrize(("height", "width"), [(60, 80), (80, 60), (500, 3), (1, 1)])
def test_crops_lie_in_the_picture(height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    crops = [random_crop(height, width, generator) for _ in range(300)]
    assert all(0 <= r.start < r.stop <= height and 0 <= c.start < c.stop <= width for r, c in crops)
    if (height, width) == (60, 80):
        shares = [(r.stop - r.start) * (c.stop - c.start) / 4800 for r, c in crops]
        shapes = [(c.stop - c.start) / (r.stop - r.start) for r, c in crops]
        assert 0.06 < min(shares) < 0.2 and 0.8 < max(shares) <= 1
        assert 0.7 < min(shapes) < 0.8 and 1.25 < max(shapes) < 1.42


def break_(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut short": path.read_bytes()[:50], "no image": b"<html>404</html>" * 20}[how])


@pytest.mark.parametrize("how", ["missing", "empty", "cut short", "no image"])
def test_broken_images_are_left_out_up_to_a_share(tmp_path: Path, how: str, capfd: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / f"{i:03}.png" for i in range(100)]
    for i, path in enumerate(paths):
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(path)
    assert readable(paths, 0.01) == set(paths)
    break_(paths[70], how)
    assert readable(paths, 0.01) == set(paths) - {paths[70]}
    assert capfd.readouterr().err.startswith(f"1 of 100 images cannot be read and are left out; the first: {paths[70]}")
    break_(paths[30], how)
    with pytest.raises(InputError, match=rf"^{paths[30]}: .*2 of 100 .*more than 1%.*--skip-share"):
        readable(paths, 0.01)
    assert len(readable(paths, 0.05)) == 98


def test_bad_input_is_one_line(home: Path, tmp_path: Path) -> None:
    recipe = recipe_named("paper", epochs=1, **TINY)
    with pytest.raises(UsageError, match="fewer than one batch of 64"):
        train(home, tmp_path / "a", replace(recipe, batch_size=64))
    with pytest.raises(UsageError, match="nothing to train"):
        train(home, tmp_path / "b", replace(recipe, lock_image=True, lock_text=True))
    with pytest.raises(BundleError, match="not found"):
        train(home, tmp_path / "c", recipe, "none")
    data = tiny_clip.captions(tmp_path / "data")
    for image in (data / "images").iterdir():
        image.unlink()
    with pytest.raises(InputError, match=r"no such file.*22 of 22 images"):
        train_clip_on_pairs([data], home / "tiny", tmp_path / "d", recipe)
    with pytest.raises(InputError, match="no training pairs"):
        train_clip_on_pairs([data], home / "tiny", tmp_path / "d", recipe, share=1.0)
    for split in ("train", "val"):
        (data / f"{split}.jsonl").write_text("")
    with pytest.raises(InputError) as error:
        train_clip_on_pairs([data], home / "tiny", tmp_path / "e", recipe)
    assert error.value.exit_code == 3 and "\n" not in str(error.value)


def test_options_for_captions_need_a_checkpoint(tmp_path: Path, command: Callable[..., Result]) -> None:
    done = command("train", "clip", "--data", "x", "--output", tmp_path, "--micro-batch", "4")
    assert done.code == 2 and done.err == "error: --micro-batch needs --from; give --from CHECKPOINT, or leave this option out\n"


def test_the_validation_loss_is_that_of_whole_batches() -> None:
    image, text = (torch.randn(11, 4, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    scale = torch.tensor(5.0)
    first, second = (contrastive_loss(image[i : i + 4], text[i : i + 4], scale).item() for i in (0, 4))
    assert loss_over(image, text, [scale], 4, contrastive_loss) == pytest.approx((first + second) / 2)
    assert loss_over(image, text, [scale], 64, contrastive_loss) == pytest.approx(contrastive_loss(image, text, scale).item())


def test_retrieval_counts_what_stands_before_the_pair() -> None:
    rng = np.random.default_rng(0)
    image, text = (torch.from_numpy(rng.normal(size=(30, 3))) for _ in range(2))
    cosine = (image / image.norm(dim=1, keepdim=True)) @ (text / text.norm(dim=1, keepdim=True)).T
    out = recall_at(image, text, [str(i) for i in range(30)])
    for way, scores in (("image_to_text", cosine), ("text_to_image", cosine.T)):
        rank = [int((scores[i].argsort(descending=True) == i).nonzero()) for i in range(30)]
        assert [out[f"{way}_R@{k}"] for k in (1, 5, 10)] == [round(sum(r < k for r in rank) / 30, 4) for k in (1, 5, 10)]
    assert out["pool"] == 30 and not math.isnan(out["image_to_text_R@1"])


@pytest.mark.parametrize("packed", [False, True])
def test_copies_of_validation_files_do_not_train(tmp_path: Path, capsys: pytest.CaptureFixture[str], packed: bool) -> None:
    folder = tiny_clip.captions(tmp_path / "data", training=6, validation=3)
    shutil.copy(folder / "images" / "val1.png", folder / "images" / "train2.png")
    folder = tiny_clip.shards(tmp_path / "shards", folder) if packed else folder
    training, validation = pairs_for_training([folder], (), 0.01)
    assert [p.image.name for p in training] == [f"train{i}.png" for i in (0, 1, 3, 4, 5)] and len(validation) == 3
    assert "1 training image is left out" in capsys.readouterr().err
