"""The server of embeddings and neighbours."""
