"""classify: zero-shot from words, few-shot from examples, the bundle's own labels, and the command."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pmclip_deploy as pm
from pmclip_deploy import classify
from pmclip_deploy.classify import bank_from_labels, probe_from_examples, scores_from_cache, scores_from_probe, zero_shot_scores
from pmclip_deploy.cli.classify import labels_from_file
from pmclip_deploy.imaging.raster import picture_from_array
from pmclip_deploy.kernels import contrastive_similarity
from tests.tiny.bundle import tiny_bundle

RNG = np.random.default_rng(0)
LABELS = ["is there a fracture", "which plane", "the plane"]


def picture(value: int = 128) -> Any:
    return (RNG.integers(0, 40, (32, 32)) + value).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> pm.Predictor:
    return pm.load(tiny_bundle(tmp_path_factory.mktemp("towers") / "bundle", None))


def unit(x: Any) -> Any:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# --- zero-shot -----------------------------------------------------------------------------------------------------------------


def test_scores_are_scaled_cosines_with_the_mean_of_the_prompts(towers: pm.Predictor) -> None:
    templates = ["{}", "is {} there"]
    image = picture()
    made = towers.classify(image, LABELS, templates=templates)
    seen, scale = unit(towers.embed_image(image)), towers.manifest.logit_scale
    expected = {
        label: scale * seen @ unit(np.mean([unit(towers.embed_text(t.replace("{}", label))) for t in templates], 0)) for label in LABELS
    }
    assert {x.label: x.score for x in made.labels} == pytest.approx(expected, abs=1e-4)
    assert [x.score for x in made.labels] == sorted((x.score for x in made.labels), reverse=True)
    assert sum(x.share for x in made.labels) == pytest.approx(1)
    ratio = made.labels[0].share / made.labels[-1].share
    assert np.log(ratio) == pytest.approx(made.labels[0].score - made.labels[-1].score, abs=1e-4)
    document = made.to_json()
    assert document["schema"] == "pmclip-deploy/classification/1" and document["method"] == "zero-shot"
    json.dumps(document, allow_nan=False)


def test_other_labels_do_not_change_a_score(towers: pm.Predictor) -> None:
    image = picture()
    few = {x.label: x.score for x in towers.classify(image, LABELS[:2]).labels}
    many = {x.label: x.score for x in towers.classify(image, LABELS).labels}
    assert few == pytest.approx({label: many[label] for label in few}, abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "more", "said"),
    [
        ([], {}, "no labels given"),
        (["a"], {}, "two labels or more"),
        (["a", " "], {}, "none of them empty"),
        (["a", "b", "a"], {}, "'a' is given twice; give it once"),
        (["a", "b"], {"templates": ["no place"]}, "'no place' has no {}; write {}"),
        (["a", "b"], {"templates": []}, "has no {}"),
        (["a", "b"], {"method": "probe"}, "zero-shot without examples"),
        ("ab", {}, "not a text"),
        (["a", "b"], {"templates": "{}"}, "not a text"),
        ([], {"examples": {"a": "a.png", "b": "b.png"}}, "not a text"),
        ([], {"examples": {"a": [1], "b": [1]}, "method": "probe", "templates": ["{}"]}, "the probe reads no words"),
        ([], {"templates": ["{}"]}, "no labels given"),
        ([], {"examples": {"a": [1], "b": [1]}, "method": "zero-shot"}, "cache or probe"),
        (["a"], {"examples": {"a": [1], "b": [1]}}, "the examples name the labels"),
        ([], {"examples": {"a": [picture()], "b": []}}, "'b' has no examples; give one image"),
        ([], {"examples": {"a": [picture()], "b": iter([])}}, "'b' has no examples; give one image"),
    ],
)
def test_what_does_not_go_together(towers: pm.Predictor, labels: list[str], more: dict[str, Any], said: str) -> None:
    with pytest.raises(pm.UsageError, match=said):
        towers.classify(picture(), labels, **more)


def test_a_label_without_a_direction_comes_last() -> None:
    bank = RNG.normal(size=(3, 8)).astype(np.float32)
    bank[0] = 0
    scores = zero_shot_scores(bank[1], bank, 100.0)
    assert scores.argmax() == 1 and scores[0] == -np.inf
    with pytest.raises(pm.BundleError, match="computes NaN or infinity"):
        zero_shot_scores(np.full(8, np.nan, np.float32), bank, 100.0)


def test_a_label_without_a_direction_has_no_score(towers: pm.Predictor) -> None:
    made = towers.classify(picture(), ["the", "fracture", "plane"], templates=["{}"])  # the tiny text tower has nothing for "the"
    assert [x["score"] is None for x in made.to_json()["labels"]] == [False, False, True] and made.labels[-1].share == 0
    json.dumps(made.to_json(), allow_nan=False)


@pytest.mark.parametrize("method", ["zero-shot", "cache", "probe"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_image_or_an_example_without_numbers_is_refused(
    towers: pm.Predictor, monkeypatch: pytest.MonkeyPatch, method: str, bad: float
) -> None:
    image, examples = picture_from_array(picture(0)), {"plane": [picture(10)], "fracture": [picture(200)]}
    embed = towers.embed_image
    given: dict[str, Any] = {"labels": list(examples)} if method == "zero-shot" else {"examples": examples}
    for broken in [image] if method == "zero-shot" else [image, examples["fracture"][0]]:

        def wrong(x: Any, broken: Any = broken) -> Any:
            return np.full_like(embed(x), bad) if x is broken else embed(x)

        monkeypatch.setattr(towers, "embed_image", wrong)
        monkeypatch.setattr(towers, "embeddings_of_images", lambda images, wrong=wrong: map(wrong, images))
        with pytest.raises(pm.BundleError, match="computes NaN or infinity"):
            towers.classify(image, method=method, **given)


# --- few-shot ------------------------------------------------------------------------------------------------------------------


def clusters(shots: list[int], spread: float = 0.4) -> tuple[Any, Any, Any]:
    """(examples, their labels, the centres of the clusters)"""
    centres = RNG.normal(size=(len(shots), 64)).astype(np.float32)
    of = np.repeat(np.arange(len(shots)), shots)
    return (centres[of] + spread * RNG.normal(size=(len(of), 64))).astype(np.float32), of, centres


@pytest.mark.parametrize("shots", [[1, 1], [4, 4, 4], [1, 20, 3]])
def test_both_methods_find_clusters_whatever_the_number_of_examples(shots: list[int]) -> None:
    x, of, centres = clusters(shots)
    probe, nothing = probe_from_examples(x, of, len(shots)), np.zeros(len(shots), np.float32)
    for label, centre in enumerate(centres):
        for _ in range(10):
            seen = (centre + 0.4 * RNG.normal(size=64)).astype(np.float32)
            assert scores_from_probe(seen, probe).argmax() == label
            assert scores_from_cache(seen, x, of, nothing).argmax() == label


def test_the_probe_is_the_minimum_of_its_loss() -> None:
    torch = pytest.importorskip("torch")
    x, of, _ = clusters([3, 9, 5], 1.5)
    probe = probe_from_examples(x, of, 3)
    features = torch.tensor(np.hstack([unit(x), np.ones((len(x), 1))]), dtype=torch.float64)
    weights = torch.zeros(65, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor(1 / (3 * np.bincount(of)[of]))
    solver = torch.optim.LBFGS([weights], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def loss() -> Any:
        solver.zero_grad()
        entropy = torch.nn.functional.cross_entropy(features @ weights, torch.tensor(of), reduction="none")
        value = (weight * entropy).sum() + classify.DECAY / 2 * weights.square().sum()
        value.backward()
        return value

    solver.step(loss)
    np.testing.assert_allclose(probe, weights.detach().numpy(), atol=2e-3)


def test_the_cache_adds_votes_to_the_words(towers: pm.Predictor) -> None:
    image, examples = picture(30), {"fracture": [picture(30), picture(40)], "plane": [picture(200)]}
    zero = {x.label: x.score for x in towers.classify(image, ["fracture", "plane"]).labels}
    few = {x.label: x.score for x in towers.classify(image, examples=examples).labels}
    for label, of in examples.items():
        near = [np.exp(-5.5 * (1 - unit(towers.embed_image(x)) @ unit(towers.embed_image(image)))) for x in of]
        assert few[label] - zero[label] == pytest.approx(np.mean(near), abs=1e-4)
    assert towers.classify(image, examples=examples, method="probe").method == "probe"


# --- the bundle's own labels ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A bundle exported with labels, and the checkpoint's own embeddings of them."""
    pytest.importorskip("onnx"), pytest.importorskip("open_clip")
    from pmclip_deploy.export.pack import bundle_from_checkpoint
    from tests.tiny import clip as tiny_clip

    folder = tmp_path_factory.mktemp("labelled")
    tiny_clip.add_tiny(folder)
    try:
        checkpoint = tiny_clip.checkpoint(folder / "checkpoint", "tiny", tiny_clip.lively("tiny"))
        bundle_from_checkpoint(checkpoint, folder / "bundle", "fp32", labels=LABELS)
        bundle_from_checkpoint(checkpoint, folder / "plain", "fp32")
    finally:
        tiny_clip.remove_tiny()
    return folder / "bundle", bank_from_labels(pm.load(folder / "plain").embed_texts, LABELS)


@pytest.mark.parametrize("compiled", [True, False])
def test_kernel_and_graph_give_the_same_answers(labelled: tuple[Path, Any], compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classify, "implementation", lambda: "C++, for a test" if compiled else "NumPy")
    path, bank = labelled
    predictor = pm.load(path)
    image = picture()
    made = predictor.classify(image)
    found = contrastive_similarity(predictor.embed_image(image)[None], bank, predictor.manifest.logit_scale, len(LABELS))
    assert [x.label for x in made.labels] == [LABELS[i] for i in found.index[0]]
    assert [x.score for x in made.labels] == pytest.approx(found.score[0].tolist(), abs=1e-3)
    given = predictor.classify(image, LABELS)
    assert [x.label for x in given.labels] == [x.label for x in made.labels]
    assert ("labels" in predictor._sessions) == (not compiled)
    with pytest.raises(pm.UsageError, match="were embedded at export"):
        predictor.classify(image, templates=["{}"])


def test_export_says_whether_labels_survive(labelled: tuple[Path, Any]) -> None:
    from pmclip_deploy.bundle.files import manifest_from_bundle
    from pmclip_deploy.errors import ParityError
    from pmclip_deploy.export.gates import gate
    from pmclip_deploy.export.parity import label_parity
    from pmclip_deploy.export.probes import sample_pictures

    path, _ = labelled
    assert manifest_from_bundle(path).parity["labels"] == {"n": len(sample_pictures()), "agreement": 1.0}
    predictor, pictures = pm.load(path), sample_pictures()
    chosen = [predictor.classify(x).labels[0].label for x in pictures]
    turned = pm.load(path)
    turned.embed_image = lambda image, **_: -predictor.embed_image(image)  # type: ignore[method-assign]
    least = [predictor.classify(x).labels[-1].label for x in pictures]
    same = np.mean([a == b for a, b in zip(chosen, least, strict=True)])
    assert label_parity(predictor, turned, pictures) == {"n": len(pictures), "agreement": same}
    measured = {"tensors": {}, "answers": None, "labels": {"n": 100, "agreement": 0.96}}
    with pytest.raises(ParityError, match=r"labels agree on 96\.00% of 100 pictures"):
        gate("int8", measured)
    gate("int8", {**measured, "labels": {"n": 99, "agreement": 0.5}})


def test_a_bundles_labels_are_checked(labelled: tuple[Path, Any], tmp_path: Path) -> None:
    from pmclip_deploy.bundle.files import manifest_from_bundle, write_bundle
    from pmclip_deploy.bundle.names import LABELS as FILE

    path, bank = labelled
    manifest = manifest_from_bundle(path)
    assert manifest.labels == tuple(LABELS) and manifest.graphs["labels"].precision == "fp32"
    files: dict[str, Any] = {name: path / name for name in manifest.files}
    for i, content in enumerate((b"none", bank[:2], bank.astype(np.float64))):
        if isinstance(content, np.ndarray):
            np.save(tmp_path / "bank.npy", content)
            content = (tmp_path / "bank.npy").read_bytes()
        write_bundle(tmp_path / str(i), manifest, {**files, FILE: content})
        with pytest.raises(pm.BundleError, match=r"labels\.npy"):
            pm.load(tmp_path / str(i)).classify(picture())


# --- the command ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def there(tmp_path: Path) -> Path:
    Image.fromarray(picture()).save(tmp_path / "scan.png")
    tiny_bundle(tmp_path / "bundle")
    (tmp_path / "labels.txt").write_text("fracture\n\n plane \n")
    (tmp_path / "empty.txt").write_text("\ufeff\n \n", encoding="utf-8")
    for label, value in (("dark", 10), ("bright", 210)):
        (tmp_path / "shots" / label).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(picture(value)).save(tmp_path / "shots" / label / f"{i}.png")
    return tmp_path


def test_the_command(there: Path, command: Any) -> None:
    code, out, err = command("classify", there / "scan.png", "fracture", "plane", "--bundle", there / "bundle")
    assert code == 0 and not err and "fracture" in out and "Research use only" in out and "not probabilities" in out
    code, out, err = command("classify", there / "scan.png", "--labels", there / "labels.txt", "--bundle", there / "bundle", "--json")
    (document,) = json.loads(out)["classifications"]
    assert code == 0 and {x["label"] for x in document["labels"]} == {"fracture", "plane"} and document["image"]["format"] == "png"
    for method in ("cache", "probe"):
        code, out, err = command(
            "classify", there / "scan.png", "--examples", there / "shots", "--method", method, "--bundle", there / "bundle", "--json"
        )
        assert code == 0 and {x["label"] for x in json.loads(out)["classifications"][0]["labels"]} == {"dark", "bright"}


@pytest.mark.parametrize("few_shot", [False, True])
def test_many_files_are_classified_and_labels_are_embedded_once(
    there: Path, command: Any, monkeypatch: pytest.MonkeyPatch, few_shot: bool
) -> None:
    Image.fromarray(picture(210)).save(there / "b.png")
    (there / "more").mkdir()
    Image.fromarray(picture(90)).save(there / "more" / "c.png")
    (there / "more" / "cut.png").write_bytes((there / "b.png").read_bytes()[:60])
    (there / "more" / "note.txt").write_text("no picture")
    labels = ["--examples", there / "shots"] if few_shot else ["fracture", "plane"]
    given = (*labels, "--bundle", there / "bundle", "--json")
    alone = [command("classify", there / name, *given).answer for name in ("scan.png", "b.png", "more/c.png")]
    embedded: list[int] = []
    real = pm.Predictor.embed_texts
    monkeypatch.setattr(pm.Predictor, "embed_texts", lambda self, texts: embedded.append(len(texts)) or real(self, texts))
    done = command("classify", there / "scan.png", there / "b.png", there / "more", *given)
    assert done.code == 3 and done.json["schema"] == "pmclip-deploy/classifications/2" and len(embedded) == 1
    assert [(x["image"], x["labels"]) for x in done.json["classifications"]] == [(x["image"], x["labels"]) for x in alone]
    (cut,) = done.json["unreadable"]
    assert cut["source"] == str(there / "more" / "cut.png") and done.json["no_pictures"] == [str(there / "more" / "note.txt")]
    assert done.err.splitlines() == [f"error: {cut['message']}; {cut['hint']}", f"{there / 'more'}: 1 file is no picture"]


def test_classifications_are_written_to_a_file(there: Path, command: Any, tmp_path: Path) -> None:
    given = (there / "scan.png", there / "shots", "fracture", "plane", "--bundle", there / "bundle")
    for suffix in (".csv", ".jsonl"):
        done = command("classify", *given, "--output", tmp_path / f"x{suffix}")
        assert done.code == 0 and "┃" not in done.out and f"x{suffix}: labels for 5 pictures\n" in done.out
    rows = list(csv.DictReader((tmp_path / "x.csv").open(newline="", encoding="utf-8")))
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 10 and {line["schema"] for line in lines} == {"pmclip-deploy/classification/1"}
    shown = [(line["image"]["source"], x["label"], x["share"]) for line in lines for x in line["labels"]]
    assert [(row["image"], row["label"], float(row["share"])) for row in rows] == shown


@pytest.mark.parametrize("method", ["cache", "probe"])
def test_what_is_no_picture_is_no_example(there: Path, command: Any, method: str) -> None:
    given = ("classify", there / "scan.png", "--examples", there / "shots", "--method", method, "--bundle", there / "bundle", "--json")
    scores = json.loads(command(*given)[1])["classifications"][0]["labels"]
    (there / "shots" / ".git").mkdir()
    for name in (".DS_Store", "notes.txt", "read me"):
        (there / "shots" / "dark" / name).write_text("no picture")
    code, out, err = command(*given)
    assert code == 0 and json.loads(out)["classifications"][0]["labels"] == scores
    assert err.startswith(f"left out 2 of 6 examples: no picture; the first error: {there / 'shots' / 'dark' / 'notes.txt'}: ")
    assert err.count("\n") == 1
    for path in (there / "shots" / "dark").glob("*.png"):
        path.unlink()
    code, out, err = command(*given)
    assert code == 3 and not out and err.startswith(f"error: {there / 'shots' / 'dark'}: holds no picture") and err.count("\n") == 1


def test_examples_have_a_bar(there: Path, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []
    monkeypatch.setattr("pmclip_deploy.cli.classify.progress", lambda items, what: bars.append((len(items), what)) or items)
    assert command("classify", there / "scan.png", "--examples", there / "shots", "--bundle", there / "bundle")[0] == 0
    assert bars == [(4, "Embedding")]


def test_labels_are_lines_and_a_byte_order_mark_is_none(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes("\ufefffracture\r\n\nupper\x0blobe\u2028left\n".encode())
    assert labels_from_file(tmp_path / "x") == ["fracture", "upper\x0blobe\u2028left"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nowhere.png", "a", "b"], 3, "no such file"),
        (["scan.png"], 2, "no labels given"),
        (["scan.png", "a"], 2, "two labels"),
        (["scan.png", "a", "b", "--labels", "labels.txt"], 2, "choose one"),
        (["scan.png", "--labels", "none.txt"], 3, "none.txt"),
        (["scan.png", "--labels", "empty.txt"], 3, "empty.txt: holds no label"),
        (["scan.png", "--examples", "shots", "--method", "probe", "--template", "{}"], 2, "leave out the templates"),
        (["scan.png", "--examples", "bundle"], 3, "two folders or more"),
        (["scan.png", "--examples", "nowhere"], 3, "cannot be read"),
        (["labels.txt", "a", "b"], 3, "labels.txt"),
        (["scan.png", "a", "b", "nowhere.dcm"], 3, "nowhere.dcm: no such file"),
        (["scan.png", "a", "scan.png", "b"], 2, "images come before labels"),
        (["scan.png", "a", "b", "--output", "x.txt"], 2, ".jsonl or .csv"),
        (["scan.png", "a", "b", "--output", "nowhere/x.csv"], 2, "its folder does not exist"),
        (["scan.png", "scan.png"], 2, "no labels given"),
    ],
)
def test_what_goes_wrong_is_one_line(
    there: Path, command: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, said: str
) -> None:
    monkeypatch.chdir(there)
    got, out, err = command("classify", *arguments, "--bundle", "bundle")
    assert got == code and said in err and err.count("\n") == 1 and not out


# --- a sigmoid loss ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sigmoid_towers(tmp_path_factory: pytest.TempPathFactory) -> pm.Predictor:
    made = pm.load(tiny_bundle(tmp_path_factory.mktemp("sigmoid") / "bundle", None, logit_bias=-3.5))
    assert made.manifest.logit_bias == -3.5
    return made


def test_a_sigmoid_loss_gives_each_label_a_probability_of_its_own(sigmoid_towers: pm.Predictor, towers: pm.Predictor) -> None:
    """Of the label's own text: a mean of prompts is none of the texts that the loss saw."""
    image = picture()
    made = {x.label: x for x in sigmoid_towers.classify(image, LABELS).labels}
    assert all(x.share is None for x in made.values())
    seen, scale = unit(sigmoid_towers.embed_image(image)), sigmoid_towers.manifest.logit_scale
    for label, x in made.items():
        logit = float(scale * seen @ unit(sigmoid_towers.embed_text(label))) - 3.5
        assert x.score == pytest.approx(logit, abs=1e-4) and x.probability == pytest.approx(1 / (1 + np.exp(-logit)), rel=1e-3)
    few = {x.label: x.probability for x in sigmoid_towers.classify(image, LABELS[:2]).labels}
    assert few == pytest.approx({label: made[label].probability for label in few}, rel=1e-4)  # other labels do not change it
    both = [x.classify(image, LABELS).labels[0] for x in (towers, sigmoid_towers)]
    assert [(x.share is None, x.probability is None) for x in both] == [(False, True), (True, False)]
    assert [set(x.to_json()) for x in both] == [{"label", "share", "score", "probability"}] * 2
    assert "share=" in repr(both[0]) and "probability=" in repr(both[1])


def test_what_the_sigmoid_loss_did_not_see_has_shares(sigmoid_towers: pm.Predictor) -> None:
    image, examples = picture(), {label: [picture(60), picture(200)] for label in LABELS[:2]}
    for made in (
        sigmoid_towers.classify(image, LABELS, templates=["{}", "is {} there"]),
        sigmoid_towers.classify(image, examples=examples),
        sigmoid_towers.classify(image, examples=examples, method="probe"),
    ):
        assert all(x.probability is None for x in made.labels)
        assert sum(x.share or 0 for x in made.labels) == pytest.approx(1)


def test_the_command_says_probability_only_of_a_sigmoid_loss(
    sigmoid_towers: pm.Predictor, towers: pm.Predictor, command: Any, tmp_path: Path
) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    said = {}
    for name, of in (("sigmoid", sigmoid_towers), ("softmax", towers)):
        done = command("classify", tmp_path / "a.png", *LABELS, "--bundle", of.path)
        assert done.code == 0
        said[name] = done.out
    assert "Probability" in said["sigmoid"] and "Share" not in said["sigmoid"]
    assert "each probability is of its label alone, by the model's sigmoid loss" in said["sigmoid"]
    assert "Share" in said["softmax"] and "Probability" not in said["softmax"] and "They are not probabilities" in said["softmax"]
