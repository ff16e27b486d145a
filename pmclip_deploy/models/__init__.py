"""The embedded default model: ``pmclip-lite/checkpoint`` (weights) and ``pmclip-lite/bundle`` (what ``infer`` runs).

``pmclip-lite/reference.npz`` is what the weights say to a few pictures in fp32, for ``bench``.
"""

from pathlib import Path

DEFAULT_CHECKPOINT = Path(__file__).parent / "pmclip-lite" / "checkpoint"
DEFAULT_BUNDLE = Path(__file__).parent / "pmclip-lite" / "bundle"
DEFAULT_REFERENCE = Path(__file__).parent / "pmclip-lite" / "reference.npz"
