"""Finds what is wrong with a data set, and writes a corrected copy: `python -m dataset.audit`."""
