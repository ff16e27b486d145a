"""`pmclip-deploy bench`: measures a bundle on this machine, and checks its answers."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pmclip_deploy.atomic import write, write_errors
from pmclip_deploy.cli.options import Bundle, Device, Images, Json, check_choice, check_data_and_images, finite
from pmclip_deploy.cli.output import print_json, print_notes
from pmclip_deploy.console import counted, one_line
from pmclip_deploy.errors import ParityError, UsageError

if TYPE_CHECKING:
    from pmclip_deploy.benchmarks.results import Run
    from pmclip_deploy.bundle.manifest import Manifest

SCENARIOS = ("single-stream", "multi-stream", "offline", "server")

Scenarios = Annotated[list[str] | None, typer.Option(help=f"{', '.join(SCENARIOS)}. Repeat for more. Default: all.", show_default=False)]
Seconds = Annotated[float, typer.Option(min=1, max=86400, callback=finite, help="Approximate duration of the measurements.")]
LatencyBound = Annotated[
    float, typer.Option(min=0.001, callback=finite, help="server: milliseconds within which 99% of the questions must be answered.")
]
Data = Annotated[
    Path | None,
    typer.Option(help="JSON lines {image, question, answer}. With them, accuracy and its baselines are measured too.", show_default=False),
]
Output = Annotated[Path | None, typer.Option(help="File of JSON lines. The rows are appended to it.", show_default=False)]
SubmitFile = Annotated[
    Path | None, typer.Option(help="JSON file to write. It names no host, user, path or patient, so you can share it.", show_default=False)
]
GpuProof = Annotated[
    bool,
    typer.Option(
        "--gpu-proof",
        help="Build TensorRT engines of the embedded model, or open those of --bundle, and measure everything on the GPU. "
        "--submit-file gets JSON lines. --device cpu rehearses it.",
    ),
]


def bench(
    bundle: Bundle = None,
    device: Device = "auto",
    scenario: Scenarios = None,
    seconds: Seconds = 100,
    latency_bound: LatencyBound = 100,
    data: Data = None,
    images: Images = None,
    output: Output = None,
    submit_file: SubmitFile = None,
    gpu_proof: GpuProof = False,
    as_json: Json = False,
) -> int:
    """Measure latency, throughput, cold start, memory and energy on this machine, and check the answers. A failed check exits with 5.

    pmclip-deploy bench --device cuda --submit-file bench.json

    pmclip-deploy bench --gpu-proof --submit-file proof.jsonl
    """
    chosen = _check(scenario, data, images, output, submit_file)
    if gpu_proof:
        if submit_file is None or scenario or data or output or as_json:
            raise UsageError("--gpu-proof needs --submit-file, and takes only --bundle, --device and --seconds beside it")
        return _prove(bundle, device, seconds, submit_file)
    from pmclip_deploy.benchmarks.results import append
    from pmclip_deploy.bundle.files import verify_bundle
    from pmclip_deploy.models import DEFAULT_BUNDLE
    from pmclip_deploy.threads import cpu_threads

    path, threads = bundle or DEFAULT_BUNDLE, cpu_threads()
    manifest = verify_bundle(path)
    run = _run(path, manifest, device, threads)
    if not as_json:
        _print_stamp(run.environment)
    rows, missed = [], list[str]()
    for found, misses in _found(path, manifest, device, chosen, seconds, latency_bound / 1e3, threads, data, images):
        missed += misses
        system = found.system or f"pmclip-deploy {manifest.precision}"
        rows.append(run.row(manifest.backbone, system, found.part, found.scenario, found.figures,
                            threads=threads, samples=found.samples, not_measured=found.not_measured))  # fmt: skip
        if not as_json:
            _print_row(rows[-1])
    document = {"schema": "pmclip-deploy/bench-run/1", "environment": run.environment, "check": {"passed": not missed, "missed": missed},
                "rows": [{key: value for key, value in row.items() if key != "environment"} for row in rows]}  # fmt: skip
    if output is not None:
        append(output, rows)
    if submit_file is not None:
        _write_submission(submit_file, document)
    if as_json:
        print_json(document)
    if missed:
        raise ParityError(
            f"the bundle answers differently than when it was exported: {'; '.join(missed)}",
            "run `pmclip-deploy bundle verify` and `pmclip-deploy doctor`",
        )
    return 0


def _prove(bundle: Path | None, device: str, seconds: float, file: Path) -> int:
    from pmclip_deploy.benchmarks.gpu_proof import prove

    failed = prove(bundle, device, seconds, file)
    for name, code in failed:
        print(f"failed: {name}, with status {code}; {one_line(str(file))} says why", file=sys.stderr)
    print(f"wrote {one_line(str(file))}")
    return failed[0][1] if failed else 0


def _check(scenarios: list[str] | None, data: Path | None, images: Path | None, output: Path | None, submit_file: Path | None) -> list[str]:
    """The scenarios, in their order."""
    check_data_and_images(data, images)
    for name in scenarios or ():
        check_choice("scenario", name, SCENARIOS)
    for file in (output, submit_file):
        if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
            raise UsageError(f"{file}: cannot be written", "give a file in a folder that exists")
    return [name for name in SCENARIOS if name in (scenarios or SCENARIOS)]


def _run(path: Path, manifest: "Manifest", device: str, threads: int) -> "Run":
    from pmclip_deploy.benchmarks.results import Run, command_line
    from pmclip_deploy.bundle.files import sha256_of_file
    from pmclip_deploy.bundle.names import MANIFEST
    from pmclip_deploy.machine import stamp

    about = {"name": manifest.name, "version": manifest.version, "precision": manifest.precision, "target": manifest.target,
             "sha256": sha256_of_file(path / MANIFEST)}  # fmt: skip
    return Run(command_line("pmclip-deploy"), {**stamp(threads), "device": device, "bundle": about})


def _write_submission(path: Path, document: Mapping[str, Any]) -> None:
    with write_errors(f"{path}:", "give another --submit-file"):
        write(path, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _found(
    path: Path, manifest: "Manifest", device: str, chosen: list[str], seconds: float, bound: float, threads: int,
    data: Path | None, images: Path | None,
) -> Iterator[tuple[Any, list[str]]]:  # fmt: skip
    """Every row, with the checks that it failed. New processes come first: their peak of memory begins with that of this process."""
    from pmclip_deploy.benchmarks import stages

    for found in stages.cold_start(path, manifest, device):
        yield found, []
    yield stages.size_on_disk(path, manifest), []
    for found in stages.scenarios(path, manifest, device, chosen, (1 - stages.STAGES) * seconds, bound, threads):
        yield found, []

    from pmclip_deploy.opening import load

    predictor = load(path, device)
    print_notes(predictor)
    for found in stages.stages(predictor, stages.STAGES * seconds):
        yield found, []
    yield stages.agreement(predictor) if data is None or images is None else stages.accuracy(predictor, data, images)


def _print_stamp(environment: Any) -> None:
    cpu, bundle = environment["cpu"], environment["bundle"]
    gpus = [f"{gpu['name']}, driver {gpu['driver_version']}, {gpu['power.limit']}" for gpu in environment["gpus"]]
    jetson = environment["jetson"]
    lines = [
        f"machine  {environment['platform']}, Python {environment['python']}",
        f"cpu      {cpu['name']}, {cpu['usable']} of {cpu['logical']} usable, {counted(environment['threads'], 'thread')}, "
        f"{' '.join(cpu['flags'])}",
        *(f"gpu      {gpu}" for gpu in gpus or ["nvidia-smi lists none"]),
        *([f"jetson   {', '.join(f'{name} {value}' for name, value in jetson.items() if value)}"] if jetson else []),
        f"versions {', '.join(f'{name} {version}' for name, version in environment['packages'].items())}",
        f"bundle   {bundle['name']} {bundle['version']} {bundle['precision']} for {bundle['target']}, {bundle['sha256'][:16]}",
    ]
    for line in lines:
        print(one_line(line))


def _print_row(row: dict[str, Any]) -> None:
    figures = {name: value for name, value in row["figures"].items() if value is not None and not name.startswith(("p25", "p75"))}
    said = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()]
    why = [f"not measured: {row['not_measured']}"] if row["not_measured"] else []
    start = f"{row['system'].removeprefix('pmclip-deploy '):6} {row['part']:34} {row['scenario']:14} "
    print(start + one_line(", ".join(said + why)), flush=True)
