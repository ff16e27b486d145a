"""What the config.json or open_clip_config.json beside published weights says, and how an error quotes it."""

from collections.abc import Mapping
from typing import Any

from pmclip_deploy.spec import Preprocess


def part_of(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of a config.json; in older ones NAME_dict stands beside it, and counts (transformers' CLIPConfig)."""
    parts = [part for key in (name, f"{name}_dict") if isinstance(part := config.get(key), dict)]
    return {key: value for part in parts for key, value in part.items()}


def pixels_of_transformers(told: Mapping[str, Any]) -> dict[str, Any]:
    """What a preprocessor_config.json says, as ``preprocess_cfg`` of an open_clip_config.json does. It numbers filters as Pillow does."""
    filters = {2: "bilinear", 3: "bicubic"}
    said = {key: told[f"image_{key}"] for key in ("mean", "std") if f"image_{key}" in told}
    return said | ({"interpolation": filters.get(told["resample"], short(told["resample"]))} if "resample" in told else {})


def misfit_of_pixels(config: Mapping[str, Any], preprocess: Preprocess, ours: str) -> str | None:
    """How the pictures of ``config`` are normalised, if ``ours``, a backbone with ``preprocess``, normalises them otherwise."""
    for key, mine in (("mean", preprocess.mean), ("std", preprocess.std)):
        if (theirs := part_of(config, "preprocess_cfg").get(key)) is not None and not _is_close(theirs, mine):
            return f"it normalises pictures by a {key} of {short(theirs)}, {ours} by {short(mine)}"
    return None


def _is_close(theirs: object, mine: tuple[float, ...]) -> bool:
    if not isinstance(theirs, list) or len(theirs) != len(mine):
        return False
    return all(isinstance(a, int | float) and abs(a - b) < 1e-3 for a, b in zip(theirs, mine, strict=True))


def short(value: object) -> str:
    return " ".join(str(value).split())[:60]
