"""What operators of a store do: look at what is there, verify it, and carry it elsewhere."""
