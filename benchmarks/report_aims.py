"""The aims of the benchmark report, and which of them the rows meet."""

from __future__ import annotations

from pmclip_deploy.benchmarks.peers import LITE, MODELS, VIT
from pmclip_deploy.benchmarks.report_gpu import gpu_aims, on_a_gpu
from pmclip_deploy.benchmarks.report_rows import (
    COLD,
    COMPARE,
    OURS,
    PARTS,
    PREPROCESSING,
    REFERENCE,
    Rows,
    as_cosine,
    as_spread,
    at_least,
    at_most,
    find,
    least_cosine,
    pair_of,
    quotient,
    runs,
)
from pmclip_deploy.benchmarks.report_writing import Block, Table
from pmclip_deploy.export.page import NOT_MEASURED, finite

EAGER, OPENVINO, COLD_LIMIT, PIXELS, PIXELS_HOPED = 0.6, 1.0, 0.07, 4.0, 10.0  # the aims


def aims(rows: Rows) -> list[Block]:
    """The table of aims: each with its limit, what was measured, and whether it is met."""
    found: list[list[str]] = []

    def say(run: Rows, what: str, limit: str, measured: str | None, met: bool | None, more: str = "") -> None:
        verdict = NOT_MEASURED if met is None or measured is None else ("met" if met else "missed") + more
        found.append([what, limit, measured or NOT_MEASURED, verdict, run[0]["run"][:8] if run else ""])

    for run in runs(rows, COMPARE, VIT) or [[]]:
        for part in PARTS:
            for other, limit in ((REFERENCE, EAGER), ("openvino-fp32", OPENVINO)):
                paired = pair_of(find(run, f"{OURS} fp32", part, "single-stream"), f"ratio{{}} to {other}")
                what = f"{VIT} fp32, one {part}: time to that of {other}"
                say(run, what, f"at most {limit:g}", as_spread(paired), at_most(paired[0], limit))
    for model in MODELS:  # measured or not
        for run in runs(rows, COMPARE, model) or [[]]:
            peers = list(dict.fromkeys(r["system"] for r in run if r["system"].endswith("int8") and not r["system"].startswith(OURS)))
            for part in PARTS:
                ours = find(run, f"{OURS} int8", part, "single-stream")
                cosine = least_cosine(find(run, f"{OURS} int8", part, "parity"))
                for peer in peers or ["every peer's INT8"]:
                    paired, theirs = pair_of(ours, f"ratio{{}} to {peer}"), least_cosine(find(run, peer, part, "parity"))
                    known = finite(paired[0]) and finite(cosine) and finite(theirs)
                    measured = f"{as_spread(paired)}; {as_cosine(cosine)} against {as_cosine(theirs)}" if known else None
                    met = bool(paired[0] < 1 and cosine >= theirs) if known else None
                    say(run, f"{model} INT8, one {part}: time to that of {peer}; least cosine to fp32", "under 1; not less", measured, met)
    for which, part, until in ((COLD, "infer", "infer's answer"), (COMPARE, "both", "its first embeddings")):
        for run in runs(rows, which, LITE) or [[]]:
            ratio = quotient(find(run, f"{OURS} int8", part, "cold"), find(run, REFERENCE, part, "cold"), "p50_ms")
            what = f"{LITE} INT8, from a new process to {until}: time to that of {REFERENCE}"
            met = None if ratio is None else ratio < COLD_LIMIT
            say(run, what, f"under {COLD_LIMIT:g}", None if ratio is None else f"{ratio:.3f}", met)
    for run in runs(rows, PREPROCESSING) or [[]]:
        others = [r for r in run if r["system"] != OURS]
        windowing = [r for r in others if r["part"].startswith("window")]
        hoped = f"at least {PIXELS:g} times, {PIXELS_HOPED:g} hoped for"
        for row in windowing:
            paired = pair_of(row["figures"], "times_ours{}")
            more = f", {PIXELS_HOPED:g} too" if finite(paired[0]) and paired[0] >= PIXELS_HOPED else ""
            say(
                run, f"{row['model']}, {row['part']}: {row['system']}, to ours", hoped, as_spread(paired), at_least(paired[0], PIXELS), more
            )
        if not windowing:
            say(run, "window and preprocess a radiograph: open_clip's path, to ours", hoped, None, None)
        reach = "not faster: its quartiles reach 1"
        decoded = [r for r in others if r["part"].startswith("decode") and finite(r["figures"].get("times_ours"))]
        for part in dict.fromkeys(r["part"] for r in decoded):
            fastest = min((r for r in decoded if r["part"] == part), key=lambda r: float(r["figures"]["times_ours"]))
            paired = pair_of(fastest["figures"], "times_ours{}")
            say(run, f"{part}: the fastest other, {fastest['system']}, to ours", reach, as_spread(paired), at_least(paired[2], 1))
        if not decoded:
            say(run, "decode JPEG 2000, JPEG-LS and RLE: the fastest other, to ours", reach, None, None)
    for run in on_a_gpu(rows) or [[]]:
        for aim in gpu_aims(run):
            met = (at_least if aim.is_least else at_most)(aim.measured, aim.limit)
            limits = f"at {'least' if aim.is_least else 'most'} {aim.limit:g}"
            say(run, f"GPU: {aim.what}", limits, None if aim.measured is None else f"{aim.measured:.3g}", met)
    return [
        "Met or missed by the median of the rounds, with its quartiles in brackets. Radiographs' pixels were compared before they were "
        "timed, as were decoders' samples. Where a peer's INT8 is faster and its cosine less, the aim is missed all the same.",
        Table(["aim", "limit", "measured", "", "run"], found, left=5),
    ]
