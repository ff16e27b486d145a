"""`train findings`: a network for each fold and one for all, what the folds' networks say to films they have not seen, and a checkpoint."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from pmclip_deploy.atomic import write, write_errors
from pmclip_deploy.bundle.files import name_of_output
from pmclip_deploy.console import print_note
from pmclip_deploy.errors import BundleError, UsageError
from pmclip_deploy.train.checkpoint import Checkpoint, read_checkpoint, under, write_tensors
from pmclip_deploy.train.findings.films import FINDINGS, VAL, Film, films_from_folders, folds_of_films, sha256_of_films
from pmclip_deploy.train.findings.groups import KEPT_FOR_DEMO
from pmclip_deploy.train.findings.strata import Outcomes, auroc_figures, findings_from_outcomes, region_figures
from pmclip_deploy.train.findings.training import TRUNK, Labels, new_net, read_result, said_to_films, trained_net, write_result
from pmclip_deploy.train.findings.views import one_process_at_a_time, remove_views, views_of_films
from pmclip_deploy.train.loop import Settings
from pmclip_deploy.train.processes import device_of_process

ALL = "all"  # the part that trains on every fold: its network is the one that is kept
LEAST_FOLDS = 2  # that give figures: a threshold of one is chosen on the others
APART = "apart.txt"  # beside a fold's checkpoint: the groups that it has not seen, for benchmarks/trust.py
PREFIX = "findings"  # of the tensors in the checkpoint
ELSEWHERE = "VQA-Med 2019"  # whose validation films trained nothing


@dataclass(frozen=True)
class Run:
    """All that a part's network depends on, and where it is written."""

    films: tuple[Film, ...]
    fold: NDArray[np.int64]  # (N,)
    checkpoint: Path
    meta: Checkpoint
    tensors: dict[str, Tensor]
    output: Path
    settings: Settings
    made_with: dict[str, Any]

    def part(self, name: str) -> dict[str, Any]:
        return {**self.made_with, "part": name}

    def result(self, name: str) -> Path:
        return self.output / f"fold-{name}.npz"

    def training(self, name: str) -> NDArray[np.int64]:
        return np.flatnonzero((self.fold != VAL) & (self.fold != (VAL if name == ALL else int(name))))

    def measured(self, name: str) -> NDArray[np.int64]:
        return np.flatnonzero(self.fold == (VAL if name == ALL else int(name)))


def train_findings(
    data: Sequence[Path],
    checkpoint: Path,
    output: Path,
    settings: Settings,
    folds: int = 5,
    only: Sequence[str] = (),
    keep_views: bool = False,
    fold_checkpoints: bool = False,
    name: str | None = None,
) -> Mapping[str, object]:
    """Trains the parts ``only`` (by default all folds and "all"), then writes a checkpoint to ``output`` from the parts that are there.

    The checkpoint is ``checkpoint``, with the network of "all" under "findings." and what the folds have measured. Returns its description,
    without metrics where "all" or all folds but one are still missing. ``fold_checkpoints`` writes each fold's too, into a folder of its
    own, measured by the others. With ``settings.resume`` a part that is done is not trained again.
    """
    names = [*map(str, range(folds)), ALL]
    if unknown := sorted(set(only) - set(names)):
        raise UsageError(f"--only {unknown[0]} is no part", f"choose of {', '.join(names)}")
    name = name_of_output(output, name)
    settings.start()
    run = _run(data, checkpoint, output, settings, folds, name)
    there = [name for name in names if run.result(name).is_file()]
    wanted = [name for name in only or names if not (settings.resume and name in there)]
    results = {name: _result(run, name) for name in there if name not in wanted}  # now, rather than after hours of training
    with device_of_process() as device:
        _train_parts(run, wanted, device)
    with one_process_at_a_time(output):
        results = {name: results.get(name) or _result(run, name) for name in names if run.result(name).is_file()}
        missing = [name for name in names if name not in results]
        if missing:
            print_note(f"folds that are still to be trained: {', '.join(missing)}")
        elif not keep_views:
            remove_views(output)
        if ALL not in results or len(results) <= LEAST_FOLDS:
            return {"metrics": {}, "provenance": {PREFIX: {**run.made_with, "folds_done": sorted(results)}}}
        for name in [name for name in results if fold_checkpoints and len(results) > LEAST_FOLDS + 1 and name != ALL]:
            _write_fold(run, name, results)
        return _write(run, ALL, results, output)


def _run(data: Sequence[Path], checkpoint: Path, output: Path, settings: Settings, folds: int, name: str) -> Run:
    meta, tensors = read_checkpoint(checkpoint)
    films = films_from_folders(data, settings.limit)
    made_with = {
        **settings.to_json(),
        "folds": folds,
        "data_sha256": sha256_of_films(films),
        "trunk_sha256": _sha256_of_tensors(under(tensors, TRUNK)),
        "data": [path.name for path in data],
        "films": len(films),
        "kept_apart": list(KEPT_FOR_DEMO),
    }
    fold = folds_of_films(films, folds)
    return Run(tuple(films), fold, checkpoint, {**meta, "name": name}, tensors, output, settings, json.loads(json.dumps(made_with)))


def _train_parts(run: Run, names: Sequence[str], device: torch.device) -> None:
    if not names:
        return
    seen = {key: run.made_with[key] for key in ("seed", "data_sha256", "trunk_sha256")}
    net = new_net(run.tensors).to(device=device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    views = views_of_films(run.films, net, run.output, seen, run.settings.seed, run.settings.resume, device)
    labels = Labels.of_films(run.films, device)
    for name in names:
        state = run.output / f"fold-{name}" / "state.pt"
        made_with = run.part(name)
        net, seconds = trained_net(f"fold {name}", run.training(name), labels, views, run.tensors, run.settings, made_with, state, device)
        films = [run.films[i] for i in run.measured(name)]
        about = {"made_with": made_with, "seconds": round(seconds), "threads": torch.get_num_threads(), "device": device.type}
        write_result(run.output, f"fold-{name}", net, said_to_films(net, films, device, f"fold {name}"), films, about)
        state.unlink()


def _result(run: Run, name: str) -> tuple[dict[str, Any], Outcomes]:
    """Raises BundleError where the part was made with other settings."""
    about, arrays = read_result(run.result(name))
    if about.get("made_with") != run.part(name):
        raise BundleError(f"{run.result(name)}: made with other settings", "train it again without --resume, or give the same options")
    rows = run.measured(name)
    films = tuple(run.films[i] for i in rows)
    finding, region = (arrays[key].astype(np.float64).mean(axis=1) for key in ("finding", "region"))
    return about, Outcomes(films, run.fold[rows], finding, region, arrays["places"].astype(np.float32))


def _write_fold(run: Run, name: str, results: dict[str, tuple[dict[str, Any], Outcomes]]) -> None:
    folder = run.output / f"fold-{name}"
    _write(run, name, results, folder)
    apart = {f"{film.name.split('/')[0]} {film.group}" for film in results[name][1].films}
    with write_errors(f"{folder / APART}:", "make room and go on with --resume"):
        write(folder / APART, "".join(f"{line}\n" for line in sorted(apart)))


def _write(run: Run, name: str, results: dict[str, tuple[dict[str, Any], Outcomes]], folder: Path) -> Checkpoint:
    """The checkpoint with the network of a part, measured by all folds but that one; returns its description."""
    others = {key: of for key, (_, of) in results.items() if key not in (ALL, name)}
    findings, figures = findings_from_outcomes(_joined(list(others.values())))
    about, held_out = results[name]
    if name == ALL:
        figures["held out"] = {
            ELSEWHERE: {f: auroc_figures(held_out, i, ELSEWHERE) for i, f in enumerate(FINDINGS)},
            "regions": region_figures(held_out),
        }
    provenance = {**about["made_with"], "measured_by": sorted(others)}
    provenance |= {key: about[key] for key in ("seconds", "threads", "device")}
    meta: Checkpoint = {
        **run.meta,
        "findings": json.loads(json.dumps(asdict(findings))),
        "metrics": {**run.meta["metrics"], **{f"{PREFIX} {key}": of for key, of in figures.items()}},
        "provenance": {**run.meta["provenance"], PREFIX: provenance},
    }
    net = load_file(run.result(name).with_suffix(".safetensors"))
    rest = {k: v for k, v in run.tensors.items() if not k.startswith(f"{PREFIX}.")}
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder, {**rest, **{f"{PREFIX}.{k}": v for k, v in net.items()}}, meta, run.checkpoint / "tokenizer.json")
    return meta


def _joined(parts: Sequence[Outcomes]) -> Outcomes:
    arrays = (np.concatenate([getattr(part, key) for part in parts]) for key in ("fold", "finding", "region", "places"))
    return Outcomes(tuple(film for part in parts for film in part.films), *arrays)


def _sha256_of_tensors(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()
