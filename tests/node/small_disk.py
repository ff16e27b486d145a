"""Run in a mount namespace of its own: a node whose state lies on a disk of 20 MB, and more images than that holds.

Usage: python small_disk.py FOLDER.  Prints the statuses, whether the node was ready, and what became of it, as JSON.
"""

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.node.running import asked, listening, sent, slices


def main() -> None:
    folder = Path(sys.argv[1])
    (folder / "state").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "none", folder / "state"], check=True)
    options = {"disk": {"refuse_below_gb": "0.006", "retention_images": "on_sent"}, "metrics": {"port": "0"}}
    with listening(folder, **options) as node:
        port, statuses = node.events("metrics")[0]["port"], Counter[str]()
        rest = slices(450)
        for _ in range(40):
            answers = sent(node.port, rest)
            statuses.update(f"{status:04X}" if status is not None else "none" for status in answers)
            if 0xA700 in answers:
                statuses[f"ready {asked(port, 'ready')[0]}"] += 1
            rest = [image for image, status in zip(rest, answers, strict=True) if status != 0]
            if not rest:
                break
            time.sleep(2)
        node.until(lambda: set(json.loads(node.queue("show", "--json").stdout)["counts"]["job"]) == {"done"})
        counts = json.loads(node.queue("show", "--json").stdout)["counts"]
        print(json.dumps({"statuses": statuses, "left": len(rest), "counts": counts, "ready": asked(port, "ready")[0]}))


if __name__ == "__main__":
    main()
