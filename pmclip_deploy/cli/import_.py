"""`pmclip-deploy import`: makes a checkpoint of published CLIP weights."""

from pathlib import Path
from typing import Annotated

import typer

from pmclip_deploy.cli.options import Json
from pmclip_deploy.cli.output import print_json
from pmclip_deploy.console import one_line
from pmclip_deploy.extras import need_extra


def import_(
    weights: Annotated[
        Path, typer.Argument(metavar="WEIGHTS", help="OpenAI's .pt, PubMedCLIP's .pth, or a file or folder of open_clip or Hugging Face.")
    ],
    output: Annotated[Path, typer.Option(help="Folder to write the checkpoint to.")],
    backbone: Annotated[
        str | None,
        typer.Option(
            help="Name of the backbone, such as ViT-B/32. Default: the backbone that fits the shapes of the weights.", show_default=False
        ),
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option(
            help="quick_gelu (OpenAI, PubMedCLIP) or gelu (LAION, DataComp). Default: the one that config.json beside the weights names, "
            "or else quick_gelu.",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(help="Folder of a LoRA adapter to merge. Default: the one in the folder of the weights.", show_default=False),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model. Default: the name of the output folder.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Read published CLIP weights into a checkpoint. No code in the files is run. Needs the extra `train`."""
    need_extra("train", "this command", "torch", "open_clip", "safetensors")
    from pmclip_deploy.train.importing import import_weights

    meta = import_weights(weights, output, backbone, name, activation, adapter)
    made = meta["provenance"]["import"]
    if as_json:
        print_json(
            {"schema": "pmclip-deploy/import/1", "checkpoint": str(output), "name": meta["name"], "backbone": meta["backbone"], **made}
        )
    else:
        article = "an" if made["kind"][0] in "AEIOUaeiou" else "a"
        print(f"{meta['backbone']} from {article} {made['kind']}, checkpoint in {one_line(str(output))}")
        for file in made.get("adapter", ()):
            print(f"LoRA adapter merged: {one_line(file)}")
        for line in made.get("assumed", ()):
            print(f"assumed: {one_line(line)}")
        if made.get("activation_from") == "assumed":
            said = "assumed, since no config.json says it. If the model was trained with GELU, give --activation gelu"
            print(f"activation: {made['activation']}, {said}")
        elif "activation" in made:
            print(f"activation: {made['activation']}, as {made['activation_from']} says")
        if "interpolation" in made:
            by = "assumed" if made["interpolation_from"] == "assumed" else "as the configuration beside the weights says"
            print(f"pictures are scaled by a {made['interpolation']} filter, {by}")
