"""Tokens that are stored exactly, or in fp8: their numbers as bytes."""
