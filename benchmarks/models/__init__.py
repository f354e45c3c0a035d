"""The models that published numbers are measured on, where they do not ship with kvtc."""
