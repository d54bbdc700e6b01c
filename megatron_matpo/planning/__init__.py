"""`matpo plan`: memory, micro-batches and layouts of a run, reckoned before anything starts."""
