"""Every operator: one folder each, whose `__init__.py` holds the function."""
