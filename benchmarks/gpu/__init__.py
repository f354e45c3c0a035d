"""Time of the codec on a CUDA device, by stage."""
