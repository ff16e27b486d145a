"""Tokens: own length, own padding, truncation, whatever the tokenizer's file says."""

from pathlib import Path

import numpy as np
import pytest

from pmclip_deploy.errors import BundleError
from pmclip_deploy.tokens import tokenizer_from_file, tokens_from_text
from tests.tiny.bundle import WORDS, tiny_tokenizer

CLS, SEP = WORDS.index("[CLS]"), WORDS.index("[SEP]")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_a_text_keeps_its_own_length(path: Path) -> None:
    tokens = tokens_from_text(path, ["Is there a fracture?"], 16, 0)
    assert tokens.dtype == np.int64
    assert tokens.tolist() == [[CLS, *(WORDS.index(w) for w in ("is", "there", "a", "fracture", "?")), SEP]]


def test_a_batch_is_padded_to_its_longest(path: Path) -> None:
    tokens = tokens_from_text(tokenizer_from_file(path), ["plane", "is there a plane"], 16, 7)
    assert tokens.shape == (2, 6)
    assert tokens[0].tolist() == [CLS, WORDS.index("plane"), SEP, 7, 7, 7]


def test_a_long_text_is_cut_and_keeps_its_end_mark(path: Path) -> None:
    tokens = tokens_from_text(path, ["fracture " * 10_000], 16, 0)
    assert tokens.shape == (1, 16) and tokens[0, 0] == CLS and tokens[0, -1] == SEP


def test_nothing_and_empty(path: Path) -> None:
    assert tokens_from_text(path, [], 16, 0).shape == (0, 0)
    assert tokens_from_text(path, [""], 16, 0).tolist() == [[CLS, SEP]]


def test_a_broken_file_is_a_bundle_error(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"model":\n3}')
    for path in (tmp_path / "t.json", tmp_path / "nowhere"):
        with pytest.raises(BundleError) as caught:
            tokenizer_from_file(path)
        assert "\n" not in str(caught.value)
