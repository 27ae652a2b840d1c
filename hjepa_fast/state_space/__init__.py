"""Mechanical systems on their states: gradients of H, steps and their adjoints, written out. See `equations.py`."""
