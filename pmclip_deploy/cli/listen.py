"""`pmclip-deploy listen`: a DICOM node that asks a protocol's questions about each study."""

from pathlib import Path
from typing import Annotated

import typer

from pmclip_deploy.cli.options import Device
from pmclip_deploy.cli.output import RESEARCH_ONLY, print_notes
from pmclip_deploy.console import print_note

NEEDS = ("pynetdicom", "yaml", "pydantic", "highdicom", "starlette", "prometheus_client")

Config = Annotated[Path, typer.Option("--config", help="The node's configuration, ward.yaml; `pmclip-deploy ward init` writes one.")]
Check = Annotated[
    bool, typer.Option("--check", help="Check the configuration, ask each archive with C-ECHO, print what is offered, and exit.")
]


def listen(config: Config, check: Check = False, device: Device = "auto") -> None:
    """Take images from modalities and archives, and send a report about each study.

    pmclip-deploy listen --config ward.yaml
    """
    from pmclip_deploy.extras import need_extra

    need_extra("ward", "listen", *NEEDS)
    from pmclip_deploy.node.protocol import protocols_from_files
    from pmclip_deploy.node.settings import ward_from_file

    ward = ward_from_file(config)
    protocols = protocols_from_files(ward.protocols)
    if check:
        from pmclip_deploy.node.check import check as run_check

        raise typer.Exit(run_check(ward, protocols))
    from pmclip_deploy.node.run import Node, alone, ended_by_signals
    from pmclip_deploy.opening import load

    with alone(ward):
        predictor = load(ward.bundle, device)
        print_notes(predictor)
        node = Node(ward, protocols, predictor)
        with ended_by_signals(node):
            node.run(lambda port: print_note(f"{RESEARCH_ONLY} Listening as {ward.node.aet} on {ward.node.host} port {port}"))
