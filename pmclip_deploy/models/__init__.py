"""The embedded default model: ``pmclip-lite/checkpoint`` (weights) and ``pmclip-lite/bundle`` (what ``infer`` runs).

``pmclip-lite/reference.npz`` is what the weights say to a few pictures in fp32, for ``bench``. ``demo`` holds two radiographs of
FracAtlas (CC BY 4.0) as DICOM files, written by ``train/findings/demo.py``, and what is true of them.
"""

from pathlib import Path

DEFAULT_CHECKPOINT = Path(__file__).parent / "pmclip-lite" / "checkpoint"
DEFAULT_BUNDLE = Path(__file__).parent / "pmclip-lite" / "bundle"
DEMO = Path(__file__).parent / "demo"
DEFAULT_REFERENCE = Path(__file__).parent / "pmclip-lite" / "reference.npz"
