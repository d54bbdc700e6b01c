"""Statistics of evaluations, their results on disk, and the table. Torch-free."""
