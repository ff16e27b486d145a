"""Stage "towers" of `benchmarks.gpu`: how long PyTorch takes for a backbone's towers in each precision, and how near fp32 it stays.

Weights are random. TensorRT has no part in it: engines are measured by `pmclip-deploy bench`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pmclip_deploy.benchmarks.gpu_stage import Figures, Stage
from pmclip_deploy.benchmarks.peers import LITE, MODELS

IMAGES, TEXTS, LENGTHS = (1, 8, 64, 256), (1, 64), (12, 77)
COMPILED = 64  # the batch that torch.compile is tried with, beside 1
SECONDS = 0.15  # of calls that one figure is of


@dataclass(frozen=True)
class Variant:
    """One way to run a tower."""

    title: str
    dtype: str = "float32"
    tf32: bool = False
    channels_last: bool = False
    graph: bool = False
    compiled: bool = False
    fp8: bool = False


FP32 = Variant("torch f32")
VARIANTS = (
    FP32,
    Variant("torch TF32", tf32=True),
    Variant("torch f16", "float16"),
    Variant("torch bf16", "bfloat16"),
    Variant("torch f16, channels last", "float16", channels_last=True),
    Variant("torch f32, CUDA graph", graph=True),
    Variant("torch f16, CUDA graph", "float16", graph=True),
    Variant("torch.compile f16", "float16", compiled=True),
    Variant("torch.compile, torchao fp8", "bfloat16", compiled=True, fp8=True),
)


def measure(stage: Stage) -> None:
    import torch

    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32, but in the variant that says otherwise
    every = [Models(stage, name) for name in ((LITE,) if stage.is_rehearsal else MODELS)]
    for compiled in (False, True):  # those that take many seconds to compile come last
        for models in every:
            for part, encode, make in inputs(stage, models):
                wanted = Wanted(models, encode, make)
                for variant in VARIANTS:
                    if variant.compiled == compiled and fits(variant, part):
                        stage.measure(part, variant.title, partial(figures, stage, models, variant, encode, wanted), model=models.name)


def backbone_of(stage: Stage, name: str) -> Any:
    """In a rehearsal pmclip-lite with small pictures and one layer for texts."""
    from pmclip_deploy.train.backbones import BACKBONES

    backbone: Any = BACKBONES[name]
    return replace(backbone, preprocess=replace(backbone.preprocess, size=64), text_layers=1) if stage.is_rehearsal else backbone


class Models:
    """A backbone's towers with random weights, of each dtype that was asked for."""

    def __init__(self, stage: Stage, name: str) -> None:
        self.stage, self.name = stage, name
        self.made: dict[tuple[str, bool], Any] = {}

    @property
    def backbone(self) -> Any:
        return backbone_of(self.stage, self.name)

    def of(self, dtype: str, channels_last: bool = False) -> Any:
        import torch

        if (dtype, channels_last) not in self.made:
            if dtype == FP32.dtype and not channels_last:
                torch.manual_seed(0)
                model = self.backbone.build().eval().to(self.stage.device)
            else:
                model = deepcopy(self.of(FP32.dtype)).to(getattr(torch, dtype))
                if channels_last:
                    model.visual.to(memory_format=torch.channels_last)
            self.made[dtype, channels_last] = model
        return self.made[dtype, channels_last]


Make = Callable[[], Any]


def inputs(stage: Stage, models: Models) -> Iterator[tuple[str, str, Make]]:
    """(part, method of the towers, what makes its input)."""
    for batch in (1,) if stage.is_rehearsal else IMAGES:
        yield f"image, B {batch}", "encode_image", partial(pixels, models, batch)
    for batch in (1,) if stage.is_rehearsal else TEXTS:
        for length in (min(of, models.backbone.context_length) for of in (LENGTHS[:1] if stage.is_rehearsal else LENGTHS)):
            yield f"text, B {batch}, {length} tokens", "encode_text", partial(tokens, models, batch, length)


def pixels(models: Models, batch: int) -> Any:
    import torch

    size = models.backbone.preprocess.size
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch)).to(models.stage.device)


def tokens(models: Models, batch: int, length: int) -> Any:
    """The largest is the last, as an end mark is."""
    import torch

    drawn = torch.randint(1000, 30_000, (batch, length), generator=torch.Generator().manual_seed(batch))
    drawn[:, -1] = 30_001
    return drawn.to(models.stage.device)


class Wanted:
    """An input, and what fp32 makes of it."""

    def __init__(self, models: Models, encode: str, make: Make) -> None:
        self.models, self.encode, self.make = models, encode, make
        self.made: tuple[Any, Any] | None = None

    def __call__(self) -> tuple[Any, Any]:
        import torch

        if self.made is None:
            given = self.make()
            with torch.inference_mode():
                self.made = given, getattr(self.models.of(FP32.dtype), self.encode)(given).float()
        return self.made


def fits(variant: Variant, part: str) -> bool:
    """Compilers are tried on pictures alone, and with two batches: each takes seconds."""
    if variant.compiled:
        return part in ("image, B 1", f"image, B {COMPILED}")
    return part.startswith("image") or not variant.channels_last


def figures(stage: Stage, models: Models, variant: Variant, encode: str, wanted: Wanted) -> Figures:
    import torch
    from torch.nn import functional as F

    given, fp32 = wanted()
    call = partial(prepared(stage, models, variant, encode, given), given)
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = variant.tf32
        with torch.inference_mode():
            cosine = float(F.cosine_similarity(call().float(), fp32).min())
            found = stage.timed(call, SECONDS)
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed
    return {**found, "samples_per_s": 1e3 * len(given) / found["p50_ms"], "cosine": cosine}


def prepared(stage: Stage, models: Models, variant: Variant, encode: str, given: Any) -> Callable[[Any], Any]:
    """The tower as a function of an input like ``given``."""
    import torch

    if variant.compiled or variant.graph:
        stage.need_gpu()
    model = models.of(variant.dtype, variant.channels_last)
    if variant.fp8:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, quantize_

        model = deepcopy(model)
        quantize_(model.visual, Float8DynamicActivationFloat8WeightConfig())
    run = torch.compile(getattr(model, encode), mode="reduce-overhead") if variant.compiled else getattr(model, encode)

    def tower(x: Any) -> Any:
        x = x.to(getattr(torch, variant.dtype)) if x.is_floating_point() else x
        return run(x.contiguous(memory_format=torch.channels_last) if variant.channels_last else x)

    return captured(tower, given) if variant.graph else tower


def captured(tower: Callable[[Any], Any], given: Any) -> Callable[[Any], Any]:
    import torch

    with torch.inference_mode():
        tower(given)  # what is lazy is done before the capture
        torch.cuda.synchronize()
        graph, place = torch.cuda.CUDAGraph(), given.clone()
        with torch.cuda.graph(graph):
            out = tower(place)

    def replay(x: Any) -> Any:
        place.copy_(x)
        graph.replay()
        return out

    return replay
