"""The container: the tables of a stream (`tables`), writing and parsing it (`stream`), splitting and joining it (`parts`)."""
