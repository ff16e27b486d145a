"""manifest.json as frozen data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pmclip_deploy.bundle.checks import (
    abstention_from_json,
    between,
    engine_from_json,
    file_from_json,
    findings_from_json,
    get,
    graphs_from_json,
    head_from_json,
    kind_from_json,
    of_type,
    preprocess_from_json,
    probe_from_json,
    within,
)
from pmclip_deploy.bundle.names import NEEDED_BY
from pmclip_deploy.bundle.types import Abstention, Engine, File, Findings, Graph, Head, Kind, Probe
from pmclip_deploy.console import one_line
from pmclip_deploy.spec import BUNDLE_SCHEMA, Preprocess


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
    logit_bias: float | None = None  # added to the scaled cosines by a sigmoid loss
    head: Head | None = None  # without one a bundle embeds, and answers nothing
    answers: tuple[str, ...] = ()
    kinds: tuple[Kind, ...] = ()
    abstention: Abstention = field(default=Abstention(0.0, 0.0))
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
        schema = get(data, "schema", str)
        if schema != BUNDLE_SCHEMA:
            raise ValueError(f'its schema is "{one_line(schema[:60])}", this version reads "{BUNDLE_SCHEMA}"')
        answers = tuple(of_type(x, str, f"answers[{i}]") for i, x in enumerate(get(data, "answers", list)))
        text, graphs = get(data, "text", dict), graphs_from_json(get(data, "graphs", dict))
        head = data.get("head", {"kind": "lite", "grey": {}} if "head" in graphs else None)
        manifest = cls(
            name=get(data, "name", str),
            version=get(data, "version", str),
            precision=get(data, "precision", str),
            target=get(data, "target", str),
            backbone=get(data, "backbone", str),
            preprocess=preprocess_from_json(get(data, "preprocess", dict), "preprocess"),
            context_length=between(get(text, "context_length", int, "text"), 2, 1 << 16, "text.context_length"),
            pad_id=between(get(text, "pad_id", int, "text"), 0, 1 << 31, "text.pad_id"),
            embed_dim=between(get(data, "embed_dim", int), 1, 1 << 16, "embed_dim"),
            logit_scale=within(get(data, "logit_scale", float), 1e-3, 1e4, "logit_scale"),
            graphs=graphs,
            logit_bias=within(get(data, "logit_bias", float), -1e4, 1e4, "logit_bias") if "logit_bias" in data else None,
            head=None if head is None else head_from_json(of_type(head, dict, "head")),
            answers=answers,
            kinds=tuple(kind_from_json(k, f"kinds[{i}]", len(answers)) for i, k in enumerate(get(data, "kinds", list))),
            abstention=abstention_from_json(get(data, "abstention", dict)),
            findings=findings_from_json(data["findings"]) if data.get("findings") is not None else None,
            probes=tuple(probe_from_json(p, f"probes[{i}]") for i, p in enumerate(get({"probes": [], **data}, "probes", list))),
            engines=tuple(
                engine_from_json(e, f"engines[{i}]", graphs) for i, e in enumerate(get({"engines": [], **data}, "engines", list))
            ),
            labels=tuple(of_type(x, str, f"labels[{i}]") for i, x in enumerate(get({"labels": [], **data}, "labels", list))),
            asked=tuple(of_type(x, str, f"asked[{i}]") for i, x in enumerate(get({"asked": [], **data}, "asked", list))),
            metrics=get(data, "metrics", dict),
            parity=get(data, "parity", dict),
            provenance=get(data, "provenance", dict),
            files={name: file_from_json(name, f) for name, f in get(data, "files", dict).items()} if "files" in data else {},
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
        if self.logit_bias is None:
            del data["logit_bias"]
        for of in (data["preprocess"], data.get("findings", {}).get("preprocess", {})):
            if of.get("interpolation") == "bicubic":  # the default
                del of["interpolation"]
        text = {"context_length": data.pop("context_length"), "pad_id": data.pop("pad_id")}
        first = {key: data.pop(key) for key in ("name", "version", "precision", "target", "backbone", "preprocess")}
        return {"schema": BUNDLE_SCHEMA, **first, "text": text, **data}
