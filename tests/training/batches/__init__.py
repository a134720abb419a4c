"""Tests of training/batches."""
