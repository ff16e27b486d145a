"""What a precision is: its name, its parity gate, and the recipes that are tried until one passes. Standard library only."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pmclip_deploy.export.calibration import Calibration
    from pmclip_deploy.export.int8_from_onnx import Graphs

STORED = "fp32, stored as fp16"


@dataclass(frozen=True)
class Recipe:
    """The graphs of a bundle."""

    graphs: "Graphs"
    calibration: "Calibration | None" = None
    kept: tuple[str, ...] = ()  # GRAPH/LAYER that stay above INT8
    precisions: Mapping[str, str] = field(default_factory=dict)


class Work(Protocol):
    """What an export has for its recipes."""

    graphs: "Graphs"  # in fp32

    @property
    def target(self) -> str: ...

    def half(self) -> Recipe:
        """Graphs that compute in fp16, but for what overflows."""

    def int8(self) -> Iterator[Recipe]:
        """INT8 with ever more layers in float, the most harmful first, of the parts that missed their gates."""


@dataclass(frozen=True)
class Precision:
    """Each file beside this one has one as ``PRECISION``; it imports what it computes with inside functions."""

    name: str
    bits: int  # of most weights: precisions with more come first
    gate: Mapping[str, float]  # of each graph's tensors: a least "cosine" or "cosine_mean", a largest "max_abs"
    recipes: Callable[[Work], Iterator[Recipe]]  # the fastest first; the first that passes the gates is taken
    stray: float = 0.5  # the largest relative error of one row or column of a tower (gates.py has what is stricter)
    calibrated: bool = False  # whether it needs pictures to calibrate on
