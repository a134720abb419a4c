"""Catalogues and models for the Massive Text Embedding Benchmark, the library mteb."""
