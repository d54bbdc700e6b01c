"""Fakes of everything a rollout needs: tokenizers, chat templates, engine, tools, data rows."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from megatron_matpo.agents.tools import ToolReply, ToolSpec
from megatron_matpo.agents.xml_calls import CALL_EXAMPLE
from megatron_matpo.config.agents import AgentConfig
from megatron_matpo.config.data import DataConfig
from megatron_matpo.config.evaluation import EvalConfig
from megatron_matpo.config.reward import RewardConfig
from megatron_matpo.config.rollout import RolloutConfig
from megatron_matpo.config.root import Config
from megatron_matpo.config.run import ObsConfig, RunConfig
from megatron_matpo.data.chat import Chat
from megatron_matpo.data.dataset import Question
from megatron_matpo.data.tokenizer import Tokenizer
from megatron_matpo.types import VersionSpan

# Behaves as Qwen3's: earlier thoughts are stripped, and an empty one is put before a last reply.
CHATML = """\
{%- set ns = namespace(last=-1) -%}
{%- for m in messages %}
  {%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
  {%- if m.role == 'assistant' %}
    {%- set said = m.content.split('</think>')[-1].lstrip('\n') %}
    {{- '<|im_start|>assistant\n' }}
    {%- if loop.index0 > ns.last %}{{- '<think>\n\n</think>\n\n' }}{% endif %}
    {{- said + '<|im_end|>\n' }}
  {%- else %}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
THINKING = CHATML.replace(
    "{{- '<|im_start|>assistant\n' }}{% endif %}",
    "{{- '<|im_start|>assistant\n<think>\n' }}{% endif %}",
)
LLAMA3 = """\
{%- for m in messages %}{% if loop.first %}{{- bos_token }}{% endif %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
MISTRAL = """\
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}
{%- set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{{- bos_token }}
{%- for m in rest %}
  {%- set must_be_user = loop.index0 % 2 == 0 %}
  {%- if (m.role == 'user') != must_be_user %}{{ raise_exception('must alternate') }}{% endif %}
  {%- if m.role == 'user' %}
    {%- if loop.last and system is defined %}
      {{- '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}
    {%- else %}{{- '[INST] ' + m.content + '[/INST]' }}{% endif %}
  {%- else %}{{- ' ' + m.content | trim + eos_token }}{% endif %}
{%- endfor %}"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL}

_SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<s>", "</s>", "[INST]", "[/INST]"),
)


def byte_tokenizer() -> tokenizers.Tokenizer:
    """One token per byte, and the special tokens of all templates above."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(text, special=True) for text in _SPECIALS])
    return bpe


def make_tokenizer(template: str = CHATML) -> Tokenizer:
    """A `Tokenizer` with one of the templates above."""
    bos = "<|begin_of_text|>" if template == LLAMA3 else "<s>"
    return Tokenizer(byte_tokenizer(), template, {"bos_token": bos, "eos_token": "</s>"}, "test")


def make_chat(template: str = CHATML) -> Chat:
    """A `Chat` with one of the templates above."""
    return Chat(make_tokenizer(template))


def call(server: str, tool: str, closed: bool = True, **arguments: Any) -> str:
    """A tool call as the model has to write it."""
    text = CALL_EXAMPLE.replace("SERVER", server).replace("TOOL", tool)
    text = text.replace('{"ARGUMENT": "VALUE"}', json.dumps(arguments))
    return text if closed else text.removesuffix("</use_mcp_tool>")


def search(query: str, closed: bool = True) -> str:
    """A call of the fake search tool."""
    return call("web", "search", closed, q=query)


def delegate(subtask: str, agent: str = "browser") -> str:
    """A call of a worker agent."""
    return call(agent, "search_and_browse", subtask=subtask)


@dataclass(frozen=True)
class FakeGeneration:
    """What `FakeEngine` returns."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    versions: tuple[VersionSpan, ...]


Script = Callable[[str, int, str], str | BaseException]
"""(conversation id, number of its earlier turns, its text so far) -> the turn, or what fails."""


@dataclass
class FakeEngine:
    """Speaks `Sampler` and plays a script; a text that ends with "..." is cut by length."""

    script: Script
    tokenizer: Tokenizer = field(default_factory=make_tokenizer)
    end: str = "<|im_end|>"
    version: int = 0
    delay_s: float = 0.0
    contexts: list[tuple[str, list[int]]] = field(default_factory=list)
    outputs: dict[str, list[list[int]]] = field(default_factory=dict)
    max_tokens: list[int] = field(default_factory=list)
    num_running: int = 0
    max_running: int = 0

    async def sample(
        self, ids: Sequence[int], max_tokens: int, conversation_id: str
    ) -> FakeGeneration:
        self.contexts.append((conversation_id, list(ids)))
        self.max_tokens.append(max_tokens)
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        try:
            await asyncio.sleep(self.delay_s)
        finally:
            self.num_running -= 1
        turns = self.outputs.setdefault(conversation_id, [])
        answer = self.script(conversation_id, len(turns), self.tokenizer.decode(ids))
        if isinstance(answer, BaseException):
            raise answer
        is_cut = answer.endswith("...")
        out = self.tokenizer.encode(answer if is_cut else answer + self.end)
        is_cut = is_cut or len(out) > max_tokens
        out = out[:max_tokens]
        turns.append(out)
        logprobs = tuple(-(i + 1) / 16 for i in range(len(out)))
        reason = "length" if is_cut else "stop"
        return FakeGeneration(tuple(out), logprobs, reason, (VersionSpan(self.version, len(out)),))


def _schema(*required: str, **more: str) -> dict[str, Any]:
    names = {name: {"type": "string"} for name in required}
    names |= {name: {"type": kind} for name, kind in more.items()}
    return {"type": "object", "properties": names, "required": list(required)}


@dataclass
class FakeToolBox:
    """Two servers: `web` with search and scrape, `calc` with add. Echoes its arguments."""

    delays_s: dict[str, float] = field(default_factory=dict)
    """By query."""
    failure: BaseException | None = None
    seen: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    num_cancelled: int = 0

    def specs(self) -> list[ToolSpec]:
        return [
            ToolSpec("web", "search", "Search.", _schema("q", num="integer")),
            ToolSpec("web", "scrape", "Read a page.", _schema("url")),
            ToolSpec("calc", "add", "Add.", _schema(a="number", b="number")),
        ]

    async def call(self, server: str, tool: str, arguments: dict[str, Any]) -> ToolReply:
        self.seen.append((server, tool, arguments))
        try:
            await asyncio.sleep(self.delays_s.get(str(arguments.get("q")), 0.0))
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if self.failure is not None:
            raise self.failure
        return ToolReply(f"{tool} says {json.dumps(arguments)}", arguments.get("q") == "error")


def make_question(name: str = "Who?", truth: str = "Ada") -> Question:
    """A data row."""
    return Question("You plan.", f"{name} Box it.", name, truth, "test")


def make_config(run_dir: str = "runs", **rollout: Any) -> Config:
    """Planner `planner` with worker `browser`, which has the server `web`."""
    return Config(
        run=RunConfig(name="test", dir=run_dir),
        data=DataConfig(prompts_per_step=2, samples_per_prompt=2),
        eval=EvalConfig(max_rows=3),
        rollout=RolloutConfig(**{"planner": "planner", "context_length": 4000} | rollout),
        agents={
            "planner": AgentConfig(
                role="planner", tools=["browser"], max_turns=4, final_summary="never"
            ),
            "browser": AgentConfig(
                role="worker", tools=["web"], max_turns=3, final_summary="never"
            ),
        },
        reward=RewardConfig(),
        obs=ObsConfig(record_rollouts=False, trace_every=0),
    )
