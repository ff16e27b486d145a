"""fp16: on a CPU, which would convert before each product, the weights are stored so; elsewhere the graphs compute in it."""

from collections.abc import Iterator

from pmclip_deploy.export.precisions.base import STORED, Precision, Recipe, Work


def recipes(work: Work) -> Iterator[Recipe]:
    from pmclip_deploy.export.weights import half_stored

    if work.target == "cpu":
        stored = {name: half_stored(model) for name, model in work.graphs.items()}
        yield Recipe(stored, precisions=dict.fromkeys(work.graphs, STORED))
    else:
        yield work.half()


PRECISION = Precision("fp16", 16, {"cosine": 0.999}, recipes, stray=0.1)
