"""How many planted faults does the parity gate catch without data? Each is planted in a copy of the shipped bundle, which is sealed again.

    python -m pmclip_deploy.benchmarks.planted_faults
"""

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from pmclip_deploy.bundle.files import manifest_from_bundle, write_bundle
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.bundle.types import Findings, Kind, Stratum
from pmclip_deploy.errors import PmclipError
from pmclip_deploy.export.checks import differences
from pmclip_deploy.export.gates import gate
from pmclip_deploy.export.onnx_from_checkpoint import modules_from_checkpoint
from pmclip_deploy.export.parity import parity_of
from pmclip_deploy.export.probes import KnownSession
from pmclip_deploy.export.reference import Reference
from pmclip_deploy.models import DEFAULT_BUNDLE, DEFAULT_CHECKPOINT
from pmclip_deploy.opening import load
from pmclip_deploy.predictor import Predictor
from pmclip_deploy.sessions import Session
from pmclip_deploy.tokens import tokenizer_from_file

Array = NDArray[Any]
Change = Callable[[Array], Array]
T = TypeVar("T")


class Copy:
    """The shipped bundle in memory, to be changed and written elsewhere."""

    def __init__(self) -> None:
        self.manifest: Manifest = manifest_from_bundle(DEFAULT_BUNDLE)
        self.files: dict[str, bytes | Path] = {name: DEFAULT_BUNDLE / name for name in self.manifest.files}

    def weights(self, graph: str, name: str, change: Change) -> None:
        model = onnx.load(DEFAULT_BUNDLE / f"{graph}.onnx")
        weight = next(w for w in model.graph.initializer if w.name == name)
        before = numpy_helper.to_array(weight)
        weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(before.copy()), before.dtype), name))
        self._put(graph, model)

    def output(self, graph: str, name: str, op_type: str, *operands: Any, **attributes: Any) -> None:
        """What the graph gives as ``name`` goes through one more operator."""
        model, inner = onnx.load(DEFAULT_BUNDLE / f"{graph}.onnx"), f"{name}.before"
        for node in model.graph.node:
            node.output[:] = [inner if x == name else x for x in node.output]
            node.input[:] = [inner if x == name else x for x in node.input]
        given = [f"planted.{i}" for i in range(len(operands))]
        model.graph.initializer.extend(numpy_helper.from_array(np.asarray(x), n) for x, n in zip(operands, given, strict=True))
        model.graph.node.append(helper.make_node(op_type, [inner, *given], [name], **attributes))
        self._put(graph, model)

    def input(self, graph: str, name: str, op_type: str, *operands: Any, **attributes: Any) -> None:
        model, inner = onnx.load(DEFAULT_BUNDLE / f"{graph}.onnx"), f"{name}.after"
        for node in model.graph.node:
            node.input[:] = [inner if x == name else x for x in node.input]
        given = [f"planted.{i}" for i in range(len(operands))]
        model.graph.initializer.extend(numpy_helper.from_array(np.asarray(x), n) for x, n in zip(operands, given, strict=True))
        model.graph.node.insert(0, helper.make_node(op_type, [name, *given], [inner], **attributes))
        self._put(graph, model)

    def _put(self, graph: str, model: onnx.ModelProto) -> None:
        self.files[f"{graph}.onnx"] = model.SerializeToString()
        self.files.pop(f"{graph}.onnx.data", None)

    def tokenizer(self, change: Callable[[Any], object]) -> None:
        content = json.loads((DEFAULT_BUNDLE / "tokenizer.json").read_bytes())
        change(content)
        self.files["tokenizer.json"] = json.dumps(content, ensure_ascii=False).encode()

    def array(self, name: str, change: Change) -> None:
        content = io.BytesIO()
        before = np.load(DEFAULT_BUNDLE / name)
        np.save(content, np.ascontiguousarray(change(before.copy()), before.dtype))
        self.files[name] = content.getvalue()

    def says(self, **changes: Any) -> None:
        self.manifest = replace(self.manifest, **changes)

    def kinds(self, change: Callable[[Kind], Kind]) -> None:
        self.says(kinds=tuple(map(change, self.manifest.kinds)))

    def abstains(self, **changes: Any) -> None:
        self.says(abstention=replace(self.manifest.abstention, **changes))

    def strata(self, change: Callable[[Stratum], Stratum]) -> None:
        of = self.of_findings
        self.findings(findings=tuple(replace(f, strata=tuple(map(change, f.strata))) for f in of.findings))

    def findings(self, **changes: Any) -> None:
        self.says(findings=replace(self.of_findings, **changes))

    @property
    def of_findings(self) -> Findings:
        assert self.manifest.findings is not None
        return self.manifest.findings

    def columns(self, kind: str) -> list[int]:
        return next(list(k.answers) for k in self.manifest.kinds if k.name == kind)

    def permuted(self, graph: str, output: str, order: Any) -> None:
        self.output(graph, output, "Gather", np.asarray(order, np.int64), axis=1)

    def swapped(self, graph: str, output: str, width: int, a: int, b: int) -> None:
        order = list(range(width))
        order[a], order[b] = b, a
        self.permuted(graph, output, order)


def rows(change: Callable[[Array, Any], object], which: Any) -> Change:
    def changed(x: Array) -> Array:
        change(x, which)
        return x

    return changed


def zero(which: Any) -> Change:
    return rows(lambda x, i: x.__setitem__(i, 0), which)


def swap(a: int, b: int) -> Change:
    return rows(lambda x, i: x.__setitem__([a, b], x[[b, a]]), None)


def vector(length: int, value: float, *at: int, base: float = 0.0) -> Array:
    x = np.full(length, base, np.float32)
    x[list(at)] = value
    return x


def _row(word: str) -> int:
    row = tokenizer_from_file(DEFAULT_BUNDLE / "tokenizer.json").token_to_id(word)
    assert row is not None
    return int(row)


FAULTS: dict[str, Callable[[Copy], object]] = {}
_A, _K, _R, _F = 1574, 23, 6, 2  # answers, kinds, regions and findings of the shipped model


def _add(name: str, plant: Callable[[Copy], object]) -> None:
    assert name not in FAULTS
    FAULTS[name] = plant


def _each(name: str, values: Iterable[T], plant: Callable[[Copy, T], object]) -> None:
    for value in values:
        _add(name.format(value), _bound(plant, value))


def _bound(plant: Callable[[Copy, T], object], value: T) -> Callable[[Copy], object]:
    return lambda copy: plant(copy, value)


def _of_head() -> None:
    closed, open_ = ("finding: fracture", "abnormality yes/no", "modality yes/no"), ("modality", "plane", "organ", "contrast", "weighting")
    _each("head: yes and no swapped, {}", closed, lambda c, k: c.swapped("head", "answer", _A, *c.columns(k)))
    _each("head: a dead yes, {}", closed, lambda c, k: c.output("head", "answer", "Add", vector(_A, -1e4, c.columns(k)[1])))
    _each("head: a bias of 1.5, {}", closed, lambda c, k: c.output("head", "answer", "Add", vector(_A, 1.5, c.columns(k)[1])))
    _each("head: two answers swapped, {}", open_, lambda c, k: c.swapped("head", "answer", _A, *c.columns(k)[:2]))
    _each("head: a bias of 1.5, {}", open_, lambda c, k: c.output("head", "answer", "Add", vector(_A, 1.5, c.columns(k)[1])))
    _each("head: a dead answer, {}", open_, lambda c, k: c.output("head", "answer", "Mul", vector(_A, 0, c.columns(k)[1], base=1)))
    _add("head: answers rotated", lambda c: c.permuted("head", "answer", np.roll(np.arange(_A), 1)))
    _add("head: answers times 1.5", lambda c: c.output("head", "answer", "Mul", np.float32(1.5)))
    _add("head: kinds rotated", lambda c: c.permuted("head", "kind", np.roll(np.arange(_K), 1)))
    _add("head: two kinds swapped", lambda c: c.swapped("head", "kind", _K, 18, 19))
    _add("head: a kind is always favoured", lambda c: c.output("head", "kind", "Add", vector(_K, 1.5, 21)))
    _add("head: a kind is never chosen", lambda c: c.output("head", "kind", "Add", vector(_K, -1e4, 7)))
    _add("head: kinds in zeros", lambda c: c.output("head", "kind", "Mul", np.float32(0)))
    _add("head: the radiograph guard negated", lambda c: c.output("head", "radiograph", "Neg"))
    _add("head: the radiograph guard plus 1.5", lambda c: c.output("head", "radiograph", "Add", np.float32(1.5)))
    _add("head: the radiograph guard in zeros", lambda c: c.output("head", "radiograph", "Mul", np.float32(0)))
    _add("head: the guard's details left out", lambda c: c.weights("head", "radiographs.0.weight.q", zero(slice(512, None))))
    _add("head: the memory left out", lambda c: c.weights("head", "strength", lambda x: x * 0))
    _add("head: the memory of twice the strength", lambda c: c.weights("head", "strength", lambda x: x * 2))
    _add("head: half of the memory's cases in zeros", lambda c: c.weights("head", "cases.scale", zero(slice(0, None, 2))))
    _add("head: the memory's cases shifted by one", lambda c: c.weights("head", "cases.q", lambda x: np.roll(x, 1, 1)))
    _add("head: the details' cases shifted by one", lambda c: c.weights("head", "detail.cases.q", lambda x: np.roll(x, 1, 1)))
    _add("head: the memory's balance left out", lambda c: c.weights("head", "balance", lambda x: x * 0))
    _add("head: the question's prior left out", lambda c: c.weights("head", "prior.2.weight.scale", lambda x: x * 0))
    _add("head: the fusion's image half in zeros", lambda c: c.weights("head", "fused.image.weight.q", zero(slice(0, 256))))
    _add("head: scales of the answers rotated", lambda c: c.weights("head", "answer.fused.weight.scale", lambda x: np.roll(x, 1)))


def _of_towers() -> None:
    half, fifth = slice(0, None, 2), slice(0, None, 5)
    _add("image: a dead column of the embedding", lambda c: c.weights("image", "proj.weight.scale", zero(7)))
    _add("image: a negated column", lambda c: c.weights("image", "proj.weight.scale", rows(lambda x, i: x.__setitem__(i, -x[i]), 100)))
    _add("image: two columns swapped", lambda c: c.swapped("image", "embedding", 512, 3, 4))
    _add("image: the embedding times 2", lambda c: c.output("image", "embedding", "Mul", np.float32(2)))
    _add("image: a bias on one column", lambda c: c.output("image", "embedding", "Add", vector(512, 1.5, 200)))
    _add("image: the details in zeros", lambda c: c.output("image", "details", "Mul", np.float32(0)))
    _add("image: a dead column of the details", lambda c: c.output("image", "details", "Mul", vector(640, 0, 11, base=1)))
    _add("image: the details rotated", lambda c: c.permuted("image", "details", np.roll(np.arange(640), 1)))
    _add("image: red and blue swapped", lambda c: c.input("image", "pixels", "Gather", np.array([2, 1, 0]), axis=1))
    _add("image: seen upside down", lambda c: c.input("image", "pixels", "Gather", np.arange(255, -1, -1), axis=2))
    _add("image: pixels negated", lambda c: c.input("image", "pixels", "Neg"))
    _add("image: two channels of the stem in zeros", lambda c: c.weights("image", "conv_stem.weight.half", zero(slice(0, 2))))
    _add("image: a range of a third", lambda c: c.weights("image", "blocks.6.0.conv_dw.relu6.scale", lambda x: x / 3))
    _add("image: every fifth channel of the last layer dead", lambda c: c.weights("image", "conv_head.weight.scale", zero(fifth)))
    words = ("not", "without", "no", "left", "right", "yes", "fracture", "with", "##s", "[UNK]", "[CLS]")
    _each("text: the row of {} in zeros", words, lambda c, w: c.weights("text", "words.weight.scale", zero(_row(w))))
    _add("text: the rows of left and right swapped", lambda c: c.weights("text", "words.weight.q", swap(_row("left"), _row("right"))))
    _add("text: the rows of yes and no swapped", lambda c: c.weights("text", "words.weight.q", swap(_row("yes"), _row("no"))))
    _add("text: a row of the rarest word in zeros", lambda c: c.weights("text", "words.weight.scale", zero(7999)))
    _add("text: the word table shifted by one", lambda c: c.weights("text", "words.weight.q", lambda x: np.roll(x, 1, 0)))
    _each("text: positions after {} in zeros", (8, 16, 32, 63), lambda c, i: c.weights("text", "places.weight", zero(slice(i, None))))
    last = rows(lambda x, i: x.__setitem__(i, x[15]), slice(16, None))
    _add("text: positions after 16 are the 16th", lambda c: c.weights("text", "places.weight", last))
    _add("text: positions shifted by one", lambda c: c.weights("text", "places.weight", lambda x: np.roll(x, 1, 0)))
    _add("text: a dead column of the embedding", lambda c: c.weights("text", "proj.weight.scale", zero(7)))
    _add("text: the embedding times 2", lambda c: c.output("text", "embedding", "Mul", np.float32(2)))
    _add("text: two columns swapped", lambda c: c.swapped("text", "embedding", 512, 3, 4))
    _add("text: a layer's second half left out", lambda c: c.weights("text", "layer.2.down.weight.scale", lambda x: x * 0))
    _add("text: padding is not masked", lambda c: c.weights("text", "pad_id", lambda x: x + 4))
    _add("text: half of a layer's columns in zeros", lambda c: c.weights("text", "layer.3.up.weight.scale", zero(half)))


def _of_findings() -> None:
    _add("findings: two findings swapped", lambda c: c.permuted("findings", "finding", [1, 0]))
    _each("findings: a bias of 1.5 on finding {}", range(_F), lambda c, i: c.output("findings", "finding", "Add", vector(_F, 1.5, i)))
    _each("findings: finding {} in zeros", range(_F), lambda c, i: c.output("findings", "finding", "Mul", vector(_F, 0, i, base=1)))
    _add("findings: logits times 1.5", lambda c: c.output("findings", "finding", "Mul", np.float32(1.5)))
    _add("findings: two regions swapped", lambda c: c.swapped("findings", "region", _R, 0, 1))
    _add("findings: regions rotated", lambda c: c.permuted("findings", "region", np.roll(np.arange(_R), 1)))
    _add("findings: a bias of 1.5 on a region", lambda c: c.output("findings", "region", "Add", vector(_R, 1.5, 4)))
    _add("findings: a region that is never seen", lambda c: c.output("findings", "region", "Add", vector(_R, -1e4, 2)))
    _add("findings: maps upside down", lambda c: c.output("findings", "places", "Gather", np.arange(19, -1, -1), axis=2))
    _add("findings: maps of two findings swapped", lambda c: c.permuted("findings", "places", [1, 0]))
    _add("findings: the part of the whole picture left out", lambda c: c.weights("findings", "pooled.weight.half", lambda x: x * 0))
    _add("findings: seen in negative", lambda c: c.input("findings", "pixels", "Neg"))


def _of_manifest() -> None:
    _add("manifest: temperatures times 0.2", lambda c: c.kinds(lambda k: replace(k, temperature=0.2 * k.temperature)))
    _add("manifest: thresholds 0", lambda c: c.kinds(lambda k: replace(k, threshold=0.0)))
    _add("manifest: thresholds 1", lambda c: c.kinds(lambda k: replace(k, threshold=1.0)))
    _add("manifest: refused kinds are answered", lambda c: c.kinds(lambda k: replace(k, reason=None, answers=(0, 1)) if k.reason else k))
    _add("manifest: a kind refused", lambda c: c.kinds(lambda k: replace(k, reason="no") if k.name == "organ" else k))
    _add("manifest: kinds rotated", lambda c: c.says(kinds=(*c.manifest.kinds[1:], c.manifest.kinds[0])))
    _add("manifest: yes and no swapped", lambda c: c.kinds(lambda k: replace(k, answers=k.answers[::-1]) if len(k.answers) == 2 else k))
    _add("manifest: majorities left out", lambda c: c.kinds(lambda k: replace(k, majority=None)))
    _add("manifest: notes left out", lambda c: c.kinds(lambda k: replace(k, note=None)))
    _add("manifest: sigmoids for softmax", lambda c: c.kinds(lambda k: replace(k, independent=True)))
    _add("manifest: one temperature", lambda c: c.kinds(lambda k: replace(k, temperature=1.0) if k.name == "plane" else k))
    _each("manifest: radiograph threshold {:g}", (1e9, -1e9, 1.0), lambda c, v: c.abstains(radiograph_threshold=v))
    _each("manifest: kind threshold {:g}", (0.0, 0.99), lambda c, v: c.abstains(kind_threshold=v))
    _add("manifest: the curve left out", lambda c: c.abstains(curve=()))
    _each("manifest: logit scale times {:g}", (10, 0.1, 1.01), lambda c, f: c.says(logit_scale=f * c.manifest.logit_scale))
    _add("manifest: answers rotated", lambda c: c.says(answers=(*c.manifest.answers[1:], c.manifest.answers[0])))
    _add("manifest: context length 16", lambda c: c.says(context_length=16))
    _add("manifest: another padding", lambda c: c.says(pad_id=1))
    _add("manifest: pixels another mean", lambda c: c.says(preprocess=replace(c.manifest.preprocess, mean=(0.5, 0.5, 0.48))))
    _add("manifest: margins are kept", lambda c: c.says(preprocess=replace(c.manifest.preprocess, trim=False)))
    _add("manifest: pictures padded", lambda c: c.says(preprocess=replace(c.manifest.preprocess, resize="pad")))
    _add("manifest: stored questions in another order", lambda c: c.says(asked=(*c.manifest.asked[1:], c.manifest.asked[0])))
    _add("manifest: a stored question left out", lambda c: c.says(asked=()))
    _add("manifest: findings' thresholds 0", lambda c: c.strata(lambda s: replace(s, threshold=0.0)))
    _add("manifest: findings' slopes doubled", lambda c: c.strata(lambda s: replace(s, slope=2 * s.slope)))
    _add("manifest: findings' intercepts 0", lambda c: c.strata(lambda s: replace(s, intercept=0.0)))
    _add("manifest: findings' reasons left out", lambda c: c.strata(lambda s: replace(s, reason=None)))
    _add("manifest: children's stratum for all", lambda c: c.strata(lambda s: replace(s, children=False)))
    _add("manifest: findings' worth", lambda c: c.strata(lambda s: replace(s, yes=(s.yes[1], s.yes[1]))))
    _add("manifest: findings' names swapped", lambda c: c.findings(findings=tuple(
        replace(f, name=o.name) for f, o in zip(c.of_findings.findings, c.of_findings.findings[::-1], strict=True))))  # fmt: skip
    _add("manifest: regions' names swapped", lambda c: c.findings(regions=("leg", "hand", *c.of_findings.regions[2:])))
    _add("manifest: findings' pictures squashed", lambda c: c.findings(preprocess=replace(c.of_findings.preprocess, resize="squash")))
    _add("manifest: no findings", lambda c: c.says(findings=None, graphs={k: v for k, v in c.manifest.graphs.items() if k != "findings"}))


def _of_files() -> None:
    def normal(**changes: Any) -> Callable[[Copy], object]:
        return lambda c: c.tokenizer(lambda t: t["normalizer"].update(changes))

    def vocabulary(a: str, b: str) -> Callable[[Copy], object]:
        def change(content: Any) -> None:
            pieces = content["model"]["vocab"]
            pieces[a], pieces[b] = pieces[b], pieces[a]

        return lambda c: c.tokenizer(change)

    def without(word: str) -> Callable[[Copy], object]:
        """Another word stands in its place."""

        def change(content: Any) -> None:
            pieces = content["model"]["vocab"]
            pieces[f"{word}-gone"] = pieces.pop(word)

        return lambda c: c.tokenizer(change)

    _add("tokenizer: upper case stays", normal(lowercase=False, strip_accents=True))
    _add("tokenizer: accents stay", normal(strip_accents=False))
    _add("tokenizer: Chinese characters are not separated", normal(handle_chinese_chars=False))
    _add("tokenizer: control characters stay", normal(clean_text=False))
    _add("tokenizer: words of 10 letters at most", lambda c: c.tokenizer(lambda t: t["model"].update(max_input_chars_per_word=10)))
    _add("tokenizer: punctuation is not separated", lambda c: c.tokenizer(lambda t: t.update(pre_tokenizer={"type": "WhitespaceSplit"})))
    _add("tokenizer: no marks around a text", lambda c: c.tokenizer(lambda t: t.update(post_processor=None)))
    _add("tokenizer: left and right swapped", vocabulary("left", "right"))
    _add("tokenizer: not and now swapped", vocabulary("not", "now"))
    _add("tokenizer: two rare pieces swapped", vocabulary("orchestra", "rugby"))
    _add("tokenizer: without is unknown", without("without"))
    _add("tokenizer: absent from upper case alone", normal(lowercase=False))
    _add("asked.npy: rows rotated", lambda c: c.array("asked.npy", lambda x: np.roll(x, 1, 0)))
    _add("asked.npy: two rows swapped", lambda c: c.array("asked.npy", swap(0, 4)))
    _add("asked.npy: a row in zeros", lambda c: c.array("asked.npy", zero(1)))
    _add("asked.npy: a column in zeros", lambda c: c.array("asked.npy", zero((slice(None), 9))))
    _add("asked.npy: times 2", lambda c: c.array("asked.npy", lambda x: 2 * x))
    _add("seen.npy: in zeros", lambda c: c.array("seen.npy", lambda x: 0 * x))
    _add("seen.npy: left out", lambda c: c.files.pop("seen.npy"))


for _group in (_of_head, _of_towers, _of_findings, _of_manifest, _of_files):
    _group()


def caught(reference: Reference, names: Sequence[str] = ()) -> Iterator[tuple[str, str | None]]:
    """Of each planted fault what the gate says, None where it says nothing; ``names`` chooses some."""
    known: dict[tuple[str, ...], Session] = {}  # by the hashes of a graph's files: most faults change one graph, or none

    def opened(folder: Path) -> Predictor:
        predictor, sessions = load(folder, "cpu"), dict[str, Session]()
        for graph in predictor.manifest.graphs:
            key = tuple(file.sha256 for name, file in predictor.manifest.files.items() if name.startswith(f"{graph}."))
            sessions[graph] = known[key] = known.get(key) or KnownSession(predictor._sessions[graph])
        return Predictor(folder, predictor.manifest, sessions, predictor._tokenizers)

    for name in names or FAULTS:
        copy = Copy()
        FAULTS[name](copy)
        with tempfile.TemporaryDirectory(prefix="pmclip-fault-") as folder:
            try:
                written = write_bundle(Path(folder, "bundle"), copy.manifest, copy.files)
                if found := differences(reference.modules, reference.predictor.manifest, written):  # the gate says so in any case
                    yield name, f"{', '.join(found)} of the bundle are not the checkpoint's"
                    continue
                precision, measured = parity_of(reference, opened(Path(folder, "bundle")))
                gate(precision, measured)
                yield name, None
            except PmclipError as error:
                yield name, str(error)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", help="names of faults; by default all")
    options = parser.parse_args(arguments)
    reference, count, missed = Reference(modules_from_checkpoint(DEFAULT_CHECKPOINT)), 0, 0
    for name, said in caught(reference, options.faults):
        count, missed = count + 1, missed + (said is None)
        print(f"{'MISSED' if said is None else 'caught'}  {name}{'' if said is None else f': {said}'}", flush=True)
    print(f"{count - missed} of {count} planted faults are caught")
    return 0


if __name__ == "__main__":
    sys.exit(main())
