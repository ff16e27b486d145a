"""MEVF's image networks: the authors' files and hostile ones, and training both, interrupted and not, on a few tiny images."""

import copy
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.command import Result

torch = pytest.importorskip("torch", reason="training needs the extra `train`")
pytest.importorskip("open_clip", reason="training needs the extra `train`")

from safetensors.torch import load_file, save_file
from torch import Generator, nn
from torch.nn import functional as F

from pmclip_deploy.errors import BundleError, InputError, UsageError
from pmclip_deploy.train import maml as M
from pmclip_deploy.train.autoencoder import grey_images, train_autoencoder
from pmclip_deploy.train.heads.vision import AutoEncoder, MamlNetwork, autoencoder_from_file, grey_from_path, maml_from_file
from pmclip_deploy.train.loop import Settings
from pmclip_deploy.train.maml import train_maml

LOADERS = pytest.mark.parametrize("load", [autoencoder_from_file, maml_from_file])
AUTHORS = {autoencoder_from_file: "pretrained_ae.pth", maml_from_file: "pretrained_maml.weights"}


# The authors' files


@torch.no_grad()
def test_the_authors_autoencoder_reconstructs_real_images(shared: Path) -> None:
    model = autoencoder_from_file(shared / "mevf" / "pretrained_ae.pth").eval()
    paths = sorted((shared / "vqa-rad" / "images").glob("*.jpg"))[:8]
    for path in paths:
        x = grey_from_path(path, 128)[None]
        assert x.shape == (1, 1, 128, 128) and x.dtype == torch.float32 and 0 <= x.min() < x.max() <= 1
        assert F.mse_loss(model(x), x) < 0.1 * x.var(), path.name
    fresh = AutoEncoder().eval()
    assert F.mse_loss(fresh(x), x) > 0.5 * x.var()


@torch.no_grad()
def test_the_authors_maml_network_holds_the_files_numbers(shared: Path) -> None:
    path = shared / "mevf" / "pretrained_maml.weights"
    model, data = maml_from_file(path).eval(), path.read_bytes()
    for convolution in model.convolutions:
        assert convolution.weight.permute(2, 3, 1, 0).contiguous().numpy().tobytes() in data  # TensorFlow's order
        assert convolution.bias.numpy().tobytes() in data
    images = [grey_from_path(p, 84) for p in sorted((shared / "vqa-rad" / "images").glob("*.jpg"))[:4]]
    features = model(torch.stack(images))
    assert features.shape == (4, 64) and features.isfinite().all() and features.std(0).mean() > 1e-3


class Hostile:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.proof),)


def arrays(extra: Any = None) -> dict[str, Any]:
    """What the authors' MAML file holds, with random values."""
    rng = np.random.default_rng(0)
    out: dict[str, Any] = {"conv1": rng.normal(size=(3, 3, 1, 64)).astype("f4"), "b1": rng.normal(size=64).astype("f4")}
    for i in (2, 3, 4):
        out |= {f"conv{i}": rng.normal(size=(3, 3, 64, 64)).astype("f4"), f"b{i}": rng.normal(size=64).astype("f4")}
    return out | ({"extra": extra} if extra is not None else {})


def as_numpy_1(content: Any) -> bytes:
    """Pickled as numpy 1 did, under the old module's name."""
    return pickle.dumps(content, 3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def test_a_pickle_of_arrays_is_read_into_the_network(tmp_path: Path) -> None:
    (tmp_path / "maml").write_bytes(as_numpy_1(arrays()))
    network = maml_from_file(tmp_path / "maml")
    for i, convolution in enumerate(network.convolutions, 1):
        np.testing.assert_array_equal(convolution.weight.detach().numpy(), arrays()[f"conv{i}"].transpose(3, 2, 0, 1))
        np.testing.assert_array_equal(convolution.bias.detach().numpy(), arrays()[f"b{i}"])


def hostile_files(proof: Path) -> dict[str, bytes]:
    zipped = io.BytesIO()
    torch.save({"conv1.weight": torch.zeros(64, 1, 3, 3)}, zipped)
    rewritten = io.BytesIO()
    with zipfile.ZipFile(zipped) as old, zipfile.ZipFile(rewritten, "w") as new:
        for item in old.infolist():
            hostile = pickle.dumps({"conv1.weight": Hostile(proof)}, 2)
            new.writestr(item.filename, hostile if item.filename.endswith("data.pkl") else old.read(item))
    files = {f"pickle {n}": pickle.dumps(Hostile(proof), n) for n in range(pickle.HIGHEST_PROTOCOL + 1)}
    files |= {"among arrays": as_numpy_1(arrays(Hostile(proof))), "among arrays, protocol 4": pickle.dumps(arrays(Hostile(proof)), 4)}
    return files | {"torch zip": rewritten.getvalue()}


def test_the_hostile_file_would_run(tmp_path: Path) -> None:
    pickle.loads(hostile_files(tmp_path / "proof")["among arrays"].replace(b"numpy.core", b"numpy._core"))  # noqa: S301
    assert (tmp_path / "proof").is_dir()


@LOADERS
def test_a_hostile_file_is_refused_and_not_run(load: Any, tmp_path: Path) -> None:
    for name, content in hostile_files(tmp_path / "proof").items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BundleError, match="broken, or not the weights") as error:
            load(tmp_path / name)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "proof").exists(), name


@LOADERS
def test_what_is_no_such_network_is_one_clear_line(load: Any, tmp_path: Path) -> None:
    other = {autoencoder_from_file: MamlNetwork(), maml_from_file: AutoEncoder()}[load]
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    torch.save(other.state_dict(), tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "noise").write_bytes(np.random.default_rng(0).bytes(5000))
    missing, reshaped = arrays(), arrays()
    missing.pop("b3")
    reshaped["b3"] = np.zeros(65, "f4")
    fortran = arrays() | {"conv2": np.asfortranarray(arrays()["conv2"])}
    for name, content in {"missing": missing, "reshaped": reshaped, "fortran": fortran}.items():
        (tmp_path / name).write_bytes(as_numpy_1(content))
    for path in tmp_path.iterdir():
        with pytest.raises(BundleError, match="broken, or not the weights"):
            load(path)
    with pytest.raises(BundleError, match="cannot be read"):
        load(tmp_path / "none")


@LOADERS
def test_a_truncated_or_swapped_file_of_the_authors_is_refused(load: Any, shared: Path, tmp_path: Path) -> None:
    data = (shared / "mevf" / AUTHORS[load]).read_bytes()
    for share in (0.01, 0.5, 0.999):
        (tmp_path / "part").write_bytes(data[: int(share * len(data))])
        with pytest.raises(BundleError, match="broken"):
            load(tmp_path / "part")
    for name in set(AUTHORS.values()) - {AUTHORS[load]}:
        with pytest.raises(BundleError, match="not the weights"):
            load(shared / "mevf" / name)


# Training


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of seven bright pictures, each class in a shade of its own, one of them in colour, beside files that are none."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for c, name in enumerate(("abdomen", "chest", "head", "knee")):
        (folder / name).mkdir()
        for i in range(7):
            pixels = (240 - 12 * c + rng.integers(0, 5, (40, 50))).astype(np.uint8)
            Image.fromarray(pixels if i else np.stack([pixels, pixels, pixels // 2], 2)).save(folder / name / f"{i}.png")
    (folder / "chest" / "notes.txt").write_text("no picture")
    (folder / "few").mkdir()
    Image.fromarray(pixels).save(folder / "few" / "0.png")
    rows = [{"image": f"{c}/{i}.png", "label": c} for c in ("chest", "head", "knee") for i in range(7)]
    (folder / "labels.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def same(a: Path, b: Path) -> bool:
    x, y = load_file(a), load_file(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def interrupted_after_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next training stops when it has written its first state."""
    replace = Path.replace

    def stop(self: Path, target: Path) -> Path:
        replace(self, target)
        monkeypatch.setattr(Path, "replace", replace)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stop)


def test_the_autoencoder_trains_and_resumes_to_the_same_weights(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(3, 0.05, 12, 3)
    meta = train_autoencoder([pictures], tmp_path / "whole.safetensors", settings)
    assert meta["metrics"]["held_out"] == 2 and meta["metrics"]["skipped"] == 2  # the note and the labels
    white, _ = grey_images(sorted(pictures.rglob("*.png")), 128)
    with torch.no_grad():
        torch.manual_seed(3)
        x = white[:4] / 255
        start, trained = (F.mse_loss(m(x), x) for m in (AutoEncoder(), autoencoder_from_file(tmp_path / "whole.safetensors")))
    assert trained < 0.7 * start

    interrupted_after_an_epoch(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train_autoencoder([pictures], tmp_path / "parts.safetensors", settings)
    assert not (tmp_path / "parts.safetensors").exists()
    with pytest.raises(BundleError, match="other settings"):
        train_autoencoder([pictures], tmp_path / "parts.safetensors", Settings(3, 0.05, 12, 4, resume=True))
    again = train_autoencoder([pictures], tmp_path / "parts.safetensors", Settings(3, 0.05, 12, 3, resume=True))
    assert same(tmp_path / "whole.safetensors", tmp_path / "parts.safetensors") and again["metrics"] == meta["metrics"]


def test_maml_trains_and_resumes_to_the_same_weights(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(2, 0.01, 2, 3)
    meta = train_maml(pictures, tmp_path / "whole.safetensors", settings, tasks=4)
    assert meta["metrics"]["classes"] == 4 and meta["metrics"]["skipped"] == 1
    torch.manual_seed(3)
    assert not torch.equal(maml_from_file(tmp_path / "whole.safetensors").convolutions[3].weight, MamlNetwork().convolutions[3].weight)
    interrupted_after_an_epoch(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train_maml(pictures, tmp_path / "parts.safetensors", settings, tasks=4)
    again = train_maml(pictures, tmp_path / "parts.safetensors", Settings(2, 0.01, 2, 3, resume=True), tasks=4)
    assert same(tmp_path / "whole.safetensors", tmp_path / "parts.safetensors") and again["metrics"] == meta["metrics"]


def test_the_meta_gradient_is_that_at_the_adapted_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(MamlNetwork(), nn.Linear(64, M.WAYS))
    classes = [torch.randint(0, 255, (7, 1, 84, 84), dtype=torch.uint8) for _ in range(4)]
    learnt, asked, labels = M.task(classes, Generator().manual_seed(1))
    adapted = copy.deepcopy(model)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=M.RATE)
    for _ in range(M.STEPS):
        optimizer.zero_grad()
        F.cross_entropy(adapted(learnt), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    expected = F.cross_entropy(adapted(asked), labels)
    expected.backward()

    loss, _ = M.judged(model, learnt, asked, labels)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for got, wanted in zip(model.parameters(), adapted.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-3, atol=1e-5)


def test_a_task_is_three_classes_of_different_images() -> None:
    classes = [10 * c + torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 1, 84, 84) for c in range(5)]
    drawn = set()
    for seed in range(20):
        learnt, asked, labels = M.task(classes, Generator().manual_seed(seed))
        assert learnt.shape == asked.shape == (9, 1, 84, 84) and labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        shades = [(x[:, 0, 0, 0] * 255).round().long() for x in (learnt, asked)]
        assert len(set(torch.cat(shades).tolist())) == 18  # no image twice
        kinds = [(s // 10).view(3, 3) for s in shades]
        assert torch.equal(kinds[0], kinds[1]) and (kinds[0] == kinds[0][:, :1]).all() and len(kinds[0].unique()) == 3
        drawn.add(tuple(kinds[0][:, 0].tolist()))
    assert len(drawn) > 10


def test_classes_come_from_folders_or_from_lines(pictures: Path, tmp_path: Path) -> None:
    by_folder, by_line = M.paths_by_label(pictures), M.paths_by_label(pictures / "labels.jsonl")
    assert set(by_folder) == {"abdomen", "chest", "few", "head", "knee"}
    for name in ("head", "knee"):
        assert by_line[name] == by_folder[name]
    with pytest.raises(InputError, match="2 classes have 6 images or more"):
        M.classes_from_images({k: by_folder[k] for k in ("head", "knee", "few")}, 0, pictures)
    with pytest.raises(InputError, match="0 classes"):
        M.classes_from_images(by_folder, 5, pictures)
    for name, content in {"line 2": '{"image": "a", "label": 1}\n[1]\n', "line 1 ": "{", "cannot be read": None}.items():
        if content:
            (tmp_path / "rows.jsonl").write_text(content)
        with pytest.raises(InputError, match=name):
            M.paths_by_label(tmp_path / ("rows.jsonl" if content else "none.jsonl"))


def test_unfit_training_data_is_one_clear_line(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    with pytest.raises(InputError, match="no such folder"):
        train_autoencoder([tmp_path / "none"], output, Settings(1, 1e-3, 2))
    with pytest.raises(InputError, match="no image"):
        train_autoencoder([tmp_path], output, Settings(1, 1e-3, 2))
    (tmp_path / "note.txt").write_text("no picture")
    with pytest.raises(InputError, match=r"note\.txt"):
        train_autoencoder([tmp_path], output, Settings(1, 1e-3, 2))
    with pytest.raises(UsageError, match="fewer than one batch"):
        train_autoencoder([pictures], output, Settings(1, 1e-3, 64))
    with pytest.raises(UsageError, match="raise --tasks"):
        train_maml(pictures, output, Settings(1, 1e-3, 5), tasks=4)
    output.with_name("x.safetensors.training").write_text("in the way")
    for train, data in ((train_autoencoder, [pictures]), (train_maml, pictures)):
        with pytest.raises(UsageError, match=r"x\.safetensors\.training: cannot be made a folder \(File exists\)"):
            train(data, output, Settings(1, 1e-3, 1))  # type: ignore[operator]
    assert not output.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("autoencoder", "--data", "{}/chest", "--data", "{}/head", "--batch-size", "4", "--limit", "5"),
        ("maml", "--data", "{}/labels.jsonl", "--tasks", "1", "--batch-size", "1"),
    ],
    ids=lambda a: a[0],
)
def test_both_commands_write_what_their_loaders_read(
    arguments: tuple[str, ...], pictures: Path, tmp_path: Path, command: Callable[..., Result]
) -> None:
    def run(output: Path, *more: str) -> Result:
        return command("train", *[a.format(pictures) for a in arguments], "--output", output, "--epochs", "1", "--json", *more)

    output = tmp_path / "new" / "weights.safetensors"
    code, out, _ = run(output)
    assert code == 0 and json.loads(out)["checkpoint"] == str(output)
    assert json.loads(out)["provenance"]["seed"] == 1
    (autoencoder_from_file if arguments[0] == "autoencoder" else maml_from_file)(output)
    code, _, err = run(tmp_path / "new")
    assert code == 2 and "is a folder" in err and err.count("\n") == 1
    for seed in (-1, 2**32):
        code, _, err = run(tmp_path / "seed.safetensors", "--seed", str(seed))
        assert code == 2 and "--seed" in err
