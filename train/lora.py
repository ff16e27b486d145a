"""LoRA adapters (Hu et al. 2021) as PEFT saves them, merged into the weights that they adapt: W + alpha / r * B A."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pmclip_deploy.errors import BundleError
from pmclip_deploy.train.backbones.base import Tensors
from pmclip_deploy.train.backbones.configs import short
from pmclip_deploy.train.fitting import first, is_plain_float

CONFIG, FILES = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
LARGEST = 2**28  # numbers in a matrix of any CLIP; strides can declare more than a file holds, and adding makes it real
# What an adapter may use that W + alpha / r * B A does not say.
OTHERS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "replicated layers",
    "target_parameters": "LoRA of parameters",
    "trainable_token_indices": "trainable tokens",
    "megatron_config": "Megatron's layers",
}
INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")  # that leave the base as it is; PiSSA, OLoRA and LoftQ change it
PART = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.(weight|bias))?")
PATTERN = re.compile(r"(?:[\w^$|()-]|\\?\.|\\d\+?|\.\*)*")  # a pattern of names that is matched at once: no quantifier of a group
# PEFT adapts torch's MultiheadAttention as a whole, under the name of the attention, and adds the change of this layer twice, in training
# too (0.18 to 0.21): so the model that was trained has it twice.
INNER = ".base_layer.out_proj"
HINT = "merge it with PEFT's merge_and_unload, and import the merged model"


@dataclass(frozen=True)
class Adapter:
    """Of a folder: what adapter_config.json says, and the file of tensors."""

    config: Mapping[str, Any]
    config_file: Path
    file: Path


def adapter_of_folder(folder: Path, config: Mapping[str, Any]) -> Adapter:
    """``config`` is the folder's adapter_config.json. Raises BundleError if it is no LoRA that can be merged here, or has no tensors."""
    path = folder / CONFIG
    if (kind := config.get("peft_type")) != "LORA":
        raise BundleError(f"{path}: is an adapter of the kind {short(kind)}; only LORA is merged", HINT)
    for key, name in OTHERS.items():
        if config.get(key):
            raise BundleError(f"{path}: the adapter has {key}, which is {name}; only plain LoRA is merged", HINT)
    if (initial := config.get("init_lora_weights")) not in INITIAL:
        raise BundleError(f"{path}: the adapter began as {short(initial)}, which changes the base too; it is not merged", HINT)
    there = [name for name in FILES if (folder / name).is_file()]
    if not there:
        raise BundleError(f"{folder}: has none of {', '.join(FILES)}", "get the folder again")
    return Adapter(config, path, folder / there[0])


def merged(base: Tensors, tensors: Tensors, adapter: Adapter) -> Tensors:
    """``base`` with the adapter's ``tensors`` in it, in fp32. Raises BundleError where these are of another base."""
    names = {name.removeprefix("base_model.model.").replace(".modules_to_save.default", ""): x for name, x in tensors.items()}
    if wrong := [name for name, x in names.items() if not is_plain_float(x) or x.numel() > LARGEST or not x.isfinite().all()]:
        raise BundleError(f"{adapter.file}: {len(wrong)} tensors are not floats, or hold NaN or infinity: {first(wrong)}", "get it again")
    if magnitude := [name for name in names if "lora_magnitude_vector" in name]:
        raise BundleError(f"{adapter.file}: has {first(magnitude)}, so it is DoRA; only plain LoRA is merged", HINT)
    parts: dict[str, dict[str, Tensor]] = {}
    out, missing = dict(base), []
    for name, x in names.items():
        if found := PART.fullmatch(name):
            parts.setdefault(found[1], {})[f"{found[3]}.{found[4] or 'weight'}{found[2] or ''}"] = x
        elif (whole := _of_base(base, name.replace(".base_layer", ""), "")) is not None and base[whole].shape == x.shape:
            out[whole] = x
        else:
            missing.append(name)
    for module, part in parts.items():
        weight = _of_base(base, module.replace(".base_layer", ""), ".weight", ".in_proj_weight")
        if weight is None or not _adapt(out, weight, module, part, adapter):
            missing.append(module)
    if missing:
        of = short(adapter.config.get("base_model_name_or_path") or "a base that it does not name")
        raise BundleError(
            f"{adapter.file}: {len(missing)} of its layers are not in these weights, or not in this shape: {first(sorted(missing))}",
            f"give its own base, which is {of}",
        )
    if not parts:
        raise BundleError(f"{adapter.file}: holds no LoRA", "pass the folder that PEFT's save_pretrained wrote")
    return out


def _of_base(base: Tensors, module: str, *ends: str) -> str | None:
    """The tensor of a module, under the name that the adapter gives, or without what stands before it in a model around."""
    for _ in range(module.count(".") + 1):
        for end in ends:
            if f"{module}{end}" in base:
                return f"{module}{end}"
        module = module.partition(".")[2]
    return None


def _adapt(out: Tensors, weight: str, module: str, part: Mapping[str, Tensor], adapter: Adapter) -> bool:
    """Changes ``out[weight]``; False if the shapes are of another base. Raises BundleError if tensors and adapter_config.json disagree."""
    embedding = "A.weightembedding_" in part
    a, b = (part.get(f"{side}.weight" + ("embedding_" if embedding else "")) for side in "AB")
    if a is None or b is None:
        raise BundleError(f"{adapter.file}: {first([module])} lacks one of lora_A and lora_B", "get it again")
    rank, scale = _rank_and_scale(module.removesuffix(INNER).replace(".base_layer", ""), adapter)
    if len(a) != rank:
        raise BundleError(f"{adapter.file}: {first([module])} has rank {len(a)}, and {CONFIG} says {rank}", "get the folder again")
    if module.endswith(INNER):
        scale *= 2
    old, (a, b) = out[weight], (x.float().flatten(1) for x in (a, b))
    rows, columns = len(b), a.shape[1]
    if not is_plain_float(old) or old.numel() > LARGEST or b.shape[1] != rank or rows * columns != old.numel():
        return False
    if old.shape[0] != (columns if embedding else rows):
        return False
    change = (b @ a) * scale
    out[weight] = old.float() + (change.T if embedding else change.reshape(old.shape))
    if (shift := part.get("B.bias")) is not None:
        bias = weight.removesuffix("weight") + "bias"
        if bias not in out or out[bias].shape != shift.shape:
            return False
        out[bias] = out[bias].float() + shift.float() * scale
    return True


def _rank_and_scale(module: str, adapter: Adapter) -> tuple[int, float]:
    config = adapter.config
    rank = _of_pattern("rank_pattern", module, config.get("r", 8), adapter)
    alpha = _of_pattern("alpha_pattern", module, config.get("lora_alpha", 8), adapter)
    numbers = isinstance(rank, int) and isinstance(alpha, int | float) and not isinstance(rank, bool) and not isinstance(alpha, bool)
    if not numbers or not 1 <= rank <= 1e5 or not -1e6 <= alpha <= 1e6:  # which NaN is not either
        raise BundleError(
            f"{adapter.config_file}: r is {short(rank)} and lora_alpha {short(alpha)}, which are no such numbers", "get it again"
        )
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_pattern(key: str, module: str, usual: Any, adapter: Adapter) -> Any:
    """The value of the first pattern that matches the module's name to its end, as PEFT finds it."""
    patterns = adapter.config.get(key) or {}
    for pattern in patterns if isinstance(patterns, dict) else [short(patterns)]:
        try:
            if len(pattern) > 200 or sum(map(pattern.count, "*+")) > 3 or not PATTERN.fullmatch(pattern):
                raise ValueError
            if re.match(rf"(.*\.)?({pattern})$", module):
                return patterns[pattern]
        except (ValueError, TypeError, re.error):
            raise BundleError(f"{adapter.config_file}: {key} has {short(pattern)}, which is no pattern of names", HINT) from None
    return usual
