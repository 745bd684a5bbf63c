"""Faults that are done for real, and what the library and the EchoIR trainer make of each."""
