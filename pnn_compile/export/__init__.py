"""Other formats of a compiled network."""
