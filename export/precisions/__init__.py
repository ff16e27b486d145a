"""The precisions of `export --precision`, by name: each file here but ``base`` has one. Standard library only, so that help is cheap."""

from importlib import import_module
from pkgutil import iter_modules

from pmclip_deploy.export.precisions.base import Precision

_modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__) if module.name != "base"]
_found: list[Precision] = sorted((module.PRECISION for module in _modules), key=lambda precision: (-precision.bits, precision.name))
PRECISIONS = {precision.name: precision for precision in _found}
TENSOR_GATES = {name: precision.gate for name, precision in PRECISIONS.items()}
