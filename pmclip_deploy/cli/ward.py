"""`pmclip-deploy ward`: the first files of a node."""

from pathlib import Path
from typing import Annotated

import typer

from pmclip_deploy.atomic import write_errors
from pmclip_deploy.errors import UsageError

app = typer.Typer(help="Set up a DICOM node.", no_args_is_help=True)

WARD = """\
# A node of pmclip-deploy. Unknown keys are errors. Durations: 60, 15m, 6h, 7d.
# Check this file with `pmclip-deploy listen --config ward.yaml --check`.

node:
  aet: PMCLIP
  host: 127.0.0.1          # 0.0.0.0 to be reached from other machines
  port: 11112
  # tls: {cert: node.pem, key: node.key, ca: peers.pem}

peers: []                  # who may connect; nobody as long as it is empty
  # - {aet: PACS, addresses: [10.0.0.5/32]}

complete:                  # when a study is taken as whole
  quiet_s: 60              # nothing of it came for so long
  force_s: 30m             # or its first image is so old

protocols: [chest.yaml]

send:
  - {to: "folder:reports"}
  # - {to: "dicom:PACS@10.0.0.5:104", sr_classes: [comprehensive3d, comprehensive], i_understand_this_is_research: true}
  # - {to: "stow:https://pacs.example/dicom-web/studies", token_file: token, i_understand_this_is_research: true}

retry: {first_s: 10, factor: 2, max_s: 15m, give_up: 7d}
disk: {refuse_below_gb: 5, retention_images: 1d, retention_reports: 7d}
# audit: {file: audit.xml, syslog: "audit.example:6514", ca: hospital.pem}   # audit messages of PS3.15; Patient IDs are hashed
# metrics: {port: 9112}    # /metrics, /live and /ready, on 127.0.0.1 alone
"""

CHEST = """\
# Values are compared whole, without regard to case. "" stands for an absent attribute. The first protocol that matches takes the image.
name: chest
revision: 1                # raise it with every change
match: {Modality: [CR, DX], BodyPartExamined: [CHEST, THORAX, ""], ViewPosition: [PA, AP]}
exclude: {ImageType: [LOCALIZER, "DERIVED&SECONDARY"], BurnedInAnnotation: [YES]}
pick: {per: series, choose: middle, max_images: 3}
questions:
  - {id: pneumonia, ask: "is there pneumonia?"}
  - {id: plane, ask: "in what plane is this image taken?"}
report: {when: always}     # or answered: no report if no question had an answer
"""


@app.command()
def init(folder: Annotated[Path, typer.Argument(help="Folder for ward.yaml and a first protocol.")]) -> None:
    """Write a commented ward.yaml and a protocol. Files that exist are not replaced."""
    files = {"ward.yaml": WARD, "chest.yaml": CHEST}
    if there := [name for name in files if (folder / name).exists()]:
        raise UsageError(f"{folder / there[0]}: exists already", "give another folder")
    with write_errors(f"{folder}:", "give another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, "utf-8")
    print(f"{folder}: {', '.join(files)}")
