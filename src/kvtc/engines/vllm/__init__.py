"""kvtc in vLLM."""
