"""`pmclip-deploy export triton` and `export triton-check`: a bundle as a model repository of Triton Inference Server."""

from pathlib import Path
from typing import Annotated

import typer

from pmclip_deploy.cli.options import check_choice
from pmclip_deploy.console import counted, one_line
from pmclip_deploy.errors import UsageError
from pmclip_deploy.extras import need_extra

DEVICES = ("cpu", "gpu")
NEEDS = ("tritonclient", "onnx")

Bundle = Annotated[Path | None, typer.Argument(metavar="[BUNDLE]", help="Bundle folder. Default: the embedded model.", show_default=False)]
Output = Annotated[Path, typer.Option(help="Folder to write. Versions of the same bundle that it holds are kept.", show_default=False)]
Instances = Annotated[int, typer.Option(min=1, max=64, help="Number of instances of each model.")]
Threads = Annotated[int, typer.Option(min=1, max=256, help="Number of threads of each instance.")]
OnDevice = Annotated[str, typer.Option("--device", help=f"Where Triton runs the models: {' or '.join(DEVICES)}.")]
Repository = Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `export triton` wrote.", show_default=False)]
OfBundle = Annotated[
    Path | None, typer.Option("--bundle", help="Bundle that the folder was written from. Default: the embedded model.", show_default=False)
]
Images = Annotated[
    Path | None, typer.Option(help="Folder of pictures to compare answers on. Default: the two films of the demo.", show_default=False)
]


def export_triton(
    bundle: Bundle = None, *, output: Output, instances: Instances = 1, threads: Threads = 4, device: OnDevice = "cpu"
) -> None:
    """Write a bundle as a model repository for Triton Inference Server. Needs the extra `triton`."""
    need_extra("triton", "export triton", *NEEDS)
    check_choice("device", device, DEVICES)
    from pmclip_deploy.export.triton import repository_from_bundle
    from pmclip_deploy.models import DEFAULT_BUNDLE

    configs = repository_from_bundle(bundle or DEFAULT_BUNDLE, output, instances, threads, device)
    print(f"wrote {one_line(str(output))}: {counted(len(configs), 'model')}, version {configs[0].version_policy.specific.versions[0]}")


def triton_check(folder: Repository, bundle: OfBundle = None, images: Images = None) -> None:
    """Check a model repository without a server: its configurations, graphs and answers. Needs the extra `triton`.

    A broken repository exits with 4. An answer that differs from the bundle's exits with 5.
    """
    need_extra("triton", "export triton-check", *NEEDS)
    from pmclip_deploy.export.triton_check import check_repository
    from pmclip_deploy.models import DEFAULT_BUNDLE, DEMO

    chosen = images or DEMO
    pictures = sorted(path for path in chosen.iterdir() if path.is_file()) if chosen.is_dir() else []
    pictures = pictures if images else [path for path in pictures if path.suffix == ".dcm"]
    if not pictures:
        raise UsageError(f"{chosen}: holds no pictures", "give --images a folder of DICOM, PNG or JPEG files")
    checked = check_repository(folder, bundle or DEFAULT_BUNDLE, pictures)
    for config in checked.repository.configs.values():
        kind = config.platform or config.backend
        versions = ", ".join(map(str, config.version_policy.specific.versions))
        print(f"{config.name}: {kind}, version {versions}, max_batch_size {config.max_batch_size}")
    answers = f"{counted(checked.answers, 'answer')} about {counted(checked.pictures, 'picture')} equal those of the bundle"
    print(f"{answers}; largest difference of a probability {checked.of_answers:.2g}, of the ensemble's {checked.of_ensemble:.2g}")
    print("not checked: a Triton server itself")
