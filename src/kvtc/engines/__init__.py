"""Serving engines, each in a folder of its own; here what they share."""
