"""Reading item and pair tables: one answer to what an id, a text, a picture or a broken row is."""
