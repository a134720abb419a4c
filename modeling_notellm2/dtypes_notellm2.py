"""Names of the types that a model computes in. Needs no torch, so that a command lists them in no time."""

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""What `--dtype` takes."""


__all__ = ["DTYPES"]
