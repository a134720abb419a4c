"""Tests of hub/cards."""
