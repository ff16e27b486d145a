"""Which graphs a bundle has, and what they take and give."""

from collections.abc import Mapping
from typing import TypeAlias

from pmclip_deploy.bundle.manifest import Manifest

Contract: TypeAlias = Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]
CONTRACT: Contract = {  # inputs and outputs of each graph, where the head is pmclip-lite's
    "image": (("pixels",), ("embedding",)),
    "text": (("tokens",), ("embedding",)),
    "head": (("image", "text"), ("answer", "kind", "radiograph")),
}


def contract_of(manifest: Manifest) -> Contract:
    """The inputs and outputs of each graph of a bundle, in their order."""
    contract, head = {name: CONTRACT[name] for name in ("image", "text")}, manifest.head
    if head is not None:
        contract["head"] = CONTRACT["head"] if head.words is None else (("image", "tokens"), ("answer", "kind"))
        if head.details:
            contract["image"] = (("pixels",), ("embedding", "details"))
        if head.grey:
            contract["features"] = (tuple(head.grey), ("features",))
    if manifest.findings:
        contract["findings"] = (("pixels",), ("finding", "region", "places"))
    if manifest.labels:
        contract["labels"] = (("image", "bank", "logit_scale"), ("score", "index", "log_sum_exp"))
    return contract
