"""The process that kvtc is a guest in: threads, forks, logs, progress, and the caller's torch state."""
