"""Answer extraction, graders, the LLM judge, and the combination of accuracy and format."""
