"""kvtc in LMCache."""
