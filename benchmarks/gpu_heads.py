"""Stage "heads" of `benchmarks.gpu`: MEVF and QCR on SLAKE, trained and measured as `benchmarks.slake_heads` does.

The heads have the paper's size, and MEVF its 20 epochs. QCR has 20 of 200. What the time does not reach says so.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pmclip_deploy.benchmarks.gpu_stage import Figures, Stage
from pmclip_deploy.benchmarks.peers import LITE

if TYPE_CHECKING:  # torch is imported where a figure is measured
    from pmclip_deploy.benchmarks.slake_heads import Table


def measure(stage: Stage) -> None:
    from pmclip_deploy.benchmarks import slake_heads as of

    size = of.Size("gpu", epochs=20, tuned_epochs=20, type_epochs=20)
    tiny = of.Size("rehearsal", hidden=8, depth=1, epochs=1, tuned_epochs=1, type_epochs=1, batch_size=4, images=4, freeze_autoencoder=True)
    with tempfile.TemporaryDirectory() as folder:
        given = stage.files["slake"], stage.files["glove"], stage.files.get("autoencoder"), Path(folder)
        table = of.Table(*given, tiny if stage.is_rehearsal else size, device=stage.device)
        for head in of.HEADS:
            for tower in (of.NONE, of.TUNED) if stage.is_rehearsal else reversed(of.TOWERS):
                stage.measure(f"SLAKE, {head}, tower {tower}", "pmclip-deploy", partial(row, table, head, tower), model=LITE)


def row(table: Table, head: str, tower: str) -> Figures:
    """Accuracy of all, of open and of closed test questions, its interval, and that of the baselines."""
    made = table.row(head, tower)
    of_baselines = {name: groups["overall"]["accuracy"] for name, groups in made["baselines"].items()}
    low, high = made["overall"]["ci95"]
    of_groups = {name: made[name]["accuracy"] for name in ("overall", "open", "closed")}
    run = {key: made["run"][key] for key in ("epochs", "seconds")}
    return {**of_groups, "overall_low": low, "overall_high": high, **of_baselines, **run, "samples": made["overall"]["n"]}
