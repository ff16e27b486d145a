"""CLIP's tokenizer as a tokenizer.json: OpenAI's byte-pair vocabulary, from open_clip's package, in the `tokenizers` format."""

import gzip
import json
from collections.abc import Mapping
from html import unescape
from itertools import accumulate
from pathlib import Path
from typing import Any

import ftfy.bad_codecs  # noqa: F401  # registers sloppy-windows-1252
import numpy as np
import open_clip
from ftfy.chardata import LIGATURES, WIDTH_MAP
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

VOCABULARY = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
MERGES = 49152 - 256 - 2  # of the file's lines, after its first: what is left of 49,152 ids beside bytes and the two marks
START, END = "<start_of_text>", "<end_of_text>"

# open_clip's, which ignores case: the long s is then an s, and U+0345 is neither a letter nor none, so that it is left out.
WORDS = r"'[sſ]|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}\u0345]+"

# What ftfy and html.unescape do to a text, as far as replacements can: forms of another width, ligatures, quotes, control characters,
# common entities.
CONTROLS = r"[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]"
ENTITIES = ("lt", "gt", "quot", "apos", "nbsp", "deg", "plusmn", "micro", "times", "alpha", "beta", "gamma", "ndash", "mdash", "le", "ge")


def clip_tokenizer_json() -> str:
    """The text of a tokenizer.json whose ids equal ``open_clip.SimpleTokenizer``'s, truncation included once the reader asks for it.

    Two differences: the cleaning covers what stands above and not ftfy's repair of mojibake, and a text that spells out a
    start or end mark doesn't get its id, since it could then cut a question short.
    """
    lines = gzip.decompress(VOCABULARY.read_bytes()).decode().split("\n")[1 : 1 + MERGES]
    merges = [(first, second) for first, second in map(str.split, lines)]
    alphabet = _alphabet()
    words = [*alphabet, *(c + "</w>" for c in alphabet), *(first + second for first, second in merges), START, END]
    ids = {word: i for i, word in enumerate(words)}

    tokenizer = Tokenizer(models.BPE(ids, merges, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([*cleaning(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(f"{START} $A {END}", special_tokens=[(START, ids[START]), (END, ids[END])])
    document = json.loads(tokenizer.to_str())
    document["model"]["merges"] = [f"{first} {second}" for first, second in merges]  # read a third faster than as pairs
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def cleaning() -> list[Any]:
    """Normalizers that do what open_clip does to a text before any tokenizer, as far as replacements can."""
    characters = _characters()
    # The map takes a character and its accent, as one grapheme, for the character alone. NUL parts them, and is one of CONTROLS.
    accented = normalizers.Replace(Regex(rf"(?<=[{''.join(map(chr, characters))}])(?=\p{{M}})"), "\0")
    replaced = {"&(amp;|#38;)+": "&", **{f"&{name};": unescape(f"&{name};") for name in ENTITIES}, "&#(39|x27);": "'"}
    replaced |= {"[\u2018-\u201b\u02bc]": "'", "[\u201c-\u201f]": '"', CONTROLS: ""}
    return [
        accented,
        normalizers.Precompiled(charsmap(characters)),
        *(normalizers.Replace(Regex(old), new) for old, new in replaced.items()),
        normalizers.NFC(),
    ]


def _characters() -> dict[int, str]:
    """What ftfy puts in the place of one character: C1 controls as Windows-1252 has them, ligatures, full-width and half-width forms."""
    c1 = {code: bytes([code]).decode("sloppy-windows-1252") for code in range(0x80, 0xA0)}
    return {code: new for code, new in (c1 | LIGATURES | WIDTH_MAP).items() if new != chr(code)}


def charsmap(characters: Mapping[int, str]) -> bytes:
    """``characters`` as sentencepiece writes such a map, for ``normalizers.Precompiled``: a replacement for each would take 1 ms a text.

    A trie over the bytes of UTF-8 as a double array of u32 (darts-clone): a unit is at the XOR of its parent's offset (bits 10 to 31)
    and its label (bits 0 to 7); bit 8 says that a value is at the offset itself, which is a place among the strings that follow.
    """
    strings = {new: f"{new}\0".encode() for new in characters.values()}
    place = dict(zip(strings, accumulate(map(len, strings.values()), initial=0), strict=False))
    prefixes = sorted({chr(code).encode()[:length] for code in characters for length in range(len(chr(code).encode()))})
    block = {prefix: 256 * (i + 1) for i, prefix in enumerate(prefixes)}  # of the units below it, one for each byte
    units = [0] * (256 * (len(block) + 1))
    units[0] = block[b""] << 10
    for prefix in prefixes[1:]:
        at = block[prefix[:-1]] + prefix[-1]
        units[at] = (at ^ block[prefix]) << 10 | prefix[-1]
    for code, new in characters.items():
        *before, last = chr(code).encode()
        at = block[bytes(before)] + last
        units[at] = (at ^ len(units)) << 10 | 1 << 8 | last
        units.append(place[new] | 1 << 31)
    trie = np.array(units, "<u4").tobytes()
    return len(trie).to_bytes(4, "little") + trie + b"".join(strings.values())


def _alphabet() -> list[str]:
    """A printable character for each byte, in the vocabulary's order: printable Latin-1 first, then the rest from U+0100 on."""
    printable = [b for b in range(256) if chr(b).isprintable() and not chr(b).isspace()]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
