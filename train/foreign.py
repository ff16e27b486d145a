"""Weights that `import` does not read: what they are, by the names of their tensors and by the first bytes of the file."""

from collections.abc import Collection

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

NAMED = {  # parts of tensors' names, all of which must be there; the first row that fits is taken
    (".lora_",): LORA,
    ("lora_A",): LORA,
    ("lora_up",): LORA,
    ("lora_te",): LORA,
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
