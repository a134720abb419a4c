"""Tests of hub/benchmark."""
