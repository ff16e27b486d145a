"""Can an answer be trusted? The failures that issue reports named, measured with any bundle, before and after it is trained again.

    python -m pmclip_deploy.benchmarks.trust --data DATA --pictures pictures --output benchmarks/results/trust.jsonl.gz
    python -m pmclip_deploy.benchmarks.trust --rows benchmarks/results/trust.jsonl.gz \\
        --markdown docs/measured/trust.md --markdown docs/measured/model.md

DATA holds fracatlas, kermany-cxr, vqa-med-2019, slake and dicom, or some of them. What --pictures holds is told in trust_pictures.py.
A bundle that learned from one of these sets is measured by cross-validation: --bundle FOLD1 --apart FILE1 --bundle FOLD2 --apart FILE2 ...,
where each file has a line "SET GROUP" for every group that its bundle neither learned from nor was tuned on. Of a set that a file names,
only those groups are asked. No time is measured. --limit 20 looks at a few pictures of each set, and docs leave such rows out.
"""

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pmclip_deploy as pm
from pmclip_deploy.benchmarks import trust_table
from pmclip_deploy.benchmarks.results import Row, Run, append, command_line, read
from pmclip_deploy.benchmarks.trust_bench import (
    SETS,
    VQA_MED,
    Bench,
    Figure,
    Found,
    Groups,
)
from pmclip_deploy.benchmarks.trust_robustness import robustness
from pmclip_deploy.benchmarks.trust_sections import body_part, consistency, findings, header, no_radiology, normality, radiology, weak
from pmclip_deploy.console import print_error, print_note
from pmclip_deploy.errors import InputError, PmclipError, UsageError
from pmclip_deploy.evaluation.evaluate import tower_trained_on
from pmclip_deploy.machine import versions
from pmclip_deploy.models import DEFAULT_BUNDLE
from pmclip_deploy.spec import ANSWER_SCHEMA
from pmclip_deploy.texts import lines_of_file

SECTIONS: dict[str, Callable[[Bench], Iterator[Found]]] = {
    "findings": findings,
    "normality": normality,
    "consistency": consistency,
    "body part": body_part,
    "header": header,
    "confidence": weak,
    "no radiology": no_radiology,
    "radiology": radiology,
    "robustness": robustness,
}


def measured(bench: Bench, run: Run, sections: Sequence[str]) -> Iterator[Row]:
    """The sections' rows, one after the other."""
    manifest = bench.predictors[0].manifest
    learned = {name for p in bench.predictors for name in tower_trained_on(p.manifest.provenance)} & SETS.keys()
    learned -= {VQA_MED, *bench.named}  # VQA-Med's validation part is apart
    for section in sections:
        print_note(f"{section} ...")
        for found in SECTIONS[section](bench):
            seen = any(SETS[name] in found.pictures for name in learned)
            figures = {name: _rounded(figure) for name, figure in found.figures.items()}
            yield run.row(manifest.backbone, f"pmclip-deploy {manifest.precision}", f"{section}: {found.part}", found.pictures,
                          {**figures, **({"learned from this set": {"value": True}} if seen else {})}, threads=None,
                          samples=max((f["n"] for f in figures.values()), default=0), not_measured=found.not_measured)  # fmt: skip


def _rounded(figure: Figure) -> Figure:
    def short(value: Any) -> Any:
        return [short(v) for v in value] if isinstance(value, list) else round(value, 4) + 0.0 if isinstance(value, float) else value

    return {key: short(value) for key, value in figure.items()}


def groups_from_file(path: Path) -> Groups:
    """{(set, group)} of lines "SET GROUP"."""
    lines = [line.split(None, 1) for _, line in lines_of_file(path, 'give a text file of lines "SET GROUP"')]
    if wrong := [line for line in lines if len(line) != 2 or line[0] not in SETS]:
        raise InputError(f'{path}: "{" ".join(wrong[0])[:60]}" is no line "SET GROUP" with a set among {", ".join(SETS)}')
    return {(name, group.strip()) for name, group in lines}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--bundle", type=Path, action="append", help="default: the embedded model; repeat it for cross-validation")
    parser.add_argument("--apart", type=Path, action="append", default=[], help='lines "SET GROUP", one file for each --bundle')
    parser.add_argument("--pictures", type=Path, default=Path("/"), help="where Debian's pictures were extracted; default: /")
    parser.add_argument("--only", action="append", choices=SECTIONS)
    parser.add_argument("--limit", type=int, help="so many pictures of each set and class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON lines to append to")
    parser.add_argument("--rows", type=Path, help="JSON lines to render; no bundle is asked")
    parser.add_argument("--markdown", type=Path, action="append", help="a page whose tables are written anew from --rows; repeat it")
    options = parser.parse_args(arguments)
    try:
        if options.rows is not None:
            rows = read(options.rows)
            for page in options.markdown or [None]:
                trust_table.render(rows, page)
            return 0
        if options.data is None or not options.data.is_dir():
            raise UsageError("--data: give the folder that holds fracatlas, vqa-med-2019 and the others, or --rows to render a table")
        if options.limit is not None and options.limit < 2:
            raise UsageError("--limit: give 2 or more")
        bundles = options.bundle or [DEFAULT_BUNDLE]
        if len(options.apart) not in (0 if len(bundles) == 1 else len(bundles), len(bundles)):
            raise UsageError("--apart: give one file for each --bundle")
        _measure(options, bundles, [groups_from_file(path) for path in options.apart] or [set()])
    except PmclipError as error:
        print_error(str(error))
        return error.exit_code
    return 0


def _measure(options: argparse.Namespace, bundles: Sequence[Path], apart: Sequence[Groups]) -> None:
    predictors = [pm.load(path) for path in bundles]
    manifest, hashes = predictors[0].manifest, [p.model.sha256 for p in predictors]
    sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    about = {"name": manifest.name, "version": manifest.version, "precision": manifest.precision, "sha256": sha256, "folds": len(hashes)}
    packages = versions("pmclip-deploy", "numpy", "onnxruntime", "pillow", "pydicom", "scikit-image", "scikit-learn")
    environment = {"bundle": about, "packages": packages, "answers": ANSWER_SCHEMA, "seed": options.seed, "limit": options.limit}
    run = Run(command_line("python -m pmclip_deploy.benchmarks.trust"), environment)
    bench = Bench(options.data, predictors, apart, options.pictures, options.seed, options.limit)
    rows = list(measured(bench, run, options.only or list(SECTIONS)))
    print(trust_table.markdown(rows, limited=True))
    if options.output is not None:
        append(options.output, rows)


if __name__ == "__main__":
    sys.exit(main())
