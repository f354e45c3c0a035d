"""Recurrent states rounded to a few bits, from their numbers to bytes and back."""
