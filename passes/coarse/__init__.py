"""Coarse networks: one file a family, and the choice between them."""
