"""Nearest neighbours of an encoded catalogue: an index of our own, or files for a vector database."""
