"""Time of the codec and of its stages on the CPU."""
