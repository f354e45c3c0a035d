"""The profiles `joint` and `conditional`."""
