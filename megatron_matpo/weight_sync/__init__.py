"""Trainer weights to rollout engines, after every step."""
