"""What quantisation must know of real data, measured once on the fp32 graphs and kept as calibration.json.gz, for any target and method."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from pmclip_deploy.export.weights import layers_of
from pmclip_deploy.sessions.onnxruntime import import_onnxruntime

SCHEMA = "pmclip-deploy/calibration/2"
TAIL = 1e-4  # of one input's values lies outside the percentile's range, on either side
SAMPLE = 100_000  # values of one tensor that a percentile is taken of
KEPT = 1024  # values of one tensor and input that the other methods are given
CONNECTORS = {"Add": 2, "AveragePool": 1, "GlobalAveragePool": 1, "Resize": 1}  # between convolutions, and how many inputs are activations

Floats = NDArray[np.float32]
Feeds = Iterable[Mapping[str, NDArray[Any]]]


@dataclass(frozen=True)
class Measured:
    """Of one tensor."""

    ranges: Mapping[str, tuple[float, float]]  # by method: least and largest value that is represented; "max" alone where no layer reads it
    means: list[float] = field(default_factory=list)  # of each channel, where a layer reads the tensor
    largest: list[float] = field(default_factory=list)  # absolute value of each channel, where a matrix reads it


@dataclass(frozen=True)
class Calibration:
    checkpoint: str  # sha256 of the weights it was made from, as a model.safetensors without those of the findings, or of them alone
    images: Mapping[str, str]  # name to sha256
    questions: int  # how many the text tower read
    tensors: Mapping[str, Mapping[str, Measured]]  # graph to tensor
    kept: Mapping[str, list[str]] = field(default_factory=dict)  # target to GRAPH/LAYER that stayed in float when its gates passed
    findings: "Calibration | None" = None  # of the graph "findings", which has weights and images of its own

    @property
    def of_graphs(self) -> Mapping[str, Mapping[str, Measured]]:
        """The tensors of every graph."""
        return {**self.tensors, **({} if self.findings is None else self.findings.of_graphs)}

    def keeping(self, target: str, layers: Sequence[str]) -> "Calibration":
        """With ``layers`` as what stays in float on ``target``, and nothing said of other targets."""
        mine = sorted(layer for layer in layers if layer.partition("/")[0] in self.tensors)
        return replace(self, kept={target: mine}, findings=self.findings and self.findings.keeping(target, layers))

    def joined(self, before: "Calibration | None", findings: "Calibration | None" = None) -> "Calibration":
        """With what the tables ``before`` kept on other targets, where they measured the same."""
        others = before.kept if before is not None and before.tensors == self.tensors else {}
        return replace(self, kept={**others, **self.kept}, findings=self.findings and self.findings.joined(findings))

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        if self.findings is None:
            del data["findings"]
        else:
            data["findings"] = self.findings.to_json()
        return {"schema": SCHEMA, **data}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Calibration":
        """Raises ValueError, KeyError, TypeError or AttributeError where ``data`` is none."""
        if data["schema"] != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA}")
        tensors = {
            graph: {
                name: Measured(
                    {method: (float(low), float(high)) for method, (low, high) in t["ranges"].items()},
                    [float(x) for x in t["means"]],
                    [float(x) for x in t["largest"]],
                )
                for name, t in of.items()
            }
            for graph, of in data["tensors"].items()
        }
        kept = {str(target): [str(layer) for layer in layers] for target, layers in data["kept"].items()}
        findings = cls.from_json(data["findings"]) if "findings" in data else None
        return cls(str(data["checkpoint"]), dict(data["images"]), int(data["questions"]), tensors, kept, findings)


def measured_from_feeds(model: onnx.ModelProto, feeds: Feeds) -> dict[str, Measured]:
    """Of every float tensor the whole range, and of what a layer or a connector reads all else; each feed is a batch of one."""
    layers = set(layers_of(model))
    product = {n.input[0]: n.op_type for n in model.graph.node if n.output[0] in layers}
    read = {*product, *(x for n in model.graph.node for x in n.input[: CONNECTORS.get(n.op_type, 0)])}
    typed = [*onnx.shape_inference.infer_shapes(model).graph.value_info, *model.graph.input]
    floats = sorted({v.name for v in typed if v.type.tensor_type.elem_type == TensorProto.FLOAT})

    ends = {name: np.zeros(2) for name in floats}  # zero is in every range: padding must be exact
    tails = {name: np.zeros(2) for name in floats if name in read}
    samples: dict[str, list[Floats]] = {name: [] for name in tails}
    sums: dict[str, NDArray[np.float64]] = {}
    largest: dict[str, Floats] = {}
    count = 0
    for values in _values(model, floats, feeds):
        count += 1
        for name, value in values.items():
            flat = value.ravel()
            ends[name] = np.array([min(ends[name][0], flat.min()), max(ends[name][1], flat.max())])
            if name not in tails:
                continue
            low, high = np.quantile(flat[:: max(1, flat.size // SAMPLE)], [TAIL, 1 - TAIL])
            tails[name] = np.array([min(tails[name][0], low), max(tails[name][1], high)])
            samples[name].append(flat[:: max(1, flat.size // KEPT)].copy())
            if name in product:
                others = (0, 2, 3) if product[name] == "Conv" else tuple(range(value.ndim - 1))
                sums[name] = sums.get(name, 0) + value.mean(others, dtype=np.float64)
                if product[name] == "MatMul":
                    largest[name] = np.maximum(largest.get(name, np.float32(0)), np.abs(value).max(others))
    out = {}
    for name in floats:
        ranges: dict[str, Sequence[float] | NDArray[np.float64]] = {"max": ends[name]}
        if name in tails:
            sample = np.concatenate(samples[name])
            ranges |= {"percentile": tails[name], "entropy": entropy_range(sample, ends[name]), "mse": mse_range(sample, ends[name])}
        short = {method: (_short(low), _short(high)) for method, (low, high) in ranges.items()}
        out[name] = Measured(short, [_short(x / count) for x in sums.get(name, [])], [_short(x) for x in largest.get(name, [])])
    return out


def histograms_from_feeds(model: onnx.ModelProto, names: Sequence[str], feeds: Feeds) -> dict[str, tuple[list[int], list[float]]]:
    """Of each tensor (counts, edges), 64 bins over all its values."""
    every = list(_values(model, names, feeds))
    out = {}
    for name in names:
        flat = np.concatenate([values[name].ravel() for values in every])
        counts, edges = np.histogram(flat[np.isfinite(flat)], 64)
        out[name] = counts.tolist(), edges.tolist()
    return out


def _values(model: onnx.ModelProto, names: Sequence[str], feeds: Feeds) -> Iterator[dict[str, Floats]]:
    """Of each feed the tensors of that name, inputs too."""
    probe, given = onnx.ModelProto(), {x.name for x in model.graph.input}
    probe.CopyFrom(model)
    inner = [name for name in names if name not in given]
    probe.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inner)
    session = import_onnxruntime().InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    for feed in feeds:
        values = dict(zip(inner, session.run(inner, dict(feed)), strict=True))
        yield {name: values[name] if name in values else feed[name] for name in names}


def entropy_range(sample: Floats, ends: NDArray[np.float64]) -> tuple[float, float]:
    """The clip of |x| under which 128 levels lose the least information, by the divergence of Kullback and Leibler (Migacz 2017)."""
    counts, edges = np.histogram(np.abs(sample), 2048)
    best, bound = np.inf, float(edges[-1])
    for size in range(128, len(counts) + 1, 16):
        clipped = counts[:size].astype(np.float64)
        clipped[-1] += counts[size:].sum()
        level = np.arange(size) * 128 // size
        filled = counts[:size] > 0
        shared = np.bincount(level, counts[:size], 128) / np.maximum(np.bincount(level, filled, 128), 1)
        p, q = clipped / clipped.sum(), np.where(filled, shared[level], 0)
        q = np.maximum(q / max(q.sum(), 1), 1e-9)  # what falls where nothing was before the clip costs, and is not infinite
        lost = float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())
        if lost < best:
            best, bound = lost, float(edges[size])
    return max(float(ends[0]), -bound), min(float(ends[1]), bound)


def mse_range(sample: Floats, ends: NDArray[np.float64]) -> tuple[float, float]:
    """The part of the whole range, in steps of 2.5%, whose 256 levels have the least mean squared error."""

    def error(part: float) -> float:
        low, high = ends * part
        step = max(high - low, 1e-12) / 255
        return float(np.square(np.clip(np.round((sample - low) / step), 0, 255) * step + low - sample).mean())

    part = min(np.linspace(1, 0.2, 33), key=error)
    return float(ends[0] * part), float(ends[1] * part)


def _short(x: float) -> float:
    """Six digits: what calibration.json.gz holds is what is used."""
    return float(f"{float(x):.6g}")
