"""What a restored cache is worth: quality against the exact cache on real text, tables, plots, and
where numbers come from.
"""
