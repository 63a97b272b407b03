"""Measurements of time and memory, with a description of their environment."""
