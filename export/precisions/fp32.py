"""fp32: the graphs as they are."""

from collections.abc import Iterator

from pmclip_deploy.export.precisions.base import Precision, Recipe, Work


def recipes(work: Work) -> Iterator[Recipe]:
    yield Recipe(work.graphs, precisions=dict.fromkeys(work.graphs, "fp32"))


PRECISION = Precision("fp32", 32, {"cosine": 0.9999, "max_abs": 1e-3}, recipes, stray=0.01)
