"""A world in integers.

`integer` and `graph` say what is computed, `program` writes it down for TinyEngine, `build` and `cases` run that.
"""
