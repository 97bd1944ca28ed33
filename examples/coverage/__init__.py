"""Which models compile: a list of models, a check of each in a process of its own, a table."""
