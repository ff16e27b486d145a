"""`pmclip-deploy bundle show | verify | sign`: print a bundle's manifest, check its files and its signature, sign it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pmclip_deploy.cli.options import Json
from pmclip_deploy.cli.output import print_json
from pmclip_deploy.console import counted, one_line

if TYPE_CHECKING:
    from pmclip_deploy.bundle.manifest import Manifest

app = typer.Typer(help="Show, verify or sign a bundle.", no_args_is_help=True)

Folder = Annotated[Path | None, typer.Argument(metavar="[FOLDER]", help="Bundle folder. Default: the embedded model.", show_default=False)]


@app.command()
def show(folder: Folder = None, as_json: Json = False) -> None:
    """Print the manifest of a bundle: the model, its graphs, thresholds, figures and files."""
    from pmclip_deploy.bundle.files import manifest_from_bundle
    from pmclip_deploy.models import DEFAULT_BUNDLE

    path = folder or DEFAULT_BUNDLE
    manifest = manifest_from_bundle(path)
    if as_json:
        print_json(manifest.to_json())
        return
    lines = [
        f"{manifest.name} {manifest.version}, {manifest.precision} for {manifest.target}, in {path}",
        f"image:    {manifest.preprocess.size} x {manifest.preprocess.size}, {manifest.preprocess.resize}",
        f"text:     up to {manifest.context_length} tokens",
        *_lines_of_head(manifest),
        *([f"labels:   {', '.join(manifest.labels)}"] if manifest.labels else []),
        *(
            f"taught:   {probe.finding.name}, measured on {counted(sum(s.n for s in probe.finding.strata), 'picture')}"
            for probe in manifest.probes
        ),
        *(
            f"graph:    {name}, {graph.precision}, {graph.file}"
            + (f", layers in float: {len(kept)}" if (kept := graph.float_layers) else "")
            for name, graph in manifest.graphs.items()
        ),
        *(
            f"engine:   {e.graph}, {e.backend} {e.version}, compute capability {', '.join(e.compute_capabilities)}, {e.platform}, "
            f"batch {_span(e.profile[0], e.profile[2], 'd')}, {e.file}"
            for e in manifest.engines
        ),
        *(f"file:     {file.sha256}  {file.bytes:>10,} bytes  {name}" for name, file in manifest.files.items()),
        *(f"metric:   {name} {value}" for name, value in manifest.metrics.items() if isinstance(value, (int, float, str))),
    ]
    for line in lines:
        print("".join(c if c.isprintable() else "?" for c in line))


@app.command()
def verify(
    folder: Folder = None,
    key: Annotated[Path | None, typer.Option(metavar="PUBLIC.pem", help="Public key. With it, the signature is checked too.")] = None,
    as_json: Json = False,
) -> None:
    """Check the sha256 of every file, and with --key the signature.

    If a file has changed, is missing or was added, or if the signature is wrong, the command exits with 4.
    """
    from pmclip_deploy.bundle.files import manifest_from_bundle, problems_in_bundle
    from pmclip_deploy.bundle.names import NEXT_STEP
    from pmclip_deploy.bundle.signing import fingerprint, problems_in_signature, public_key_from_pem
    from pmclip_deploy.errors import BundleError
    from pmclip_deploy.models import DEFAULT_BUNDLE

    path, public_key = folder or DEFAULT_BUNDLE, None if key is None else public_key_from_pem(key)
    manifest = manifest_from_bundle(path)
    broken = problems_in_bundle(path, manifest)
    problems = broken + ([] if public_key is None else problems_in_signature(path, public_key))
    signed_by = None if public_key is None or problems else fingerprint(public_key)
    if as_json:
        about = {"schema": "pmclip-deploy/verification/1", "bundle": str(path), "verified": not problems, "signed_by": signed_by}
        print_json({**about, "problems": problems})
    if problems:
        next_step = (
            NEXT_STEP if broken else "get the bundle from the holder of this key, or pass the public key of the person who signed it"
        )
        raise BundleError(f"{path}: {', '.join(problems)}", next_step)
    if not as_json:
        signed = "" if signed_by is None else f", signed by the key with the sha256 {signed_by}"
        print(f"{one_line(str(path))}: all {len(manifest.files)} files match the manifest{signed}")


@app.command()
def sign(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Bundle folder.", show_default=False)],
    key: Annotated[
        Path,
        typer.Option(metavar="PRIVATE.pem", help="Ed25519 private key. If it is encrypted, PMCLIP_SIGNING_PASSWORD holds the password."),
    ],
    as_json: Json = False,
) -> None:
    """Sign a bundle, so that `bundle verify --key` can show who made it. Its files must verify. Needs the extra `sign`."""
    from pmclip_deploy.bundle.names import SIGNATURE
    from pmclip_deploy.bundle.signing import fingerprint, private_key_from_pem, sign_bundle

    private_key = private_key_from_pem(key)
    sign_bundle(folder, private_key)
    signed_by = fingerprint(private_key.public_key())
    if as_json:
        print_json({"schema": "pmclip-deploy/signature/1", "bundle": str(folder), "file": SIGNATURE, "signed_by": signed_by})
    else:
        print(f"{one_line(str(folder))}: wrote {SIGNATURE}, signed by the key with the sha256 {signed_by}")


def _lines_of_head(manifest: "Manifest") -> list[str]:
    head, limits = manifest.head, manifest.abstention
    if head is None:
        return [
            f"head:     none; the bundle embeds images and texts, and answers {'what it was taught' if manifest.probes else 'no question'}"
        ]
    sees = [*(["the image's embedding"] if head.clip else []), *(f"{name} {side} x {side}" for name, side in head.grey.items())]
    reads = "the text's embedding" if head.words is None else f"{head.words.length} words"
    answerable = [kind for kind in manifest.kinds if kind.reason is None]
    thresholds = [kind.threshold for kind in answerable] or [0.0]
    low, high = min(thresholds), max(thresholds)
    abstains = [
        f"if the kind of question is less likely than {limits.kind_threshold:.2f}",
        f"if the logit of a radiology image is below {limits.radiograph_threshold:.2f}" if head.words is None else "if no word is known",
        f"if the best answer is less likely than {_span(low, high, '.2f')}{'' if low == high else ' (depends on the kind of question)'}",
    ]
    return [
        f"head:     {head.kind}, sees {', '.join(sees) or 'nothing of the image'}, reads {reads}",
        f"answers:  {len(manifest.answers)}, in {counted(len(answerable), 'kind of question', 'kinds of question')}",
        f"abstains: {', '.join(abstains)}",
    ]


def _span(low: float, high: float, form: str) -> str:
    return f"{low:{form}}" if low == high else f"{low:{form}} to {high:{form}}"
