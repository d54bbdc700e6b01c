"""Roles, prompts, the tool-call grammar and the planner/worker driver. Torch-free, no I/O."""
