"""Time to the first token with the prefix cache and its stores."""
