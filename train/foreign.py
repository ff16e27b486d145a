"""Weights that `import` does not read: what they are, by the names of their tensors and by the first bytes of the file."""

import re
from collections.abc import Collection, Mapping
from typing import Any

FORMAT = "give the same model as safetensors or PyTorch's state dict"
PAGE = ("a web page, without the weights", "download the file itself")
WHOLE = "give the weights of the whole model, with both towers"
LORA = ("a LoRA adapter", "merge it into its base model, and save that")
SIGLIP = ("a SigLIP model of a size that is not read, or parts of one", WHOLE)
MAGIC = {
    b"\x89HDF": ("an HDF5 file, as TensorFlow writes it", FORMAT),
    b"GGUF": ("a GGUF file", FORMAT),
    b"version ": ("a pointer of Git LFS, without the weights", "run `git lfs pull` where it was cloned"),
    b"<!DOCTYP": PAGE,
    b"<!doctyp": PAGE,
    b"<html": PAGE,
    b"\x1f\x8b": ("compressed with gzip", "unpack it, and pass the weights' file"),
}

TWO_TOWERS = "only models of an image tower and a text tower are read"
CAPTIONS = "which writes text"
KINDS = {  # parts of a config.json's model_type; the first that is in it is taken
    "coca": f"CoCa, {CAPTIONS}",
    "blip": f"BLIP, {CAPTIONS}",
    "llava": f"LLaVA, {CAPTIONS}",
    "flamingo": f"Flamingo, {CAPTIONS}",
    "paligemma": f"PaliGemma, {CAPTIONS}",
    "kosmos": f"Kosmos, {CAPTIONS}",
    "florence": f"Florence, {CAPTIONS}",
    "idefics": f"Idefics, {CAPTIONS}",
    "vl": f"a vision-language model, {CAPTIONS}",
    "gemma": f"Gemma, {CAPTIONS}",
    "llama": f"Llama, {CAPTIONS}",
    "gpt": f"GPT, {CAPTIONS}",
    "git": f"GIT, {CAPTIONS}",
    "vision-encoder-decoder": f"an encoder and a decoder, {CAPTIONS}",
    "siglip2": "SigLIP 2 for pictures of any shape (NaFlex)",
    "naflex": "NaFlex, which reads pictures of any shape",
}
GENERATES = ("causallm", "conditionalgeneration")  # in a config.json's architectures
NAMED = {  # parts of tensors' names, all of which must be there; the first row that fits is taken
    (".lora_",): LORA,
    ("lora_A",): LORA,
    ("lora_up",): LORA,
    ("lora_te",): LORA,
    ("text_decoder.", "visual."): (f"CoCa, {CAPTIONS}", TWO_TOWERS),
    ("text_decoder.",): (f"BLIP or another captioning model, {CAPTIONS}", TWO_TOWERS),
    ("qformer.",): (f"BLIP-2, {CAPTIONS}", TWO_TOWERS),
    ("mm_projector.",): (f"LLaVA, {CAPTIONS}", TWO_TOWERS),
    ("multi_modal_projector.",): (f"LLaVA or its kind, {CAPTIONS}", TWO_TOWERS),
    ("language_model.",): (f"a language model with an image tower, {CAPTIONS}", TWO_TOWERS),
    ("lm_head.",): (f"a language model, {CAPTIONS}", TWO_TOWERS),
    ("logit_bias",): SIGLIP,
    ("vision_model.head.",): SIGLIP,
    ("visual.trunk.", "text.transformer."): ("a model of a timm image tower and a BERT, other than BiomedCLIP", ""),
    ("text.transformer.embeddings.",): ("a model whose text tower is a BERT", ""),
    ("visual.trunk.",): ("a model whose image tower is one of timm", ""),
    ("optimizer",): ("an optimizer's state", WHOLE),
}
IMAGE = ("visual.", "vision_model.", "visual_projection.")
TEXT = ("transformer.", "token_embedding.", "ln_final.", "text_model.", "text_projection")
HEAD = ("classifier", "head", "fc", "linear", "probe", "weight", "bias")  # one of them is in every name


def kind_of_file(head: bytes) -> tuple[str, str] | None:
    """(what a file that begins so is, what to do), if it holds no tensors that can be read."""
    return next((said for magic, said in MAGIC.items() if head.startswith(magic)), None)


def kind_of_config(config: Mapping[str, Any]) -> str | None:
    """What a config.json is of, if that is no model of two towers; by its model_type, its architectures and open_clip's own keys."""
    model = config.get("model_cfg")
    if isinstance(model, dict):
        seen = model.get("vision_cfg")
        trunk = str(seen.get("timm_model_name")) if isinstance(seen, dict) else ""
        return KINDS["coca"] if model.get("multimodal_cfg") else KINDS["naflex"] if "naflex" in trunk.lower() else None
    kind = str(config.get("model_type", "")).lower()
    if said := next(
        (name for part, name in KINDS.items() if re.search(rf"(?<![a-z]){part}", kind) or (part != "vl" and part in kind)), None
    ):
        return said
    made = str(config.get("architectures", "")).lower()
    return f"a model, {CAPTIONS}" if any(of in made for of in GENERATES) else None


def kind_of_tensors(names: Collection[str]) -> tuple[str, str] | None:
    """(what tensors of these names are, what to do), if they are no CLIP model with both towers."""
    for parts, said in NAMED.items():
        if all(any(part in name for name in names) for part in parts):
            return said
    image, text = (any(name.startswith(of) for name in names) for of in (IMAGE, TEXT))
    if image != text:
        return f"the {'image' if image else 'text'} tower alone", WHOLE
    if not image and all(any(part in name for part in HEAD) for name in names):
        return "a head alone, without towers", WHOLE
    return None
