"""What makes a training step fast, on a CPU most of all: bf16 where it is computed in, fp32 where that is faster, memory that is kept."""

import ctypes
import sys
from typing import Any

import torch
from torch import Tensor, nn


def run_slow_convolutions_in_float(model: nn.Module) -> None:
    """Under bf16 autocast on a CPU, runs 5x5 and strided depthwise convolutions in fp32; on a GPU it changes nothing.

    oneDNN has no fast bf16 gradient for them: 72 against 23 ms for one weight gradient at 240 channels and 32x32.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1 and (module.kernel_size[0] == 5 or module.stride[0] == 2):
            module.forward = _in_float(module.forward)  # type: ignore[method-assign]


def _in_float(forward: Any) -> Any:
    def wrapped(x: Tensor) -> Tensor:
        out: Tensor
        if x.device.type != "cpu":
            out = forward(x)
            return out
        with torch.autocast("cpu", enabled=False):
            out = forward(x.float())
            return out

    return wrapped


def mixed_precision() -> torch.autocast:
    """bf16 where the CPU computes in it; emulated bf16 would be five times slower than fp32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


def autocast(device: torch.device, mixed: bool) -> torch.autocast:
    """bf16, which needs no loss scaling, where the device computes in it."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16, enabled=mixed and torch.cuda.is_bf16_supported(including_emulation=False))
    return mixed_precision() if mixed else torch.autocast("cpu", enabled=False)


def keep_freed_memory() -> None:
    """Tells glibc to keep large freed blocks: page faults on fresh activations were 40% of a training step on a CPU."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # glibc's names
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
            libc.mallopt(M_TOP_PAD, 2**28)
