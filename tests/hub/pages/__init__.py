"""Tests of hub/pages."""
