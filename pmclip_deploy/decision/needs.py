"""Which graphs of a bundle a question needs."""

from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.decision.evidence import FACETS


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


def asked_of(manifest: Manifest) -> tuple[str, ...]:
    """All that the head is asked to answer any question, where the rules of decision are about it."""
    return tuple(sorted({question for _, question in FACETS.values()})) if facet_kinds(manifest) else ()


def facet_kinds(manifest: Manifest) -> dict[str, int]:
    """The place of each of FACETS among the kinds of question; empty where the rules of decision are not about this head."""
    places = {kind.name: i for i, kind in enumerate(manifest.kinds)}
    known = all(kind in places for kind, _ in FACETS.values())
    return {facet: places[kind] for facet, (kind, _) in FACETS.items()} if known else {}
