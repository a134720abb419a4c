"""Semantic ids: an item as a few codes of residual k-means, for recommenders that generate items code by code."""
