"""A bundle: the folder that holds all that inference needs; reads, verifies and writes its manifest and files."""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from pmclip_deploy.errors import BundleError, UsageError
from pmclip_deploy.sessions import targets
from pmclip_deploy.spec import BUNDLE_SCHEMA, Preprocess, Resize
from pmclip_deploy.vocabulary import FAMILIES, REGIONS

MANIFEST = "manifest.json"
SEAL = "manifest.sha256"  # as sha256sum writes it; the manifest holds the hashes of all other files
SIGNATURE = "manifest.sig"  # signing.py's; a bundle may have one, and what is written anew has none
TOKENIZER = "tokenizer.json"
WORDS = "words.json"  # the tokenizer of a head that reads words
LABELS = "labels.npy"  # (N, D) f32, the embeddings of Manifest.labels
ASKED = "asked.npy"  # (N, D) f32, the embeddings of Manifest.asked
PROBES = "probes.npy"  # (N, D + 1) f32, of each of Manifest.probes the weights of the image's embedding, and a number to add
SEEN = "seen.npy"  # (N, 32) u8, signatures of the pictures that the image tower learned from (train/lookalikes.py); a bundle may have it
GRAPHS = ("image", "text", "features", "head", "labels", "findings")  # the towers always; the others where something needs them
NEEDED_BY = {"labels": "labels need", "findings": "findings need"}  # the others by the head
HEADS = ("lite", "mevf", "qcr")  # kinds of head
MAX_MANIFEST_BYTES = 16 << 20
NEXT_STEP = "copy the bundle again, or rebuild it with `pmclip-deploy export`"

T = TypeVar("T")


@dataclass(frozen=True)
class Graph:
    file: str
    precision: str
    float_layers: tuple[str, ...] = ()  # of a precision below fp32: the layers that stayed above it, so that the gates passed


@dataclass(frozen=True)
class Words:
    """A head's own reading of a question: WORDS makes its tokens, always ``length`` of them, filled up with ``pad_id``."""

    length: int
    pad_id: int


@dataclass(frozen=True)
class Head:
    """What the graph "head" answers from: the text tower's embedding, or the question's own ``words``.

    ``grey`` names the inputs of the graph "features" and the side of each in pixels: MEVF's auto-encoder and MAML network.
    """

    kind: str  # of HEADS
    words: Words | None = None
    grey: Mapping[str, int] = field(default_factory=dict)
    clip: bool = True  # whether it sees the image tower's embedding
    details: int = 0  # numbers that it sees beside the embedding; with any, both are means over a picture and its mirror image


@dataclass(frozen=True)
class Engine:
    """A TensorRT plan of one graph, and where it runs."""

    graph: str
    file: str
    backend: str  # its name in the registry (sessions)
    version: str  # of TensorRT
    compute_capabilities: tuple[str, ...]  # "8.9"
    platform: str  # "linux-x86_64"
    onnx_sha256: str  # of the graph's file and its weights, as they were built
    profile: tuple[int, int, int]  # least, usual and largest batch
    plugin_sha256: str | None = None


@dataclass(frozen=True)
class File:
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Kind:
    """A kind of question: which answers it has and when one of them is believed.

    A kind with a ``reason`` is one the model must not answer; the reason is the text shown.
    """

    name: str
    answers: tuple[int, ...]  # indices into Manifest.answers
    temperature: float = 1.0
    threshold: float = 0.0
    reason: str | None = None
    majority: int | None = None  # the training set's most frequent answer, an index into Manifest.answers
    note: str | None = None  # how to read the probability, where that needs saying
    independent: bool = False  # each answer has a probability of its own (a sigmoid), as MEVF and QCR are trained; else a softmax


@dataclass(frozen=True)
class Abstention:
    kind_threshold: float
    radiograph_threshold: float
    curve: tuple[tuple[float, float], ...] = ()  # (coverage, accuracy) on validation data


@dataclass(frozen=True)
class Stratum:
    """Pictures of one modality family and one body region on which a finding was measured; none of them trained or tuned anything."""

    family: str  # of vocabulary.FAMILIES
    region: str  # of Findings.regions
    n: int
    positives: int
    auroc: float
    auroc_ci95: tuple[float, float]
    threshold: float  # of the finding's logit: from it on the answer is yes
    yes: tuple[int, int]  # (right, given)
    no: tuple[int, int]
    slope: float  # of the logistic curve from logit to probability, at the share of positives here
    intercept: float
    children: bool = False  # measured on children alone
    reason: str | None = None  # why it is not answered all the same

    @property
    def sensitivity(self) -> float:
        return self.yes[0] / self.positives

    @property
    def specificity(self) -> float:
        return self.no[0] / (self.n - self.positives)


@dataclass(frozen=True)
class Finding:
    name: str
    strata: tuple[Stratum, ...]
    map_hits: float | None = None  # share of right yes answers whose map had its peak where the finding is; None: no map is shown


@dataclass(frozen=True)
class Findings:
    """What the graph "findings" sees: pixels (B, 3, S, S) f32 -> finding (B, F), region (B, R), places (B, F, h, w) f32 logits.

    Its logits are the means over the picture and its mirror image.
    """

    preprocess: Preprocess
    regions: tuple[str, ...]  # of vocabulary.REGIONS; the last column is what is no radiograph of them
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Probe:
    """A finding that a bundle was taught by `train finding`: a linear model of the image's embedding (Predictor.probed_embedding)."""

    finding: Finding  # its strata of any of vocabulary.FAMILIES and REGIONS
    asked: tuple[str, ...] = ()  # questions about it, beside those by its name; to each a yes says that it is there


@dataclass(frozen=True)
class Manifest:
    """manifest.json as frozen data; ``files`` is filled in by ``write_bundle``."""

    name: str
    version: str
    precision: str
    target: str
    backbone: str
    preprocess: Preprocess
    context_length: int
    pad_id: int
    embed_dim: int
    logit_scale: float
    graphs: Mapping[str, Graph]
    head: Head | None = None  # without one a bundle embeds, and answers nothing
    answers: tuple[str, ...] = ()
    kinds: tuple[Kind, ...] = ()
    abstention: Abstention = Abstention(0.0, 0.0)
    findings: Findings | None = None
    probes: tuple[Probe, ...] = ()
    engines: tuple[Engine, ...] = ()
    labels: tuple[str, ...] = ()  # what ``classify`` chooses among where it is given none
    asked: tuple[str, ...] = ()  # questions whose embeddings are kept, so that ``ask`` opens no text tower
    metrics: Mapping[str, Any] = field(default_factory=dict)
    parity: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, File] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: Any) -> "Manifest":
        """Raises ValueError, in one line, where ``data`` is no manifest."""
        schema = _get(data, "schema", str)
        if schema != BUNDLE_SCHEMA:
            raise ValueError(f'its schema is "{schema[:60]}", this version reads "{BUNDLE_SCHEMA}"')
        answers = tuple(_is(x, str, f"answers[{i}]") for i, x in enumerate(_get(data, "answers", list)))
        text, graphs = _get(data, "text", dict), _graphs(_get(data, "graphs", dict))
        head = data.get("head", {"kind": "lite", "grey": {}} if "head" in graphs else None)
        manifest = cls(
            name=_get(data, "name", str),
            version=_get(data, "version", str),
            precision=_get(data, "precision", str),
            target=_get(data, "target", str),
            backbone=_get(data, "backbone", str),
            preprocess=_preprocess(_get(data, "preprocess", dict), "preprocess"),
            context_length=_between(_get(text, "context_length", int, "text"), 2, 1 << 16, "text.context_length"),
            pad_id=_between(_get(text, "pad_id", int, "text"), 0, 1 << 31, "text.pad_id"),
            embed_dim=_between(_get(data, "embed_dim", int), 1, 1 << 16, "embed_dim"),
            logit_scale=_get(data, "logit_scale", float),
            graphs=graphs,
            head=None if head is None else _head(_is(head, dict, "head")),
            answers=answers,
            kinds=tuple(_kind(k, f"kinds[{i}]", len(answers)) for i, k in enumerate(_get(data, "kinds", list))),
            abstention=_abstention(_get(data, "abstention", dict)),
            findings=_findings(data["findings"]) if data.get("findings") is not None else None,
            probes=tuple(_probe(p, f"probes[{i}]") for i, p in enumerate(_get({"probes": [], **data}, "probes", list))),
            engines=tuple(_engine(e, f"engines[{i}]", graphs) for i, e in enumerate(_get({"engines": [], **data}, "engines", list))),
            labels=tuple(_is(x, str, f"labels[{i}]") for i, x in enumerate(_get({"labels": [], **data}, "labels", list))),
            asked=tuple(_is(x, str, f"asked[{i}]") for i, x in enumerate(_get({"asked": [], **data}, "asked", list))),
            metrics=_get(data, "metrics", dict),
            parity=_get(data, "parity", dict),
            provenance=_get(data, "provenance", dict),
            files={name: _file(name, f) for name, f in _get(data, "files", dict).items()} if "files" in data else {},
        )
        names = [*(f.name for f in (manifest.findings.findings if manifest.findings else ())), *(p.finding.name for p in manifest.probes)]
        if manifest.probes and len(set(names)) < len(names):
            raise ValueError("two of its findings have one name")
        if manifest.head is not None and not (manifest.answers and manifest.kinds):
            raise ValueError("it has a head, and no answers or no kinds of question")
        needed = set() if manifest.head is None else {"head", "features"} if manifest.head.grey else {"head"}
        needed |= {"labels"} if manifest.labels else set()
        needed |= {"findings"} if manifest.findings else set()
        if missing := sorted(needed - set(graphs)):
            raise ValueError(f"graphs.{missing[0]} is missing, which the {NEEDED_BY.get(missing[0], 'head needs')}")
        if idle := sorted(set(graphs) - {"image", "text"} - needed):
            raise ValueError(f"graphs.{idle[0]} is there, and no {idle[0] if idle[0] in NEEDED_BY else 'head that needs it'}")
        return manifest

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        for absent in ("labels", "asked", "findings", "probes"):
            if not data[absent]:
                del data[absent]
        text = {"context_length": data.pop("context_length"), "pad_id": data.pop("pad_id")}
        first = {key: data.pop(key) for key in ("name", "version", "precision", "target", "backbone", "preprocess")}
        return {"schema": BUNDLE_SCHEMA, **first, "text": text, **data}


def manifest_from_bundle(path: Path) -> Manifest:
    """Reads and checks manifest.json; the other files are not opened."""
    file = Path(path) / MANIFEST
    if not Path(path).is_dir():
        raise BundleError(f"{path}: no such bundle folder; pass --bundle FOLDER, or build one with `pmclip-deploy export`")
    try:
        if not file.is_file():  # a device or a pipe is not read
            raise BundleError(f"{file}: missing, so this folder is no bundle; {NEXT_STEP}")
        if file.stat().st_size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{file}: larger than a manifest can be; {NEXT_STEP}")
        manifest = Manifest.from_json(json.loads(file.read_bytes(), parse_constant=_no_constant))
        more = [WORDS] if manifest.head is not None and manifest.head.words is not None else []
        more += [name for name, has in ((LABELS, manifest.labels), (ASKED, manifest.asked), (PROBES, manifest.probes)) if has]
        for name in [*(g.file for g in manifest.graphs.values()), *(e.file for e in manifest.engines), TOKENIZER, *more]:
            if name not in manifest.files:
                raise ValueError(f'"files" does not list {name}')
    except OSError as error:
        raise BundleError(f"{file}: cannot be read ({error.strerror}); check its permissions") from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise BundleError(f"{file}: not a usable manifest, {_line(error)}; {NEXT_STEP}") from error
    return manifest


def verify_bundle(path: Path, manifest: Manifest | None = None, verified: Callable[[str], object] = len) -> Manifest:
    """Every file is there with its size and sha256, the manifest's too, and nothing more but a signature; else one BundleError says all.

    A symbolic link is followed: what counts is the content, and the hash covers it. ``verified`` is told each file that may be parsed
    already: it, those before it and the manifest are as they should be.
    """
    manifest = manifest or manifest_from_bundle(path)
    problems = problems_in_bundle(path, manifest, verified)
    if problems:
        raise BundleError(f"{path}: {', '.join(problems)}; {NEXT_STEP}")
    return manifest


def problems_in_bundle(path: Path, manifest: Manifest, verified: Callable[[str], object] = len) -> list[str]:
    problems = []
    try:
        seal = Path(path) / SEAL
        if not seal.is_file():
            problems.append(f"{SEAL} is missing")
        elif seal.stat().st_size != len(expected_seal := _seal(path)) or seal.read_bytes() != expected_seal:
            problems.append(f"{MANIFEST} has changed (its sha256 is not the one in {SEAL})")
        for name, expected in sorted(manifest.files.items(), key=lambda item: item[1].bytes):  # so that most can be parsed soon
            file = Path(path) / name
            if not file.is_file():
                problems.append(f"{name} is missing")
            elif file.stat().st_size != expected.bytes:
                problems.append(f"{name} has changed ({file.stat().st_size} bytes, not {expected.bytes})")
            elif sha256_of_file(file) != expected.sha256:
                problems.append(f"{name} has changed (its sha256 differs)")
            elif not problems:
                verified(name)
        extra = sorted(entry.name for entry in Path(path).iterdir() if entry.name not in (*manifest.files, MANIFEST, SEAL, SIGNATURE))
    except OSError as error:
        raise BundleError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from error
    return problems + [f"{name!r} does not belong to the bundle" for name in extra]


def name_of_output(output: Path, name: str | None = None) -> str:
    """What is trained, imported or exported is called ``name``, else as its folder is, other characters as dashes. Raises UsageError."""
    named = re.sub(r"[^\w.-]+", "-", output.resolve().name).strip("-.") if name is None else name
    if not re.fullmatch(r"\w[\w.-]{0,63}", named):
        raise UsageError(f"{named[:70]!r} is no name: at most 64 letters, digits, dots, dashes; pass another --name")
    return named


def refuse_foreign_folder(directory: Path) -> None:
    """Raises BundleError where a bundle must not be written: a file, or a folder with something else in it."""
    if directory.exists() and not (directory / MANIFEST).is_file() and (not directory.is_dir() or any(directory.iterdir())):
        raise BundleError(f"{directory}: exists and is no bundle, so it is not overwritten; choose another folder")


def write_bundle(directory: Path, manifest: Manifest, files: Mapping[str, Path | bytes]) -> Manifest:
    """Writes ``files`` (name to source file or content) and the manifest, with their hashes filled in.

    All of it appears at once, or nothing does: a sibling folder is written, synced and renamed. A bundle that stood
    there is replaced; a folder that is no bundle is refused.
    """
    directory = Path(directory).resolve()
    refuse_foreign_folder(directory)
    beside = f".{directory.name}.{os.getpid()}"
    new, old = directory.with_name(beside + ".new"), directory.with_name(beside + ".old")
    try:
        new.mkdir(parents=True)
        for name, source in files.items():
            _check_name(name)
            _write(new / name, source)
        hashed = replace(manifest, files={name: File(sha256_of_file(new / name), (new / name).stat().st_size) for name in sorted(files)})
        _write(new / MANIFEST, (json.dumps(hashed.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
        _write(new / SEAL, _seal(new))
        verify_bundle(new)  # what is written can be read
        sync_folder(new)
        if directory.exists():
            directory.rename(old)
        try:
            new.rename(directory)
        except OSError:
            if old.exists():
                old.rename(directory)
            raise
        sync_folder(directory.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise BundleError(f"{directory}: cannot be written ({error.strerror}); check the space left and the permissions") from error
    except ValueError as error:
        raise BundleError(f"{directory}: not written, {_line(error)}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return hashed


def _write(path: Path, source: Path | bytes) -> None:
    with path.open("wb") as out:
        if isinstance(source, bytes):
            out.write(source)
        else:
            with Path(source).open("rb") as content:
                shutil.copyfileobj(content, out, 1 << 20)
        out.flush()
        os.fsync(out.fileno())


def sync_folder(folder: Path) -> None:
    """So that a rename in it outlasts a power cut."""
    if os.name == "posix":  # Windows cannot open a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _seal(folder: Path) -> bytes:
    return f"{sha256_of_file(Path(folder) / MANIFEST)}  {MANIFEST}\n".encode()


def sha256_of_file(path: Path) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(4 << 20))
    with path.open("rb", buffering=0) as content:
        while size := content.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def _is(value: Any, kind: type[T], where: str) -> T:
    if kind is float and type(value) is int and abs(value) < 1 << 53:
        value = float(value)
    if kind is list and type(value) is tuple:
        value = list(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{where} is not {'an' if kind is int else 'a'} {kind.__name__}")
    return value


def _get(data: Any, key: str, kind: type[T], where: str = "") -> T:
    name = f"{where}.{key}" if where else key
    if not isinstance(data, dict):
        raise ValueError(f"{where or 'the whole'} is not an object")
    if key not in data:
        raise ValueError(f"{name} is missing")
    return _is(data[key], kind, name)


def _between(value: int, low: int, high: int, where: str) -> int:
    if not low <= value <= high:
        raise ValueError(f"{where} is {value}, not between {low} and {high}")
    return value


def _one_of(choices: Sequence[str], value: str, where: str) -> str:
    if value not in choices:
        raise ValueError(f"{where} is {value[:60]!r}, not one of {', '.join(choices)}")
    return value


def _sha256(value: str, where: str) -> str:
    if len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise ValueError(f"{where} is no sha256")
    return value


def _check_name(name: str) -> str:
    """A name in the bundle's own folder: no path, so nothing outside the folder is ever read or written."""
    bad = not name or name in (".", "..", MANIFEST, SEAL, SIGNATURE) or any(c in "/\\:\0\n" for c in name) or len(name) > 255
    if bad:
        raise ValueError(f"{name[:60]!r} is no file name inside the bundle")
    return name


def _preprocess(data: dict[str, Any], where: str) -> Preprocess:
    resize = _get(data, "resize", str, where)
    _one_of(get_args(Resize), resize, f"{where}.resize")
    mean, std = ([_is(x, float, f"{where}.{key}") for x in _get(data, key, list, where)] for key in ("mean", "std"))
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"{where}.mean and .std are not three numbers, std above 0")
    size = _between(_get(data, "size", int, where), 8, 4096, f"{where}.size")
    trim = _get({"trim": False, **data}, "trim", bool, where)
    return Preprocess(size, resize, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]), trim)  # type: ignore[arg-type]


def _graphs(data: dict[str, Any]) -> dict[str, Graph]:
    wanted = [name for name in GRAPHS if name in ("image", "text") or name in data]
    if unknown := sorted(set(data) - set(GRAPHS)):
        raise ValueError(f"graphs.{unknown[0][:60]} is unknown; this version knows {', '.join(GRAPHS)}")
    graphs = {name: _get(data, name, dict, "graphs") for name in wanted}
    return {
        name: Graph(
            _check_name(_get(g, "file", str, f"graphs.{name}")),
            _get(g, "precision", str, f"graphs.{name}"),
            tuple(_is(x, str, f"graphs.{name}.float_layers") for x in _get({"float_layers": [], **g}, "float_layers", list)),
        )
        for name, g in graphs.items()
    }


def _head(data: dict[str, Any]) -> Head:
    words, sides = data.get("words"), _get(data, "grey", dict, "head")
    head = Head(
        kind=_one_of(HEADS, _get(data, "kind", str, "head"), "head.kind"),
        words=None
        if words is None
        else Words(
            length=_between(_get(words, "length", int, "head.words"), 1, 1 << 16, "head.words.length"),
            pad_id=_between(_get(words, "pad_id", int, "head.words"), 0, 1 << 31, "head.words.pad_id"),
        ),
        grey={name: _between(_is(side, int, f"head.grey.{name}"), 8, 4096, f"head.grey.{name}") for name, side in sides.items()},
        clip=_get({"clip": True, **data}, "clip", bool, "head"),
        details=_between(_get({"details": 0, **data}, "details", int, "head"), 0, 1 << 16, "head.details"),
    )
    if head.kind == "lite" and head != Head("lite", details=head.details):
        raise ValueError("a lite head sees what the towers give alone, and its words, grey or clip say otherwise")
    if head.kind != "lite" and head.details:
        raise ValueError(f"head.details is not 0, and a head of kind {head.kind} sees none")
    if head.kind != "lite" and head.words is None:
        raise ValueError(f"head.words is missing, which a head of kind {head.kind} needs")
    return head


def _engine(data: Any, where: str, graphs: Mapping[str, Graph]) -> Engine:
    plugin = data.get("plugin_sha256") if isinstance(data, dict) else None
    profile = [_between(_is(x, int, f"{where}.profile"), 1, 1 << 16, f"{where}.profile") for x in _get(data, "profile", list, where)]
    if len(profile) != 3 or sorted(profile) != profile:
        raise ValueError(f"{where}.profile is not [least, usual, largest] batch")
    capabilities = tuple(_is(x, str, f"{where}.compute_capabilities") for x in _get(data, "compute_capabilities", list, where))
    if not capabilities or not all(re.fullmatch(r"[0-9]+\.[0-9]", x) for x in capabilities):
        raise ValueError(f'{where}.compute_capabilities is not a list of numbers like "8.9"')
    return Engine(
        graph=_one_of(tuple(graphs), _get(data, "graph", str, where), f"{where}.graph"),
        file=_check_name(_get(data, "file", str, where)),
        backend=_one_of(tuple(filter(None, targets().values())), _get(data, "backend", str, where), f"{where}.backend"),
        version=_get(data, "version", str, where),
        compute_capabilities=capabilities,
        platform=_get(data, "platform", str, where),
        onnx_sha256=_sha256(_get(data, "onnx_sha256", str, where), f"{where}.onnx_sha256"),
        profile=(profile[0], profile[1], profile[2]),
        plugin_sha256=None if plugin is None else _sha256(_is(plugin, str, f"{where}.plugin_sha256"), f"{where}.plugin_sha256"),
    )


def _kind(data: Any, where: str, answers: int) -> Kind:
    reason, majority, note = (data.get(key) if isinstance(data, dict) else None for key in ("reason", "majority", "note"))
    kind = Kind(
        name=_get(data, "name", str, where),
        answers=tuple(_is(x, int, f"{where}.answers") for x in _get(data, "answers", list, where)),
        temperature=_get(data, "temperature", float, where),
        threshold=_get(data, "threshold", float, where),
        reason=None if reason is None else _is(reason, str, f"{where}.reason"),
        majority=None if majority is None else _is(majority, int, f"{where}.majority"),
        note=None if note is None else _is(note, str, f"{where}.note"),
        independent=_get(data, "independent", bool, where) if "independent" in data else False,
    )
    for index in [*kind.answers, *([] if kind.majority is None else [kind.majority])]:
        _between(index, 0, answers - 1, f"{where}: an answer's index")
    if kind.temperature <= 0:
        raise ValueError(f"{where}.temperature is not above 0")
    if kind.reason is None and not kind.answers:
        raise ValueError(f"{where} has neither answers nor a reason to give none")
    return kind


def _abstention(data: dict[str, Any]) -> Abstention:
    where = "abstention"
    curve = [[_is(x, float, f"{where}.curve") for x in _is(point, list, f"{where}.curve")] for point in _get(data, "curve", list, where)]
    if any(len(point) != 2 for point in curve):
        raise ValueError(f"{where}.curve is not a list of [coverage, accuracy]")
    return Abstention(
        kind_threshold=_get(data, "kind_threshold", float, where),
        radiograph_threshold=_get(data, "radiograph_threshold", float, where),
        curve=tuple((coverage, accuracy) for coverage, accuracy in curve),
    )


def _findings(data: Any) -> Findings:
    rows = _get(data, "findings", list, "findings")
    findings = Findings(
        preprocess=_preprocess(_get(data, "preprocess", dict, "findings"), "findings.preprocess"),
        regions=tuple(_is(x, str, "findings.regions") for x in _get(data, "regions", list, "findings")),
        findings=tuple(_finding(row, f"findings.findings[{i}]") for i, row in enumerate(rows)),
    )
    if not findings.findings or not findings.regions:
        raise ValueError("findings has no findings or no regions")
    for i, finding in enumerate(findings.findings):
        for j, stratum in enumerate(finding.strata):
            _one_of(findings.regions, stratum.region, f"findings.findings[{i}].strata[{j}].region")
    return findings


def _finding(data: Any, where: str) -> Finding:
    hits = data.get("map_hits") if isinstance(data, dict) else None
    strata = tuple(_stratum(row, f"{where}.strata[{i}]") for i, row in enumerate(_get(data, "strata", list, where)))
    return Finding(_get(data, "name", str, where), strata, None if hits is None else _share(hits, f"{where}.map_hits"))


def _probe(data: Any, where: str) -> Probe:
    probe = Probe(
        _finding(_get(data, "finding", dict, where), f"{where}.finding"),
        tuple(_is(x, str, f"{where}.asked") for x in _get(data, "asked", list, where)),
    )
    for i, stratum in enumerate(probe.finding.strata):
        _one_of(tuple(FAMILIES), stratum.family, f"{where}.finding.strata[{i}].family")
        _one_of(tuple(REGIONS), stratum.region, f"{where}.finding.strata[{i}].region")
    return probe


def _stratum(data: Any, where: str) -> Stratum:
    reason = data.get("reason") if isinstance(data, dict) else None
    interval = [_share(x, f"{where}.auroc_ci95") for x in _get(data, "auroc_ci95", list, where)]
    counts = {key: [_is(x, int, f"{where}.{key}") for x in _get(data, key, list, where)] for key in ("yes", "no")}
    stratum = Stratum(
        family=_get(data, "family", str, where),
        region=_get(data, "region", str, where),
        n=_get(data, "n", int, where),
        positives=_get(data, "positives", int, where),
        auroc=_share(_get(data, "auroc", float, where), f"{where}.auroc"),
        auroc_ci95=(interval[0], interval[-1]) if len(interval) == 2 else (1.0, 0.0),
        threshold=_finite(_get(data, "threshold", float, where), f"{where}.threshold"),
        yes=(counts["yes"][0], counts["yes"][-1]) if len(counts["yes"]) == 2 else (1, 0),
        no=(counts["no"][0], counts["no"][-1]) if len(counts["no"]) == 2 else (1, 0),
        slope=_finite(_get(data, "slope", float, where), f"{where}.slope"),
        intercept=_finite(_get(data, "intercept", float, where), f"{where}.intercept"),
        children=_get({"children": False, **data}, "children", bool, where),
        reason=None if reason is None else _is(reason, str, f"{where}.reason"),
    )
    (right_yes, yes), (right_no, no) = stratum.yes, stratum.no
    counted = 0 <= right_yes <= yes and 0 <= right_no <= no and yes + no == stratum.n and right_yes + no - right_no == stratum.positives
    if not counted or not 0 < stratum.positives < stratum.n or not stratum.auroc_ci95[0] <= stratum.auroc <= stratum.auroc_ci95[1]:
        raise ValueError(f"{where}: its counts or its interval contradict each other")
    if stratum.slope <= 0:
        raise ValueError(f"{where}.slope is not above 0")
    return stratum


def _share(value: Any, where: str) -> float:
    if not 0 <= (share := _is(value, float, where)) <= 1:  # a comparison with NaN is false, so NaN is refused
        raise ValueError(f"{where} is not between 0 and 1")
    return share


def _finite(value: float, where: str) -> float:
    if not abs(value) < 1e6:
        raise ValueError(f"{where} is no usable number")
    return value


def _file(name: str, data: Any) -> File:
    _check_name(name)
    sha256 = _sha256(_get(data, "sha256", str, f"files.{name}"), f"files.{name}.sha256")
    return File(sha256, _between(_get(data, "bytes", int, f"files.{name}"), 0, 1 << 50, f"files.{name}.bytes"))
