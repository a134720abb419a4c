"""Tests of training/tables/commands."""
