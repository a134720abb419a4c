"""Data sets and experiments: uses the product, and nothing of the product uses it."""
