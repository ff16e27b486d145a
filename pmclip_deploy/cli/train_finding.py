"""`pmclip-deploy train finding`: teaches a bundle a finding from a few hundred labelled pictures."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pmclip_deploy.cli.options import Bundle, Json, check_choice
from pmclip_deploy.cli.output import print_json
from pmclip_deploy.cli.train_options import SCHEMA, Name
from pmclip_deploy.console import counted, one_line, print_note, stages
from pmclip_deploy.errors import GateError

if TYPE_CHECKING:
    from pmclip_deploy.bundle.manifest import Manifest
    from pmclip_deploy.bundle.types import Stratum
    from pmclip_deploy.train.finding import Measured


def finding(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the finding in questions, such as pneumothorax.")],
    images: Annotated[
        Path,
        typer.Option(
            "--images", help="Folder with the folders positive and negative, or a CSV file with the columns path, label and group."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="Folder to write the new bundle to.")],
    ask: Annotated[
        list[str] | None,
        typer.Option(
            "--ask", help='Question that asks for the finding, such as "has the lung collapsed?". Repeat for more.', show_default=False
        ),
    ] = None,
    bundle: Bundle = None,
    called: Name = None,
    modality: Annotated[
        str | None, typer.Option(help="Modality of pictures whose files do not give it: xr, ct, mr, us, ...", show_default=False)
    ] = None,
    region: Annotated[
        str | None, typer.Option(help="Body region of pictures whose files do not give it: hand, shoulder, chest, ...", show_default=False)
    ] = None,
    children: Annotated[
        bool, typer.Option("--children", help="All pictures are of patients under 18. The finding is then answered for such patients only.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace the finding of this name that the bundle was taught earlier.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Teach a bundle a finding from labelled pictures, and measure on which kinds of picture it may answer. Needs no extra.

    pmclip-deploy train finding pneumothorax --images FOLDER --ask "has the lung collapsed?" --output DIR
    """
    from pmclip_deploy.vocabulary import FAMILIES, REGIONS

    for option, value, known in (("modality", modality, FAMILIES), ("region", region, REGIONS)):
        if value is not None:
            check_choice(option, value, known)
    from pmclip_deploy.train.finding import advice, train_finding
    from pmclip_deploy.train.finding_data import Defaults

    defaults = Defaults(modality, region, children)
    measured, manifest = train_finding(
        name, images, output, asked=ask or (), bundle=bundle, called=called, defaults=defaults, replace_it=replace, progress=stages
    )
    if as_json:
        _print_document(measured, manifest, output)
    else:
        if measured.name != name.lower():
            print(f"the finding {one_line(name)} is called {measured.name}. Questions may also use its other names.")
        _print(measured, manifest, output)
    if manifest is None:
        best = max(measured.strata, key=lambda stratum: stratum.auroc_ci95[0])
        raise GateError(f"{measured.name} is not answered, so no bundle was written: {best.reason}", advice(best))


def _print_document(measured: "Measured", manifest: "Manifest | None", output: Path) -> None:
    written = None if manifest is None else {"bundle": str(output), "name": manifest.name, "signed": False}
    print_json({"schema": SCHEMA, **(written or {"bundle": None}), "metrics": measured.to_json()})


def _print(measured: "Measured", manifest: "Manifest | None", output: Path) -> None:
    from pmclip_deploy.decision.rules import question_about
    from pmclip_deploy.train.finding import label_of

    of, s = measured.to_json(), measured.samples
    counts = f"{counted(of['pictures'], 'picture')}, {of['positives']} with {measured.name}, in {counted(of['groups'], 'group')}"
    print(f"{counts}: {_listed(s.grouped)}")
    if s.left_out:
        print(f"left out: {_listed(s.left_out)}")
    if s.alike:
        were = counted(s.alike, "pair of look-alikes was", "pairs of look-alikes were")
        print(f"{were} in two groups; these groups were joined")
    if s.disagreeing:
        have = counted(s.disagreeing, "pair of look-alikes has", "pairs of look-alikes have")
        print(f"{have} different labels; check these labels")
    for error in s.broken:
        print_note(error)
    if not measured.contamination_checked:
        named = ", ".join(map(one_line, measured.tower_trained_on)) or "pictures that the bundle does not name"
        print(f"the image tower was trained on {named}; whether yours are among them was not checked, because the bundle has no signatures")
    for stratum in measured.strata:
        _print_stratum(measured.name, stratum)
    for key, (yes, no) in measured.small.items():
        print(f"{label_of(key)}: {yes} with the finding and {no} without it are too few pictures or patients; not measured, not answered")
    if manifest is not None:
        print(f"bundle {manifest.name} in {one_line(str(output))}; the bundle is not signed")
        print(f'next: pmclip-deploy infer FILE "{question_about(manifest, measured.name)}" --bundle {one_line(str(output))}')


def _print_stratum(name: str, stratum: "Stratum") -> None:
    from pmclip_deploy.decision.findings import worth_of
    from pmclip_deploy.train.finding import advice

    low, high = math.floor(100 * stratum.auroc_ci95[0]) / 100, stratum.auroc_ci95[1]  # rounded as the gate says it
    print(
        f"{worth_of(name, stratum, True).stratum}: AUROC {stratum.auroc:.2f} (95% {low:.2f} to {high:.2f}), {counted(stratum.n, 'picture')}"
    )
    if stratum.reason:
        print(f"  not answered: {stratum.reason}; {advice(stratum)}")
        return
    for found, word in ((True, "yes"), (False, "no")):
        print(f"  {word} - {worth_of(name, stratum, found).sentence()}")


def _listed(counts: dict[str, int]) -> str:
    return "; ".join(f"{what} ({count:,})" for what, count in counts.items())
