"""Which films stay together, and which the demo keeps from all training. Standard library only: benchmarks read it without torch."""

import re
from typing import Any

NORMALS = 10  # of Kermany's normal films, which name no patient: file numbers in a row that stay together
KEPT_FOR_DEMO = ("fa0159",)  # FracAtlas's group of both films of `pmclip-deploy demo` (demo.py), whole


def group_of_row(row: dict[str, Any]) -> str:
    """Of a row of FracAtlas's or Kermany's labels.jsonl: what measures keeps together, whatever the label calls it. Raises KeyError."""
    number = re.search(r"IM-(\d+)-", row["image"])  # a normal film of Kermany's; the others are named by their patients
    return f"{row['group']}{int(number[1]) // NORMALS}" if number else row["group"]


def kept_for_demo(group: str) -> bool:
    """Whether a film of this group may neither train nor validate."""
    return group in KEPT_FOR_DEMO
