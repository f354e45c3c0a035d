"""What the codec's parts are worth: rate and quality on held-out text."""
