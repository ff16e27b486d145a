"""CLIP's towers and tokens against open_clip: every row of the spec, texts of their own length, the same pixels and the same ids."""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs the extra `train`")
open_clip = pytest.importorskip("open_clip", reason="training needs the extra `train`")

from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transform import PreprocessCfg, image_transform
from PIL import Image

from pmclip_deploy.errors import BundleError
from pmclip_deploy.pixels import tensor_from_pixels
from pmclip_deploy.spec import BACKBONES, Backbone
from pmclip_deploy.tokens import tokenizer_from_file, tokens_from_text
from pmclip_deploy.train import towers
from pmclip_deploy.train.bpe import clip_tokenizer_json

CLIP_ROWS = [b for b in BACKBONES.values() if b.open_clip_name]
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
    assert config["quick_gelu"] is True
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
        ours = towers.towers_from_spec(backbone).state_dict()
        theirs = open_clip.CLIP(**open_clip.get_model_config(backbone.open_clip_name)).state_dict()
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}


@torch.no_grad()
def test_a_text_of_its_own_length_equals_one_padded_to_77(tokenizer: Path) -> None:
    torch.manual_seed(0)
    model = towers.towers_from_spec(RN50).eval()
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
    towers.save_checkpoint(tmp_path, {"clip.count": torch.tensor(3)}, described, tokenizer)
    with pytest.raises(BundleError, match=rf"checkpoint\.json: .*{said}"):
        towers.read_checkpoint(tmp_path)


def test_what_fp16_cannot_hold_is_kept(tmp_path: Path, tokenizer: Path) -> None:
    tensors = {"clip.big": torch.tensor([1.0, 1e6]), "clip.small": torch.tensor([0.1]), "clip.count": torch.tensor(3)}
    towers.save_checkpoint(tmp_path, tensors, DESCRIBED, tokenizer)
    _, read = towers.read_checkpoint(tmp_path)
    assert read["clip.big"].tolist() == [1.0, 1e6] and read["clip.count"] == 3
    assert read["clip.small"] == torch.tensor([0.1]).half().float()


def test_a_checkpoint_of_another_backbone_is_one_clear_line(tmp_path: Path, tokenizer: Path) -> None:
    towers.save_checkpoint(tmp_path, {"clip.logit_scale": torch.tensor(1.0)}, DESCRIBED, tokenizer)
    with pytest.raises(BundleError, match="does not fit RN50") as caught:
        towers.towers_from_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
