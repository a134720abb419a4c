"""What a model's card says."""
