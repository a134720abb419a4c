"""Tests of training/reporting."""
