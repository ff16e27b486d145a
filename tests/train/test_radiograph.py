"""Pictures that are no radiology images, and the branch that tells them apart."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="needs torch: pip install '.[train]'")
pytest.importorskip("open_clip", reason="needs open_clip: pip install '.[train]'")
pytest.importorskip("skimage", reason="needs scikit-image's photographs: pip install '.[train]'")

from pmclip_deploy.errors import InputError
from pmclip_deploy.spec import Preprocess
from pmclip_deploy.train import radiograph
from pmclip_deploy.train.backbones.base import LiteTowers
from pmclip_deploy.train.drawings import DRAWN, SIZE
from pmclip_deploy.train.heads.lite import LiteHead, unit
from pmclip_deploy.train.nonradiographs import changed, filed, nonradiographs, photographs_from_folder

PREPROCESS = Preprocess(32, "squash", (0.5,) * 3, (0.5,) * 3)


# --- the pictures ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DRAWN)
def test_a_drawing_follows_from_its_seed_and_no_two_are_equal(kind: str) -> None:
    a, b, c = (np.asarray(DRAWN[kind](np.random.default_rng(seed)).convert("RGB")) for seed in (3, 3, 4))
    assert a.shape == (SIZE, SIZE, 3) and (a == b).all() and not (a == c).all()


def test_half_are_grey_and_photographs_take_every_second_place() -> None:
    red = Image.new("RGB", (300, 200), (250, 10, 10))
    pictures = nonradiographs(60, 0, [red] * 2000)
    grey = [bool((p.max(-1) == p.min(-1)).all()) for p in pictures]
    assert 15 < sum(grey) < 50
    reddest = [p.reshape(-1, 3)[p[..., 0].argmax()] for p, is_grey in zip(pictures, grey, strict=True) if not is_grey]
    assert sum(int(r) - int(g) > 60 for r, g, _ in reddest) >= 6


def test_a_folder_gives_each_picture_once_and_no_icons(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first, second = (Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((900, 600)) for _ in range(2))
    first.save(tmp_path / "a.jpg")
    first.resize((450, 300)).save(tmp_path / "again.png")
    first.resize((48, 48)).save(tmp_path / "icon.png")
    (tmp_path / "no picture.jpg").write_text("text")
    second.save(tmp_path / "in.webp")
    (tmp_path / "c.rcc").write_bytes(b"qres" + (tmp_path / "in.webp").read_bytes() + b"name RIFF")
    (tmp_path / "in.webp").unlink()
    found, sha256 = photographs_from_folder(tmp_path)
    assert [picture.size for picture in found] == [(640, 427), (640, 427)] and len(sha256) == 64
    assert photographs_from_folder(tmp_path)[1] == sha256
    (tmp_path / "c.rcc").unlink()
    assert photographs_from_folder(tmp_path)[1] != sha256


def test_a_folder_without_photographs_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no photographs"):
        photographs_from_folder(tmp_path)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_changes_keep_the_size_and_radiology_its_colours(mode: str) -> None:
    picture = Image.fromarray(np.arange(120 * 90, dtype=np.uint8).reshape(90, 120) // 2 + 60).convert(mode)
    rng = np.random.default_rng(1)
    assert all(changed(picture, rng).size == (120, 90) for _ in range(40))
    assert all((out := filed(picture, rng)).size == (120, 90) and out.mode == mode for _ in range(40))


def test_radiology_is_varied_but_stays_what_it_is() -> None:
    rng = np.random.default_rng(2)
    film = np.asarray(Image.linear_gradient("L").resize((700, 500)))
    for pixels in (film, np.repeat(film[..., None], 3, 2)):
        out = [radiograph.varied(pixels, rng) for _ in range(60)]
        assert all(o.ndim == pixels.ndim and max(o.shape[:2]) <= 600 and o.max() > 20 for o in out)
    assert all((o[..., 0] == o[..., 1]).all() for o in out if not (o != o[..., :1]).any()) and len({o.shape for o in out}) > 10


# --- the fit --------------------------------------------------------------------------------------------------------------------


class Levels(LiteTowers):
    """A tower that sees how bright and how coloured a picture is."""

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        spread = (pixels.amax(1) - pixels.amin(1)).mean((1, 2))
        return torch.stack([spread, pixels.mean((1, 2, 3)), pixels.std((1, 2, 3)), torch.ones(len(pixels))], 1)


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """Forty films that differ in level, ten groups."""
    rows = []
    (folder := tmp_path / "films" / "images").mkdir(parents=True)
    for i in range(40):
        Image.fromarray(np.full((40, 50), 40 + i, np.uint8)).save(folder / f"{i:02}.png")
        rows.append({"image": f"images/{i:02}.png", "group": f"g{i // 4}", "labels": {"fractured": i % 3 == 0}})
    (tmp_path / "films" / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path / "films"


def test_what_is_kept_aside_passes_at_zero(films: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(radiograph, "NEGATIVES", 70)
    monkeypatch.setattr(radiograph, "KEPT", 0.75)
    torch.manual_seed(0)
    paths, head = sorted((films / "images").iterdir()), LiteHead(4, 3, 2, 2, 4)
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    fitted = radiograph.train_radiograph(Levels(), head, PREPROCESS, [paths], photographs_from_folder(None), 1)
    assert fitted.radiology == 40 and fitted.others == 70 and fitted.photographs_sha256 is None
    same = [name for name, tensor in head.state_dict().items() if (tensor == before[name]).all()]
    assert sorted(set(before) - set(same)) == [f"radiograph.{layer}.{part}" for layer in (0, 2) for part in ("bias", "weight")]
    logits = head.radiograph(unit(torch.tensor([[0.0, -0.6, 0.02, 1.0], [1.2, 0.1, 0.8, 1.0]]))).squeeze(-1)  # a dark grey film; colours
    assert logits[0] > 0 > logits[1] and fitted.turned_away > 0.3


def test_a_fold_leaves_out_whole_groups(films: Path) -> None:
    (everything,), none = radiograph.pictures_of_films([films])
    assert len(everything) == 40 and none == []
    left_out = []
    for fold in range(radiograph.FOLDS):
        (paths,), apart = radiograph.pictures_of_films([films], fold)
        groups = {f"films g{int(path.stem) // 4}" for path in paths}
        assert not groups & set(apart) and len(groups) + len(apart) == 10
        left_out += apart
    assert len(left_out) == len(set(left_out)) == 10
