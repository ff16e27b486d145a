"""Which graphs a bundle has, what they take and give, and which of them a question needs."""

from collections.abc import Mapping
from typing import TypeAlias

from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.decision.evidence import FACETS

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


def graphs_of_ask(manifest: Manifest) -> tuple[str, ...]:
    """The graphs that ``ask`` runs; without a head both towers."""
    head = manifest.head
    if head is None:
        return ("image", "text")
    needed = {"image": head.clip, "text": head.words is None and not asks_from_memory(manifest), "features": bool(head.grey), "head": True}
    return tuple(name for name, is_needed in needed.items() if is_needed)


def asks_from_memory(manifest: Manifest) -> bool:
    """Whether the bundle keeps the embeddings of all that its head is asked to answer any question."""
    return bool(facet_kinds(manifest)) and {question for _, question in FACETS.values()} <= {*manifest.asked}


def facet_kinds(manifest: Manifest) -> dict[str, int]:
    """The place of each of FACETS among the kinds of question; empty where the rules of decision are not about this head."""
    places = {kind.name: i for i, kind in enumerate(manifest.kinds)}
    known = all(kind in places for kind, _ in FACETS.values())
    return {facet: places[kind] for facet, (kind, _) in FACETS.items()} if known else {}
