"""Largest values of formats of 8 and 16 bits."""

FLOAT16_MAX = 65504.0
E4M3_MAX = 448.0
