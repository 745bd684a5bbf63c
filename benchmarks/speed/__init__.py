"""The tasks of `make bench`, one a file. Each has `tables(repeats)`: its tables, with what they compare."""
