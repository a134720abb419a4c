"""Where the halves of a model come from."""
