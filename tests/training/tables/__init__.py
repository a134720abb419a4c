"""Tests of training/tables."""
