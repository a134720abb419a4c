"""From tables to weights: batches, losses, the Trainer and what it keeps."""
