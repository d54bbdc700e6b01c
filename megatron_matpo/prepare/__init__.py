"""`matpo data`: data sets checked, built and given the recipe's prompts, before any run."""
