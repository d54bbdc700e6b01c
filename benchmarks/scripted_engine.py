"""A rollout engine that plays a schedule: SGLang's HTTP protocol without a model.

    python -m benchmarks.scripted_engine --model FOLDER --shape JSON   (prints its port)

`POST /generate` takes `input_ids` and answers with `output_ids`, log-probs and policy versions as
SGLang 0.5.20 does, after the latency that the schedule has for this turn, counted from the moment
the request was read. It keeps no state: which episode, agent and turn is asked for is read from the
context, so that repeated requests get the same answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from pydoc_data.topics import topics

import orjson
import tokenizers
from aiohttp import web
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from benchmarks import rollout_schedule as schedule
from megatron_matpo.data.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_VOCAB_SIZE = 16_000
_CALL = (
    "<use_mcp_tool>\n<server_name>{server}</server_name>\n<tool_name>{tool}</tool_name>\n"
    "<arguments>\n{arguments}\n</arguments>\n</use_mcp_tool>"
)


def write_model_folder(folder: Path) -> None:
    """A byte-level BPE tokenizer, trained on Python's own manual, with a ChatML template."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE,
        special_tokens=[AddedToken(text, special=True) for text in _SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(topics.values(), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))


class ScriptedEngine:
    """Answers `/generate` from a schedule."""

    def __init__(self, tokenizer: Tokenizer, shape: schedule.Shape, version: int = 0) -> None:
        """`version` is the policy version that all tokens are said to be of."""
        self._tokenizer = tokenizer
        self._shape = shape
        self._version = version
        self._start, self._end = (tokenizer.encode(text)[0] for text in _SPECIALS[1:])
        self._prose = tokenizer.encode("\n".join(topics.values())[:200_000])
        self._planner = lru_cache(maxsize=None)(lambda i: schedule.make_episode(i, shape))

    def app(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/generate", self.generate)
        return app

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """One generation."""
        raw = await request.read()
        loop = asyncio.get_running_loop()
        started = loop.time()
        body = orjson.loads(raw)
        episode, worker, number = self.find_turn(body["input_ids"])
        turn = self.agent(episode, worker).turns[number]
        answer = self.answer(episode, worker, number)
        await asyncio.sleep(started + turn.latency_s - loop.time())
        return web.Response(body=answer, content_type="application/json")

    def find_turn(self, ids: Sequence[int]) -> tuple[int, int | None, int]:
        """(episode, worker or None for the planner, turn) that this context asks for."""
        user = ids.index(self._start, ids.index(self._start) + 1)
        message = self._tokenizer.decode(ids[user : ids.index(self._end, user)])
        episode, worker = schedule.who(message)
        agent = self.agent(episode, worker)
        return episode, worker, agent.messages_seen.index(ids.count(self._start))

    def agent(self, episode: int, worker: int | None) -> schedule.Agent:
        """The planner of an episode, or one of its workers."""
        planner = self._planner(episode)
        return planner if worker is None else schedule.workers_of(planner)[worker]

    def answer(self, episode: int, worker: int | None, number: int) -> bytes:
        """The body of SGLang's answer to this turn."""
        turn = self.agent(episode, worker).turns[number]
        rng = random.Random(f"{self._shape.seed}/{episode}/{worker}/{number}")
        start = rng.randrange(len(self._prose) - turn.num_tokens)
        said = "\n".join(_written(call, episode) for call in turn.calls)
        if worker is None and not turn.calls:
            said = f"The answer is \\boxed{{{schedule.ANSWER}}}."
        ids = [
            *self._prose[start : start + turn.num_tokens],
            *self._tokenizer.encode(f"\n{said}"),
            self._end,
        ]
        version = str(self._version)
        return orjson.dumps(
            {
                "text": "",
                "output_ids": ids,
                "meta_info": {
                    "id": f"{episode}-{worker}-{number}",
                    "finish_reason": {"type": "stop", "matched": self._end},
                    "completion_tokens": len(ids),
                    "output_token_logprobs": [[-rng.random(), token, None] for token in ids],
                    "weight_version": version,
                    "weight_versions": [{"version": version, "start": 0, "end": len(ids)}],
                },
            }
        )


def _written(call: schedule.Call, episode: int) -> str:
    """The call as the policy writes it."""
    match call:
        case schedule.ToolCall(latency_s, num_chars):
            arguments = {"q": "who wrote it", "wait_s": latency_s, "num_chars": num_chars}
            server, tool = schedule.SERVER, schedule.TOOL
        case schedule.Delegation(number, _):
            arguments = {"subtask": schedule.subtask(episode, number)}
            server, tool = schedule.WORKER, "search_and_browse"
        case schedule.InvalidCall():
            arguments, server, tool = {"q": "who"}, "web", "no_such_tool"
    return _CALL.format(server=server, tool=tool, arguments=json.dumps(arguments))


async def _serve(model: Path, shape: schedule.Shape) -> None:
    engine = ScriptedEngine(Tokenizer.load(model), shape)
    runner = web.AppRunner(engine.app(), access_log=None, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--shape", type=json.loads, required=True)
    arguments = parser.parse_args()
    asyncio.run(_serve(arguments.model, schedule.Shape(**arguments.shape)))


if __name__ == "__main__":
    main()
