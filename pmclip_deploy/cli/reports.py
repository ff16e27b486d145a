"""The files of `infer --sr` and `--sc`: where each goes, and when it is written."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pmclip_deploy.atomic import write, write_errors
from pmclip_deploy.cli.options import check_choice
from pmclip_deploy.cli.pictures import Pictures
from pmclip_deploy.console import counted, one_line
from pmclip_deploy.errors import UsageError
from pmclip_deploy.report.capture import capture_from_answers
from pmclip_deploy.report.document import SR_CLASSES, bytes_of, check_extra, report_from_answers
from pmclip_deploy.report.source import header_from_path, source_from_dataset

if TYPE_CHECKING:
    from pydicom import Dataset

    from pmclip_deploy.answer import Answer

    Make = Callable[[Dataset, Sequence[Answer]], Dataset]


class Reports:
    """The reports of one command.

    About one image an option names a file, or a folder that exists. About several images, or those of a folder, it names a folder, which
    is made. In a folder a report has its SOP Instance UID as its name: a hash, which tells nothing of the patient.
    Raises UsageError if a path cannot be written, is an image, or is given twice.
    """

    def __init__(self, sr: Path | None, sc: Path | None, sr_class: str, prevalence: float | None, pictures: Pictures) -> None:
        check_choice("--sr-class", sr_class, SR_CLASSES)
        if sr is not None:
            check_extra()
        self.written = list[dict[str, str]]()  # of each image its path, "source", and its reports by kind
        self._folders = {path for path in (sr, sc) if path is not None and (path.is_dir() or not pictures.alone)}
        for option, path in {"--sr": sr, "--sc": sc}.items():
            if path is not None:
                self._check(option, path, pictures)
        if sr is not None and sc is not None and sr not in self._folders and sr.absolute() == sc.absolute():
            raise UsageError(f"{sr}: --sr and --sc name the same file", "give each a file of its own")
        self._kinds: list[tuple[str, Path, Make]] = []
        if sr is not None:
            self._kinds.append(("sr", sr, partial(report_from_answers, sr_class=sr_class, prevalence=prevalence)))
        if sc is not None:
            self._kinds.append(("sc", sc, partial(capture_from_answers, prevalence=prevalence)))

    def write(self, path: Path, ask: "Callable[[Path], list[Answer]]") -> "list[Answer]":
        """The answers about an image, when its reports are written. Raises InputError if the image cannot have one."""
        dataset = header_from_path(path)
        source_from_dataset(dataset, str(path))  # before the image is asked about
        answers = ask(path)
        of = {"source": str(path)}
        for kind, target, make in self._kinds:
            report = make(dataset, answers)
            file = target / f"{report.SOPInstanceUID}.dcm" if target in self._folders else target
            with write_errors(f"{file}:", f"give another --{kind}"):
                if target in self._folders:
                    target.mkdir(parents=True, exist_ok=True)
                write(file, bytes_of(report))
            of[kind] = str(file)
        self.written.append(of)
        return answers

    def print(self) -> None:
        for kind, path, _ in self._kinds:
            what = {"sr": "Structured Report", "sc": "Secondary Capture"}[kind]
            print(one_line(f"{path}: {counted(len(self.written), what)}"))

    def _check(self, option: str, path: Path, pictures: Pictures) -> None:
        if path in self._folders:
            if (path.exists() and not path.is_dir()) or (path.suffix.lower() == ".dcm" and not path.exists()):
                raise UsageError(f"{path}: {option} writes a file for each image", f"give {option} a folder")
        elif not path.absolute().parent.is_dir():
            raise UsageError(f"{path}: cannot be written", f"give {option} a file in a folder that exists")
        elif path.exists() and any(image.exists() and path.samefile(image) for image in pictures.paths):
            raise UsageError(f"{path}: {option} would replace the image", f"give {option} another file")
