"""Drawn pictures that are no radiology images, by kind: what photographs, documents and other clinics' pictures look like, from a seed.

Each function but those of tools.py takes a generator and gives one picture (288 x 288, grey or RGB). None needs a file, so that training
has them everywhere.
"""

from collections.abc import Callable

from PIL import Image

from pmclip_deploy.train.drawings.clinics import face, fundus, scope, skin, slide, tissue
from pmclip_deploy.train.drawings.paper import chart, code, logo, page, plan, screen, trace
from pmclip_deploy.train.drawings.patterns import blank, cells, clouds, dead_leaves, ground, noise, ramp, shapes, stripes, weave
from pmclip_deploy.train.drawings.things import bokeh, box, cutout, leaf, section, vessel, view, wood
from pmclip_deploy.train.drawings.tools import SIZE as SIZE
from pmclip_deploy.train.drawings.tools import Rng

DRAWN: dict[str, Callable[[Rng], Image.Image]] = {
    f.__name__: f
    for f in (
        *(blank, noise, clouds, ramp, stripes, shapes, dead_leaves, cells, ground, weave),
        *(page, screen, chart, trace, plan, logo, code),
        *(vessel, box, cutout, bokeh, view, wood, leaf, section),
        *(face, skin, fundus, scope, tissue, slide),
    )
}
