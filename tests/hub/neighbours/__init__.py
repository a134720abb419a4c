"""Tests of hub/catalogue."""
