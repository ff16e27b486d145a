"""The embedded default model: ``pmclip-lite/checkpoint`` (weights) and ``pmclip-lite/bundle`` (what ``infer`` runs)."""

from pathlib import Path

DEFAULT_CHECKPOINT = Path(__file__).parent / "pmclip-lite" / "checkpoint"
DEFAULT_BUNDLE = Path(__file__).parent / "pmclip-lite" / "bundle"
