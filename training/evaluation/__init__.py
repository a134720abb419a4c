"""How good embeddings are: ranks, metrics, slices, baselines, saliency."""
