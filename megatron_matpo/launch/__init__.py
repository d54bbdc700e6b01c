"""Starts the roles of a run as processes, watches them, and leaves none behind."""
