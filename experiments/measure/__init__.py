"""Measuring: time, memory, and what a number depends on besides the program."""
