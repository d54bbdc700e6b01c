"""The trainer's engine: the only package that imports Megatron-Core and Transformer Engine."""
