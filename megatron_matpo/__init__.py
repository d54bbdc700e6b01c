"""Reinforcement learning of planner/worker agents with Megatron-Core, SGLang and asyncio."""

__version__ = "0.1.0"
