"""Configuration: YAML recipe and dotted overrides -> validated, frozen dataclasses. Torch-free."""

from megatron_matpo.config.load import dump_config, load_recipe, load_resolved
from megatron_matpo.config.root import Config

__all__ = ["Config", "dump_config", "load_recipe", "load_resolved"]
