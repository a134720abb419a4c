"""Encoding a whole catalogue, and reading what that wrote."""
