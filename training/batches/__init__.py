"""What a step sees: the tables of a run, pairs drawn and collated, pictures encoded once, what is no negative."""
