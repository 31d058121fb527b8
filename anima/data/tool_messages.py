"""Calls of tools, their results, and the list of tools: from a row of chat messages to the fields of a Message.

Everything is kept as JSON text; only the model's own template knows how to write it. Knows no other key of a row.
"""

import json
import math
from collections.abc import Mapping

from anima.errors import DataError

UNREAD_KEYS = ("reasoning_content", "thinking", "function_call")
"""Keys of a message that say something and that no template of ours would show."""


def tool_calls_of(message: Mapping[str, object], path: str, source: str) -> str:
    """The calls of an answer as a JSON list, or "" for none. Arguments that are JSON text become an object.

    Raises:
        DataError: The calls have another shape, or the message says something under a key that is not read.
    """
    for key in UNREAD_KEYS:
        if message.get(key):
            raise DataError(
                f"{path}{key} is not read",
                where=source,
                got=repr(message[key])[:60],
                allowed="content, tool_calls",
                fix="put thoughts into content as <think>…</think>" if key != "function_call" else "use tool_calls",
            )
    calls = message.get("tool_calls")
    if _absent(calls) or calls == []:
        return ""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise _wrong(f"{path}tool_calls is not a list of objects", calls, source)
    return json.dumps([_call(call, f"{path}tool_calls", source) for call in calls], ensure_ascii=False, sort_keys=True)


def tools_of(row: Mapping[str, object], source: str) -> str:
    """The tools that a row offers, as a JSON list, or "" for none; the row may hold them as JSON text.

    Raises:
        DataError: They are no list of objects.
    """
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise _wrong("tools is no JSON", tools, source) from None
    if _absent(tools) or tools in ("", []):
        return ""
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _wrong("tools is not a list of objects", tools, source)
    return json.dumps(tools, ensure_ascii=False, sort_keys=True)


def _call(call: Mapping[str, object], path: str, source: str) -> dict[str, object]:
    """One call as `{"type": "function", "function": {"name", "arguments"}}` with what else it holds."""
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _wrong(f"{path}: a call has no function with a name", call, source)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise _wrong(f"{path}: the arguments are no JSON", arguments, source) from None
    if not isinstance(arguments, dict):
        raise _wrong(f"{path}: the arguments are no object", arguments, source)
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {"type": "function", **identity, "function": {"name": function["name"], "arguments": arguments}}


def _absent(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _wrong(what: str, value: object, source: str) -> DataError:
    return DataError(
        what,
        where=source,
        got=repr(value)[:80],
        allowed='[{"type": "function", "function": {"name": "…", "arguments": {…}}}]',
        fix="mend or remove this row",
    )
