"""Models of transformers: what they cache, calibration on them, who they are."""
