"""Answer extraction, graders and the combination of accuracy and format. Torch-free, no I/O."""
