"""Pages that show a catalogue."""
