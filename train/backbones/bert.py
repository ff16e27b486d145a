"""BERT (Devlin et al. 2019) as a text tower of open_clip's: its shape from a configuration, its graph, its tokenizer."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from open_clip import CustomTextCLIP
from open_clip.hf_model import ClsPooler, MeanPooler
from tokenizers import Tokenizer, normalizers
from tokenizers.implementations.bert_wordpiece import BertWordPieceTokenizer
from torch import nn

from pmclip_deploy.errors import BundleError
from pmclip_deploy.tokens import tokenizer_from_file
from pmclip_deploy.train.backbones.configs import short
from pmclip_deploy.train.bpe import cleaning

if TYPE_CHECKING:
    from onnx import ModelProto

    from pmclip_deploy.train.graph import Graph

VOCABULARY = 30522  # word pieces, of every BERT for English texts without case
BASE: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": VOCABULARY,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
Towers = TypeVar("Towers", bound=CustomTextCLIP)


def towers_from_config(kind: type[Towers], config: Mapping[str, Any], bert: Mapping[str, Any]) -> Towers:
    """Untrained. ``config`` is open_clip's; it reads the text tower's shape, ``bert``, from a folder."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(bert))
        towers: Towers = kind(**{**config, "text_cfg": {**config["text_cfg"], "hf_model_name": folder, "hf_model_pretrained": False}})
        return towers


def uncased_tokenizer(vocabulary: Path) -> Tokenizer:
    """Of a vocab.txt. Raises BundleError."""
    try:
        return Tokenizer.from_str(BertWordPieceTokenizer(str(vocabulary)).to_str())
    except Exception as error:  # the tokenizers package raises bare Exceptions
        raise BundleError(f"{vocabulary}: no usable vocabulary ({' '.join(str(error).split())[:200]})", "get it again") from error


def wordpieces_beside(
    weights: Path, name: str, pad_id: int = 0, vocabulary: int = VOCABULARY, cased: bool = False, cleaned: bool = True
) -> str:
    """Of the tokenizer.json, or else the vocab.txt, in the folder of the weights of backbone ``name``; ``cased`` if it may tell upper case.

    If ``cleaned``, a text is cleaned first, as open_clip does it. Raises BundleError if there is none, or it is none of BERT's.
    """
    there = [path for of in ("tokenizer.json", "vocab.txt") if (path := weights.with_name(of)).is_file()]
    hint = f"put the tokenizer.json of {name} beside the weights"
    if not there:
        raise BundleError(f"{weights.parent}: has no tokenizer.json", hint)
    file = there[0]
    tokenizer = tokenizer_from_file(file) if file.suffix == ".json" else uncased_tokenizer(file)
    if wrong := _misfit_of_tokenizer(tokenizer, pad_id, vocabulary, cased):
        raise BundleError(f"{file}: is not the tokenizer of {name}: {wrong}", hint)
    tokenizer.no_truncation()
    if cleaned:
        tokenizer.normalizer = normalizers.Sequence([*cleaning(), *([tokenizer.normalizer] if tokenizer.normalizer else [])])
    return tokenizer.to_str()


def _misfit_of_tokenizer(tokenizer: Tokenizer, pad_id: int, vocabulary: int, cased: bool) -> str | None:
    if (marks := tokenizer.encode("").tokens) != ["[CLS]", "[SEP]"]:
        return f"an empty text is {short(marks)}, not [CLS] and [SEP]"
    if (pad := tokenizer.token_to_id("[PAD]")) != pad_id:
        return f"[PAD] is {pad}, not {pad_id}"
    if (last := max(tokenizer.get_vocab().values())) >= vocabulary:
        return f"its last piece has the number {last}, and there are {vocabulary}"
    if not cased and (tokenizer.normalizer is None or tokenizer.encode("CT").ids != tokenizer.encode("ct").ids):
        return "it tells upper from lower case"
    return None


def bert_graph(g: "Graph", bert: Any, limit: int, first_only: bool = False, padding_counts: bool = False) -> tuple[str, str]:
    """From "tokens" (B, T) with T <= ``limit``: the last hidden state (B, T, W), and (B, T, 1), 1 for a token and 0 for padding.

    With ``first_only`` the state is (B, 1, W), the first token's: of the last layer nothing else is computed. With ``padding_counts``
    every text is padded to ``limit`` and nothing is masked, for a model that was trained so; the second output is then "".
    """
    from pmclip_deploy.train.graph import FLOAT, scaled

    heads, width, tokens = bert.config.num_attention_heads, bert.config.hidden_size, "tokens"
    pad_id = g.ints("pad_id", bert.config.pad_token_id)
    real, masked = "", None
    if padding_counts:
        missing = g.node("Sub", "missing", g.ints("limit", [limit]), g.node("Shape", "own_length", "tokens", start=1, end=2))
        tokens = g.node("Pad", "padded", "tokens", g.node("Concat", "padding", g.ints("no_padding", [0, 0, 0]), missing, axis=0), pad_id)
    else:
        real = g.node("Cast", "real", g.node("Not", "not_pad", g.node("Equal", "is_pad", "tokens", pad_id)), to=FLOAT)
        real = g.node("Unsqueeze", "mask", real, g.ints("last", [-1]))
        # -1e4 where the key is padding: its weight after the softmax is exactly 0 in fp32.
        masked = g.node("Mul", "mask.scaled", g.node("Sub", "mask.less_one", real, g.floats("one", 1)), g.floats("ten_thousand", 1e4))
        masked = g.node("Reshape", "mask.keys", masked, g.ints("keys_shape", [0, 1, 1, -1]))  # (B, 1, 1, T)

    e = bert.embeddings
    words = g.node("Gather", "words", g.weight("words.weight", e.word_embeddings.weight), tokens)
    places = e.position_embeddings.weight[:limit] + e.token_type_embeddings.weight[0]
    length = g.node("Shape", "length", tokens, start=1, end=2)
    places = g.node("Slice", "places", g.weight("places.weight", places), g.ints("zero", [0]), length, g.ints("zero", [0]))
    x = g.norm("embeddings.norm", g.node("Add", "embeddings", words, places), e.LayerNorm)

    for i, layer in enumerate(bert.encoder.layer):
        name, a = f"layer.{i}", layer.attention
        parts = [a.self.query, a.self.key, a.self.value]
        weight, bias = (scaled(torch.cat(of), heads) for of in ([p.weight for p in parts], [p.bias for p in parts]))
        if first_only and i == len(bert.encoder.layer) - 1:
            of_all = g.linear(f"{name}.kv", x, weight[width:], bias[width:])
            k, v = g.nodes("Split", [f"{name}.k", f"{name}.v"], of_all, axis=-1, num_outputs=2)
            x = g.first(f"{name}.picked", x)
            q = g.linear(f"{name}.q", x, weight[:width], bias[:width])
        else:
            qkv = g.linear(f"{name}.qkv", x, weight, bias)  # (B, T, 3W)
            q, k, v = g.nodes("Split", [f"{name}.{p}" for p in "qkv"], qkv, axis=-1, num_outputs=3)
        joined = g.attention(name, q, k, v, heads, width, masked)
        out = g.linear(f"{name}.attention.out", joined, a.output.dense.weight, a.output.dense.bias)
        x = g.norm(f"{name}.attention.norm", g.node("Add", f"{name}.attention.skip", out, x), a.output.LayerNorm)
        up = g.linear(f"{name}.up", x, layer.intermediate.dense.weight, layer.intermediate.dense.bias)
        down = g.linear(f"{name}.down", g.node("Gelu", f"{name}.gelu", up), layer.output.dense.weight, layer.output.dense.bias)
        x = g.norm(f"{name}.norm", g.node("Add", f"{name}.skip", down, x), layer.output.LayerNorm)
    return x, real


def bert_text_graph(text: Any, limit: int, embed_dim: int) -> "ModelProto":
    """Of open_clip's ``HFTextEncoder``, with T <= ``limit``: the mean over what is not padding, or the first token, and a projection."""
    from pmclip_deploy.train.graph import INT64, Graph

    g, bert = Graph(), text.transformer
    mean = isinstance(text.pooler, MeanPooler)
    x, real = bert_graph(g, bert, limit, first_only=not mean)
    if mean:
        tokens_axis = g.ints("tokens_axis", [1])
        total = g.node("ReduceSum", "sum", g.node("Mul", "unpadded", x, real), tokens_axis, keepdims=0)
        count = g.node("ReduceSum", "count", real, tokens_axis, keepdims=0)
        x = g.node("Div", "mean", total, count)
    else:
        x = g.token(x)
        if isinstance(text.pooler, ClsPooler) and bert.pooler is not None:
            x = g.node("Tanh", "pooler", g.linear("pooler.dense", x, bert.pooler.dense.weight, bert.pooler.dense.bias))
    linears = [layer for layer in text.proj.modules() if isinstance(layer, nn.Linear)]
    if len(linears) == 2:
        x = g.node("Gelu", "proj.gelu", g.node("MatMul", "proj.up", x, g.weight("proj.up.weight", linears[0].weight.T)))
    if linears:
        g.node("MatMul", "embedding", x, g.weight("proj.weight", linears[-1].weight.T))
    else:
        g.node("Identity", "embedding", x)
    return g.model("text", {"tokens": (INT64, ["B", "T"])}, {"embedding": ["B", embed_dim]})
