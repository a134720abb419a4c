"""Tests of hub/backbones."""
