"""Names of methods: which of them are points of one curve."""

from __future__ import annotations


def split_name(name: str) -> tuple[str, str]:
    """The series and the setting of a method's name: "paper 16x" -> ("paper", "16x"), "FP8" ->
    ("FP8", "").

    The setting is the last word if it holds a digit.
    """
    series, _, setting = name.rpartition(" ")
    return (series.rstrip(","), setting) if series and any(map(str.isdigit, setting)) else (name, "")
