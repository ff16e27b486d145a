"""What an ONNX file may hold, checked before anything runs it: operators whose work is bounded, and weights in FILE.data alone.

Read from the protobuf itself (onnx.proto; protobuf's "Encoding"), since the runtime has no package onnx: 2 ms for a thousand nodes and
weights. Every occurrence of a field counts, also where protobuf would take the last one or merge them.
"""

from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

from pmclip_deploy.errors import BundleError

SIMILARITY = ("ai.pmclip", "ContrastiveSimilarity")  # the one model-local function, of `export --labels`
# What `export` writes, what quantising makes of it, and others of ONNX that end by themselves. Not If, Loop, Scan and SequenceMap: a Loop
# may have no end, and nodes inside nodes would have to be checked too. Not RNN, GRU and LSTM, and no domain of onnxruntime's own.
OPERATORS = frozenset(
    """
    Abs Add And ArgMax ArgMin AveragePool BatchNormalization Cast Ceil Clip Concat Constant ConstantOfShape Conv ConvInteger ConvTranspose
    Cos CumSum DepthToSpace DequantizeLinear Div Dropout DynamicQuantizeLinear Elu Equal Erf Exp Expand Flatten Floor Gather GatherElements
    GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GroupNormalization HardSigmoid HardSwish Identity
    InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization LRN MatMul MatMulInteger
    Max MaxPool Mean Min Mish Mul Neg Not Or Pad Pow PRelu QLinearConv QLinearMatMul QuantizeLinear Reciprocal ReduceL1 ReduceL2
    ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize Round
    ScatterElements ScatterND Selu Shape Sigmoid Sign Sin Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tanh
    Tile TopK Transpose Trilu Unsqueeze Where
    """.split()  # noqa: SIM905
)

# Numbers of fields (onnx.proto).
GRAPH, FUNCTION = 7, 25  # ModelProto
NODE, INITIALIZER, SPARSE_INITIALIZER = 1, 5, 15  # GraphProto
OP_TYPE, ATTRIBUTE, DOMAIN = 4, 5, 7  # NodeProto
IN_ATTRIBUTE = {5: "tensor", 10: "tensor", 6: "graph", 11: "graph", 22: "sparse tensor", 23: "sparse tensor"}  # AttributeProto
FUNCTION_NAME, FUNCTION_NODE, FUNCTION_DOMAIN = 1, 7, 10  # FunctionProto
DIMS, DATA_TYPE, NAME, EXTERNAL_DATA, DATA_LOCATION = 1, 2, 8, 13, 14  # TensorProto
RAW_DATA = 9  # of a TensorProto too
BYTES, VARINT, FIXED = 2, 0, {1: 8, 5: 4}  # wire types, and how long the last are
# numpy's name of each type that a weight outside its graph may have, by the number in TensorProto.DataType. Its end is the type's bytes.
NUMPY = {1: "<f4", 2: "u1", 3: "i1", 4: "<u2", 5: "<i2", 6: "<i4", 7: "<i8", 9: "b1", 10: "<f2", 11: "<f8", 12: "<u4", 13: "<u8"}


class Outside(NamedTuple):
    """A weight that lies in FILE.data."""

    name: str
    data_type: int  # of TensorProto.DataType
    dims: tuple[int, ...]
    offset: int
    length: int


def model_from_file(path: Path, read: Callable[[Path], bytes] = Path.read_bytes) -> tuple[bytes, list[Outside], bytes]:
    """A graph, checked, its weights in FILE.data, and the bytes of FILE.data: all in memory that is this process's alone.

    No library that runs a graph opens a file of it. Such a library would map FILE.data, so that somebody who overwrites the file ends this
    process or changes its answers; and older ones follow a path in the graph to anywhere. Raises BundleError.
    """
    data = path.with_name(f"{path.name}.data")
    try:
        content = read(path)
        outside = weights_outside(content, data.name)
        raw = read(data) if outside else b""
        for weight in outside:
            if weight.data_type not in NUMPY or weight.length != int(NUMPY[weight.data_type][-1]) * prod(weight.dims):
                raise ValueError(f"its weight {weight.name[:60]!r} has another size than its shape")
            if weight.offset + weight.length > len(raw):
                raise ValueError(f"its weight {weight.name[:60]!r} lies beyond the end of {data.name}")
    except FileNotFoundError as error:
        raise BundleError(f"{error.filename}: missing", "copy the bundle again") from None
    except OSError as error:
        raise BundleError(f"{error.filename}: cannot be read ({error.strerror})", "check its permissions") from error
    except ValueError as error:
        raise BundleError(f"{path}: refused, {error}", "export it again with `pmclip-deploy export`") from None
    return content, outside, raw


def with_weights_inside(content: bytes, data_name: str, data: bytes) -> bytes:
    """The same model without FILE.data, for a library that takes a model as one piece. ``model_from_file`` has checked it."""
    parts, place = list[bytes](), 0
    for number, first, last in _fields(content, 0, len(content)):
        after = abs(last)
        parts.append(_field(GRAPH, b"".join(_inside(content, first, last, data_name, data))) if number == GRAPH else content[place:after])
        place = after
    return b"".join(parts)


def _inside(content: bytes, start: int, end: int, data_name: str, data: bytes) -> Iterator[bytes]:
    """The fields of a GraphProto. Of a scalar field that occurs twice the last one counts, so what a weight says of FILE.data may stay."""
    place = start
    for number, first, last in _fields(content, start, end):
        weight = _outside(content, first, last, data_name) if number == INITIALIZER else None
        if weight is None:
            yield content[place : abs(last)]
        else:
            raw = _field(RAW_DATA, data[weight.offset : weight.offset + weight.length])
            yield _field(INITIALIZER, content[first:last] + bytes([DATA_LOCATION << 3 | VARINT, 0]) + raw)
        place = abs(last)


def _field(number: int, content: bytes) -> bytes:
    length, left = bytearray(), len(content)
    while left > 127:
        length.append(left & 127 | 128)
        left >>= 7
    return bytes([number << 3 | BYTES, *length, left]) + content


def weights_outside(content: bytes, data_name: str) -> list[Outside]:
    """Checks a model, and returns its weights that lie in ``data_name``. Raises ValueError, in one line, where it holds something else."""
    outside = list[Outside]()
    try:
        for number, start, end in _fields(content, 0, len(content)):
            if number == GRAPH:
                outside += _of_graph(content, start, end, data_name)
            elif number == FUNCTION:
                _check_function(content, start, end)
    except (IndexError, UnicodeDecodeError):
        raise ValueError("it is cut short or no ONNX file") from None
    return outside


def _of_graph(content: bytes, start: int, end: int, data_name: str) -> Iterator[Outside]:
    for number, first, last in _fields(content, start, end):
        if number == NODE:
            _check_node(content, first, last, (SIMILARITY,))
        elif number == INITIALIZER:
            if (weight := _outside(content, first, last, data_name)) is not None:
                yield weight
        elif number == SPARSE_INITIALIZER:
            raise ValueError("it holds a sparse weight, which no bundle has")


def _check_function(content: bytes, start: int, end: int) -> None:
    """Its nodes call no function: functions that call each other would be a loop, or more nodes than memory holds."""
    names, domains = list[str](), list[str]()
    for number, first, last in _fields(content, start, end):
        if number == FUNCTION_NODE:
            _check_node(content, first, last, ())
        elif number == FUNCTION_NAME:
            names.append(content[first:last].decode())
        elif number == FUNCTION_DOMAIN:
            domains.append(content[first:last].decode())
    if (domains, names) != ([SIMILARITY[0]], [SIMILARITY[1]]):
        raise ValueError(f"it defines the function {'/'.join([*domains, *names])[:60]!r}, which no bundle has")


def _check_node(content: bytes, start: int, end: int, functions: tuple[tuple[str, str], ...]) -> None:
    names, domain = list[str](), ""
    for number, first, last in _fields(content, start, end):
        if number == OP_TYPE:
            names.append(content[first:last].decode())
        elif number == DOMAIN:
            domain += content[first:last].decode()
        elif number == ATTRIBUTE:
            for inner, low, high in _fields(content, first, last):
                if (kind := IN_ATTRIBUTE.get(inner)) == "tensor":
                    if _outside(content, low, high, "") is not None:
                        raise ValueError("a node's own constant lies outside the graph")
                elif kind is not None:
                    raise ValueError(f"a node holds a {kind}, which no bundle has")
    for name in names:
        if (domain, name) not in functions and (domain not in ("", "ai.onnx") or name not in OPERATORS):
            raise ValueError(f"it has the operator {f'{domain}.{name}'.lstrip('.')[:60]!r}, which no bundle has")


def _outside(content: bytes, start: int, end: int, data_name: str) -> Outside | None:
    """A tensor's place in ``data_name``; None where its numbers are inside."""
    name, data_type, dims, where, said = "", 0, list[int](), list[tuple[str, str]](), False
    for number, first, last in _fields(content, start, end):
        if number == DIMS:
            dims += [first] if last < 0 else _packed(content, first, last)
        elif number == DATA_TYPE:
            data_type = first
        elif number == NAME:
            name = content[first:last].decode()
        elif number == EXTERNAL_DATA:
            pair = {of: content[low:high].decode() for of, low, high in _fields(content, first, last)}
            where.append((pair.get(1, ""), pair.get(2, "")))
        elif number == DATA_LOCATION:
            said = said or first != 0
    if not said and not where:
        return None
    places = dict(where)
    if len(places) < len(where) or places.get("location") != data_name or not {"offset", "length"} <= set(places):
        raise ValueError(f"its weight {name[:60]!r} lies in {places.get('location', '')[:60]!r}, not in {data_name!r}")
    offset, length = (int(places[key]) if places[key].isascii() and places[key].isdigit() else -1 for key in ("offset", "length"))
    if not said or min(offset, length) < 0:
        raise ValueError(f"its weight {name[:60]!r} has no usable place in {data_name!r}")
    return Outside(name, data_type, tuple(dims), offset, length)


def _packed(content: bytes, start: int, end: int) -> list[int]:
    found = []
    while start < end:
        value, start = _varint(content, start)
        found.append(value)
    return found


def _varint(content: bytes, place: int) -> tuple[int, int]:
    """-> its value, and where it ends."""
    value = shift = 0
    while (byte := content[place]) & 128:
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if shift > 63:
            raise ValueError("it is no ONNX file")
    return value | byte << shift, place + 1


def _fields(content: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The number of each field, and where its bytes begin and end; of an integer its value, and its end as a negative number.

    Most tags and lengths are one byte long, and calls are most of what this costs.
    """
    while start < end:
        tag, start = (content[start], start + 1) if content[start] < 128 else _varint(content, start)
        kind = tag & 7
        if kind == BYTES:
            length, start = (content[start], start + 1) if content[start] < 128 else _varint(content, start)
            last = start + length
        elif kind == VARINT:
            value, start = (content[start], start + 1) if content[start] < 128 else _varint(content, start)
            if start > end:
                break
            yield tag >> 3, value, -start
            continue
        elif kind in FIXED:
            last = start + FIXED[kind]
        else:
            raise ValueError("it is cut short or no ONNX file")
        if last > end:
            raise ValueError("it is cut short or no ONNX file")
        yield tag >> 3, start, last
        start = last
    if start != end:
        raise ValueError("it is cut short or no ONNX file")
