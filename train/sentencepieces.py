"""SigLIP's tokenizers from published folders, as tokenizer.json: texts are cleaned as each model's own tokenizer cleans them."""

import json
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers.convert_slow_tokenizer import import_protobuf

from pmclip_deploy.errors import BundleError
from pmclip_deploy.tokens import tokenizer_from_file
from pmclip_deploy.train.bpe import cleaning

PUNCTUATION = normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), "")  # string.punctuation
BLANKS = [normalizers.Replace(Regex(r"[\s\x1c-\x1f\x85]+"), " "), normalizers.Strip()]  # Python's \s
AT_END = normalizers.Replace(Regex(r" \z"), "")
UNIGRAM = 1  # sentencepiece's number of this kind of model


def tokenizer_from_folder(folder: Path, of_open_clip: bool, words: int, gemma: bool, name: str) -> str:
    """The text of a tokenizer.json, of the spiece.model or tokenizer.json in ``folder``, whose ids are below ``words``.

    SigLIP's has word pieces by a unigram model, SigLIP 2's is Gemma's, by byte pairs. transformers lowers case, and for SigLIP takes out
    punctuation; open_clip does both for both. No text gives the marks. Raises BundleError.
    """
    hint = f"put the tokenizer of {name} beside the weights"
    there = [path for of in (["spiece.model"] * (not gemma) + ["tokenizer.json"]) if (path := folder / of).is_file()]
    if not there:
        raise BundleError(f"{folder}: has no {'tokenizer.json' if gemma else 'spiece.model and no tokenizer.json'}", hint)
    file = there[0]
    tokenizer = _from_spiece(file) if file.suffix == ".model" else _without_marks(tokenizer_from_file(file), gemma and not of_open_clip)
    end, pad = ("<eos>", "<pad>") if gemma else ("</s>", "</s>")
    kind = models.BPE if gemma else models.Unigram
    if not isinstance(tokenizer.model, kind):
        raise BundleError(f"{file}: is not the tokenizer of {name}: its model is no {kind.__name__}", hint)
    if (tokenizer.token_to_id(end), tokenizer.token_to_id(pad)) != (1, 0 if gemma else 1):
        raise BundleError(f"{file}: is not the tokenizer of {name}: {end} is {tokenizer.token_to_id(end)}, not 1", hint)
    if (last := max(tokenizer.get_vocab().values())) >= words:
        raise BundleError(f"{file}: is not the tokenizer of {name}: its last piece has the number {last}, and there are {words}", hint)
    before = [tokenizer.normalizer] if tokenizer.normalizer is not None else []
    tokenizer.normalizer = normalizers.Sequence([*_cleaning(of_open_clip, gemma), *before])
    tokenizer.post_processor = processors.TemplateProcessing(f"$A {end}", special_tokens=[(end, 1)])
    tokenizer.no_truncation()
    return tokenizer.to_str()


def _cleaning(of_open_clip: bool, gemma: bool) -> list[Any]:
    if of_open_clip:
        return [*cleaning(), normalizers.Replace("_", " "), PUNCTUATION, normalizers.Lowercase(), *BLANKS]
    if gemma:
        return [normalizers.Lowercase()]
    return [normalizers.Replace("\u2581", " "), normalizers.Lowercase(), PUNCTUATION, *BLANKS]


def _from_spiece(file: Path) -> Tokenizer:
    """Of a sentencepiece model, which computes what it computes: characters replaced, blanks joined, a blank before the text."""
    proto = import_protobuf().ModelProto()  # type: ignore[no-untyped-call]
    try:
        proto.ParseFromString(file.read_bytes())
    except DecodeError:
        raise BundleError(f"{file}: no sentencepiece model, or a damaged one", "get it again") from None
    pieces, charsmap = [(piece.piece, piece.score) for piece in proto.pieces], proto.normalizer_spec.precompiled_charsmap
    if proto.trainer_spec.model_type != UNIGRAM or not 0 <= proto.trainer_spec.unk_id < len(pieces):
        raise BundleError(f"{file}: a sentencepiece model, and no unigram model with a piece for what is unknown", "get it again")
    tokenizer = Tokenizer(models.Unigram(pieces, proto.trainer_spec.unk_id, proto.trainer_spec.byte_fallback))
    try:
        replaced = [normalizers.Precompiled(charsmap)] if charsmap else []
    except Exception:  # the tokenizers package raises bare Exceptions
        raise BundleError(f"{file}: its table of characters is damaged", "get it again") from None
    tokenizer.normalizer = normalizers.Sequence([*replaced, normalizers.Replace(Regex(" {2,}"), " "), AT_END])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return tokenizer


def _without_marks(tokenizer: Tokenizer, keep_pieces: bool) -> Tokenizer:
    """Without added tokens that a text could spell out; ``keep_pieces`` that are no marks, as Gemma's of several blanks."""
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if keep_pieces and not token["special"]]
    return Tokenizer.from_str(json.dumps(content))
