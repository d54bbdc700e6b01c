"""`matpo simulate`: a discrete-event model of a training step. Pure Python; docs/simulate.md."""
