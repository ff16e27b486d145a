"""`train findings`: films and folds, views, one network, what out-of-fold logits earn, and the command end to end on a few films."""

import json
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


from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.bundle.types import Graph
from pmclip_deploy.errors import BundleError, InputError, UsageError
from pmclip_deploy.imaging.preprocess import resized
from pmclip_deploy.models import DEFAULT_BUNDLE
from pmclip_deploy.train.checkpoint import read_checkpoint, under
from pmclip_deploy.train.datasets import Question
from pmclip_deploy.train.findings import films as films_module
from pmclip_deploy.train.findings import strata, training, views
from pmclip_deploy.train.findings.films import PREPROCESS, REGIONS, TRAIN, VAL, Film, films_from_folders, folds_of_films, stratified_folds
from pmclip_deploy.train.findings.gate import least_right, least_threshold, logistic_curve, missed
from pmclip_deploy.train.findings.groups import KEPT_FOR_DEMO
from pmclip_deploy.train.findings.net import FindingsNet
from pmclip_deploy.train.findings.strata import Outcomes, findings_from_outcomes, placed
from pmclip_deploy.train.findings.training import Labels, drawn_batches, new_net, trained_net
from pmclip_deploy.train.findings.views import Views, augmented, square_of_film, views_of_films
from pmclip_deploy.train.loop import Settings
from tests.tiny.bundle import tiny_manifest

CHECKPOINT = DEFAULT_BUNDLE.parent / "checkpoint"
CPU = torch.device("cpu")


def film(i: int, fractured: bool | None, group: str, **changes: Any) -> Film:
    pixels = np.random.default_rng(i).integers(0, 200, (60, 50), dtype=np.uint8)
    hand = tuple(region == "hand" for region in REGIONS)
    return replace(Film(f"set/{i}", pixels, "set", "folds", group, (fractured, None), hand, boxes=()), **changes)


# --- films and folds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_group_stays_in_one_fold_and_the_folds_are_alike(count: int) -> None:
    rng = np.random.default_rng(count)
    groups = [f"g{k}" for k in rng.integers(0, 60, 900)]
    positive = (rng.random(900) < 0.2).tolist()
    films = [film(i, yes, group) for i, (group, yes) in enumerate(zip(groups, positive, strict=True))]
    folds = folds_of_films(films, count)
    assert all(len({int(k) for k, f in zip(folds, films, strict=True) if f.group == group}) == 1 for group in groups)
    rows, yes = (np.bincount(folds, w, count) for w in (None, positive))
    assert rows.max() / rows.min() < 1.15 and yes.max() / yes.min() < 1.15


def test_folds_depend_on_names_and_not_on_the_order_of_films() -> None:
    groups, positive = ["a", "b", "c", "a", "d"], [True, False, True, False, False]
    assert stratified_folds(groups, positive, 2) == stratified_folds(groups[::-1], positive[::-1], 2)


def test_other_parts_have_no_fold_and_too_few_groups_are_refused() -> None:
    films = [film(i, i % 2 == 0, f"g{i}") for i in range(4)]
    other = [film(8, None, "x", part="train"), film(9, None, "y", part="val")]
    assert folds_of_films([*films, *other], 2).tolist()[4:] == [TRAIN, VAL]
    with pytest.raises(UsageError, match=r"set: 4 groups .* into 5 folds; lower --folds"):
        folds_of_films(films, 5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """18 films in each of FracAtlas's and Kermany's layouts, with a bright bar where the finding is, and 8 of VQA-Med's."""
    home, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)

    def picture(folder: Path, name: str, bar: bool) -> None:
        pixels = rng.integers(20, 120, (90, 70), dtype=np.uint8)
        if bar:
            pixels[30:45, 20:50] = 250
        (folder / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "images" / name)

    fracatlas, kermany, vqa = home / "fracatlas", home / "kermany-cxr", home / "vqa-med-2019"
    rows = []
    for i in range(18):
        picture(fracatlas, f"IMG{i}.png", i % 3 == 0)
        labels = {"hand": i % 2, "leg": (i + 1) % 2, "hip": 0, "shoulder": int(i == 5), "fractured": int(i % 3 == 0)}
        box = [[20 / 70, 30 / 90, 30 / 70, 15 / 90]] if i % 3 == 0 else []
        rows.append({"image": f"images/IMG{i}.png", "group": f"fa{i // 2}", "original_size": [70, 90], "labels": labels, "boxes": box})
    (fracatlas / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = []
    for i in range(18):
        ill = i % 2 == 1
        name, group = (f"person{i}_virus_{i}.png", f"Pperson{i}") if ill else (f"IM-{100 + 4 * i:04}-0001.png", "NIM")
        picture(kermany, name, ill)
        labels = {"finding": "pneumonia" if ill else "normal", "cause": None}
        rows.append({"image": f"images/{name}", "group": group, "original_size": [70, 90], "labels": labels})
    (kermany / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split, count in (("train", 4), ("val", 4)):
        rows = []
        for i in range(count):
            picture(vqa, f"{split}{i}.png", i % 2 == 0)
            said = {"modality": "xr - plain film", "organ": "musculoskeletal", "abnormality": ("femur fracture", "osteosarcoma")[i % 2]}
            rows += [{"image": f"{split}{i}.png", "category": k, "question": f"what {k}?", "answer": v} for k, v in said.items()]
        (vqa / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"fracatlas": fracatlas, "kermany": kermany, "vqa": vqa}


@pytest.fixture
def few_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(films_module, "NO_RADIOLOGY", 8)
    monkeypatch.setattr(films_module, "HELD_OUT", 3)


@pytest.mark.usefixtures("few_others")
def test_films_say_what_their_datasets_know(data: dict[str, Path]) -> None:
    films = {f.name: f for f in films_from_folders(list(data.values()))}
    assert len(films) == 18 + 18 + 8 + 8
    broken, whole = films["fracatlas/IMG0.png"], films["fracatlas/IMG1.png"]
    assert broken.findings == (True, None) and whole.findings == (False, None)
    assert len(broken.boxes or ()) == 1 and whole.boxes == ()
    assert films["fracatlas/IMG5.png"].regions == (True, False, False, True, False, False)
    ill, normal = films["kermany-cxr/person1_virus_1.png"], films["kermany-cxr/IM-0100-0001.png"]
    assert ill.findings == (False, True) and normal.findings == (False, False)
    assert ill.boxes is None and ill.children and not broken.children
    assert normal.group == "NIM10" and films["kermany-cxr/IM-0116-0001.png"].group == "NIM11" and ill.group == "Pperson1"
    assert films["vqa-med-2019/train0.png"].findings[0] is True and films["vqa-med-2019/val1.png"].findings[0] is False
    assert [f.part for f in films.values() if f.source == "no radiology"] == ["train"] * 5 + ["val"] * 3
    assert len(films_from_folders(list(data.values()), 2)) == 2 + 2 + 4 + 4


@pytest.mark.usefixtures("few_others")
def test_the_demos_films_and_their_like_neither_train_nor_validate(data: dict[str, Path], tmp_path: Path) -> None:
    labels = (data["fracatlas"] / "labels.jsonl").read_text().replace('"fa3"', f'"{KEPT_FOR_DEMO[0]}"')
    (tmp_path / "labels.jsonl").write_text(labels)
    names = {f.name.partition("/")[2] for f in films_from_folders([tmp_path])}
    assert {f"IMG{i}.png" for i in range(18)} - names == {"IMG6.png", "IMG7.png"}


@pytest.mark.parametrize(
    ("said", "finding", "region"),
    [
        ({"modality": ("?", "xr - plain film"), "organ": ("?", "musculoskeletal"), "abnormality": ("?", "fx of radius")}, True, None),
        ({"modality": ("?", "xr - plain film"), "organ": ("?", "musculoskeletal")}, None, None),
        ({"modality": ("?", "xr - plain film"), "organ": ("?", "lung, mediastinum, pleura")}, None, "chest"),
        ({"modality": ("is this an x-ray?", "yes"), "organ": ("?", "breast")}, None, "other"),
        ({"modality": ("is this a ct or plain film?", "yes"), "organ": ("?", "breast")}, None, "other"),
        ({"modality": ("was it taken with contrast?", "no")}, None, "other"),
        ({"modality": ("?", "mr - t2 weighted"), "abnormality": ("?", "fracture")}, None, "other"),
    ],
)
def test_answers_tell_what_a_picture_is(said: dict[str, tuple[str, str]], finding: bool | None, region: str | None) -> None:
    questions = [Question(Path("a.png"), q, a, category, a in ("yes", "no")) for category, (q, a) in said.items()]
    made = films_module._film_of_questions("a", Path("a.png"), questions, "train")
    assert made is not None and made.findings == (finding, None)
    assert made.regions == (tuple(r == region for r in REGIONS) if region else (None,) * len(REGIONS))


def test_a_broken_row_is_named(data: dict[str, Path], tmp_path: Path) -> None:
    line = (data["fracatlas"] / "labels.jsonl").read_text().splitlines()[0]
    for second, said in (("{", "line 2: not a JSON object"), ('{"image": "images/a.png"}', "line 2: 'labels' is missing")):
        (tmp_path / "labels.jsonl").write_text(f"{line}\n{second}\n")
        with pytest.raises(InputError, match=said):
            films_from_folders([tmp_path])


# --- views ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(90, 200), (200, 90), (500, 400)], ids=["wide", "tall", "large"])
def test_a_box_lies_on_the_square_where_its_pixels_do(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(1).integers(30, 60, shape, dtype=np.uint8)
    pixels[: shape[0] // 5] = 0  # a margin, which is cut off
    top, left, height, width = shape[0] // 2, shape[1] // 3, shape[0] // 6, shape[1] // 4
    pixels[top : top + height, left : left + width] = 255
    box = (left / shape[1], top / shape[0], width / shape[1], height / shape[0])
    rows, columns = np.where(resized(pixels, PREPROCESS) > 150)
    assert np.allclose(placed(box, pixels, 320), (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1), atol=1.5)


def test_a_view_s_mask_follows_its_picture() -> None:
    pixels = np.random.default_rng(1).integers(0, 40, (100, 80), dtype=np.uint8)
    pixels[40:70, 20:60] = 255
    square = square_of_film(film(0, True, "g", image=pixels, boxes=((0.25, 0.4, 0.5, 0.3),)))
    assert square.shape == (4, 360, 360)
    x, mask = augmented(torch.stack([square] * 24).float() / 255, torch.Generator().manual_seed(3))
    assert x.shape == (24, 3, 320, 320) and mask.shape == (24, 20, 20) and x.min() >= 0 and x.max() <= 1
    bright = torch.nn.functional.avg_pool2d(x[:, :1], 16)[:, 0]
    both = torch.stack([bright.flatten(1), mask.flatten(1)])
    correlation = [float(torch.corrcoef(both[:, i])[0, 1]) for i in range(24)]
    assert np.median(correlation) > 0.8 and sum(c > 0.5 for c in correlation) >= 20  # a few are inverted


@pytest.fixture(scope="module")
def trunk() -> dict[str, Any]:
    return read_checkpoint(CHECKPOINT)[1]


def test_views_go_on_where_they_were_cut_off_and_are_used_again(
    trunk: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "BATCH", 4)
    films = [film(i, i % 2 == 0, f"g{i}", views=2) for i in range(5)] + [film(9, None, "x", part="val")]
    net, key, write = new_net(trunk).eval(), {"seed": 1}, views._Writer.write
    written: list[int] = []

    def counted(self: Any, start: int, *rest: Any) -> None:
        if len(written) == 2 and cut:
            raise KeyboardInterrupt
        written.append(start)
        write(self, start, *rest)

    monkeypatch.setattr(views._Writer, "write", counted)
    cut = False
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = views_of_films(films, net, tmp_path / "whole", key, 1, False, CPU)
    assert written == [0, 4, 8] and whole.features.shape == (10, 40, 40, 40) and whole.count.tolist() == [2] * 5 + [0]
    written.clear()
    cut = True
    with pytest.raises(KeyboardInterrupt):
        views_of_films(films, net, tmp_path / "parts", key, 1, False, CPU)
    cut = False
    parts = views_of_films(films, net, tmp_path / "parts", key, 1, False, CPU)
    again = views_of_films(films, net, tmp_path / "parts", key, 1, True, CPU)
    assert written == [0, 4, 8]
    assert all(np.array_equal(whole.features, x.features) and np.array_equal(whole.masks, x.masks) for x in (parts, again))
    with pytest.raises(BundleError, match="other settings"):
        views_of_films(films, net, tmp_path / "parts", {"seed": 2}, 2, True, CPU)


# --- training -------------------------------------------------------------------------------------------------------------------


def small_views(films: list[Film]) -> Views:
    count = np.array([f.views for f in films])
    x = torch.randn(int(count.sum()), 8, 8, 40, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    masks = (np.random.default_rng(0).random((len(x), 4, 4)) < 0.2).astype(np.uint8) * 255
    return Views(np.cumsum(count) - count, count, x.view(torch.int16).numpy(), masks)


def test_a_film_comes_as_often_as_its_weight_says() -> None:
    films = [film(0, True, "a", weight=3, views=4), film(1, False, "b", weight=0.25, views=2), film(2, False, "c")]
    labels, seen = Labels.of_films(films, CPU), small_views(films)
    settings = Settings(epochs=1, learning_rate=0, batch_size=4)
    drawn = [batch for epoch in range(400) for batch in drawn_batches(np.arange(3), labels, seen, settings, 1, epoch)]
    counts = np.bincount(np.concatenate([of for of, _ in drawn]), minlength=3) / 400
    assert counts[0] > 2.6 and 0.15 < counts[1] < 0.3 and 0.9 < counts[2] < 1.2
    rows = {(int(i), int(row)) for of, rows in drawn for i, row in zip(of, rows, strict=True)}
    assert rows == {(0, 0), (0, 1), (0, 2), (0, 3), (1, 4), (1, 5), (2, 6)}


def test_training_resumes_to_the_weights_of_an_uninterrupted_run(
    trunk: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    films = [film(i, i % 2 == 0, f"g{i}") for i in range(12)]
    labels, seen, loss_of_batch = Labels.of_films(films, CPU), small_views(films), training.loss_of_batch
    settings = Settings(epochs=3, learning_rate=1e-3, batch_size=4, seed=2)

    def run(name: str, of: Settings) -> FindingsNet:
        return trained_net("one", np.arange(12), labels, seen, trunk, of, {}, tmp_path / name / "state.pt", CPU)[0]

    whole, steps = run("whole", settings), []

    def cut(*arguments: Any) -> Any:
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return loss_of_batch(*arguments)

    monkeypatch.setattr(training, "loss_of_batch", cut)
    with pytest.raises(KeyboardInterrupt):
        run("parts", settings)
    parts = run("parts", replace(settings, resume=True))
    assert len(steps) == 5 + 6
    a, b = whole.state_dict(), parts.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    locked = under({f"x.{k}": v for k, v in a.items()}, "x.trunk.blocks.0")
    assert all(torch.equal(v, trunk[f"clip.visual.trunk.blocks.0.{k}"]) for k, v in locked.items())
    assert not torch.equal(a["trunk.conv_head.weight"], trunk["clip.visual.trunk.conv_head.weight"])


def test_another_tower_is_refused() -> None:
    with pytest.raises(BundleError, match="no EfficientNet-Lite0"):
        new_net({"clip.visual.conv1.weight": torch.zeros(1)})


# --- strata ---------------------------------------------------------------------------------------------------------------------


def outcomes_of(count: int, shift: float, share: float = 0.2, **changes: Any) -> Outcomes:
    """Hands in four folds; the logit of a fracture is ``shift`` higher, and its map points at the box."""
    rng = np.random.default_rng(7)
    positive = rng.random(count) < share
    films = tuple(
        film(i, bool(yes), f"g{i // 3}", boxes=((0.1, 0.1, 0.2, 0.2),) if yes else (), **changes) for i, yes in enumerate(positive)
    )
    finding = np.stack([rng.normal(size=count) + shift * positive, np.zeros(count)], axis=1)
    places = np.zeros((count, 2, 20, 20))
    places[:, 0, 4, 6] = 1  # (0.325, 0.225) of the square: a picture of 60 x 50 leaves a twelfth on each side
    region = np.tile([3.0, 0, 0, 0, 0, 0], (count, 1))
    return Outcomes(films, np.array([i // 3 % 4 for i in range(count)]), finding, region, places)


def test_a_threshold_is_the_least_logit_at_the_specificity() -> None:
    rng = np.random.default_rng(0)
    negative, positive = rng.normal(size=1000), rng.normal(size=400) + 2
    logit, truth = np.concatenate([negative, positive]), np.arange(1400) >= 1000
    found = least_threshold(logit, truth)
    assert (negative < found).sum() == 900
    assert not ((logit > np.sort(negative)[899]) & (logit < found)).any()


def test_a_threshold_rises_where_a_yes_would_be_right_too_seldom() -> None:
    rng = np.random.default_rng(0)
    logit, truth = np.concatenate([rng.normal(size=500), rng.normal(size=480) + 4]), np.arange(980) >= 500
    found = least_threshold(logit, truth)
    assert truth[logit >= found].mean() >= least_right(480 / 980) > truth[logit >= np.sort(logit[:500])[450]].mean()


def test_no_fold_s_own_labels_decide_its_answers() -> None:
    known = outcomes_of(600, 2.0)
    flipped = tuple(
        replace(f, findings=(not f.findings[0], None)) if k == 0 else f for k, f in zip(known.fold.tolist(), known.films, strict=True)
    )
    one, other = (strata._judged(of, 0) for of in (known, replace(known, films=flipped)))
    own = known.fold == 0
    assert np.array_equal(one.yes[own], other.yes[own]) and np.array_equal(one.probability[own], other.probability[own])
    assert not np.array_equal(one.probability[~own], other.probability[~own])


def test_a_logistic_curve_gives_the_probability() -> None:
    rng = np.random.default_rng(0)
    logit = rng.normal(size=20_000) * 3
    positive = rng.random(20_000) < 1 / (1 + np.exp(-(0.7 * logit - 1.2)))
    assert np.allclose(logistic_curve(logit, positive), (0.7, -1.2), atol=0.06)
    for scores in (np.arange(20.0), -np.arange(20.0), np.zeros(20)):
        slope, intercept = logistic_curve(scores, np.arange(20) >= 10)
        assert slope > 0 and np.isfinite(intercept)


def test_a_stratum_that_ranks_well_is_answered_and_its_counts_add_up() -> None:
    findings, figures = findings_from_outcomes(outcomes_of(900, 2.5))
    fracture, pneumonia = findings.findings
    assert [s.region for s in fracture.strata] == ["hand"] and pneumonia.strata == ()
    stratum = fracture.strata[0]
    assert stratum.reason is None and stratum.auroc > 0.9 and not stratum.children
    assert 0.85 < stratum.specificity < 0.95 and stratum.sensitivity > 0.7
    assert figures["fracture"]["sensitivity"]["value"] == pytest.approx(stratum.sensitivity)
    assert figures["fracture"]["ece"] < 0.05 and figures["fracture"]["baselines"]["regions"]["auroc"] == pytest.approx(0.5, abs=0.1)
    assert fracture.map_hits == 1.0 and figures["fracture"]["map"]["baselines"]["middle"]["value"] == 0.0
    assert figures["regions"]["accuracy"] == 1.0
    graphs = {**tiny_manifest().graphs, "findings": Graph("findings.onnx", "fp32")}
    manifest = replace(tiny_manifest(), findings=findings, graphs=graphs)
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))).findings == findings


def test_what_a_stratum_lacks_is_said() -> None:
    weak = findings_from_outcomes(outcomes_of(300, 0.3))[0].findings[0].strata[0]
    assert weak.reason is not None and "AUROC's lower 95% bound is 0.5" in weak.reason and "0.70 is needed" in weak.reason
    good = findings_from_outcomes(outcomes_of(300, 2.5))[0].findings[0].strata[0]  # 63 of 300 are fractured
    seldom = missed(replace(good, yes=(20, 50)))
    assert seldom == "20 of 50 yes answers were right; 42% is needed where 63 of 300 have it"
    assert missed(replace(good, yes=(21, 50))) is None
    assert missed(replace(good, yes=(0, 0))) == "no yes was given on 300 pictures"
    assert least_right(0.1) == pytest.approx(0.2) and least_right(0.6) == pytest.approx(0.8)


def test_a_map_that_misses_is_not_shown() -> None:
    of = outcomes_of(600, 2.5)
    places = np.roll(of.places, (8, 8), axis=(2, 3))
    findings, figures = findings_from_outcomes(replace(of, places=places))
    assert findings.findings[0].map_hits is None and figures["fracture"]["map"]["value"] == 0.0


def test_children_are_told_apart() -> None:
    assert findings_from_outcomes(outcomes_of(300, 2.5, children=True))[0].findings[0].strata[0].children


# --- the command ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[str]]]:
    """A run in two parts, as two processes would make it: (its folder, its arguments)."""
    patch, output = pytest.MonkeyPatch(), tmp_path_factory.mktemp("run")
    patch.setattr(films_module, "NO_RADIOLOGY", 8)
    patch.setattr(films_module, "HELD_OUT", 3)
    arguments = [f"--data={path}" for path in data.values()]
    arguments += [f"--checkpoint={CHECKPOINT}", f"--output={output}", "--folds=3", "--epochs=1", "--batch-size=8", "--threads=1"]
    yield output, arguments
    patch.undo()


@pytest.mark.nightly  # three folds and the whole, of a network of real size
def test_the_command_from_folds_to_a_checkpoint(trained: tuple[Path, list[str]], command: Callable[..., Result]) -> None:
    output, arguments = trained
    code, out, err = command("train", "findings", *arguments, "--json", "--only=0", "--only=2")
    assert code == 0 and json.loads(out)["checkpoint"] is None
    assert "still to be trained: 1, all" in err and not (output / "checkpoint.json").exists()
    assert (output / "views").is_dir()
    first = (output / "fold-0.npz").stat().st_mtime_ns
    done = command("train", "findings", *arguments, "--json", "--resume", "--fold-checkpoints")
    assert done.code == 0, done.err
    assert (output / "fold-0.npz").stat().st_mtime_ns == first and not (output / "views").exists()
    assert done.json["provenance"]["findings"]["measured_by"] == ["0", "1", "2"]
    assert done.json["provenance"]["findings"]["kept_apart"] == list(KEPT_FOR_DEMO)

    (meta, tensors), (_, given) = read_checkpoint(output), read_checkpoint(CHECKPOINT)
    assert all(torch.equal(tensors[k], v) for k, v in given.items() if not k.startswith("findings."))
    net = FindingsNet.from_tensors(under(tensors, "findings"))
    assert [x.shape for x in net(torch.zeros(2, 3, 320, 320))] == [(2, 2), (2, 6), (2, 2, 20, 20)]
    assert {s["region"] for f in meta["findings"]["findings"] for s in f["strata"]} <= {"hand", "leg", "chest"}
    assert meta["metrics"]["findings pneumonia"]["n"] == 18 and "findings held out" in meta["metrics"]

    of = read_checkpoint(output / "fold-1")[0]["provenance"]["findings"]
    assert of["part"] == "1" and of["measured_by"] == ["0", "2"]
    seen = [set((output / f"fold-{k}" / "apart.txt").read_text().splitlines()) for k in range(3)]
    assert all(seen) and not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]


@pytest.mark.nightly  # its fixture trains
def test_folds_of_other_settings_are_refused_before_anything_is_trained(
    trained: tuple[Path, list[str]], command: Callable[..., Result]
) -> None:
    output, arguments = trained
    if not (output / "fold-0.npz").exists():
        pytest.skip("needs the test before it")
    for more in (["--seed=5", "--resume"], ["--seed=5", "--only=1"]):
        code, _, err = command("train", "findings", *arguments, *more)
        assert code == 4 and len(err.splitlines()) == 1 and "made with other settings" in err


@pytest.mark.nightly  # its fixture trains
def test_a_part_that_is_none_is_refused(trained: tuple[Path, list[str]], command: Callable[..., Result]) -> None:
    code, _, err = command("train", "findings", *trained[1], "--only=3")
    assert code == 2 and "--only 3 is no part; choose of 0, 1, 2, all" in err


def test_films_of_the_real_sets_part_as_they_should(shared: Path) -> None:
    films = films_from_folders([shared / "fracatlas", shared / "kermany-cxr"])
    folds = folds_of_films(films, 5)
    of: dict[tuple[str, str], set[int]] = {}
    for f, fold in zip(films, folds.tolist(), strict=True):
        of.setdefault((f.source, f.group), set()).add(fold)
    assert all(len(x) == 1 for x in of.values())
    assert not {"fracatlas/IMG0003182.jpg", "fracatlas/IMG0003189.jpg"} & {f.name for f in films}
    assert sum(f.source == "FracAtlas" for f in films) == 3137 - 20
    for source, finding in (("FracAtlas", 0), ("Kermany", 1)):
        yes = np.bincount([k for f, k in zip(films, folds, strict=True) if f.source == source and f.findings[finding]])
        assert len(yes) == 5 and yes.max() / yes.min() < 1.3
