"""The call formats by the names of `rollout.call_format`."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_matpo.agents.grammar import CallGrammar
from megatron_matpo.agents.json_calls import JsonCalls
from megatron_matpo.agents.xml_calls import XmlCalls

GRAMMARS: Mapping[str, CallGrammar] = {"mcp_xml": XmlCalls(), "tool_call": JsonCalls()}
