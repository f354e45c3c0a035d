"""Entries as files of a directory that processes share."""
