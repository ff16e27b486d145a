"""JSON to the manifest's types; a ValueError names the key that is wrong."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

from pmclip_deploy.bundle.names import GRAPHS, HEADS, MANIFEST, SEAL, SIGNATURE
from pmclip_deploy.bundle.types import Abstention, Engine, File, Finding, Findings, Graph, Head, Kind, Probe, Stratum, Words
from pmclip_deploy.sessions import targets
from pmclip_deploy.spec import Interpolation, Preprocess, Resize
from pmclip_deploy.vocabulary import FAMILIES, REGIONS

T = TypeVar("T")


def no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


IN_JSON = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def no_twin(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, for json.loads: whoever checks a file may read the first of two values and whoever uses it the last."""
    data = dict(pairs)
    if len(data) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {name[:60]!r} is there twice")
    return data


def of_type(value: Any, kind: type[T], where: str) -> T:
    if kind is float and type(value) is int and abs(value) < 1 << 53:
        value = float(value)
    if kind is list and type(value) is tuple:
        value = list(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{where} is not {IN_JSON.get(kind, kind.__name__)}")
    return value


def get(data: Any, key: str, kind: type[T], where: str = "") -> T:
    name = f"{where}.{key}" if where else key
    if not isinstance(data, dict):
        raise ValueError(f"{where or 'the whole'} is not an object")
    if key not in data:
        raise ValueError(f"{name} is missing")
    return of_type(data[key], kind, name)


def between(value: int, low: int, high: int, where: str) -> int:
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


def check_name(name: str) -> str:
    """A name in the bundle's own folder: no path, so nothing outside the folder is ever read or written."""
    bad = not name or name in (".", "..", MANIFEST, SEAL, SIGNATURE) or any(c in "/\\:\0\n" for c in name) or len(name) > 255
    if bad:
        raise ValueError(f"{name[:60]!r} is no file name inside the bundle")
    return name


def preprocess_from_json(data: dict[str, Any], where: str) -> Preprocess:
    resize = get(data, "resize", str, where)
    _one_of(get_args(Resize), resize, f"{where}.resize")
    mean, std = ([of_type(x, float, f"{where}.{key}") for x in get(data, key, list, where)] for key in ("mean", "std"))
    if len(mean) != 3 or len(std) != 3 or not all(abs(x) <= 10 for x in mean) or not all(1e-3 <= x <= 10 for x in std):  # of 0..1
        raise ValueError(f"{where}.mean and .std are not three numbers each, up to 10, and std from 0.001 on")
    size = between(get(data, "size", int, where), 8, 4096, f"{where}.size")
    trim = get({"trim": False, **data}, "trim", bool, where)
    interpolation = get({"interpolation": "bicubic", **data}, "interpolation", str, where)
    _one_of(get_args(Interpolation), interpolation, f"{where}.interpolation")
    return Preprocess(size, resize, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]), trim, interpolation)  # type: ignore[arg-type]


def graphs_from_json(data: dict[str, Any]) -> dict[str, Graph]:
    wanted = [name for name in GRAPHS if name in ("image", "text") or name in data]
    if unknown := sorted(set(data) - set(GRAPHS)):
        raise ValueError(f"graphs.{unknown[0][:60]} is unknown; this version knows {', '.join(GRAPHS)}")
    graphs = {name: get(data, name, dict, "graphs") for name in wanted}
    return {
        name: Graph(
            check_name(get(g, "file", str, f"graphs.{name}")),
            get(g, "precision", str, f"graphs.{name}"),
            tuple(of_type(x, str, f"graphs.{name}.float_layers") for x in get({"float_layers": [], **g}, "float_layers", list)),
        )
        for name, g in graphs.items()
    }


def head_from_json(data: dict[str, Any]) -> Head:
    words, sides = data.get("words"), get(data, "grey", dict, "head")
    head = Head(
        kind=_one_of(HEADS, get(data, "kind", str, "head"), "head.kind"),
        words=None
        if words is None
        else Words(
            length=between(get(words, "length", int, "head.words"), 1, 1 << 16, "head.words.length"),
            pad_id=between(get(words, "pad_id", int, "head.words"), 0, 1 << 31, "head.words.pad_id"),
        ),
        grey={name: between(of_type(side, int, f"head.grey.{name}"), 8, 4096, f"head.grey.{name}") for name, side in sides.items()},
        clip=get({"clip": True, **data}, "clip", bool, "head"),
        details=between(get({"details": 0, **data}, "details", int, "head"), 0, 1 << 16, "head.details"),
    )
    if head.kind == "lite" and head != Head("lite", details=head.details):
        raise ValueError("a lite head sees what the towers give alone, and its words, grey or clip say otherwise")
    if head.kind != "lite" and head.details:
        raise ValueError(f"head.details is not 0, and a head of kind {head.kind} sees none")
    if head.kind != "lite" and head.words is None:
        raise ValueError(f"head.words is missing, which a head of kind {head.kind} needs")
    return head


def engine_from_json(data: Any, where: str, graphs: Mapping[str, Graph]) -> Engine:
    plugin = data.get("plugin_sha256") if isinstance(data, dict) else None
    profile = [between(of_type(x, int, f"{where}.profile"), 1, 1 << 16, f"{where}.profile") for x in get(data, "profile", list, where)]
    if len(profile) != 3 or sorted(profile) != profile:
        raise ValueError(f"{where}.profile is not [least, usual, largest] batch")
    capabilities = tuple(of_type(x, str, f"{where}.compute_capabilities") for x in get(data, "compute_capabilities", list, where))
    if not capabilities or not all(re.fullmatch(r"[0-9]+\.[0-9]", x) for x in capabilities):
        raise ValueError(f'{where}.compute_capabilities is not a list of numbers like "8.9"')
    return Engine(
        graph=_one_of(tuple(graphs), get(data, "graph", str, where), f"{where}.graph"),
        file=check_name(get(data, "file", str, where)),
        backend=_one_of(tuple(filter(None, targets().values())), get(data, "backend", str, where), f"{where}.backend"),
        version=get(data, "version", str, where),
        compute_capabilities=capabilities,
        platform=get(data, "platform", str, where),
        onnx_sha256=_sha256(get(data, "onnx_sha256", str, where), f"{where}.onnx_sha256"),
        profile=(profile[0], profile[1], profile[2]),
        plugin_sha256=None if plugin is None else _sha256(of_type(plugin, str, f"{where}.plugin_sha256"), f"{where}.plugin_sha256"),
    )


def kind_from_json(data: Any, where: str, answers: int) -> Kind:
    reason, majority, note = (data.get(key) if isinstance(data, dict) else None for key in ("reason", "majority", "note"))
    kind = Kind(
        name=get(data, "name", str, where),
        answers=tuple(of_type(x, int, f"{where}.answers") for x in get(data, "answers", list, where)),
        temperature=within(get(data, "temperature", float, where), 1e-3, 1e3, f"{where}.temperature"),
        threshold=within(get(data, "threshold", float, where), 0, 1, f"{where}.threshold"),
        reason=None if reason is None else of_type(reason, str, f"{where}.reason"),
        majority=None if majority is None else of_type(majority, int, f"{where}.majority"),
        note=None if note is None else of_type(note, str, f"{where}.note"),
        independent=get(data, "independent", bool, where) if "independent" in data else False,
    )
    for index in [*kind.answers, *([] if kind.majority is None else [kind.majority])]:
        between(index, 0, answers - 1, f"{where}: an answer's index")
    if kind.reason is None and not kind.answers:
        raise ValueError(f"{where} has neither answers nor a reason to give none")
    return kind


def abstention_from_json(data: dict[str, Any]) -> Abstention:
    where = "abstention"
    curve = [[_share(x, f"{where}.curve") for x in of_type(point, list, f"{where}.curve")] for point in get(data, "curve", list, where)]
    if any(len(point) != 2 for point in curve):
        raise ValueError(f"{where}.curve is not a list of [coverage, accuracy]")
    return Abstention(
        kind_threshold=_share(get(data, "kind_threshold", float, where), f"{where}.kind_threshold"),
        radiograph_threshold=_logit(get(data, "radiograph_threshold", float, where), f"{where}.radiograph_threshold"),
        curve=tuple((coverage, accuracy) for coverage, accuracy in curve),
    )


def findings_from_json(data: Any) -> Findings:
    rows = get(data, "findings", list, "findings")
    findings = Findings(
        preprocess=preprocess_from_json(get(data, "preprocess", dict, "findings"), "findings.preprocess"),
        regions=tuple(of_type(x, str, "findings.regions") for x in get(data, "regions", list, "findings")),
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
    strata = tuple(_stratum(row, f"{where}.strata[{i}]") for i, row in enumerate(get(data, "strata", list, where)))
    return Finding(get(data, "name", str, where), strata, None if hits is None else _share(hits, f"{where}.map_hits"))


def probe_from_json(data: Any, where: str) -> Probe:
    probe = Probe(
        _finding(get(data, "finding", dict, where), f"{where}.finding"),
        tuple(of_type(x, str, f"{where}.asked") for x in get(data, "asked", list, where)),
    )
    for i, stratum in enumerate(probe.finding.strata):
        _one_of(tuple(FAMILIES), stratum.family, f"{where}.finding.strata[{i}].family")
        _one_of(tuple(REGIONS), stratum.region, f"{where}.finding.strata[{i}].region")
    return probe


def _stratum(data: Any, where: str) -> Stratum:
    reason = data.get("reason") if isinstance(data, dict) else None
    interval = [_share(x, f"{where}.auroc_ci95") for x in get(data, "auroc_ci95", list, where)]
    counts = {key: [of_type(x, int, f"{where}.{key}") for x in get(data, key, list, where)] for key in ("yes", "no")}
    stratum = Stratum(
        family=get(data, "family", str, where),
        region=get(data, "region", str, where),
        n=get(data, "n", int, where),
        positives=get(data, "positives", int, where),
        auroc=_share(get(data, "auroc", float, where), f"{where}.auroc"),
        auroc_ci95=(interval[0], interval[-1]) if len(interval) == 2 else (1.0, 0.0),
        threshold=_logit(get(data, "threshold", float, where), f"{where}.threshold"),
        yes=(counts["yes"][0], counts["yes"][-1]) if len(counts["yes"]) == 2 else (1, 0),
        no=(counts["no"][0], counts["no"][-1]) if len(counts["no"]) == 2 else (1, 0),
        slope=within(get(data, "slope", float, where), 1e-6, 1e6, f"{where}.slope"),
        intercept=_logit(get(data, "intercept", float, where), f"{where}.intercept"),
        children=get({"children": False, **data}, "children", bool, where),
        reason=None if reason is None else of_type(reason, str, f"{where}.reason"),
    )
    (right_yes, yes), (right_no, no) = stratum.yes, stratum.no
    counted = 0 <= right_yes <= yes and 0 <= right_no <= no and yes + no == stratum.n and right_yes + no - right_no == stratum.positives
    if not counted or not 0 < stratum.positives < stratum.n or not stratum.auroc_ci95[0] <= stratum.auroc <= stratum.auroc_ci95[1]:
        raise ValueError(f"{where}: its counts or its interval contradict each other")
    return stratum


def within(value: float, low: float, high: float, where: str) -> float:
    if not low <= value <= high:  # a comparison with NaN is false, so NaN is refused
        raise ValueError(f"{where} is not between {low:g} and {high:g}")
    return value


def _share(value: Any, where: str) -> float:
    return within(of_type(value, float, where), 0, 1, where)


def _logit(value: float, where: str) -> float:
    """One that says never or always is not further from 0 than this; no graph's logit is."""
    return within(value, -1e3, 1e3, where)


def file_from_json(name: str, data: Any) -> File:
    check_name(name)
    sha256 = _sha256(get(data, "sha256", str, f"files.{name}"), f"files.{name}.sha256")
    return File(sha256, between(get(data, "bytes", int, f"files.{name}"), 0, 1 << 50, f"files.{name}.bytes"))
