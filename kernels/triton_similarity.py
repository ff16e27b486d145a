"""ContrastiveSimilarity as Triton kernels: programs reduce slices of the bank to their best k and a sum, then the slices are merged.

Scores are never written: a slice leaves k keys and two floats an image. A key is a score and a row in one integer, so that the order of
integers is the order of results: the larger score, of equal ones the lower row.
"""

from typing import Any

import triton
import triton.language as tl

from pmclip_deploy.kernels.plan import Tile, plan_for

NONE = tl.constexpr(-(1 << 63))  # the least of the keys that stand for no row
FIRST = tl.constexpr((1 << 32) - (1 << 63))  # no row's key is below it
UP = tl.constexpr(2.0**126)  # the largest power of two with a reciprocal that is a normal number
LENGTH = tl.constexpr(1024.0)  # images are made this long: what fp16 rounds off then stays above its smallest number


@triton.jit
def similarity_slices(
    image,  # (B, D) f32
    bank,  # (N, D) f32, f16 or int8
    scales,  # (N,) f32, or None
    logit_scale,  # () f32
    images,  # B
    rows,  # N
    width,  # D
    step,  # from one of a program's tiles to the next: it has no divisor with their number
    keys,  # (slices, B, K) i64
    sums,  # (slices, B, 2) f32: the largest score, and the sum of exp(score - largest)
    K: tl.constexpr,  # a power of two, at least k
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (B / IMAGES, slices): programs that run at the same time read the same rows, so the bank crosses the bus once for all images.

    A program takes its tiles in leaps. One after the other, each tile of a bank that is sorted by similarity would be better than the last.
    """
    b = tl.program_id(0) * IMAGES + tl.arange(0, IMAGES)
    d = tl.arange(0, COLUMNS)
    mine = image + b[:, None].to(tl.int64) * width + d
    power, square = tl.full([IMAGES], UP, tl.float32), tl.zeros([IMAGES], tl.float32)
    for start in range(0, width, COLUMNS):
        y = tl.load(mine + start, mask=(b < images)[:, None] & (start + d < width), other=0.0)
        y, square, power, _ = _squared(y, square, power)
    known, unit = _usable(square), tl.div_rn(tl.full([IMAGES], LENGTH, tl.float32), tl.sqrt_rn(square))
    scale = tl.load(logit_scale) / LENGTH

    best = tl.zeros([IMAGES, K], tl.int64) + (tl.arange(0, K).to(tl.int64) + NONE)
    top, total = tl.full([IMAGES], float("-inf"), tl.float32), tl.zeros([IMAGES], tl.float32)
    tiles, place = tl.cdiv(tl.cdiv(rows, ROWS) - tl.program_id(1), tl.num_programs(1)), 0
    for _ in range(0, tiles):
        n = (tl.program_id(1) + place * tl.num_programs(1)) * ROWS + tl.arange(0, ROWS)
        place = tl.where(place + step < tiles, place + step, place + step - tiles)
        theirs = bank + n[:, None].to(tl.int64) * width + d
        squares, powers = tl.zeros([ROWS], tl.float32), tl.full([ROWS], UP, tl.float32)
        if IMAGES < 16:  # fewer than a matrix unit takes: each thread adds up its own products, and all threads once at the end
            dots = tl.zeros([IMAGES, ROWS, COLUMNS], tl.float32)
            for start in tl.range(0, width, COLUMNS, num_stages=3):  # else Triton prefetches for tl.dot alone
                x = tl.load(theirs + start, mask=(n < rows)[:, None] & (start + d < width), other=0)
                y = tl.load(mine + start, mask=(b < images)[:, None] & (start + d < width), other=0.0) * power[:, None] * unit[:, None]
                if x.dtype == tl.float32:
                    x, squares, powers, shrink = _squared(x, squares, powers)
                    dots *= shrink[None, :, None]
                else:
                    x = x.to(tl.float32)
                    squares += tl.sum(x * x, 1)
                dots += y[:, None, :] * x[None, :, :]
            dot = tl.sum(dots, 2)
        else:
            dot = tl.zeros([IMAGES, ROWS], tl.float32)
            for start in range(0, width, COLUMNS):
                x = tl.load(theirs + start, mask=(n < rows)[:, None] & (start + d < width), other=0)
                y = tl.load(mine + start, mask=(b < images)[:, None] & (start + d < width), other=0.0) * power[:, None] * unit[:, None]
                if x.dtype == tl.float32:
                    x, squares, powers, shrink = _squared(x, squares, powers)
                    dot = tl.dot(y, tl.trans(x), dot * shrink[None, :], input_precision="ieee")
                else:  # no square of theirs leaves f32; both are exact in fp16, and an image is in two halves of it
                    wide = x.to(tl.float32)
                    squares += tl.sum(wide * wide, 1)
                    half, high = tl.trans(x.to(tl.float16)), y.to(tl.float16)
                    dot = tl.dot(high, half, tl.dot((y - high.to(tl.float32)).to(tl.float16), half, dot))
        usable, unit_rows = _usable(squares), tl.div_rn(tl.full([ROWS], 1.0, tl.float32), tl.sqrt_rn(squares))
        if scales is not None:  # of a row's scale a cosine keeps the sign
            factor = tl.load(scales + n, mask=n < rows, other=0.0)
            usable &= (factor != 0) & (tl.abs(factor) < float("inf"))
            unit_rows = tl.where(factor < 0, -unit_rows, unit_rows)
        score = tl.where(known[:, None] & usable[None, :], dot * scale * unit_rows[None, :], float("-inf")) + 0.0  # -0 is 0

        largest = tl.maximum(top, tl.max(score, 1))
        base = tl.where(largest > float("-inf"), largest, 0.0)  # -inf - -inf is no number
        total = total * tl.exp(top - base) + tl.sum(tl.exp(score - base[:, None]), 1)
        top = largest

        bits = score.to(tl.int32, bitcast=True)
        ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
        key = tl.where(score > float("-inf"), (ordered << 32) | (0xFFFFFFFF - n[None, :].to(tl.int64)), NONE)
        best = _best(best, key)

    place = tl.program_id(1).to(tl.int64) * images + b
    tl.store(keys + place[:, None] * K + tl.arange(0, K), best, mask=(b < images)[:, None])
    tl.store(sums + place * 2, top, mask=b < images)
    tl.store(sums + place * 2 + 1, total, mask=b < images)


@triton.jit
def similarity_fold(
    keys,  # (slices, B, K) i64
    sums,  # (slices, B, 2) f32
    images,  # B
    slices,
    folded_keys,  # (slices / SLICES, B, K) i64
    folded_sums,  # (slices / SLICES, B, 2) f32
    K: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Grid (B, slices / SLICES): each program makes one slice of SLICES, so that the merge has few left."""
    b, best = tl.program_id(0).to(tl.int64), (tl.arange(0, K).to(tl.int64) + NONE)[None, :]
    best, top, total = _merged(keys, sums, images, slices, b, tl.program_id(1) * SLICES, best, float("-inf"), 0.0, K, SLICES)
    place = tl.program_id(1).to(tl.int64) * images + b
    tl.store(folded_keys + place * K + tl.arange(0, K)[None, :], best)
    tl.store(folded_sums + place * 2, top)
    tl.store(folded_sums + place * 2 + 1, total)


@triton.jit
def similarity_merge(
    keys,  # (slices, B, K) i64
    sums,  # (slices, B, 2) f32
    images,  # B
    slices,
    k,  # at most K
    score,  # (B, k) f32
    index,  # (B, k) i64
    log_sum_exp,  # (B,) f32
    K: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Grid (B,)."""
    b = tl.program_id(0).to(tl.int64)
    best = (tl.arange(0, K).to(tl.int64) + NONE)[None, :]
    top, total = float("-inf"), 0.0
    for start in range(0, slices, SLICES):
        best, top, total = _merged(keys, sums, images, slices, b, start, best, top, total, K, SLICES)
    tl.store(log_sum_exp + b, top + tl.log(total))
    for i in range(0, k):
        key = tl.max(tl.max(best, 1), 0)
        ordered = (key >> 32).to(tl.int32)
        found = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)
        tl.store(score + b * k + i, tl.where(key < FIRST, float("-inf"), found))
        tl.store(index + b * k + i, tl.where(key < FIRST, -1, 0xFFFFFFFF - (key & 0xFFFFFFFF)))
        best = tl.where(best == key, NONE, best)


@triton.jit
def _merged(keys, sums, images, slices, b, start, best, top, total, K: tl.constexpr, SLICES: tl.constexpr):
    """The best keys, the largest score and the sum, with those of SLICES slices from ``start`` on."""
    s = start + tl.arange(0, SLICES)
    place = s.to(tl.int64) * images + b
    part = tl.load(keys + place[:, None] * K + tl.arange(0, K), mask=(s < slices)[:, None], other=NONE)
    best = _best(best, tl.reshape(tl.where(part < FIRST, NONE, part), [1, SLICES * K]))
    tops = tl.load(sums + place * 2, mask=s < slices, other=float("-inf"))
    largest = tl.maximum(top, tl.max(tops, 0))
    base = tl.where(largest > float("-inf"), largest, 0.0)
    totals = tl.load(sums + place * 2 + 1, mask=s < slices, other=0.0)
    return best, largest, total * tl.exp(top - base) + tl.sum(totals * tl.exp(tops - base), 0)


@triton.jit
def _squared(x, square, power):
    """Rows times a power of two that keeps their squares in f32, the sum of those, the power, and by what earlier sums had to shrink.

    The largest is found among bits: their order is that of magnitudes, infinities and NaN are above all numbers, and stay so.
    """
    exponent = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1) >> 23
    less = tl.minimum(power, ((254 - tl.minimum(tl.maximum(exponent, 1), 253)) << 23).to(tl.float32, bitcast=True))
    shrink, x = tl.div_rn(less, power), x * less[:, None]  # a plain division may be an ulp off, even of equal numbers
    return x, square * shrink * shrink + tl.sum(x * x, 1), less, shrink


@triton.jit
def _usable(square):
    """Neither zero nor infinite nor NaN."""
    return (square > 0) & (square < float("inf"))


@triton.jit
def _best(best, key):
    """Puts keys in the places of the least, one a round and image. All are different; after the first tiles one seldom gets in."""
    least, largest = tl.min(best, 1), tl.max(key, 1)
    while tl.max((largest > least).to(tl.int32), 0) > 0:
        best = tl.where((best == least[:, None]) & (largest > least)[:, None], largest[:, None], best)
        key = tl.where(key == largest[:, None], NONE, key)
        least, largest = tl.min(best, 1), tl.max(key, 1)
    return best


def contrastive_similarity(
    image: Any, bank: Any, logit_scale: Any, k: int, scales: Any = None, tile: Tile | None = None, programs: int = 512
) -> tuple[Any, Any, Any]:
    """The reference's results, of C-contiguous torch tensors on one device; ``logit_scale`` is one too. Compiles on the first call."""
    (images, width), rows, size = image.shape, bank.shape[0], triton.next_power_of_2(k)
    tile = tile or (Tile.of("f32", 75, images) if bank.dtype == image.dtype else Tile(columns=32))  # good for any GPU
    plan = plan_for(images, rows, size, tile, programs)
    f32, i64 = image.dtype, image.new_empty(0).long().dtype
    keys, sums, *folded = (image.new_empty(shape, dtype=i64 if name.endswith("keys") else f32) for name, shape in plan.between.items())
    score, index, log_sum_exp = image.new_empty((images, k), dtype=f32), image.new_empty((images, k), dtype=i64), image.new_empty(images)
    grids, slices = plan.grids, plan.slices
    counts = images, rows, width, plan.step
    similarity_slices[grids["similarity_slices"]](image, bank, scales, logit_scale, *counts, keys, sums, size, *tile[:3])
    if plan.folded:
        similarity_fold[grids["similarity_fold"]](keys, sums, images, slices, *folded, size, tile.slices, num_warps=1)
        (keys, sums), slices = folded, plan.folded
    merge = similarity_merge[grids["similarity_merge"]]
    merge(keys, sums, images, slices, k, score, index, log_sum_exp, size, tile.slices, num_warps=1)
    return score, index, log_sum_exp
