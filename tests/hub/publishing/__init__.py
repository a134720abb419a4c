"""Tests of hub/publishing."""
