"""`matpo doctor`: what a run needs of the machines, looked at before the run does."""
