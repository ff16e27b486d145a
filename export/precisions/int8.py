"""int8: weights and what they are multiplied with, calibrated on pictures, with as few layers in float as the gates allow."""

from collections.abc import Iterator

from pmclip_deploy.export.precisions.base import Precision, Recipe, Work


def recipes(work: Work) -> Iterator[Recipe]:
    return work.int8()


PRECISION = Precision("int8", 8, {"cosine_mean": 0.99}, recipes, calibrated=True)  # of the mean: the answers decide
