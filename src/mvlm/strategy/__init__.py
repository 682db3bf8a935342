"""Axis 3: which parts learn, how fast, in which stage (paper, Tables 1 and 3)."""
