"""The policy's tokenizer and chat template, without transformers (which imports torch).

Invariants:

* `encode` adds nothing (no BOS, no EOS): what the template does not write is not there;
* `decode(encode(text)) == text` for byte-level tokenizers, special tokens included.

Source: `transformers` renders chat templates with a sandboxed Jinja environment (trim_blocks,
lstrip_blocks, loop controls, a `generation` tag, `tojson` without HTML escapes, `raise_exception`,
`strftime_now`); the environment here offers the same, and a test compares both.
"""

from __future__ import annotations

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# (`tokenizers` has no type information.)
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import tokenizers
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_matpo.errors import ConfigError

Message = Mapping[str, str]
"""`{"role": ..., "content": ...}`."""

_TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")


class TemplateRefused(ConfigError):
    """The chat template raised for these messages (some demand strict alternation of roles)."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks assistant text for trainers; renders as is."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as a plain class attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the body in place of the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, **kwargs: Any
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **kwargs)


def _compile(source: str, where: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ConfigError(f"{where}: the chat template is not valid Jinja ({error})") from error


class Tokenizer:
    """`tokenizer.json` with its chat template."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        template: str,
        special_tokens: Mapping[str, str],
        where: str = "chat template",
    ) -> None:
        """Wrap a loaded tokenizer.

        Args:
            backend: its truncation and padding settings are switched off.
            template: Jinja source.
            special_tokens: what the template may name: `bos_token`, `eos_token`, ...
            where: the file that errors name.

        Raises:
            ConfigError: the template is not valid Jinja.
        """
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._where = where
        self._special_tokens = dict(special_tokens)
        self._template = _compile(template, where)
        added = backend.get_added_tokens_decoder()
        self.special_ids: Mapping[int, str] = {
            index: token.content for index, token in added.items() if token.special
        }
        """Text of every special token, by id."""

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read `tokenizer.json`, the special tokens and the chat template of a model folder.

        The template is looked for in `chat_template.jinja`, then `tokenizer_config.json`, then
        `chat_template.json` (the places that transformers writes and reads).

        Raises:
            ConfigError: a file is missing or unreadable, or no chat template is found.
        """
        path = Path(folder)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(f"model.path={folder}: the folder has no tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the binding raises plain Exception
            raise ConfigError(f"{file}: not a tokenizer that can be read ({error})") from error
        settings = _read_json(path / "tokenizer_config.json")
        template, where = _find_template(path, settings)
        return cls(backend, template, _special_tokens(path, settings), str(where))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """Text of a conversation, as the template writes it.

        Raises:
            TemplateRefused: the template raised for these messages.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, AttributeError, KeyError) as error:
            raise TemplateRefused(f"{self._where}: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens in it become their ids, nothing is added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def cut(self, text: str, max_tokens: int) -> str:
        """The longest beginning of `text` that whole characters of its first tokens make up."""
        offsets = self._backend.encode(text, add_special_tokens=False).offsets
        # Where the first token that is left out starts; inside a character, that is its beginning.
        return text if len(offsets) <= max_tokens else text[: offsets[max_tokens][0]]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens included."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    @property
    def where(self) -> str:
        """File that holds the chat template, for messages."""
        return self._where


def _read_json(file: Path) -> dict[str, Any]:
    """The object in `file`; empty if there is no such file."""
    if not file.is_file():
        return {}
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: expected a JSON object, got {type(raw).__name__}")
    return raw


def _find_template(folder: Path, settings: dict[str, Any]) -> tuple[str, Path]:
    jinja_file = folder / _TEMPLATE_FILES[0]
    if jinja_file.is_file():
        return jinja_file.read_text(encoding="utf-8"), jinja_file
    sources = (settings, _read_json(folder / _TEMPLATE_FILES[2]))
    for source, name in zip(sources, _TEMPLATE_FILES[1:], strict=True):
        template = source.get("chat_template")
        if isinstance(template, list):  # several named templates
            named = {item.get("name"): item.get("template") for item in template}
            template = named.get("default")
        if isinstance(template, str):
            return template, folder / name
    raise ConfigError(
        f"model.path={folder}: no chat template in {', '.join(_TEMPLATE_FILES)}; "
        "agents need a chat model, or add the template of its family as chat_template.jinja"
    )


def _special_tokens(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for source in (_read_json(folder / "special_tokens_map.json"), settings):
        for name, value in source.items():
            if not name.endswith("_token"):
                continue
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                tokens[name] = text
    return tokens
