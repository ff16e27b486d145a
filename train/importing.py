"""`import`: published CLIP weights, whatever they come in, as a checkpoint of ours; nothing in the file is ever run."""

import io
import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pmclip_deploy.atomic import told, written_folder
from pmclip_deploy.bundle.files import sha256_of_file
from pmclip_deploy.errors import BundleError, PmclipError, UsageError
from pmclip_deploy.spec import BACKBONES, Backbone
from pmclip_deploy.train.bpe import clip_tokenizer_json
from pmclip_deploy.train.towers import backbone_named, name_of_output, read_checkpoint, save_checkpoint, towers_from_spec

FILES = {"model.safetensors", "checkpoint.json", "tokenizer.json"}  # of a checkpoint
HUGGING_FACE_FILES = ("model.safetensors", "pytorch_model.bin")
IMPORTABLE = [b for b in BACKBONES.values() if b.open_clip_name]
NAMED = 3  # tensors that a message names

Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Weights:
    """Tensors under OpenAI's names, and where they come from."""

    kind: str
    file: Path
    tensors: Tensors


def import_weights(source: Path, output: Path, backbone: str | None = None, name: str | None = None) -> dict[str, Any]:
    """Writes ``source`` as a checkpoint to ``output``, all of it or nothing; returns what checkpoint.json says.

    ``source`` is OpenAI's TorchScript archive or state dict, PubMedCLIP's training checkpoint, open_clip's state dict, or a
    Hugging Face ``CLIPModel`` (file or folder); its content tells which. Floats of any width are stored in fp16. Raises
    BundleError where the file is unreadable, would run code, or does not hold the backbone; UsageError for bad arguments.
    """
    wanted = _importable(backbone) if backbone else None
    name = name_of_output(output, name)
    try:
        _refuse_foreign_folder(output)
    except OSError as error:
        raise BundleError(f"{output}: cannot be written ({error.strerror}); choose another folder") from error
    try:
        weights = weights_from_file(source)
    except PmclipError:
        raise
    except Exception as error:  # whatever a damaged or hostile file makes its reader raise
        raise _unreadable(source, error) from error
    spec, tensors = _fitted(weights, wanted)
    meta = {
        "name": name,
        "version": "0.1.0",
        "backbone": spec.name,
        "logit_scale": round(tensors["logit_scale"].clamp(max=4.6052).exp().item(), 4),  # at most 100, as CLIP does
        "metrics": {},
        "provenance": {
            "import": {
                "kind": weights.kind,
                "source": weights.file.name,
                "sha256": sha256_of_file(weights.file),
                "licence": "the user's: these weights were brought by whoever imported them, under their own terms",
            }
        },
    }
    _write_folder(output, {f"clip.{k}": v for k, v in tensors.items()}, meta)
    return meta


# From a file to tensors. The first bytes tell how it is packed, the names of the tensors who made it.


def weights_from_file(source: Path) -> Weights:
    """Reads without running anything: safetensors, a pickle of tensors alone, or the data of a TorchScript archive."""
    if source.is_dir():
        source = _file_of_folder(source)
    if not source.is_file():
        raise BundleError(f"{source}: not found; pass the weights' file, or a Hugging Face folder with config.json")
    with source.open("rb") as file:
        head = file.read(9)
    if head.startswith(b"PK\x03\x04"):
        scripted = _check_archive(source)
        data = _tensors_from_torchscript(source) if scripted else torch.load(source, map_location="cpu", weights_only=True)
    elif len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= source.stat().st_size:
        scripted, data = False, load_file(source)
    else:
        scripted, data = False, torch.load(source, map_location="cpu", weights_only=True)

    kind = "OpenAI TorchScript archive" if scripted else "state dict with OpenAI's names"
    if isinstance(data, Mapping) and isinstance(data.get("state_dict"), Mapping):
        kind = "PubMedCLIP training checkpoint" if "optimizer_state_dict" in data else "training checkpoint with OpenAI's names"
        data = data["state_dict"]
    tensors = {k: v for k, v in data.items() if isinstance(k, str) and isinstance(v, Tensor)} if isinstance(data, Mapping) else {}
    if not tensors:
        raise BundleError(f"{source}: holds no named tensors; pass a state dict, a training checkpoint or a safetensors file")
    if all(k.startswith("module.") for k in tensors):  # of torch's DataParallel, as open_clip saves it
        kind, tensors = "open_clip state dict", {k.removeprefix("module."): v for k, v in tensors.items()}
    if any(k.startswith(("text_model.", "vision_model.")) for k in tensors):
        kind, tensors = "Hugging Face CLIPModel", openai_from_hugging_face(tensors)
    return Weights(kind, source, {k: v for k, v in tensors.items() if not _is_constant(k)})


def _is_constant(name: str) -> bool:
    """What old files carry beside the weights: sizes, and masks that the model makes itself."""
    return name in ("input_resolution", "context_length", "vocab_size") or name.split(".")[-1] in ("attn_mask", "position_ids")


def _file_of_folder(folder: Path) -> Path:
    """The weights in a Hugging Face folder, once its config.json says that they are CLIP's with QuickGELU."""
    if (folder / "checkpoint.json").is_file():
        raise BundleError(f"{folder}: is a checkpoint already; use it as it is")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{folder}: has no config.json, so it is no Hugging Face folder; pass the weights' file") from None
    if not isinstance(config, dict) or config.get("model_type") != "clip":
        raise BundleError(f"{folder / 'config.json'}: its model_type is not clip; only CLIPModel is read")
    for tower, heads in (("text_config", 8), ("vision_config", 12)):  # the two facts of ViT-B/32 that no tensor's shape tells
        part = config.get(tower)
        part = part if isinstance(part, dict) else {}
        told = part.get("hidden_act", "quick_gelu"), part.get("num_attention_heads", heads)
        if told != ("quick_gelu", heads):
            raise BundleError(
                f"{folder / 'config.json'}: {tower} has {told[0]} and {told[1]} heads, OpenAI's ViT-B/32 quick_gelu and {heads}"
            )
    for name in HUGGING_FACE_FILES:
        if (folder / name).is_file():
            return folder / name
    raise BundleError(f"{folder}: has none of {', '.join(HUGGING_FACE_FILES)}; pass the weights' file")


def _check_archive(path: Path) -> bool:
    """Whether the zip is a TorchScript archive. Refuses one whose data is more than the file: torch stores it uncompressed."""
    with zipfile.ZipFile(path) as archive:
        names = {info.filename.partition("/")[2] for info in archive.infolist()}
        size = sum(info.file_size for info in archive.infolist() if not info.filename.partition("/")[2].startswith("code/"))
    if "data.pkl" not in names:
        raise BundleError(f"{path}: a zip file, but not one that torch wrote; unpack it and pass the weights' file")
    if size > path.stat().st_size:
        raise BundleError(f"{path}: its data is compressed, which torch never does; save it again with torch.save")
    return "constants.pkl" in names


# TorchScript archives. torch.jit.load would compile the code in one, and run what a module's __setstate__ says. The weights are in
# data.pkl and data/*, beside that code: reading those two runs nothing, and takes archives saved from a GPU too.

STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8,
    "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
UNTYPED = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")


class _Module:
    """What a scripted module becomes: its attributes, and no class of its own."""

    attributes: Mapping[Any, Any] = {}

    def __setstate__(self, attributes: Any) -> None:
        self.attributes = attributes if isinstance(attributes, dict) else {}


class _ArchiveReader(pickle.Unpickler):
    """data.pkl with four harmless globals; every other one is refused by name before anything is called."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self.archive, self.root = archive, root
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return _Module
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _strided
        if (module, name) == ("collections", "OrderedDict"):  # always empty: a tensor's backward hooks
            return OrderedDict
        if module == "torch.jit._pickle" and name in UNTYPED:
            return lambda value, *kind: value
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _device, _count = pid
        if not re.fullmatch(r"\d+", str(key), re.ASCII):  # as torch numbers them: no way into what was not measured
            raise pickle.UnpicklingError(f"Unsupported storage {str(key)[:40]!r}")
        if key not in self.storages:
            raw = bytearray(self.archive.read(f"{self.root}/data/{key}"))  # checked against the zip's CRC-32
            self.storages[key] = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return self.storages[key]


def _strided(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return torch.as_strided(storage, size, stride, offset)  # refuses what reaches beyond the storage


def _tensors_from_torchscript(path: Path) -> Tensors:
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].partition("/")[0]
        return dict(_named_tensors(_ArchiveReader(archive, root).load(), "", set()))


def _named_tensors(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(module, _Module) or id(module) in seen:
        return
    seen.add(id(module))  # a file may nest a module in itself
    for name, value in module.attributes.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        else:
            yield from _named_tensors(value, f"{prefix}{name}.", seen)


# Hugging Face's names to OpenAI's.

RENAMED = [
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
]


def openai_from_hugging_face(tensors: Tensors) -> Tensors:
    """Renamed; projections transposed; queries, keys and values as one. What has no counterpart keeps its name, to be reported."""
    out, parts = {}, dict(tensors)
    for query in [k for k in tensors if ".self_attn.q_proj." in k]:
        names = [query.replace(".q_proj.", f".{p}_proj.") for p in "qkv"]
        small = tensors[query].numel() < 2**24  # of any CLIP; strides can declare more than a file holds, and this makes it real
        if small and all(n in parts and parts[n].shape == parts[query].shape for n in names):
            parts[query.replace(".self_attn.q_proj.", ".attn.in_proj_")] = torch.cat([parts.pop(n) for n in names])
    for name, value in parts.items():
        for pattern, new in RENAMED:
            name = re.sub(pattern, new, name)
        out[name] = value.T if name in ("text_projection", "visual.proj") and value.ndim == 2 else value
    return out


# Which backbone the tensors are, and what is wrong with them.


def _importable(name: str) -> Backbone:
    if backbone_named(name) not in IMPORTABLE:
        raise UsageError(f"backbone {name} has no published weights to import; choose one of {_names()}")
    return BACKBONES[name]


def _names() -> str:
    return ", ".join(b.name for b in IMPORTABLE)


def _shapes(backbone: Backbone) -> Shapes:
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in towers_from_spec(backbone).state_dict().items()}


def _fitted(weights: Weights, wanted: Backbone | None) -> tuple[Backbone, Tensors]:
    """(backbone, its tensors in fp32). Raises BundleError naming the first tensors that are missing, extra, misshapen or not finite."""
    found: Shapes = {k: tuple(v.shape) for k, v in weights.tensors.items()}
    shapes = {b.name: _shapes(b) for b in IMPORTABLE}
    likeness = {name: sum(found.get(k) == shape for k, shape in all_.items()) / len(all_) for name, all_ in shapes.items()}
    nearest = BACKBONES[max(likeness, key=lambda name: likeness[name])]
    spec = wanted or nearest
    if likeness[nearest.name] < 0.1:
        raise BundleError(
            f"{weights.file}: its {len(found)} tensors are no CLIP weights (first {_first(sorted(found))}); there are {_names()}"
        )
    if spec != nearest and likeness[spec.name] < likeness[nearest.name]:
        raise BundleError(f"{weights.file}: these are weights of {nearest.name}, not of {spec.name}; leave --backbone out or give that one")

    expected = shapes[spec.name]
    # Counts of batches that torch's batch norm only counts; older files lack them.
    counters = {k for k in expected if k.endswith(".num_batches_tracked")}
    tensors = weights.tensors
    faults = {
        "missing": sorted(expected.keys() - found.keys() - counters),
        "extra": sorted(found.keys() - expected.keys()),
        "misshapen": [
            f"{k} is {_shape(found[k])}, must be {_shape(expected[k])}"
            for k in sorted(expected.keys() & found.keys())
            if found[k] != expected[k]
        ],
        "not floats": sorted(k for k, v in tensors.items() if k in expected.keys() - counters and not _is_plain_float(v)),
    }
    if any(faults.values()):
        told = "; ".join(f"{len(names)} {fault}: {_first(names)}" for fault, names in faults.items() if names)
        raise BundleError(f"{weights.file}: does not fit {spec.name}: {told}")
    tensors = {k: torch.tensor(0) if k in counters - found.keys() else _fp32(tensors[k]) for k in expected}
    if broken := [k for k, v in tensors.items() if v.is_floating_point() and not v.isfinite().all()]:
        raise BundleError(f"{weights.file}: {len(broken)} tensors hold NaN or infinity: {_first(broken)}; get the file again")
    return spec, tensors


def _is_plain_float(x: Tensor) -> bool:
    """Not sparse, not a promise without data (meta), and not 8 bits, whose scale would be missing."""
    return x.is_floating_point() and x.layout == torch.strided and x.device.type == "cpu" and x.dtype.itemsize > 1


def _fp32(x: Tensor) -> Tensor:
    return x.detach().float() if x.is_floating_point() else x.detach().long().clone()


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _first(names: list[str]) -> str:
    return ", ".join(" ".join(n[:120].split()) for n in names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def _unreadable(source: Path, error: Exception) -> BundleError:
    if isinstance(error, OSError) and error.strerror:
        return BundleError(f"{source}: cannot be read ({error.strerror})")
    if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return BundleError(
            f"{source}: names {refused[1]}, which no file of tensors needs and which could run code, so it is refused; "
            "get the weights as safetensors or as a state dict"
        )
    return BundleError(f"{source}: no weights that can be read, or a damaged file ({type(error).__name__}); get it again")


# Writing.


def _refuse_foreign_folder(output: Path) -> None:
    """Raises BundleError where a checkpoint must not be written: over a file, over something else, or over a training state."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir() or {path.name for path in output.iterdir()} - FILES:
        raise BundleError(f"{output}: exists and is not just a checkpoint, so it is not overwritten; choose another folder")
    read_checkpoint(output)


def _write_folder(output: Path, tensors: Tensors, meta: dict[str, Any]) -> None:
    output = output.resolve()
    with told(f"{output}:", "check the space left and the permissions", BundleError), written_folder(output) as new:
        (new / "tokenizer.json").write_text(clip_tokenizer_json(), encoding="utf-8")
        save_checkpoint(new, tensors, meta, new / "tokenizer.json")
