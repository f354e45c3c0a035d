"""Stages of the profiles `joint` and `conditional`."""
