"""`pmclip-deploy export` and `parity`: writes a checkpoint as a bundle, and measures a bundle against its checkpoint."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pmclip_deploy.atomic import write, write_errors
from pmclip_deploy.cli.classify import labels_from_file
from pmclip_deploy.cli.options import Images, Json, check_choice, check_data_and_images
from pmclip_deploy.cli.output import print_json
from pmclip_deploy.console import counted, decimal, one_line, print_note, stages
from pmclip_deploy.errors import UsageError
from pmclip_deploy.export.precisions import PRECISIONS
from pmclip_deploy.extras import need_extra
from pmclip_deploy.sessions import targets
from pmclip_deploy.sessions.engines import engine_backends
from pmclip_deploy.spec import METHODS

if TYPE_CHECKING:
    from pmclip_deploy.bundle.manifest import Manifest
    from pmclip_deploy.export.pack import Exported

PICTURES = 32  # of the data, on which tensors are compared

Data = Annotated[Path | None, typer.Option(help="JSON lines {image, question, answer}. With them, answers are compared too.")]
ReportFile = Annotated[
    Path | None, typer.Option("--report", help="HTML page to write, with errors, ranges and agreement.", show_default=False)
]

of_engines = [
    f"{x.target} ({x.title}, {'for a list of GPUs' if x.built_ahead else 'for the GPU here'})" for x in engine_backends().values()
]

RankLayers = Annotated[
    bool,
    typer.Option(
        "--rank-layers",
        help="int8: show in --report what INT8 costs in each layer. It takes 14 minutes for pmclip-lite on two cores.",
    ),
]

Checkpoint = Annotated[
    Path | None,
    typer.Argument(metavar="[CHECKPOINT]", help="Checkpoint folder. Default: the checkpoint of the embedded model.", show_default=False),
]
Precision = Annotated[str, typer.Option(help=f"{', '.join(PRECISIONS)}.")]
Target = Annotated[str, typer.Option(help=f"Where the bundle will run: {', '.join(['cpu', *of_engines])}.")]
Output = Annotated[
    Path | None,
    typer.Option(
        help="Folder to write. Default: ./NAME-PRECISION, or ./NAME-PRECISION-TARGET if the target is not cpu.", show_default=False
    ),
]
Name = Annotated[str | None, typer.Option(help="Name of the bundle. Default: the name of the checkpoint.", show_default=False)]
CalibrationImages = Annotated[
    Path | None,
    typer.Option(help="int8: folder of training images for calibration, or train.jsonl. Default: calibration.json.gz of the checkpoint."),
]
CalibrationFindings = Annotated[
    list[Path] | None,
    typer.Option(
        help="int8: training images of the findings, for their graph. Repeat for more. Default: --calibration-images.",
        show_default=False,
    ),
]
CalibrationMethod = Annotated[str, typer.Option(help=f"int8: how ranges are chosen: {', '.join(METHODS)}.")]
Labels = Annotated[
    Path | None, typer.Option(help="File with one label per line. `classify` uses these labels if it gets none.", show_default=False)
]
ComputeCapability = Annotated[
    list[str] | None,
    typer.Option(help="rtx: compute capability to build for. Repeat for more. Default: 8.6, 8.9 and 12.0.", show_default=False),
]
LargestBatch = Annotated[int, typer.Option(min=1, max=1024, help="rtx, tensorrt: the largest number of pictures in a batch.")]
TimingCache = Annotated[
    Path | None, typer.Option(help="tensorrt: timing cache, a file to read and write. It makes the next build faster.", show_default=False)
]
VersionCompatible = Annotated[
    bool, typer.Option("--version-compatible", help="tensorrt: build plans that later versions of TensorRT can run.")
]
StripWeights = Annotated[
    bool, typer.Option("--strip-weights", help="tensorrt: build plans without weights. The weights are read when a plan is opened.")
]


def export(
    checkpoint: Checkpoint = None,
    precision: Precision = "int8",
    target: Target = "cpu",
    output: Output = None,
    name: Name = None,
    calibration_images: CalibrationImages = None,
    calibration_findings: CalibrationFindings = None,
    calibration_method: CalibrationMethod = METHODS[0],
    data: Data = None,
    images: Images = None,
    labels: Labels = None,
    report: ReportFile = None,
    rank_layers: RankLayers = False,
    compute_capability: ComputeCapability = None,
    largest_batch: LargestBatch = 8,
    timing_cache: TimingCache = None,
    version_compatible: VersionCompatible = False,
    strip_weights: StripWeights = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint as a bundle, if the bundle passes the parity gates. Needs the extra `export`."""
    _check(data, images)
    for_tensorrt = timing_cache is not None or version_compatible or strip_weights
    _check_options(precision, target, calibration_method, calibration_images or calibration_findings, compute_capability, for_tensorrt)
    if rank_layers and (report is None or not PRECISIONS[precision].calibrated):
        raise UsageError("--rank-layers is for the --report of an INT8 bundle", "give --report FILE and --precision int8, or leave it out")
    _check_report(report)
    from pmclip_deploy.export.engines import EngineOptions
    from pmclip_deploy.export.pack import bundle_from_checkpoint, name_of_checkpoint
    from pmclip_deploy.models import DEFAULT_BUNDLE, DEFAULT_CHECKPOINT

    source, engines = checkpoint or DEFAULT_CHECKPOINT, None
    if (backend := targets()[target]) is not None:
        engines = EngineOptions(backend, tuple(compute_capability or ()), largest_batch, timing_cache, version_compatible, strip_weights)
        engine_backends()[backend].package()  # the error comes before the work, not after it
    made = bundle_from_checkpoint(
        source, output or Path(f"{name or name_of_checkpoint(source)}-{precision}{'' if target == 'cpu' else f'-{target}'}"), precision,
        target=target, calibration_images=calibration_images, calibration_findings=calibration_findings or (), method=calibration_method,
        data=data, images=images, labels=() if labels is None else labels_from_file(labels), name=name,
        shipped=DEFAULT_BUNDLE if source.resolve() == DEFAULT_CHECKPOINT.resolve() else None,
        ranked=rank_layers, engines=engines, steps=_steps, progress=stages,
    )  # fmt: skip
    if made.built and sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    if report is not None:
        _write_report(report, made.manifest, made.manifest.parity, _layers(made), made.speed, made.histograms)
    if as_json:
        print_json(_document(made))
    else:
        _print_exported(made)


def _check_options(
    precision: str, target: str, method: str, calibration: object, compute_capability: Sequence[str] | None, for_tensorrt: bool
) -> None:
    for option, value, known in (
        ("precision", precision, PRECISIONS),
        ("target", target, targets()),
        ("calibration-method", method, METHODS),
    ):
        check_choice(option, value, known)
    if calibration and not PRECISIONS[precision].calibrated:
        calibrated = " or ".join(name for name, of in PRECISIONS.items() if of.calibrated)
        raise UsageError(f"--calibration-images and --calibration-findings are for --precision {calibrated}", "leave them out")
    if target == "cpu" and compute_capability:
        raise UsageError("--compute-capability is for --target rtx", "leave it out: a CPU bundle has no engines")
    if target != "tensorrt" and for_tensorrt:
        raise UsageError("--timing-cache, --version-compatible and --strip-weights are for --target tensorrt", "leave them out")


def _layers(made: "Exported") -> list[dict[str, Any]]:
    return [
        {"graph": graph, "layer": layer, "effect": e.effect, "kept_float": layer in made.manifest.graphs[graph].float_layers}
        for e in made.effects
        for graph, _, layer in [e.layer.partition("/")]
    ]


def _document(made: "Exported") -> dict[str, Any]:
    manifest = made.manifest
    return {
        "schema": "pmclip-deploy/export/1",
        "bundle": str(made.output),
        "name": manifest.name,
        "precision": manifest.precision,
        "target": manifest.target,
        "bytes": sum(file.bytes for file in manifest.files.values()),
        "files": {name: {"sha256": file.sha256, "bytes": file.bytes} for name, file in manifest.files.items()},
        "float_layers": {name: list(graph.float_layers) for name, graph in manifest.graphs.items()},
        "parity": manifest.parity,
        "speed_against_fp32": made.speed,
        "engines": made.built,
        "same_as_shipped": made.same_as,
    }


def _print_exported(made: "Exported") -> None:
    manifest = made.manifest
    _print_graphs(made)
    _print_answers(manifest.parity, manifest.head is not None)
    _print_engines(made.built)
    for name, ratio in (made.speed or {}).items():
        if manifest.graphs[name].precision == "int8" and ratio < 1:
            print(
                f"INT8 is slower than fp32 on this machine: {name} runs at {ratio:.2f} times the speed of fp32. Compare --precision fp32."
            )
    if made.same_as is not None:
        changed = sorted(name for name, same in made.same_as.items() if not same)
        why = made.why or "it was made on another processor"
        print(
            f"differs from the shipped bundle in {', '.join(changed)}: {why}" if changed else "every file equals that of the shipped bundle"
        )
    total = sum(file.bytes for file in manifest.files.values())
    print(f"wrote {one_line(str(made.output))}: {total:,} bytes in {counted(len(manifest.files), 'file')}")


def _print_graphs(made: "Exported") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("graph", "precision", "bytes", "least cosine", "largest difference", "times fp32's speed")
    tensors: dict[str, dict[str, Any]] = {}
    for name, figures in made.manifest.parity["tensors"].items():  # "findings/places" is an output of "findings"
        of = tensors.setdefault(name.partition("/")[0], figures)
        tensors[name.partition("/")[0]] = {key: pick(of[key], figures[key]) for key, pick in (("cosine", min), ("max_abs", max))}
    for name, figures in tensors.items():
        graph = made.manifest.graphs[name]
        size = sum(file.bytes for file_name, file in made.manifest.files.items() if file_name.startswith(graph.file))
        kept = len(graph.float_layers)
        speed = "not measured" if made.speed is None else f"{made.speed[name]:.2f}" if name in made.speed else "1"
        said = graph.precision + (f", {counted(kept, 'layer')} above it" if kept else "")
        table.add_row(name, said, f"{size:,}", f"{figures['cosine']:.5f}", f"{figures['max_abs']:g}", speed)
    Console(highlight=False, soft_wrap=True).print(table)


def _print_engines(engines: Mapping[str, Any]) -> None:
    for name, built in engines.items():
        layers = ", ".join(f"{count} {kind}" for kind, count in (built["layers"] or {}).items()) or "not inspected"
        took = "taken from the earlier bundle in this folder" if built["seconds"] is None else f"built in {built['seconds']:.0f} s"
        print(f"engine {name}: {built['bytes']:,} bytes, {took}; layers: {layers}")
    if engines:
        print("speed and answers of the engines: not measured (they run on a GPU); parity is that of their graphs in onnxruntime")


def parity(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="[BUNDLE]", help="Bundle folder. Default: the embedded model.", show_default=False)
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint folder. Default: the checkpoint of the embedded model.", show_default=False)
    ] = None,
    data: Data = None,
    images: Images = None,
    report: ReportFile = None,
    as_json: Json = False,
) -> None:
    """Measure a bundle against its checkpoint in fp32 PyTorch. A missed gate exits with 5. Needs the extra `export`."""
    _check(data, images)
    _check_report(report)
    from pmclip_deploy.bundle.files import manifest_from_bundle
    from pmclip_deploy.evaluation.rows import rows_from_jsonl
    from pmclip_deploy.export.gates import gate
    from pmclip_deploy.export.onnx_from_checkpoint import modules_from_checkpoint
    from pmclip_deploy.export.parity import parity_of_bundle
    from pmclip_deploy.models import DEFAULT_BUNDLE, DEFAULT_CHECKPOINT

    path = bundle or DEFAULT_BUNDLE
    manifest = manifest_from_bundle(path)
    rows = rows_from_jsonl(data, images) if data else None
    pictures = [images / name for name in sorted({row.image for row in rows})[:PICTURES]] if rows and images else None
    modules = modules_from_checkpoint(checkpoint or DEFAULT_CHECKPOINT)
    precision, measured = parity_of_bundle(path, modules, rows, images, pictures, stages)
    if report is not None:
        _write_report(report, manifest, measured)
    if as_json:
        print_json({"schema": "pmclip-deploy/parity/1", "bundle": str(path), "precision": precision, **measured})
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table("graph", "n", "least cosine", "mean cosine", "largest difference", "largest value")
        for name, f in measured["tensors"].items():
            specs = {"cosine": ".5f", "cosine_mean": ".5f", "max_abs": "g", "largest": "g"}
            table.add_row(name, str(f["n"]), *("no number" if f[key] is None else format(f[key], spec) for key, spec in specs.items()))
        Console(highlight=False).print(table)
        _print_answers(measured, modules.head is not None)
    gate(precision, measured)


def _print_answers(measured: Mapping[str, Any], has_head: bool) -> None:
    if labels := measured.get("labels"):
        print(f"labels: {labels['agreement']:.2%} of {counted(labels['n'], 'picture')} get the same label as in fp32")
    if findings := measured.get("findings"):
        agree = "none of their regions is seen" if findings["agreement"] is None else f"{findings['agreement']:.2%} agree with fp32"
        where = f"{counted(findings['decisions'], 'decision')} on {counted(findings['n'], 'picture')}"
        print(f"findings: {where}, {agree}; {findings['crossed']} differ and are not near-ties")
    if (answers := measured["answers"]) is None:
        print(f"answers: not measured ({'give --data and --images' if has_head else 'there is no head'})")
        return
    low, high = (100 * x for x in answers["difference_ci95"])
    agree = (
        "no question is answered"
        if answers["agreement"] is None
        else f"{answers['agreement']:.2%} of {counted(answers['answered'], 'answer')} agree"
    )
    print(
        f"answers: {agree}, and so do best candidates on {answers['candidate_agreement']:.2%} of {answers['n']}; "
        f"accuracy {answers['accuracy']:.4f}, in fp32 "
        f"{answers['accuracy_fp32']:.4f}: {decimal(100 * answers['difference'], '+.2f')} points (95% interval {low:+.2f} to {high:+.2f})"
    )


def _write_report(
    path: Path,
    manifest: "Manifest",
    measured: Mapping[str, Any],
    layers: list[dict[str, Any]] | None = None,
    speed: dict[str, float] | None = None,
    histograms: list[dict[str, Any]] | None = None,
) -> None:
    from pmclip_deploy.errors import ParityError
    from pmclip_deploy.export.gates import gate
    from pmclip_deploy.export.report import Report, html_from_report

    try:
        gate(manifest.precision, measured)
        said = "passed"
    except ParityError as error:
        said = str(error)
    about = {"name": manifest.name, "version": manifest.version, "precision": manifest.precision, "target": manifest.target}
    about |= {key: str(value) for key, value in manifest.provenance.get("export", {}).items()}
    about |= {f"sha256 of {name}": file.sha256 for name, file in manifest.files.items()}
    title = f"Parity of {manifest.name}, {manifest.precision} for {manifest.target}"
    page = html_from_report(
        Report(
            title,
            measured,
            gate=said,
            layers=layers or [],
            effect="mean distance of what is said with this layer quantised alone: probabilities of answers, or unit embeddings",
            histograms=histograms or [],
            speed=speed,
            about=about,
        )
    )
    with write_errors(f"{path}: the report", "give another --report"):
        write(path, page)


def _steps(graph: str) -> Callable[[str, int, int], object] | None:
    """Shows the progress of an engine's build on a terminal; elsewhere one line says that it begins."""
    if not sys.stderr.isatty():
        print_note(f"Building the engine of {graph}")
        return None

    def step(phase: str, done: int, steps: int) -> None:
        print(f"\r\x1b[Kbuilding {graph}: {one_line(phase)[-60:]} {done}/{steps}", end="", file=sys.stderr, flush=True)

    return step


def _check_report(path: Path | None) -> None:
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UsageError(f"{path}: the report cannot be written", "give --report a file in a folder that exists")


def _check(data: Path | None, images: Path | None) -> None:
    check_data_and_images(data, images)
    need_extra("export", "this command", "torch", "torchvision", "onnx", "open_clip", "timm", "transformers", "safetensors")
