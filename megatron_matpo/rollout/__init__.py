"""The rollout manager: one asyncio process that runs a step's episodes. Torch-free."""
