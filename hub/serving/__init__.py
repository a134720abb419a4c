"""Embeddings and search over HTTP: what a request may hold, how requests become batches, and the routes."""
