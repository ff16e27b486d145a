"""Questions to vectors as MEVF and QCR do: dictionary, GloVe vectors, their co-occurrence average, and a recurrent network over them."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations, takewhile
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn

from pmclip_deploy.errors import InputError
from pmclip_deploy.texts import lines_of_file

LENGTH = 12  # words of a question that are read


REPLACED = (
    *(("? -yes/no", ""), ("? -open", ""), ("? - open", ""), (",", ""), ("?", ""), ("'s", " 's"), ("...", "")),
    *(("x ray", "x-ray"), (".", "")),
    ("ς", "σ"),  # lower case that depends on the place in the word, which the tokenizer's does not
)


def words_from_question(question: str) -> list[str]:
    """Lower case, without commas, full stops, question marks and VQA-RAD's trailing marks; "'s" is a word and "x ray" is "x-ray"."""
    text = question.lower()
    for old, new in REPLACED:
        text = text.replace(old, new)
    return text.split()


@dataclass(frozen=True)
class Dictionary:
    """The words that have a number, in the order in which they first stood in the questions. The padding's number follows the last."""

    words: tuple[str, ...]

    @classmethod
    def from_questions(cls, questions: Iterable[str]) -> "Dictionary":
        return cls(tuple(dict.fromkeys(word for question in questions for word in words_from_question(question))))

    @cached_property
    def number(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    @property
    def padding(self) -> int:
        return len(self.words)

    def tokens(self, questions: Sequence[str]) -> Tensor:
        """(N, 12) i64: the first twelve words, then padding, so that the last step has run over the padding, as in MEVF and QCR.

        An unknown word is padding in its place, a zero vector. (The authors' code takes the dictionary's last word for it, which
        never happens there because the dictionary holds the test questions' words too.)
        """
        tokens = torch.full((len(questions), LENGTH), self.padding)
        for row, question in zip(tokens, questions, strict=True):
            numbers = [self.number.get(word, self.padding) for word in words_from_question(question)[:LENGTH]]
            row[: len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        return tokens


def words_tokenizer_json(dictionary: Dictionary) -> str:
    """A file of the `tokenizers` package that makes of a question what ``Dictionary.tokens`` does: always twelve numbers."""
    padding = "[PAD]"  # also an unknown word's; no word in lower case is this one
    tokenizer = Tokenizer(models.WordLevel({**dictionary.number, padding: dictionary.padding}, unk_token=padding))
    replaced = [normalizers.Replace(old, new) for old, new in REPLACED]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *replaced])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\x1c-\x1f]+"), "removed")  # the four controls are spaces to Python alone
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH, pad_id=dictionary.padding, pad_token=padding)
    return str(tokenizer.to_str(pretty=True)) + "\n"


def vectors_from_glove(path: Path, dictionary: Dictionary) -> Tensor:
    """(W, D) f32 from a file in GloVe's text format (Pennington et al. 2014) or word2vec's, which has a header line.

    Words that the file lacks have zeros. Raises InputError.
    """
    hint = "give a text file of word vectors, such as glove.6B.300d.txt"
    vectors, width = torch.zeros(len(dictionary.words), 0), 0
    for number, line in lines_of_file(path, hint):
        fields = re.split("[ \t]+", line.rstrip(" \t"))  # no other blank: words hold those
        if number == 1 and len(fields) == 2 and all(re.fullmatch(r"\d{1,9}", field, re.ASCII) for field in fields):
            width = int(fields[1])  # word2vec's header: how many words, of how many numbers
            continue
        width = width or sum(1 for _ in takewhile(_is_number, reversed(fields[1:])))
        if not width:
            raise InputError(f"{path}: line {number} is not in GloVe's text format", hint)
        if len(fields) <= width:
            raise InputError(f"{path}: line {number} has {len(fields) - 1} numbers in place of {width}", hint)
        if not vectors.shape[1]:
            vectors = torch.zeros(len(dictionary.words), width)
        if (place := dictionary.number.get(" ".join(fields[:-width]))) is None:  # glove.840B has words with blanks, such as ". . ."
            continue
        if not all(_is_number(field) for field in fields[-width:]):
            raise InputError(f"{path}: line {number} is not in GloVe's text format", hint)
        vectors[place] = torch.tensor([float(field) for field in fields[-width:]])
    if not vectors.any():
        raise InputError(f"{path}: has no word of the questions", hint)
    return vectors


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def neighbours_from_questions(questions: Iterable[str], dictionary: Dictionary) -> Tensor:
    """(W, W) f32, rows summing to one (or zero): how often word j stands in a question with word i, over how often j stands at all.

    This is what MEVF and QCR call TF-IDF (after Kim et al. 2018). Their code divides the wrong entries by the frequencies, so that
    all but the first few pairs count alike; here each pair is divided by its own word's.
    """
    pairs, frequency = Counter[tuple[int, int]](), Counter[int]()
    for question in questions:
        numbers = [dictionary.number[word] for word in words_from_question(question) if word in dictionary.number]
        frequency.update(numbers)
        pairs.update(permutations(numbers, 2))
    table = torch.zeros(len(dictionary.words), len(dictionary.words), dtype=torch.float64)
    for (i, j), count in pairs.items():
        table[i, j] = count / frequency[j]
    return (table / table.sum(1, keepdim=True).clamp(min=1e-12)).float()


def tables_from_glove(path: Path, dictionary: Dictionary, questions: Iterable[str]) -> tuple[Tensor, Tensor]:
    """(GloVe's vectors, for each word the average of its neighbours' vectors in ``questions``), each (W, D) f32. Raises InputError."""
    vectors = vectors_from_glove(path, dictionary)
    return vectors, neighbours_from_questions(questions, dictionary) @ vectors


class QuestionEmbedding(nn.Module):
    """tokens (B, T) i64 -> words (B, T, E) f32, states (B, T, hidden) f32 of a one-layer GRU or LSTM over the words.

    ``tables``, each (W, D), initialise the word vectors, which are put side by side: E is the sum of their widths. The padding's
    vector is zero and stays so.
    """

    def __init__(self, tables: Sequence[Tensor], hidden: int, recurrent: str = "GRU") -> None:
        super().__init__()
        self.tables = nn.ModuleList(
            nn.Embedding.from_pretrained(nn.functional.pad(t, (0, 0, 0, 1)), freeze=False, padding_idx=len(t)) for t in tables
        )
        cells: dict[str, type[nn.GRU] | type[nn.LSTM]] = {"GRU": nn.GRU, "LSTM": nn.LSTM}
        self.recurrent = cells[recurrent](sum(t.shape[1] for t in tables), hidden, batch_first=True)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        words = torch.cat([table(tokens) for table in self.tables], dim=-1)
        return words, self.recurrent(words)[0]


def tables_like(prefix: str, tensors: dict[str, Tensor]) -> list[Tensor]:
    """Zero tables of the sizes that the QuestionEmbedding at ``prefix`` has in ``tensors``; the last row there is the padding's."""
    shapes = [t.shape for name, t in sorted(tensors.items()) if name.startswith(f"{prefix}tables.")]
    return [torch.zeros(rows - 1, width) for rows, width in shapes]
