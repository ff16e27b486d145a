"""Run in a network namespace of its own: Orthanc commits itself to one report on an association of its own, and loses another one.

Usage: python commit_chain.py FOLDER.  Prints what came out, as JSON.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.node.running import listening, sent, slices
from tests.report import orthanc

TO = {"to": f"dicom:ORTHANC@127.0.0.1:{orthanc.DICOM}", "commit": "true", "i_understand_this_is_research": "true"}
PEERS = [{"aet": name, "addresses": ["127.0.0.1"]} for name in ("SENDER", "ORTHANC")]
NODE = {"PMCLIP": {"AET": "PMCLIP", "Host": "127.0.0.1", "Port": 11112, "AllowStorageCommitment": True}}

LOSES = "function OnStoredInstance(id, tags) if tags['PatientID'] == 'LOST' then Delete(id) end end"


def main() -> None:
    folder = Path(sys.argv[1])
    (folder / "loses.lua").write_text(LOSES)
    orthanc.loopback_up()
    with (
        orthanc.running(folder / "orthanc", DicomModalities=NODE, LuaScripts=[str(folder / "loses.lua")]),
        listening(folder, node={"port": "11112"}, peers=PEERS, send=[TO]) as node,
    ):
        assert sent(node.port, slices(1)) == [0]
        node.until(lambda: node.events("committed"))
        rows = [json.loads(line) for line in node.lines if line.startswith("{")]
        events = [row["event"] for row in rows if row["event"] in ("sent", "committed", "refused")]
        counts, kept = json.loads(node.queue("show", "--json").stdout)["counts"], orthanc.kept()
        assert sent(node.port, slices(1, PatientID="LOST")) == [0]
        node.until(lambda: node.events("refused") or len(node.events("committed")) > 1)
        row = json.loads(node.queue("show", "--json").stdout)["jobs"]
        lost = f"{row[0]['sent']} {row[0]['refused']}" if row else "none"
        print(json.dumps({"events": events, "counts": counts, "kept": len(kept), "lost": lost}))


if __name__ == "__main__":
    main()
