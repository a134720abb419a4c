"""Pairs of related items from interaction logs."""
