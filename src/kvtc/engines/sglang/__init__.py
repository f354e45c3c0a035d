"""kvtc in SGLang."""
