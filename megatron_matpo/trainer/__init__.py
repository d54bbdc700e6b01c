"""The training process: wiring, the loop on one screen, and supervised training."""
