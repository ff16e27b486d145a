"""Stage "machine" of `benchmarks.gpu`: what the GPU is, and the ceilings that its other figures are measured against."""

from __future__ import annotations

from functools import partial
from typing import Any

from pmclip_deploy.benchmarks.gpu_stage import Figures, Stage

READ = "read memory"  # the part whose best figure is the ceiling of the kernels
COPY_BYTES, PRODUCT = (2 << 30, 1 << 20), (8192, 128)  # on a GPU, in a rehearsal

# Every thread keeps 16 bytes and reads on; nothing is written but where a value comes out that never does.
XOR = r"""
extern "C" __global__ void read(const int4 *p, long long n, int *out) {
    int4 s = make_int4(0, 0, 0, 0);
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x) {
        int4 x = __ldcs(p + i);
        s.x ^= x.x; s.y ^= x.y; s.z ^= x.z; s.w ^= x.w;
    }
    if ((s.x ^ s.y ^ s.z ^ s.w) == 0x5eed5eed) *out = 1;
}
"""


def measure(stage: Stage) -> None:
    import torch

    stage.measure("device", "torch", lambda: device(stage, torch))
    memory(stage, COPY_BYTES[stage.is_rehearsal])
    n = PRODUCT[stage.is_rehearsal]
    for name, dtype, tf32 in (("bf16", torch.bfloat16, False), ("f16", torch.float16, False), ("f32", torch.float32, False),
                              ("TF32", torch.float32, True), ("int8", torch.int8, False)):  # fmt: skip
        stage.measure(f"product of {n} x {n}, {name}", "torch", partial(product, stage, n, dtype, tf32))


def memory(stage: Stage, size: int) -> None:
    import torch

    source = torch.ones(size // 4, dtype=torch.int32, device=stage.device)
    stage.measure(READ, "CuPy, xor of 16 bytes", lambda: rate(stage, read_with_cupy(stage, source), size))
    stage.measure(READ, "torch, largest of float32", lambda: rate(stage, source.view(torch.float32).amax, size))
    target = torch.empty_like(source)
    stage.measure("copy memory, reads and writes", "torch", lambda: rate(stage, lambda: target.copy_(source), 2 * size))


def device(stage: Stage, torch: Any) -> Figures:
    stage.need_gpu()
    of = torch.cuda.get_device_properties(0)
    return {
        "name": of.name,
        "compute_capability": f"{of.major}.{of.minor}",
        "multiprocessors": of.multi_processor_count,
        "l2_mib": getattr(of, "L2_cache_size", 0) / (1 << 20),
        "memory_gib": of.total_memory / (1 << 30),
        "cuda_of_torch": str(torch.version.cuda),
        "torch_stream_has_cuda_stream": hasattr(torch.cuda.Stream(), "__cuda_stream__"),
    }


def read_with_cupy(stage: Stage, source: Any) -> Any:
    stage.need_gpu()
    import cupy
    import torch

    kernel, words = cupy.RawKernel(XOR, "read"), cupy.from_dlpack(source)
    out = cupy.zeros(1, cupy.int32)
    blocks = 32 * torch.cuda.get_device_properties(0).multi_processor_count
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)

    def call() -> None:
        with stream:
            kernel((blocks,), (256,), (words, cupy.int64(words.nbytes // 16), out))

    return call


def rate(stage: Stage, call: Any, size: int) -> Figures:
    figures = stage.timed(call)
    return {**figures, "gb_per_s": size / figures["p50_ms"] / 1e6}


def product(stage: Stage, n: int, dtype: Any, tf32: bool) -> Figures:
    import torch

    if dtype == torch.int8:
        stage.need_gpu()
        a, b = (torch.randint(-100, 100, (n, n), dtype=dtype, device=stage.device) for _ in range(2))
        call: Any = lambda: torch._int_mm(a, b.T)  # noqa: E731 - one of two calls
    else:
        a, b = (torch.randn(n, n, device=stage.device).to(dtype) for _ in range(2))
        call = lambda: a @ b.T  # noqa: E731
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        figures = stage.timed(call)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return {**figures, "tflop_per_s": 2 * n**3 / figures["p50_ms"] / 1e9}
