"""Tests of modeling_notellm2."""
