"""The GPU's kernels without a GPU: their numbers in Triton's interpreter, what is compiled ahead of time, and what a launch is given."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from pmclip_deploy.kernels.cuda import Array, Call, CudaSimilarity, array_from_view
from pmclip_deploy.kernels.manifest import Kernel, chosen, code, kernels_from_manifest
from pmclip_deploy.kernels.plan import FEW, Tile, plan_for, step_for, traffic
from pmclip_deploy.kernels.reference import Similarity, contrastive_similarity

NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs `pip install triton`")
TYPES = {"f32": np.float32, "f16": np.float16, "i8": np.int8}
SHAPES = [(1, 1, 1, 1), (3, 63, 7, 5), (16, 130, 64, 16), (17, 65, 100, 3), (1, 1000, 512, 10), (2, 63, 33, 100)]  # B, N, D, k
EDGES = ["ties", "no direction", "magnitudes", "none", "no scale", "negative scale", "scales"]
CASES = [(bank, *shape, "") for bank in TYPES for shape in SHAPES] + [(bank, 3, 150, 40, 12, edge) for bank in TYPES for edge in EDGES]
FOLDED = [("f32", ""), ("f16", ""), ("i8", ""), ("f32", "none")]  # with more slices than the merge takes as they are
CASES += [(bank, 1, 2200, 16, 10, edge) for bank, edge in FOLDED]


def multiprocessors(rows: int) -> int:
    """So few that a slice has more than one tile, and for many rows so many that the slices are folded."""
    return 9 if rows > 1000 else 1


class Given(NamedTuple):
    image: NDArray[np.float32]
    bank: NDArray[Any]
    logit_scale: float
    k: int
    scales: NDArray[np.float32] | None


def given(bank: str, images: int, rows: int, width: int, k: int, edge: str) -> Given:
    rng = np.random.default_rng([images, rows, width])
    image = rng.normal(size=(images, width)).astype(np.float32)
    made = rng.normal(size=(rows, width))
    made = np.round(made * 40).clip(-127, 127).astype(np.int8) if bank == "i8" else made.astype(TYPES[bank])
    scales, logit_scale = None, 100.0
    with np.errstate(over="ignore"):
        if edge == "ties":
            made[[140, 70, 66, 5, 64, 149]] = made[3]
            made[100:130] = made[90]
            image[0], image[1] = made[3], made[90]
        elif edge == "no direction":
            made[::3] = 0
            image[1] = 0
            if bank != "i8":
                made[1], made[4, 5], made[7, 0], made[8, 39] = np.inf, np.nan, -np.inf, np.nan
                image[2, 3] = np.inf
        elif edge == "magnitudes" and bank != "i8":
            powers = [1e-42, 1e-30, 1e-19, 1e19, 1e37] if bank == "f32" else [1e-6, 1e-4, 1e3, 1e4, 1.0]
            for i, power in enumerate(powers):
                made[i::7] = (made[i::7] * power).astype(made.dtype)
            image *= np.array([[1e-41], [1e36], [1e-20]], np.float32)
            made[:2, 10:] = 0  # the largest of a row first, and last
            made[2:4, :35] = 0
        elif edge == "none":
            made[:] = 0
        elif edge == "no scale":
            logit_scale = 0.0
        elif edge == "negative scale":
            logit_scale = -3.5
        elif edge == "scales":
            scales = rng.normal(size=rows).astype(np.float32)
            scales[:6] = 0, np.inf, np.nan, 1e-42, -np.inf, -1
            image[:], logit_scale = made[[0, 1, 5]], 2.0  # rows that would be the first, and show in the sum
    return Given(image, made, logit_scale, k, scales)


def compare(case: Given, found: Similarity, ties_exact: bool = False) -> None:
    """Rows whose scores differ by less than the tolerance may change places, unless they are equal."""
    atol = 1e-6 * max(1, abs(case.logit_scale)) + 1e-6
    expected = contrastive_similarity(*case)
    every = contrastive_similarity(case.image, case.bank, case.logit_scale, len(case.bank), case.scales)
    np.testing.assert_allclose(found.score, expected.score, rtol=0, atol=atol)
    np.testing.assert_allclose(found.log_sum_exp, expected.log_sum_exp, rtol=1e-6, atol=atol)
    for i, given_rows in enumerate(found.index):
        rows = given_rows[given_rows >= 0]
        assert len(set(rows)) == len(rows) == np.isfinite(expected.score[i]).sum()
        scores = dict(zip(every.index[i], every.score[i], strict=True))
        np.testing.assert_allclose([scores[row] for row in rows], found.score[i, : len(rows)], rtol=0, atol=atol)
        assert (given_rows[len(rows) :] == -1).all()
        score = found.score[i, : len(rows)]
        assert (np.diff(rows)[score[1:] == score[:-1]] > 0).all()  # of equal ones the lowest
    if ties_exact:
        np.testing.assert_array_equal(found.index, expected.index)


TILES = Tile(columns=32), Tile(FEW, 32, 32)  # of many images and of few


def kernels(bank: str, scaled: bool, size: int, tile: Tile = TILES[0]) -> list[Kernel]:
    """As the compiler writes them, less what it makes."""
    from pmclip_deploy.kernels.triton_similarity import similarity_fold, similarity_merge, similarity_slices

    rows = []
    for function, of in ((similarity_slices, bank), (similarity_fold, ""), (similarity_merge, "")):
        names = tuple(name for name in function.arg_names if not name.isupper() and (scaled or name != "scales"))
        rows.append(Kernel("", function.__name__, "sm_75", of, scaled and bool(of), False, size, tile, names, 0, 0, 0, 0, "", ""))
    return rows


def interpret(file: str) -> None:
    """Launches as CudaSimilarity would, on the CPU; in a process of its own, since Triton chooses its interpreter when it is imported."""
    import torch
    from triton.runtime.interpreter import interpreter_builder as builder

    from pmclip_deploy.kernels import triton_similarity

    read, load = [0], builder.create_masked_load

    def counted(pointers: Any, mask: Any, *rest: Any) -> Any:
        read[0] += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
        return load(pointers, mask, *rest)

    builder.create_masked_load = counted
    results: dict[str, Any] = {}
    for (number, case), tile in product(enumerate(CASES), TILES):
        one, read[0] = given(*case), 0
        (images, _), k = one.image.shape, one.k
        scale = np.array(one.logit_scale, np.float32)
        out = [np.zeros((images, k), np.float32), np.zeros((images, k), np.int64), np.zeros(images, np.float32)]
        named = {"image": one.image, "bank": one.bank, "logit_scale": scale, "scales": one.scales}
        named |= dict(zip(("score", "index", "log_sum_exp"), out, strict=True))
        arrays = {name: array for name, array in named.items() if array is not None}
        given_arrays = {name: Array(array.ctypes.data, array.shape, str(array.dtype)) for name, array in arrays.items()}
        size = 1 << (k - 1).bit_length()
        call = Call.of(given_arrays, kernels(case[0], one.scales is not None, size, tile), 75, multiprocessors(len(one.bank)))
        room = np.zeros(call.plan.room, np.int8)  # its parts are of other types, and touch no other
        addresses = {name: array.address for name, array in given_arrays.items()} | call.plan.places(room.ctypes.data)
        at = {array.ctypes.data: torch.from_numpy(array) for array in arrays.values()}
        for name, address in call.plan.places(room.ctypes.data).items():
            part = room[address - room.ctypes.data :][: prod(call.plan.between[name]) * (8 if "keys" in name else 4)]
            at[address] = torch.from_numpy(part.view(np.int64 if "keys" in name else np.float32))
        for launch in call.launches:
            kernel, grid = launch.kernel, launch.grid
            arguments = [at[value] if type(value) is int else int(value) for value in launch.given(addresses)]
            if kernel.bank and not kernel.scaled:
                arguments.insert(2, None)
            constants = (kernel.size, *kernel.tile[:3]) if kernel.bank else (kernel.size, kernel.tile.slices)
            getattr(triton_similarity, kernel.entry)[grid](*arguments, *constants)
        name = f"{number} {tile.images}"
        results |= {f"{name} {i}": array for i, array in enumerate(out)} | {f"{name} read": read[0]}
    np.savez(file, **results)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("interpreted") / "results.npz"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, __file__, str(file)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(file)


EVERY_CASE = pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: "-".join(map(str, CASES[number])).rstrip("-"))
EVERY_TILE = pytest.mark.parametrize("tile", TILES, ids=["many", "few"])


@NEEDS_TRITON
@pytest.mark.nightly  # Triton's interpreter takes a minute
@EVERY_CASE
@EVERY_TILE
def test_the_kernels_equal_the_reference(interpreted: Any, number: int, tile: Tile) -> None:
    case = CASES[number]
    found = Similarity(*(interpreted[f"{number} {tile.images} {i}"] for i in range(3)))
    compare(given(*case), found, case[-1] in ("ties", "none", "no scale"))


@NEEDS_TRITON
@pytest.mark.nightly  # Triton's interpreter takes a minute
@EVERY_CASE
@EVERY_TILE
def test_the_kernels_read_what_the_plan_counts(interpreted: Any, number: int, tile: Tile) -> None:
    case = given(*CASES[number])
    (images, width), rows = case.image.shape, len(case.bank)
    plan = plan_for(images, rows, 1 << (case.k - 1).bit_length(), tile, 4 * multiprocessors(rows))
    assert bool(plan.folded) == (rows == 2200)
    bytes_ = traffic(images, rows, width, case.k, CASES[number][0], case.scales is not None, plan, tile)
    assert interpreted[f"{number} {tile.images} read"] == bytes_.bank + bytes_.images + bytes_.partial // 2


@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 5, 30, 31, 32, 210, 1000, 4096])
def test_a_program_meets_each_of_its_tiles_once_and_a_sorted_bank_in_mixed_order(tiles: int) -> None:
    """In the order of the tiles, each of a bank that is sorted by rising similarity would hold better rows than all before."""
    tile, slices = Tile(), 7
    step = step_for(tiles * slices * tile.rows - 1, tile, slices)
    for count in (tiles, tiles - 1):  # of the first programs and of others
        walk = [turn * step % max(count, 1) for turn in range(count)]
        assert sorted(walk) == list(range(count)) and (count < 2 or step < count or step == 1)
        records = sum(place > max(walk[:turn], default=-1) for turn, place in enumerate(walk))
        assert records <= min(count, 5 + count // 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("triton", reason="needs `pip install triton`")
    made = tmp_path_factory.mktemp("kernels")
    command = [sys.executable, "-m", "pmclip_deploy.kernels.compile", "--output", str(made), "--arch", "sm_89", "--k", "10"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| sm_89 |" in done.stdout and "| 64 | i8 |" in done.stdout
    return made


def test_a_kernel_takes_what_its_launch_gives_and_no_scratch(folder: Path) -> None:
    rows = kernels_from_manifest(folder)
    assert [(row.bank, row.scaled, row.aligned) for row in rows] == [
        *((bank, scaled, aligned) for bank, scaled in (("f32", 0), ("f32", 0), ("f16", 0), ("i8", 0), ("i8", 1)) for aligned in (1, 0)),
        *[("", 0, 0)] * 2,
    ]
    assert [row.tile.images for row in rows] == [4, 4, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16]
    for row in rows:
        ptx = code(folder, row, "ptx").decode()
        names = [argument.partition(": ")[0] for argument in row.arguments]
        assert names == list(next(one.arguments for one in kernels(row.bank, row.scaled, 16) if one.entry == row.entry))
        parameters = re.search(rf"\.entry {row.entry}\((.*?)\n\)", ptx, re.S)[1]  # type: ignore[index]
        assert re.findall(r"\.param \.(\w+)", parameters) == ["u64" if "*" in argument else "u32" for argument in row.arguments]
        assert f".target {row.target}\n" in ptx and "/" not in ptx.replace("//", "")  # no path of this machine
        assert code(folder, row, "cubin").startswith(b"\x7fELF")
        assert (row.size, row.threads) == (16, 128 if row.bank else 32) and 0 < row.registers <= 255 and row.shared <= 48 << 10


def test_scratch_that_is_used_is_refused() -> None:
    compile = pytest.importorskip("pmclip_deploy.kernels.compile", reason="needs `pip install triton`")
    ptx = ".visible .entry f(\n\t.param .u64 a,\n\t.param .u64 b\n)\n{ ld.param.b64 %rd1, [a]; }"
    assert compile.without_scratch(ptx, 1) == ptx.replace(",\n\t.param .u64 b", "")
    with pytest.raises(ValueError, match="scratch"):
        compile.without_scratch(ptx.replace("[a]", "[b]"), 1)


def test_a_file_that_changed_is_refused(folder: Path, tmp_path: Path) -> None:
    row = kernels_from_manifest(folder)[0]
    (tmp_path / f"{row.file}.ptx").write_bytes(code(folder, row, "ptx") + b" ")
    with pytest.raises(ValueError, match="compile the kernels again"):
        code(tmp_path, row, "ptx")


def made(*targets: str) -> list[Kernel]:
    names = ("image: *fp32", "rows: i32")
    return [
        Kernel(f"{target} {aligned} {size}", "similarity_slices", target, "f16", False, aligned, size, Tile(), names, 128, 0, 0, 0, "", "")
        for target in targets
        for aligned in (False, True)
        for size in (16, 64)
    ]


@pytest.mark.parametrize(
    ("capability", "k", "aligned", "expected"),
    [
        (89, 10, True, "sm_89 True 16"),
        (89, 10, False, "sm_89 False 16"),
        (89, 17, True, "sm_89 True 64"),
        (87, 5, True, "sm_75 True 16"),  # PTX, which the driver compiles
        (90, 5, True, "sm_90a True 16"),
        (100, 5, True, "sm_89 True 16"),  # no other runs what is for sm_90a
    ],
)
def test_the_kernel_for_a_gpu(capability: int, k: int, aligned: bool, expected: str) -> None:
    assert chosen(made("sm_75", "sm_89", "sm_90a"), "similarity_slices", capability, k, "f16", False, aligned).file == expected


def test_the_kernel_for_as_many_images() -> None:
    few = [replace(kernel, tile=Tile(images=4), file="few") for kernel in made("sm_75", "sm_89")]
    found = [chosen(few + made("sm_89"), "similarity_slices", 89, 1, "f16", images=images).file for images in (1, 4, 5, 16, 17)]
    assert found == ["few", "few", *["sm_89 False 16"] * 3]
    assert chosen(few, "similarity_slices", 89, 1, "f16", images=5).file == "few"  # where there is no other


@pytest.mark.parametrize(("capability", "k", "bank"), [(70, 1, "f16"), (89, 65, "f16"), (89, 1, "i8")])
def test_no_kernel_for_a_gpu_says_how_to_make_it(capability: int, k: int, bank: str) -> None:
    with pytest.raises(ValueError, match=f"--arch sm_{capability} --k {k}"):
        chosen(made("sm_75", "sm_89"), "similarity_slices", capability, k, bank)


ARRAYS = {
    "image": Array(256, (3, 32), "float32"),
    "bank": Array(512, (1000, 32), "float16"),
    "logit_scale": Array(768, (1,), "float32"),
    "score": Array(1024, (3, 5), "float32"),
    "index": Array(2048, (3, 5), "int64"),
    "log_sum_exp": Array(4096, (3,), "float32"),
}


def test_a_call_of_the_compiled_kernels(folder: Path) -> None:
    rows = kernels_from_manifest(folder)
    call = Call.of(ARRAYS, rows, 89, 108)
    slices, merge = call.launches
    assert call.plan.slices == 16 and not call.plan.folded and slices.grid == (1, 16, 1) and merge.grid == (3, 1, 1)
    addresses = {name: array.address for name, array in ARRAYS.items()} | call.plan.places(8192)
    sums = 8192 + 8 * 16 * 3 * 16
    assert call.plan.room == sums + 4 * 16 * 3 * 2 - 8192
    assert slices.given(addresses) == (256, 512, 768, 3, 1000, 32, 1, 8192, sums) and slices.kernel.aligned
    assert merge.given(addresses) == (8192, sums, 3, 16, 5, 1024, 2048, 4096)
    assert [type(value) for value in merge.given(addresses)] == [int, int, np.int32, np.int32, np.int32, int, int, int]
    fold, merge = Call.of(ARRAYS | {"bank": Array(512, (10000, 32), "float16")}, rows, 89, 108).launches[1:]
    assert fold.grid == (3, 10, 1) and merge.grid == (3, 1, 1)
    assert fold.arguments == ("keys", "sums", 3, 157, "folded_keys", "folded_sums")
    assert merge.arguments == ("folded_keys", "folded_sums", 3, 10, 5, "score", "index", "log_sum_exp")
    for name, array in (("bank", Array(520, (1000, 32), "float16")), ("image", Array(260, (3, 32), "float32"))):
        assert not Call.of(ARRAYS | {name: array}, rows, 89, 108).launches[0].kernel.aligned


def test_a_call_without_images_and_one_with_too_many_rows(folder: Path) -> None:
    none = {name: Array(1024, (0, *ARRAYS[name].shape[1:]), ARRAYS[name].dtype) for name in ("image", "score", "index", "log_sum_exp")}
    assert Call.of(ARRAYS | none, kernels_from_manifest(folder), 89, 108).plan.grids["similarity_merge"] == (0, 1, 1)
    with pytest.raises(ValueError, match="2147483640 x 32"):
        Call.of(ARRAYS | {"bank": Array(512, (2**31 - 8, 32), "float16")}, kernels_from_manifest(folder), 89, 108)


@pytest.mark.parametrize(
    ("name", "array", "why"),
    [
        ("bank", Array(512, (1000, 31), "float16"), "bank is"),
        ("bank", Array(512, (1000, 32), "float64"), "should be of float32, float16, int8"),
        ("image", Array(256, (3, 32), "float16"), "image is"),
        ("index", Array(256, (3, 5), "int32"), "index is"),
        ("index", Array(256, (3, 4), "int64"), "index is"),
        ("log_sum_exp", Array(256, (4,), "float32"), "log_sum_exp is"),
        ("logit_scale", Array(256, (2,), "float32"), "logit_scale is"),
        ("scales", Array(256, (999,), "float32"), "scales is"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(name: str, array: Array, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Call.of(ARRAYS | {name: array}, [], 89, 108)


def test_an_array_must_be_contiguous() -> None:
    view = SimpleNamespace(ptr=64, shape=(1, 3, 4), dtype=np.dtype("float16"), strides=(99, 4, 1))  # nobody steps along an axis of 1
    assert array_from_view("bank", view) == Array(64, (1, 3, 4), "float16")
    view.strides = (12, 8, 1)
    with pytest.raises(ValueError, match="bank must be C-contiguous"):
        array_from_view("bank", view)


class Gpu:
    """In place of cuda.core and its device: what CudaSimilarity asks of them, with launches that are kept and not run."""

    device_id, compute_capability, properties = 0, (8, 9), SimpleNamespace(multiprocessor_count=108)

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.loaded, self.freed, self.error = 0, 0, ""
        self.utils = SimpleNamespace(StridedMemoryView=lambda given, stream_ptr: given)
        self.ObjectCode = SimpleNamespace(from_cubin=self.load)

    def load(self, cubin: bytes) -> Any:
        self.loaded += 1
        return SimpleNamespace(get_kernel=lambda entry: entry)

    def set_current(self) -> None:
        pass

    def allocate(self, size: int, stream: Any) -> Any:
        return SimpleNamespace(handle=4096, close=self.close)

    def close(self, stream: Any) -> None:
        self.freed += 1

    def LaunchConfig(self, grid: Any, block: int, shmem_size: int) -> Any:
        return grid

    def launch(self, stream: Any, *given: Any) -> None:
        if self.error:
            raise RuntimeError(self.error)
        self.launched.append(given)


@pytest.fixture
def launcher(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[CudaSimilarity, Gpu]:
    gpu = Gpu()
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(core=gpu))
    return CudaSimilarity(folder, gpu), gpu


def test_what_a_shape_launches_is_prepared_once(launcher: tuple[CudaSimilarity, Gpu], monkeypatch: pytest.MonkeyPatch) -> None:
    similarity, gpu = launcher
    stream, prepared = SimpleNamespace(handle=1), list[Any]()
    monkeypatch.setattr(Call, "of", lambda *given, of=Call.of: prepared.append(given) or of(*given))
    moved = {name: array._replace(address=array.address + 64) for name, array in ARRAYS.items()}
    for arrays in (ARRAYS, moved, ARRAYS):
        similarity(**arrays, stream=stream)
    assert (len(prepared), gpu.loaded, gpu.freed) == (1, 2, 3)
    assert [given[2] for given in gpu.launched if given[1] == "similarity_slices"] == [256, 320, 256]  # the image's address
    similarity(**ARRAYS | {"bank": Array(520, (1000, 32), "float16")}, stream=stream)
    assert (len(prepared), gpu.loaded) == (2, 3)  # another alignment takes another kernel


def test_a_launch_that_fails_frees_its_room(launcher: tuple[CudaSimilarity, Gpu]) -> None:
    similarity, gpu = launcher
    gpu.error = "the capture is invalid"
    with pytest.raises(RuntimeError, match="the capture is invalid"):
        similarity(**ARRAYS, stream=SimpleNamespace(handle=1))
    gpu.error = ""
    similarity(**ARRAYS, stream=SimpleNamespace(handle=1))
    assert gpu.freed == 2 and len(gpu.launched) == 2


def test_an_array_on_another_gpu_is_refused(launcher: tuple[CudaSimilarity, Gpu]) -> None:
    similarity, _ = launcher
    view = SimpleNamespace(ptr=512, shape=(1000, 32), dtype=np.dtype("float16"), strides=None, device_id=1)
    with pytest.raises(ValueError, match="bank is on device 1, and the kernels are on device 0"):
        similarity(**ARRAYS | {"bank": view}, stream=SimpleNamespace(handle=1))
    view.device_id = 0
    assert similarity.array("bank", view, SimpleNamespace(handle=1)) == ARRAYS["bank"]


def test_the_plugins_hand_tensorrt_the_same_launches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT itself is stood in for by plain numbers; it passes a kernel its inputs, the extra arguments, its outputs."""

    class Parameters(SimpleNamespace):
        pass

    class Exprs(tuple[int, ...]):
        from_tuple = classmethod(lambda cls, given: cls(given))

    def desc(dtype: str, *shape: int) -> SimpleNamespace:
        return SimpleNamespace(dtype=dtype, shape=shape, shape_expr=shape)

    plugin = ModuleType("tensorrt.plugin")
    same = {name: lambda plugin_id: lambda function: function for name in ("register", "aot_impl")}
    plugin.__dict__.update(same, TensorDesc=SimpleNamespace, KernelLaunchParams=Parameters, SymIntExprs=Exprs, SymInt32=int)
    plugin.__dict__.update(cdiv=lambda a, b: -(-a // b), from_shape_expr=lambda shape, dtype: desc(dtype, *shape))
    trt = ModuleType("tensorrt")
    trt.__dict__.update(plugin=plugin, float32="f", float16="h", int8="i", int64="l")
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", plugin)
    monkeypatch.delitem(sys.modules, "pmclip_deploy.kernels.tensorrt_plugin", raising=False)
    plugins = importlib.import_module("pmclip_deploy.kernels.tensorrt_plugin")

    image, bank, scale, given_attributes = desc("f", 33, 512), desc("h", 1000, 512), desc("f"), (10, str(folder), 89)
    keys, sums = plugins.slices_outputs(image, bank, scale, *given_attributes)
    assert (keys.dtype, keys.shape, sums.dtype, sums.shape) == ("l", (256, 33, 16), "f", (256, 33, 2))
    entry, ptx, parameters, extra = plugins.slices_launch(image, bank, scale, *given_attributes, (keys, sums), 0)
    row = chosen(kernels_from_manifest(folder), "similarity_slices", 89, 10, "f16", aligned=True)
    assert (entry, ptx, extra) == (row.entry, code(folder, row, "ptx").decode(), (33, 1000, 512, 1))
    assert vars(parameters) == {"grid_x": 3, "grid_y": 256, "block_x": 128, "shared_mem": row.shared}
    names = [argument.partition(":")[0] for argument in row.arguments]
    assert names == ["image", "bank", "logit_scale", "images", "rows", "width", "step", "keys", "sums"]
    many = desc("h", 1_000_000, 512)
    assert plugins.slices_launch(image, many, scale, *given_attributes, (keys, sums), 0)[3] == (33, 1_000_000, 512, 37)  # of 62 tiles

    slices = keys, sums
    keys, sums = plugins.fold_outputs(*slices, *given_attributes)
    assert (keys.dtype, keys.shape, sums.dtype, sums.shape) == ("l", (16, 33, 16), "f", (16, 33, 2))
    entry, _, parameters, extra = plugins.fold_launch(*slices, *given_attributes, (keys, sums), 0)
    assert (entry, extra, parameters.grid_x, parameters.grid_y, parameters.block_x) == ("similarity_fold", (33, 256), 33, 16, 32)

    outputs = plugins.merge_outputs(keys, sums, *given_attributes)
    assert [(one.dtype, one.shape) for one in outputs] == [("f", (33, 10)), ("l", (33, 10)), ("f", (33,))]
    entry, _, parameters, extra = plugins.merge_launch(keys, sums, *given_attributes, outputs, 0)
    assert (entry, extra, parameters.grid_x, parameters.block_x) == ("similarity_merge", (33, 16, 10), 33, 32)
    unaligned = plugins.slices_launch(image, desc("h", 1000, -1), scale, *given_attributes, (keys, sums), 0)
    assert unaligned[1] != ptx


def test_on_a_gpu(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("cuda.core", reason="needs `pip install 'cuda-core[cu13]'`")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    major, minor = torch.cuda.get_device_capability()
    command = ["pmclip_deploy.kernels.compile", "--output", str(tmp_path), "--arch", f"sm_{10 * major + minor}", "--k", "100"]
    subprocess.run([sys.executable, "-m", *command], check=True)
    similarity, stream = CudaSimilarity(tmp_path), torch.cuda.Stream()
    for case in CASES:
        one = given(*case)
        (images, _), k = one.image.shape, one.k
        image, bank, scale = (torch.from_numpy(np.asarray(x)).cuda() for x in (one.image, one.bank, np.float32(one.logit_scale)))
        scales = None if one.scales is None else torch.from_numpy(one.scales).cuda()
        out = [torch.empty((images, k), dtype=dtype, device="cuda") for dtype in (torch.float32, torch.int64)]
        out.append(torch.empty(images, device="cuda"))
        torch.cuda.synchronize()
        similarity(image, bank, scale, *out, stream, scales)
        stream.synchronize()
        compare(one, Similarity(*(x.cpu().numpy() for x in out)), case[-1] in ("ties", "none", "no scale"))


if __name__ == "__main__":
    interpret(sys.argv[1])
