"""`pmclip-deploy bundle show | verify`: what a bundle is, and whether it is what it was."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from pmclip_deploy.cli.output import one_line, print_json

app = typer.Typer(help="Look into a bundle.", no_args_is_help=True)

Folder = Annotated[Path | None, typer.Argument(metavar="[FOLDER]", help="Default: the embedded model.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.command()
def show(folder: Folder = None, as_json: Json = False) -> None:
    """Print the manifest: the model, its graphs, thresholds, figures and files."""
    from pmclip_deploy.bundle import manifest_from_bundle
    from pmclip_deploy.models import DEFAULT_BUNDLE

    path = folder or DEFAULT_BUNDLE
    manifest = manifest_from_bundle(path)
    if as_json:
        print_json(manifest.to_json())
        return
    limits, answerable = manifest.abstention, [kind for kind in manifest.kinds if kind.reason is None]
    lines = [
        f"{manifest.name} {manifest.version}, {manifest.precision} for {manifest.target}, in {path}",
        f"image:    {manifest.preprocess.size} x {manifest.preprocess.size}, {manifest.preprocess.resize}",
        f"text:     up to {manifest.context_length} tokens",
        f"answers:  {len(manifest.answers)}, in {len(answerable)} kinds of question",
        f"abstains: kind of question under {limits.kind_threshold:g}, radiograph logit under {limits.radiograph_threshold:g}, "
        f"confidence under {_span(kind.threshold for kind in answerable)}",
        *(f"graph:    {name}, {graph.precision}, {graph.file}" for name, graph in manifest.graphs.items()),
        *(f"file:     {file.sha256}  {file.bytes:>10,} bytes  {name}" for name, file in manifest.files.items()),
        *(f"metric:   {name} {value}" for name, value in manifest.metrics.items() if isinstance(value, (int, float, str))),
    ]
    for line in lines:
        print("".join(c if c.isprintable() else "?" for c in line))


@app.command()
def verify(folder: Folder = None, as_json: Json = False) -> None:
    """Check the sha256 of every file; a changed, missing or extra file exits with 4."""
    from pmclip_deploy.bundle import manifest_from_bundle, problems_in_bundle, verify_bundle
    from pmclip_deploy.models import DEFAULT_BUNDLE

    path = folder or DEFAULT_BUNDLE
    if as_json:
        problems = problems_in_bundle(path, manifest_from_bundle(path))
        print_json({"schema": "pmclip-deploy/verification/1", "bundle": str(path), "verified": not problems, "problems": problems})
    manifest = verify_bundle(path)
    if not as_json:
        print(f"{one_line(str(path))}: all {len(manifest.files)} files are what the manifest says")


def _span(values: Iterable[float]) -> str:
    low, high = min(ordered := sorted(values) or [0.0]), max(ordered)
    return f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}, by kind"
