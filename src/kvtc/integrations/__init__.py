"""Bridges from model libraries and serving engines to the neutral cache."""
