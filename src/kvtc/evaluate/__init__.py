"""What a restored cache is worth: quality against the exact cache on text and on tasks, and the
source of every number.
"""
