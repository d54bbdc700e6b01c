"""A scripted fake engine: speaks `EngineControl`, keeps what it is given, fails where told."""

from __future__ import annotations

import asyncio
import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_matpo.errors import EngineRejected, EngineUnreachable
from megatron_matpo.weight_sync.checksums import host_checksum
from megatron_matpo.weight_sync.layout import EngineLayout, EngineShape

SHAPE = EngineShape(num_ranks=1, num_kv_heads=2, dtype=torch.float32)


def write_safetensors(folder: Path, tensors) -> None:
    """What the trainer's writer does, for the transport `disk`."""
    folder.mkdir()
    save_file({name: tensor.clone() for name, tensor in tensors}, folder / "model.safetensors")


class ScriptedFakeEngine:
    """`fails` maps a verb to `refuses`, `hangs` or `dies` (and is then unreachable for good)."""

    def __init__(self, name="engine", **fails):
        self.url = f"fake://{name}"
        self.fails = fails
        self.version = "0"
        self.weights: dict[str, torch.Tensor] = {}
        self.is_paused = False
        self.is_dead = False
        self.released: set[str] = set()
        self.asked: list[str] = []

    async def _enter(self, verb):
        self.asked.append(verb)
        match self.fails.get(verb):
            case "refuses":
                raise EngineRejected(f"{self.url}: scripted refusal of {verb}")
            case "hangs":
                await asyncio.sleep(3600)
            case "dies":
                self.is_dead = True
        if self.is_dead:
            raise EngineUnreachable(f"{self.url}: scripted death")

    async def wait_ready(self, *, deadline_s):
        await self._enter("wait_ready")

    async def pause(self, *, mode, deadline_s):
        await self._enter("pause")
        self.is_paused = True

    async def resume(self, *, deadline_s):
        assert not self.released, "nothing is sampled without weights and cache"
        await self._enter("resume")
        self.is_paused = False

    async def wait_idle(self, *, deadline_s):
        await self._enter("wait_idle")

    async def update_weights_from_disk(self, *, folder, weight_version, flush_cache, deadline_s):
        assert self.is_paused, "weights change only while nothing is sampled"
        await self._enter("update")
        self.weights = load_file(Path(folder) / "model.safetensors")
        if self.fails.get("update") == "corrupts":
            next(iter(self.weights.values())).view(-1)[0] += 1e-3
        if self.fails.get("update") != "forgets":
            self.version = weight_version

    async def update_weights_from_tensor(
        self, *, payloads, weight_version, flush_cache, deadline_s
    ):
        assert self.is_paused, "weights change only while nothing is sampled"
        assert "weights" not in self.released, "there is room for them"
        await self._enter("load")
        (payload,) = payloads
        flat = pickle.loads(payload)  # what a test made, in this process
        for item in flat["metadata"]:
            data = flat["flattened_tensor"][item.start_idx : item.end_idx]
            self.weights[item.name] = data.view(item.dtype).view(item.shape).clone()
        if weight_version is not None:
            assert flush_cache, "cached prefixes belong to the old weights"
            self.version = weight_version

    async def release_memory(self, *, tags, deadline_s):
        assert self.is_paused, "SGLang ends its scheduler if it is not idle"
        await self._enter("release " + "+".join(tags))
        self.released |= set(tags)
        if "weights" in tags:
            self.weights = {}

    async def resume_memory(self, *, tags, deadline_s):
        assert set(tags) <= self.released, "SGLang ends its scheduler otherwise"
        await self._enter("take " + "+".join(tags))
        self.released -= set(tags)

    async def flush_cache(self, *, deadline_s):
        await self._enter("flush")

    async def weight_version(self, *, deadline_s):
        await self._enter("version")
        return self.version

    async def weight_checksums(self, *, deadline_s):
        assert self.is_paused, "nothing is served before it is verified"
        await self._enter("checksums")
        layout = EngineLayout(SHAPE)
        return [
            {
                engine_name: host_checksum(parts[0])
                for name, tensor in self.weights.items()
                for engine_name, parts in layout.take(name, tensor)
            }
        ]

    async def close(self):
        pass
