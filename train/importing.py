"""`import`: published CLIP weights, whatever they come in, as a checkpoint of ours; nothing in the file is ever run."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from pmclip_deploy.atomic import write_errors, written_folder
from pmclip_deploy.bundle.files import name_of_output, sha256_of_file
from pmclip_deploy.errors import BundleError, PmclipError, UsageError
from pmclip_deploy.train.backbones import backbone_named
from pmclip_deploy.train.backbones.base import ACTIVATIONS, Backbone, Tensors
from pmclip_deploy.train.backbones.configs import part_of
from pmclip_deploy.train.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from pmclip_deploy.train.contrastive import logits_of
from pmclip_deploy.train.fitting import Weights, fitted, names_of_importable
from pmclip_deploy.train.pickles import Costly
from pmclip_deploy.train.published import weights_from_file

TOKENIZERS = ("spiece.model", "tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")
FILES = {"model.safetensors", "checkpoint.json", "tokenizer.json"}  # of a checkpoint


@dataclass(frozen=True)
class Chosen:
    """An activation, and who says so."""

    activation: str
    by: str


def import_weights(
    source: Path,
    output: Path,
    backbone: str | None = None,
    name: str | None = None,
    activation: str | None = None,
    adapter: Path | None = None,
) -> Checkpoint:
    """Writes ``source`` as a checkpoint to ``output``, all of it or nothing; returns what checkpoint.json says.

    ``source`` is OpenAI's TorchScript archive or state dict, PubMedCLIP's training checkpoint, open_clip's state dict, or a
    Hugging Face ``CLIPModel`` (file or folder, in shards too); its content tells which. Floats of any width are stored in fp16.
    ``activation`` is "quick_gelu" or "gelu"; by default what config.json or open_clip_config.json says, or else OpenAI's quick_gelu.
    ``adapter`` is the folder of a LoRA adapter, by default that of the weights if it has one; it is merged into them.
    Raises BundleError where the file is unreadable, would run code, or does not hold the backbone; UsageError for bad arguments.
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise UsageError(f"activation {activation[:60]!r} is unknown", f"choose one of {', '.join(ACTIVATIONS)}")
    wanted = backbone_named(backbone) if backbone else None
    if wanted and not wanted.importable:
        raise UsageError(f"backbone {wanted.name} has no published weights to import", f"choose one of {names_of_importable()}")
    name = name_of_output(output, name)
    try:
        _refuse_foreign_folder(output)
    except OSError as error:
        raise BundleError(f"{output}: cannot be written ({error.strerror})", "choose another folder") from error
    try:
        weights = weights_from_file(source, adapter)
    except PmclipError:
        raise
    except Costly as error:
        raise BundleError(f"{source}: {error}, so it is refused", "get the weights as safetensors or as a state dict") from None
    except Exception as error:  # whatever a damaged or hostile file makes its reader raise
        raise _unreadable(source, error) from error
    spec, tensors = fitted(weights, wanted)
    spec, chosen = _activated(spec, weights, activation)
    spec, told = spec.as_told(weights.config)
    tokenizer_json = spec.tokenizer_beside(weights.file)
    meta: Checkpoint = {
        "name": name,
        "version": "0.1.0",
        "backbone": spec.name,
        **logits_of(tensors),  # type: ignore[typeddict-item]
        "metrics": {},
        "provenance": {
            "import": {
                "kind": weights.kind,
                "source": weights.file.name,
                "sha256": sha256_of_file(weights.file),
                **({"shards": {path.name: sha256_of_file(path) for path in weights.shards}} if weights.shards else {}),
                **({"adapter": {weights.adapter.name: sha256_of_file(weights.adapter)}} if weights.adapter else {}),
                **({"assumed": assumed} if (assumed := _assumed(spec, weights)) else {}),
                **({"activation": chosen.activation, "activation_from": chosen.by} if chosen else {}),
                **told,
                "licence": "the user's: these weights were brought by whoever imported them, under their own terms",
            }
        },
    }
    _write_folder(output, {f"clip.{k}": v for k, v in tensors.items()}, meta, tokenizer_json)
    return meta


def _activated(spec: Backbone, weights: Weights, wanted: str | None) -> tuple[Backbone, Chosen | None]:
    """(the backbone with the activation that was trained, who says which that is)"""
    if spec.activation is None:
        if wanted is not None:
            raise UsageError(f"backbone {spec.name} has one activation only", "leave out --activation")
        return spec, None
    try:
        told = None if weights.config is None else spec.activation_of(weights.config)
    except ValueError as error:
        if wanted is None:
            raise BundleError(f"{weights.config_file}: {error}") from None
        told = None
    if wanted is not None:
        chosen = Chosen(wanted, "--activation")
    elif told is not None:
        chosen = Chosen(told, weights.config_file.name)
    else:
        chosen = Chosen(spec.activation, "assumed" if spec.activation == ACTIVATIONS[0] else "--backbone")
    return spec.with_activation(chosen.activation), chosen


def _unreadable(source: Path, error: Exception) -> BundleError:
    if isinstance(error, OSError) and error.strerror:
        return BundleError(f"{source}: cannot be read ({error.strerror})")
    if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return BundleError(
            f"{source}: names {refused[1]}, which no file of tensors needs and which could run code, so it is refused",
            "get the weights as safetensors or as a state dict",
        )
    return BundleError(f"{source}: no weights that can be read, or a damaged file", "get it again")


def _assumed(spec: Backbone, weights: Weights) -> list[str]:
    """What the source leaves open and was taken from the backbone, a line each; of a file without a configuration, only what it lacks."""
    lines = []
    if "logit_scale" not in weights.tensors:
        lines.append(f"a logit scale of {math.exp(spec.usual_logit_scale):.2f}, since the weights have none")
    if weights.config is None:
        return lines
    told = part_of(weights.config, "preprocess_cfg")
    for key, value in (("mean", spec.preprocess.mean), ("std", spec.preprocess.std)):
        if told.get(key) is None:
            lines.append(f"a {key} of {', '.join(f'{x:.3g}' for x in value)} for pictures, since the folder names none")
    if not any(weights.file.with_name(name).is_file() for name in TOKENIZERS):
        lines.append("CLIP's own tokenizer, since the folder has none")
    if spec.described and (bert := json.loads(spec.described)["bert"]) and "num_attention_heads" not in weights.of_bert:
        lines.append(f"{bert['num_attention_heads']} heads in each of BERT's layers, since no config.json of BERT is beside the weights")
    return lines


# Writing.


def _refuse_foreign_folder(output: Path) -> None:
    """Raises BundleError where a checkpoint must not be written: over a file, over something else, or over a training state."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir() or {path.name for path in output.iterdir()} - FILES:
        raise BundleError(f"{output}: exists and is not just a checkpoint, so it is not overwritten", "choose another folder")
    read_checkpoint(output)


def _write_folder(output: Path, tensors: Tensors, meta: Checkpoint, tokenizer_json: str) -> None:
    output = output.resolve()
    with write_errors(f"{output}:", "check the space left and the permissions", BundleError), written_folder(output) as new:
        (new / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        save_checkpoint(new, tensors, meta, new / "tokenizer.json")
