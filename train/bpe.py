"""CLIP's tokenizer as a tokenizer.json: OpenAI's byte-pair vocabulary, from open_clip's package, in the `tokenizers` format."""

import gzip
import json
from html import unescape
from pathlib import Path

import open_clip
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

VOCABULARY = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
MERGES = 49152 - 256 - 2  # of the file's lines, after its first: what is left of 49,152 ids beside bytes and the two marks
START, END = "<start_of_text>", "<end_of_text>"

WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

# What ftfy and html.unescape do to a text, as far as replacements can: quotes, ligatures, control characters, common entities.
CONTROLS = r"[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]"
LIGATURES = {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "ſt", "ﬆ": "st", "Ĳ": "IJ", "ĳ": "ij"}
ENTITIES = ("lt", "gt", "quot", "apos", "nbsp", "deg", "plusmn", "micro", "times", "alpha", "beta", "gamma", "ndash", "mdash", "le", "ge")


def clip_tokenizer_json() -> str:
    """The text of a tokenizer.json whose ids equal ``open_clip.SimpleTokenizer``'s, truncation included once the reader asks for it.

    Two differences: the cleaning covers what stands above and not all of ftfy's repairs, and a text that spells out a
    start or end mark doesn't get its id, since it could then cut a question short.
    """
    lines = gzip.decompress(VOCABULARY.read_bytes()).decode().split("\n")[1 : 1 + MERGES]
    merges = [(first, second) for first, second in map(str.split, lines)]
    alphabet = _alphabet()
    words = [*alphabet, *(c + "</w>" for c in alphabet), *(first + second for first, second in merges), START, END]
    ids = {word: i for i, word in enumerate(words)}

    tokenizer = Tokenizer(models.BPE(ids, merges, end_of_word_suffix="</w>"))
    replaced = {"&(amp;|#38;)+": "&", **{f"&{name};": unescape(f"&{name};") for name in ENTITIES}, "&#(39|x27);": "'", **LIGATURES}
    replaced |= {"[\u2018-\u201b\u02bc]": "'", "[\u201c-\u201f]": '"', CONTROLS: ""}
    tokenizer.normalizer = normalizers.Sequence(
        [*(normalizers.Replace(Regex(old), new) for old, new in replaced.items()), normalizers.NFC(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(f"{START} $A {END}", special_tokens=[(START, ids[START]), (END, ids[END])])
    document = json.loads(tokenizer.to_str())
    document["model"]["merges"] = [f"{first} {second}" for first, second in merges]  # read a third faster than as pairs
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def _alphabet() -> list[str]:
    """A printable character for each byte, in the vocabulary's order: printable Latin-1 first, then the rest from U+0100 on."""
    printable = [b for b in range(256) if chr(b).isprintable() and not chr(b).isspace()]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
