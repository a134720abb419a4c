"""Tests of training/mining."""
