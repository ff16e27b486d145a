"""The compiled kernels, launched beside an engine: TensorRT-RTX takes no plugin into its networks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pmclip_deploy.kernels.manifest import ALIGNED, Kernel, chosen, code, kernels_from_manifest
from pmclip_deploy.kernels.plan import Plan, plan_for

BANKS = {"float32": "f32", "float16": "f16", "int8": "i8"}
PROGRAMS = 4  # for each multiprocessor: what registers and shared memory let it hold


class Array(NamedTuple):
    """A C-contiguous array in the GPU's memory."""

    address: int
    shape: tuple[int, ...]
    dtype: str


class Launch(NamedTuple):
    kernel: Kernel
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]  # addresses are int, counts np.int32: cuda.core passes 8 bytes and 4


@dataclass(frozen=True)
class Call:
    """What one call launches, as far as that is known before there is room for what lies between the two kernels."""

    plan: Plan
    slices: Kernel
    merge: Kernel
    values: Mapping[str, Any]

    @classmethod
    def of(cls, arrays: Mapping[str, Array], kernels: Sequence[Kernel], capability: int, multiprocessors: int) -> "Call":
        """``arrays`` by the names of the kernels' arguments, "scales" if there are any. Raises ValueError for what does not fit."""
        (images, width), (rows, _), (_, k) = (arrays[name].shape for name in ("image", "bank", "score"))
        wanted = {"image": ((images, width), "float32"), "bank": ((rows, width), arrays["bank"].dtype), "scales": ((rows,), "float32")}
        wanted |= {"score": ((images, k), "float32"), "index": ((images, k), "int64"), "log_sum_exp": ((images,), "float32")}
        for name, array in arrays.items():
            shape, dtype = wanted.get(name, ((1,) if array.shape == (1,) else (), "float32"))  # logit_scale
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{name} is {array.shape} {array.dtype}, and should be {shape} {dtype}")
        if arrays["bank"].dtype not in BANKS or not k or max(images, rows, width) >= 2**31 - 4096:  # room to round up
            raise ValueError(f"a bank of {rows} x {width} {arrays['bank'].dtype}, k {k}: it should be of {', '.join(BANKS)}, k at least 1")
        aligned = width % ALIGNED == 0 and all(arrays[name].address % 16 == 0 for name in ("image", "bank"))
        bank, scaled = BANKS[arrays["bank"].dtype], "scales" in arrays
        slices = chosen(kernels, "similarity_slices", capability, k, bank, scaled, aligned)
        merge = chosen((kernel for kernel in kernels if kernel.size == slices.size), "similarity_merge", capability, k)
        plan = plan_for(images, rows, slices.size, slices.tile, PROGRAMS * multiprocessors)
        counts = {"images": images, "rows": rows, "width": width, "slices": plan.slices, "k": k}
        values = {name: array.address for name, array in arrays.items()} | {name: np.int32(count) for name, count in counts.items()}
        return cls(plan, slices, merge, values)

    def launches(self, keys: int, sums: int) -> tuple[Launch, Launch]:
        """``keys`` and ``sums`` are addresses of room for plan.keys and plan.sums."""
        values = {**self.values, "keys": keys, "sums": sums}
        first, second = (tuple(values[argument.partition(":")[0]] for argument in kernel.arguments) for kernel in (self.slices, self.merge))
        return Launch(self.slices, self.plan.grid, first), Launch(self.merge, self.plan.merge_grid, second)


class CudaSimilarity:
    """The kernels of a folder on one GPU. Not run anywhere yet: docs/reference/gpu-kernel.md says what is tested."""

    def __init__(self, folder: Path, device: Any = None) -> None:
        from cuda import core

        self._core, self._folder, self._kernels = core, folder, kernels_from_manifest(folder)
        self._gpu = device or core.Device(0)
        self._gpu.set_current()
        major, minor = self._gpu.compute_capability
        self._capability = 10 * major + minor
        self._loaded = lru_cache(None)(self._load)

    def __call__(
        self, image: Any, bank: Any, logit_scale: Any, score: Any, index: Any, log_sum_exp: Any, stream: Any, scales: Any = None
    ) -> None:
        """Enqueues the reference's results into ``score``, ``index`` and ``log_sum_exp``; their shapes say what B and k are.

        Arrays are C-contiguous, on the GPU, with DLPack or ``__cuda_array_interface__``; a stream is cuda.core's or has ``__cuda_stream__``
        """
        stream = stream if hasattr(stream, "handle") else self._gpu.create_stream(stream)
        given = {"image": image, "bank": bank, "logit_scale": logit_scale, "score": score, "index": index, "log_sum_exp": log_sum_exp}
        given |= {} if scales is None else {"scales": scales}
        views = {name: self._core.utils.StridedMemoryView(one, stream_ptr=int(stream.handle)) for name, one in given.items()}
        arrays = {name: array_from_view(name, view) for name, view in views.items()}
        call = Call.of(arrays, self._kernels, self._capability, self._gpu.properties.multiprocessor_count)
        if not arrays["image"].shape[0]:
            return
        room = (8 * int(np.prod(call.plan.keys)), 4 * int(np.prod(call.plan.sums)))
        keys, sums = (self._gpu.allocate(size, stream=stream) for size in room)
        for kernel, grid, arguments in call.launches(int(keys.handle), int(sums.handle)):
            config = self._core.LaunchConfig(grid=grid, block=kernel.threads, shmem_size=kernel.shared)
            self._core.launch(stream, config, self._loaded(kernel), *arguments)
        keys.close(stream)  # once the kernels are through
        sums.close(stream)

    def _load(self, kernel: Kernel) -> Any:
        if kernel.capability == self._capability:
            return self._core.ObjectCode.from_cubin(code(self._folder, kernel, "cubin")).get_kernel(kernel.entry)
        return self._core.ObjectCode.from_ptx(code(self._folder, kernel, "ptx")).get_kernel(kernel.entry)


def array_from_view(name: str, view: Any) -> Array:
    """``view`` has ptr, shape, dtype, strides in elements (None where contiguous), as cuda.core's StridedMemoryView."""
    shape = tuple(view.shape)
    strides = tuple(int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape)))
    if view.strides is not None and any(n > 1 and a != b for n, a, b in zip(shape, view.strides, strides, strict=True)):
        raise ValueError(f"{name} must be C-contiguous, not of strides {view.strides}")
    return Array(int(view.ptr), shape, str(view.dtype))
