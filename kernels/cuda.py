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
ALIGNMENT = 16  # bytes: what a thread reads at once begins at a multiple of them
PREPARED = 256  # combinations of shapes, types and alignments that a CudaSimilarity keeps its launches of
PROGRAMS = 4  # for each multiprocessor: what registers and shared memory let it hold


class Array(NamedTuple):
    """A C-contiguous array in the GPU's memory."""

    address: int
    shape: tuple[int, ...]
    dtype: str


class Launch(NamedTuple):
    """One kernel of a call. The addresses of its arrays are not known yet: a string among the arguments is the name of one."""

    kernel: Kernel
    grid: tuple[int, int, int]
    arguments: tuple[str | np.int32, ...]

    def given(self, addresses: Mapping[str, int]) -> tuple[int | np.int32, ...]:
        """cuda.core passes 8 bytes of an int and 4 of a count."""
        return tuple(addresses[one] if isinstance(one, str) else one for one in self.arguments)


@dataclass(frozen=True)
class Call:
    """What is launched for arrays of these shapes, types and alignments, wherever they are."""

    plan: Plan
    launches: tuple[Launch, ...]

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
        aligned = width % ALIGNED == 0 and all(arrays[name].address % ALIGNMENT == 0 for name in ("image", "bank"))
        bank, scaled = BANKS[arrays["bank"].dtype], "scales" in arrays
        slices = chosen(kernels, "similarity_slices", capability, k, bank, scaled, aligned, images)
        plan = plan_for(images, rows, slices.size, slices.tile, PROGRAMS * multiprocessors)
        same = [kernel for kernel in kernels if kernel.size == slices.size]
        counts = {"images": images, "rows": rows, "width": width, "step": plan.step, "slices": plan.slices, "k": k}
        launches = list[Launch]()
        for entry, grid in plan.grids.items():
            kernel = slices if entry == slices.entry else chosen(same, entry, capability, k)
            renamed: dict[str, str | np.int32] = {name: np.int32(count) for name, count in counts.items()}
            if plan.folded and entry == "similarity_merge":
                renamed |= {"keys": "folded_keys", "sums": "folded_sums", "slices": np.int32(plan.folded)}
            names = (argument.partition(":")[0] for argument in kernel.arguments)
            launches.append(Launch(kernel, grid, tuple(renamed.get(name, name) for name in names)))
        return cls(plan, tuple(launches))


class CudaSimilarity:
    """The kernels of a folder on one GPU. Not run anywhere yet: docs/reference/gpu-kernel.md says what is tested."""

    def __init__(self, folder: Path, device: Any = None) -> None:
        """``device`` is a cuda.core Device. The default is the one that is current in this thread, or the first."""
        from cuda import core

        self._core, self._folder, self._kernels = core, folder, kernels_from_manifest(folder)
        self._gpu = device or core.Device()
        self._gpu.set_current()
        major, minor = self._gpu.compute_capability
        self._capability, self._multiprocessors = 10 * major + minor, self._gpu.properties.multiprocessor_count
        self._loaded, self._prepared = lru_cache(None)(self._load), lru_cache(PREPARED)(self._prepare)

    def array(self, name: str, given: Any, stream: Any) -> Array:
        """An array that ``__call__`` takes without looking at it again; for a bank, say.

        ``stream`` waits here, once, for what the array's own stream writes. The caller keeps the memory as it is. Raises ValueError.
        """
        view = self._core.utils.StridedMemoryView(given, stream_ptr=int(self._stream(stream).handle))
        if view.device_id != self._gpu.device_id:
            raise ValueError(f"{name} is on device {view.device_id}, and the kernels are on device {self._gpu.device_id}")
        return array_from_view(name, view)

    def __call__(
        self, image: Any, bank: Any, logit_scale: Any, score: Any, index: Any, log_sum_exp: Any, stream: Any, scales: Any = None
    ) -> None:
        """Enqueues the reference's results into ``score``, ``index`` and ``log_sum_exp``; their shapes say what B and k are.

        Arrays are C-contiguous, on the GPU, with DLPack or ``__cuda_array_interface__``, or come from ``array``; a stream is cuda.core's
        or has ``__cuda_stream__``. The first call of a shape loads kernels, so it cannot be captured in a CUDA graph. Later calls can.
        """
        self._gpu.set_current()
        stream = self._stream(stream)
        given = {"image": image, "bank": bank, "logit_scale": logit_scale, "score": score, "index": index, "log_sum_exp": log_sum_exp}
        given |= {} if scales is None else {"scales": scales}
        arrays = {name: one if isinstance(one, Array) else self.array(name, one, stream) for name, one in given.items()}
        if not arrays["image"].shape[0]:
            return
        call, launches = self._prepared(*((name, Array(at % ALIGNMENT, shape, dtype)) for name, (at, shape, dtype) in arrays.items()))
        room = self._gpu.allocate(call.plan.room, stream=stream)
        try:
            addresses = {name: array.address for name, array in arrays.items()} | call.plan.places(int(room.handle))
            for launch, config, kernel in launches:
                self._core.launch(stream, config, kernel, *launch.given(addresses))
        finally:
            room.close(stream)  # once the kernels are through

    def _prepare(self, *arrays: tuple[str, Array]) -> tuple[Call, list[tuple[Launch, Any, Any]]]:
        """What calls with such arrays share; their addresses are less what is a multiple of ALIGNMENT."""
        call, config = Call.of(dict(arrays), self._kernels, self._capability, self._multiprocessors), self._core.LaunchConfig
        return call, [
            (launch, config(grid=launch.grid, block=launch.kernel.threads, shmem_size=launch.kernel.shared), self._loaded(launch.kernel))
            for launch in call.launches
        ]

    def _stream(self, stream: Any) -> Any:
        return stream if hasattr(stream, "handle") else self._gpu.create_stream(stream)

    def _load(self, kernel: Kernel) -> Any:
        if kernel.capability == self._capability:
            return self._core.ObjectCode.from_cubin(code(self._folder, kernel, "cubin")).get_kernel(kernel.entry)
        return self._core.ObjectCode.from_ptx(code(self._folder, kernel, "ptx")).get_kernel(kernel.entry)


def array_from_view(name: str, view: Any) -> Array:
    """``view`` has ptr, shape, dtype, strides in elements (None where contiguous), as cuda.core's StridedMemoryView."""
    shape, step = tuple(view.shape), 1
    for n, stride in zip(reversed(shape), reversed(view.strides or ()), strict=False):
        if n > 1 and stride != step:
            raise ValueError(f"{name} must be C-contiguous, not of strides {view.strides}")
        step *= n
    return Array(int(view.ptr), shape, _type_name(view.dtype))


@lru_cache
def _type_name(dtype: Any) -> str:
    """NumPy makes it anew each time."""
    return str(dtype)
