"""Tests of training/experiments."""
