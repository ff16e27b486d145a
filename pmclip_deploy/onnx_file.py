"""What an ONNX file may hold, checked before anything runs it: operators whose work is bounded, and weights in FILE.data alone.

Read from the protobuf itself (onnx.proto; protobuf's "Encoding"), since the runtime has no package onnx: 2 ms for a thousand nodes and
weights. Every occurrence of a field counts, also where protobuf would take the last one or merge them.
"""

from collections.abc import Iterator
from typing import NamedTuple

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
BYTES, VARINT, FIXED = 2, 0, {1: 8, 5: 4}  # wire types, and how long the last are


class Outside(NamedTuple):
    """A weight that lies in FILE.data."""

    name: str
    data_type: int  # of TensorProto.DataType
    dims: tuple[int, ...]
    offset: int
    length: int


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
    """The number of each field, and where its bytes begin and end; of an integer its value and -1.

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
            yield tag >> 3, value, -1
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
