"""Tool calls and the schemas of tools, in the shape that OpenAI gave them and chat templates read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from qlora_recipes.formatters.reasons import SHORT, Reason, RowError
from qlora_recipes.formatters.text import check_json, check_text, is_visible

Tools = list[dict[str, Any]]
"""JSON schemas: `{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}`."""


def check_tools(tools: object, source: str) -> Tools | None:
    """Return the schemas of a row's tools, given as a list or as its JSON; None where there are none.

    Raises:
        RowError: for anything else.
    """
    if isinstance(tools, str) and tools.strip():
        tools = _parsed(tools, Reason.NOT_TOOLS, source)
    if not tools:
        return None
    if not isinstance(tools, list | tuple):
        raise RowError(Reason.NOT_TOOLS, f"{source} is {SHORT.repr(tools)}, expected a list of JSON schemas")
    return [_check_tool(tool, f"{source}, tool {i}") for i, tool in enumerate(tools)]


def _check_tool(tool: object, where: str) -> dict[str, Any]:
    """Return one schema; one that is not inside of `function` is put there."""
    tool = _parsed(tool, Reason.NOT_TOOLS, where) if isinstance(tool, str) else tool
    if isinstance(tool, Mapping):
        tool = tool if "function" in tool else {"type": "function", "function": tool}
        function = tool["function"]
        if isinstance(function, Mapping) and isinstance(function.get("name"), str) and is_visible(function["name"]):
            return dict(check_json(tool, Reason.NOT_TOOLS, where))
    raise RowError(Reason.NOT_TOOLS, f"{where} is {SHORT.repr(tool)}, expected the JSON schema of a named function")


def check_calls(calls: object, where: str) -> list[dict[str, Any]]:
    """Return the calls of a turn, the arguments of each as an object whether given as one or as its JSON.

    Raises:
        RowError: for anything else.
    """
    if not isinstance(calls, list | tuple):
        raise RowError(Reason.NOT_A_CALL, f"{where}, tool_calls is {SHORT.repr(calls)}, expected a list")
    return [_check_call(call, f"{where}, call {i}") for i, call in enumerate(calls)]


def _check_call(call: object, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(name, str):
        raise RowError(Reason.NOT_A_CALL, f"{where} is {SHORT.repr(call)}, expected a function's name and arguments")
    if not is_visible(check_text(name, f"{where}, name")):
        raise RowError(Reason.NOT_A_CALL, f"{where} has the name {name!r}, expected that of a function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parsed(arguments, Reason.NOT_A_CALL, f"{where}, arguments") if arguments.strip() else {}
    if not isinstance(arguments, Mapping | None):
        raise RowError(Reason.NOT_A_CALL, f"{where}, arguments are {SHORT.repr(arguments)}, expected an object")
    checked = check_json(arguments or {}, Reason.NOT_A_CALL, f"{where}, arguments")
    call_id = {} if call.get("id") is None else {"id": check_text(call["id"], f"{where}, id")}
    call.get("type")  # which is always "function"
    return {**call_id, "type": "function", "function": {"name": name, "arguments": checked}}


def _parsed(text: str, reason: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        fault = str(error) or type(error).__name__
        raise RowError(reason, f"{where} is {SHORT.repr(text)}, which is not JSON: {fault}") from error


def strings(value: object) -> Iterator[str]:
    """Yield every text of what JSON can hold, the names of its keys among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield key
            yield from strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from strings(part)
