"""Two findings as a manifest lists them: one that was measured on hands and is refused on legs, and one of children's chests."""

from dataclasses import replace

from pmclip_deploy.bundle.types import Finding, Findings, Stratum
from pmclip_deploy.spec import Preprocess

HAND = Stratum("xr", "hand", 100, 30, 0.9, (0.85, 0.95), threshold=1.0, yes=(24, 32), no=(62, 68), slope=2.0, intercept=-2.0)
LEG = replace(HAND, region="leg", reason="the lower bound of the AUROC is 0.62, and 0.70 is needed")
CHEST = replace(HAND, region="chest", children=True)
FINDINGS = Findings(
    Preprocess(320, "pad", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), True),
    ("hand", "leg", "chest", "other"),
    (Finding("fracture", (HAND, LEG)), Finding("pneumonia", (CHEST,))),
)
