"""The tasks of `make bench`, one a file. Each has `tables(rules)`: its tables, with what they compare."""
