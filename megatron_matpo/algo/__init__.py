"""Advantages and losses: pure functions, no process groups."""
