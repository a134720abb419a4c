"""After and around training: assembling, converting, publishing, encoding and indexing models."""
