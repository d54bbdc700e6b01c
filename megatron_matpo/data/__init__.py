"""Dataset rows, chat rendering, and episode trees as training samples. Torch-free."""
