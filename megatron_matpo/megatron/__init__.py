"""The trainer's engine: the only package that imports Megatron-Core and Transformer Engine."""

import warnings

# Megatron-Core announces at import what it found no accelerator libraries for, and calls torch
# functions that torch renames. Neither is something that the reader of a log can act on.
warnings.filterwarnings("ignore", module=r"megatron\.core")
warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated")
warnings.filterwarnings("ignore", message=r".*CUDA_DEVICE_MAX_CONNECTIONS")
warnings.filterwarnings("ignore", message=r".*torch\.jit\.script.* is deprecated")
