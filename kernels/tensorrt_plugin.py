"""ContrastiveSimilarity in a TensorRT network, as three plugins whose compiled kernels lie in the engine: it needs no Python then.

Three, since such a plugin is one kernel. TensorRT 10.9 and later; importing this registers them.
Not run anywhere yet: docs/reference/gpu-kernel.md.
"""

from pathlib import Path
from typing import Any

import tensorrt as trt
import tensorrt.plugin as trtp

from pmclip_deploy.kernels.manifest import ALIGNED, Kernel, chosen, code, kernels_from_manifest
from pmclip_deploy.kernels.plan import Tile, step_for

SLICES = 256  # the rows may be known only when the engine runs; slices beyond the tiles of rows find nothing to do
FOLDED = SLICES // Tile().slices
BANKS = {trt.float32: "f32", trt.float16: "f16", trt.int8: "i8"}


def add_similarity(network: Any, image: Any, bank: Any, logit_scale: Any, k: int, kernels: Path, capability: int) -> tuple[Any, Any, Any]:
    """Adds the layers and returns the tensors score, index, log_sum_exp. ``kernels`` is what pmclip_deploy.kernels.compile wrote.

    ``bank`` is f32, f16 or int8. An int8 bank's scales are left out: those of quantisers are positive, and a cosine does not see them.
    ``capability`` is the GPU's, 89 for 8.9: TensorRT builds on the GPU that will run the engine.
    """
    given = {"k": k, "kernels": str(kernels), "capability": capability}
    slices = network.add_plugin(trtp.op.pmclip.similarity_slices(image, bank, logit_scale, **given))
    fold = network.add_plugin(trtp.op.pmclip.similarity_fold(slices.get_output(0), slices.get_output(1), **given))
    merge = network.add_plugin(trtp.op.pmclip.similarity_merge(fold.get_output(0), fold.get_output(1), **given))
    return merge.get_output(0), merge.get_output(1), merge.get_output(2)


@trtp.register("pmclip::similarity_slices")
def slices_outputs(
    image: trtp.TensorDesc, bank: trtp.TensorDesc, logit_scale: trtp.TensorDesc, k: int, kernels: str, capability: int
) -> tuple[trtp.TensorDesc, trtp.TensorDesc]:
    images, size = image.shape_expr[0], _slices(image, bank, k, kernels, capability, aligned=False).size
    keys = trtp.from_shape_expr((SLICES, images, size), trt.int64)
    return keys, trtp.from_shape_expr((SLICES, images, 2), trt.float32)


@trtp.aot_impl("pmclip::similarity_slices")
def slices_launch(
    image: trtp.TensorDesc,
    bank: trtp.TensorDesc,
    logit_scale: trtp.TensorDesc,
    k: int,
    kernels: str,
    capability: int,
    outputs: tuple[trtp.TensorDesc],
    tactic: int,
) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
    kernel = _slices(image, bank, k, kernels, capability, aligned=bank.shape[1] % ALIGNED == 0)  # a width that is not known is -1
    images, (rows, width) = image.shape_expr[0], bank.shape_expr
    step = step_for(bank.shape[0], kernel.tile, SLICES) if bank.shape[0] > 0 else 1
    counts = {"images": images, "rows": rows, "width": width, "step": trtp.SymInt32(step)}
    return _launch(kernel, kernels, (trtp.cdiv(images, kernel.tile.images), SLICES), counts)


@trtp.register("pmclip::similarity_fold")
def fold_outputs(
    keys: trtp.TensorDesc, sums: trtp.TensorDesc, k: int, kernels: str, capability: int
) -> tuple[trtp.TensorDesc, trtp.TensorDesc]:
    images, size, of = keys.shape_expr[1], keys.shape[2], trtp.from_shape_expr
    return of((FOLDED, images, size), trt.int64), of((FOLDED, images, 2), trt.float32)


@trtp.aot_impl("pmclip::similarity_fold")
def fold_launch(
    keys: trtp.TensorDesc, sums: trtp.TensorDesc, k: int, kernels: str, capability: int, outputs: tuple[trtp.TensorDesc], tactic: int
) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
    images = keys.shape_expr[1]
    counts = {"images": images, "slices": trtp.SymInt32(SLICES)}
    return _launch(_of_size("similarity_fold", keys, k, kernels, capability), kernels, (images, FOLDED), counts)


@trtp.register("pmclip::similarity_merge")
def merge_outputs(
    keys: trtp.TensorDesc, sums: trtp.TensorDesc, k: int, kernels: str, capability: int
) -> tuple[trtp.TensorDesc, trtp.TensorDesc, trtp.TensorDesc]:
    images, of = keys.shape_expr[1], trtp.from_shape_expr
    return of((images, k), trt.float32), of((images, k), trt.int64), of((images,), trt.float32)


@trtp.aot_impl("pmclip::similarity_merge")
def merge_launch(
    keys: trtp.TensorDesc, sums: trtp.TensorDesc, k: int, kernels: str, capability: int, outputs: tuple[trtp.TensorDesc], tactic: int
) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
    images = keys.shape_expr[1]
    counts = {"images": images, "slices": trtp.SymInt32(FOLDED), "k": trtp.SymInt32(k)}
    return _launch(_of_size("similarity_merge", keys, k, kernels, capability), kernels, (images, 1), counts)


def _of_size(entry: str, keys: trtp.TensorDesc, k: int, kernels: str, capability: int) -> Kernel:
    """The kernel whose K is that of the one before it."""
    return chosen([kernel for kernel in kernels_from_manifest(Path(kernels)) if kernel.size == keys.shape[2]], entry, capability, k)


def _slices(image: trtp.TensorDesc, bank: trtp.TensorDesc, k: int, kernels: str, capability: int, aligned: bool) -> Kernel:
    images = image.shape[0] if image.shape[0] > 0 else 16  # as many as the engine is given: the larger tile
    found = kernels_from_manifest(Path(kernels))
    return chosen(found, "similarity_slices", capability, k, BANKS[bank.dtype], aligned=aligned, images=images)


def _launch(
    kernel: Kernel, folder: str, grid: tuple[Any, Any], counts: dict[str, Any]
) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
    """TensorRT gives a kernel its inputs, then these counts, then its outputs: the order in which similarity_* declare theirs."""
    parameters = trtp.KernelLaunchParams()
    parameters.grid_x, parameters.grid_y = grid
    parameters.block_x, parameters.shared_mem = kernel.threads, kernel.shared
    names = (argument.partition(":")[0] for argument in kernel.arguments)
    extra = trtp.SymIntExprs.from_tuple(tuple(counts[name] for name in names if name in counts))
    return kernel.entry, code(Path(folder), kernel, "ptx").decode(), parameters, extra
