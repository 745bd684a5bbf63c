"""The other libraries of the field, each used as its own documentation uses it, on the same work."""
