"""Stages of the profile `paper` alone."""
