"""What `tune` chose beside the fastest peer, of the rows of a comparison."""

from __future__ import annotations

from pmclip_deploy.benchmarks.report_rows import OURS, PARTS, Rows, as_cosine, as_spread, find, least_cosine, pair_of
from pmclip_deploy.benchmarks.report_writing import Block, Heading, Table
from pmclip_deploy.benchmarks.systems import TUNED
from pmclip_deploy.export.page import finite

SAME = 1e-5  # of a cosine: what the order of sums changes


def after_tune(run: Rows) -> list[Block]:
    """A line for each precision, part and scenario; nothing where no tuned system ran."""
    systems = list(dict.fromkeys(row["system"] for row in run))
    table: list[list[str]] = []
    for ours in (name for name in systems if name.startswith(OURS) and name.endswith(TUNED)):
        for part in PARTS:
            cosine = least_cosine(find(run, ours, part, "parity"))
            for scenario in ("single-stream", "offline"):
                figures, peers = find(run, ours, part, scenario), list[tuple[str, tuple[float, float, float], float]]()
                for peer in systems:
                    paired, theirs = pair_of(figures, f"ratio{{}} to {peer}"), least_cosine(find(run, peer, part, "parity"))
                    if finite(paired[0]) and finite(cosine) and finite(theirs) and theirs >= cosine - SAME:
                        peers.append((peer, paired, theirs))
                if peers:
                    peer, paired, theirs = max(peers, key=lambda each: each[1][0])
                    said = [as_spread(paired) or "", as_cosine(cosine), as_cosine(theirs), "met" if paired[0] <= 1 else "missed"]
                    table.append([ours.removeprefix(OURS).strip(), part, scenario, peer, *said])
    header = ["after tune", "part", "scenario", "fastest peer", "time to it", "our cosine", "its cosine", "at most 1"]
    return [
        Heading("After tune"),
        "Beside the fastest peer whose least cosine to fp32 is not less.",
        Table(header, table, left=4),
    ] if table else []  # fmt: skip
