"""`pmclip-deploy export` and `parity`: a checkpoint as a bundle, and how far a bundle is from its checkpoint."""

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from pmclip_deploy.cli.output import one_line, print_json, progress
from pmclip_deploy.errors import UsageError

PICTURES = 32  # of the data, to compare tensors on

Images = Annotated[Path | None, typer.Option(help="Folder of the images that --data names.")]
Data = Annotated[Path | None, typer.Option(help="JSON lines {image, question, answer} to compare answers on.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def export(
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="[CHECKPOINT]", help="Default: the embedded model's.", show_default=False)
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32 or int8.")] = "int8",
    target: Annotated[str, typer.Option(help="Where the bundle is to run: cpu.")] = "cpu",
    output: Annotated[Path | None, typer.Option(help="Folder to write. Default: ./NAME-PRECISION.", show_default=False)] = None,
    calibration_images: Annotated[
        Path | None, typer.Option(help="Training images to calibrate INT8 on. Default: the checkpoint's own calibration.json.")
    ] = None,
    data: Data = None,
    images: Images = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint as an ONNX bundle, if it passes its parity gates (needs the extra `export`)."""
    _check(data, images)
    if precision not in ("fp32", "int8") or target != "cpu":
        raise UsageError(f"no recipe for --precision {precision} --target {target}; there are fp32 and int8, for cpu")
    if calibration_images is not None and precision != "int8":
        raise UsageError("--calibration-images is for --precision int8")
    from pmclip_deploy.export.pack import bundle_from_checkpoint, name_of_checkpoint
    from pmclip_deploy.models import DEFAULT_BUNDLE, DEFAULT_CHECKPOINT

    source = checkpoint or DEFAULT_CHECKPOINT
    made = bundle_from_checkpoint(
        source,
        output or Path(f"{name_of_checkpoint(source)}-{precision}"),
        precision,
        target=target,
        calibration_images=calibration_images,
        data=data,
        images=images,
        shipped=DEFAULT_BUNDLE if source.resolve() == DEFAULT_CHECKPOINT.resolve() else None,
        progress=progress,
    )
    manifest = made.manifest
    if as_json:
        print_json(
            {
                "schema": "pmclip-deploy/export/1",
                "bundle": str(made.output),
                "precision": manifest.precision,
                "bytes": sum(file.bytes for file in manifest.files.values()),
                "files": {name: {"sha256": file.sha256, "bytes": file.bytes} for name, file in manifest.files.items()},
                "parity": manifest.parity,
                "speed_against_fp32": made.speed,
                "same_as_shipped": made.same_as,
            }
        )
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    table = Table("graph", "precision", "bytes", "least cosine", "largest difference", "times fp32's speed")
    for name, graph in manifest.graphs.items():
        size = sum(file.bytes for file_name, file in manifest.files.items() if file_name.startswith(graph.file))
        figures = manifest.parity["tensors"][name]
        table.add_row(name, graph.precision, f"{size:,}", f"{figures['cosine']:.5f}", f"{figures['max_abs']:g}", f"{made.speed[name]:.2f}")
    console.print(table)
    _print_answers(manifest.parity["answers"])
    for name, graph in manifest.graphs.items():
        if graph.precision.startswith("int8") and made.speed[name] < 1:
            print(f"INT8 measures slower than fp32 here: {name} runs at {made.speed[name]:.2f} times its speed; compare --precision fp32")
    if made.same_as is not None:
        changed = sorted(name for name, same in made.same_as.items() if not same)
        why = made.why or "made on another processor"
        print(f"differs from the shipped bundle in {', '.join(changed)}: {why}" if changed else "every file equals the shipped bundle's")
    total = sum(file.bytes for file in manifest.files.values())
    print(f"wrote {one_line(str(made.output))}: {total:,} bytes in {len(manifest.files)} files")


def parity(
    bundle: Annotated[Path | None, typer.Argument(metavar="[BUNDLE]", help="Default: the embedded model.", show_default=False)] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Default: the embedded model's.", show_default=False)] = None,
    data: Data = None,
    images: Images = None,
    as_json: Json = False,
) -> None:
    """Measure a bundle against its checkpoint in fp32 PyTorch; a missed gate exits with 5 (needs the extra `export`)."""
    _check(data, images)
    from pmclip_deploy.evaluate import rows_from_jsonl
    from pmclip_deploy.export.onnx_from_checkpoint import modules_from_checkpoint
    from pmclip_deploy.export.parity import gate, parity_of_bundle
    from pmclip_deploy.models import DEFAULT_BUNDLE, DEFAULT_CHECKPOINT

    path = bundle or DEFAULT_BUNDLE
    rows = rows_from_jsonl(data, images) if data else None
    pictures = [images / name for name in sorted({row.image for row in rows})[:PICTURES]] if rows and images else None
    modules = modules_from_checkpoint(checkpoint or DEFAULT_CHECKPOINT)
    precision, measured = parity_of_bundle(path, modules, rows, images, pictures, progress)
    if as_json:
        print_json({"schema": "pmclip-deploy/parity/1", "bundle": str(path), "precision": precision, **measured})
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table("graph", "n", "least cosine", "mean cosine", "largest difference", "largest value")
        for name, f in measured["tensors"].items():
            table.add_row(name, str(f["n"]), f"{f['cosine']:.5f}", f"{f['cosine_mean']:.5f}", f"{f['max_abs']:g}", f"{f['largest']:g}")
        Console(highlight=False).print(table)
        _print_answers(measured["answers"])
    gate(precision, measured)


def _print_answers(answers: dict[str, Any] | None) -> None:
    if answers is None:
        print("answers: not measured (pass --data FILE --images FOLDER)")
        return
    low, high = (100 * x for x in answers["difference_ci95"])
    agree = (
        "no row is answered" if answers["agreement"] is None else f"{answers['agreement']:.2%} of {answers['answered']} answered rows agree"
    )
    print(
        f"answers: {agree}, best candidates on {answers['candidate_agreement']:.2%} of {answers['n']}; "
        f"accuracy {answers['accuracy']:.4f}, in fp32 "
        f"{answers['accuracy_fp32']:.4f}: {100 * answers['difference']:+.2f} points (95% interval {low:+.2f} to {high:+.2f})"
    )


def _check(data: Path | None, images: Path | None) -> None:
    if (data is None) != (images is None):
        raise UsageError("--data and --images go together: the questions, and the folder of their images")
    needed = ("torch", "torchvision", "onnx", "open_clip", "timm", "transformers", "safetensors")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"this needs {', '.join(missing)}: pip install 'pmclip-deploy[export]'")
