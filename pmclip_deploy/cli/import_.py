"""`pmclip-deploy import`: published CLIP weights as a checkpoint."""

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from pmclip_deploy.cli.output import print_json
from pmclip_deploy.console import one_line
from pmclip_deploy.errors import UsageError


def import_(
    weights: Annotated[
        Path, typer.Argument(metavar="WEIGHTS", help="OpenAI's .pt, PubMedCLIP's .pth, open_clip's or Hugging Face's file or folder.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the checkpoint.")],
    backbone: Annotated[
        str | None, typer.Option(help="Such as ViT-B/32. Default: what the shapes say.", show_default=False)
    ] = None,
    name: Annotated[str | None, typer.Option(help="Default: the output folder's.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Read published CLIP weights into a checkpoint, without running anything in them (needs the extra `train`)."""
    if missing := [m for m in ("torch", "open_clip", "safetensors") if importlib.util.find_spec(m) is None]:
        raise UsageError(f"this needs {', '.join(missing)}: pip install 'pmclip-deploy[train]'")
    from pmclip_deploy.train.importing import import_weights

    meta = import_weights(weights, output, backbone, name)
    made = meta["provenance"]["import"]
    if as_json:
        print_json(
            {"schema": "pmclip-deploy/import/1", "checkpoint": str(output), "name": meta["name"], "backbone": meta["backbone"], **made}
        )
    else:
        print(f"{meta['backbone']} from a {made['kind']}, checkpoint in {one_line(str(output))}")
