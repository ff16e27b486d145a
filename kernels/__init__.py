"""The fused contrastive-similarity kernel: normalise, scaled dot products, log-sum-exp and top-k in one pass over a bank of embeddings."""
