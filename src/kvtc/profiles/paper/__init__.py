"""The profile `paper`: KVTC as published."""
