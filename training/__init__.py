"""From item and pair tables to a trained and measured NoteLLM-2 model."""
