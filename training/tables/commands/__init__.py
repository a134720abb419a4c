"""What all commands share: how they start and end, options with bounds, files written whole, guarded outputs."""
