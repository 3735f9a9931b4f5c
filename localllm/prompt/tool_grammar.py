"""Grammars that make a model call tools in its family's own syntax, with arguments that fit the schema.

What llama.cpp does with them (src/llama-grammar.cpp of 0.3.36), and what follows:

- The grammar reads each token's piece with special tokens spelled out, so `<tool_call>` may be one
  control token or many; it is plain text here either way.
- End-of-generation tokens are never text: they are refused until the grammar may end, and end it.
  `<|call|>`, `<|eom_id|>` and the like therefore appear in no rule.
- A lazy grammar collects the output and searches it with every trigger (std::regex, bytes) after each token.
  On a match, the text from the first group on is fed to the grammar, the rest of the last token included.
  If the grammar refuses any of it, C++ throws and the process aborts. So each trigger ends in
  "end of output" and matches only beginnings of what its grammar accepts.
- Accepting a token that the grammar refuses aborts too, from the first token for a strict grammar and from the trigger
  on for a lazy one. Before that a lazy grammar restricts nothing.
- Reasoning: a strict grammar has room for it and takes every token. A lazy one must not be given the tokens of
  a reasoning block (as in llama-server), or a marker quoted there would start it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from localllm.errors import GrammarError, InvalidRequest
from localllm.prompt.family import Family
from localllm.prompt.gbnf import Rules, either, json_literal, literal
from localllm.prompt.grammar import schema_rule

_TOOL_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
_END = r"(?![\s\S])"
_GAP = r"[ \n]?"
_NAME = json_literal("name")

# Where reasoning starts and ends, and what must follow its end.
_REASONING: Mapping[Family, tuple[str, str, str]] = {
    Family.MISTRAL: ("[THINK]", "[/THINK]", ""),
    Family.GPT_OSS: ("<|channel|>analysis<|message|>", "<|end|>", "<|start|>assistant"),
}
_THINK = ("<think>", "</think>", "")


@dataclass(frozen=True, slots=True)
class ToolGrammar:
    """A grammar (start rule `root`); lazy ones begin where one of the `triggers` (regular expressions) matches."""

    gbnf: str
    lazy: bool
    triggers: tuple[str, ...] = ()


def reasoning_tags(family: Family) -> tuple[str, str]:
    """What opens and closes reasoning in this family."""
    return _REASONING.get(family, _THINK)[:2]


def tool_call_grammar(
    tools: Sequence[Mapping[str, Any]],
    family: Family,
    *,
    choice: str | Mapping[str, Any],
    parallel: bool,
    reasoning_open: bool = False,
) -> ToolGrammar | None:
    """The grammar for a request's tools; None when no call is to be forced or checked.

    `choice` is OpenAI's tool_choice; `reasoning_open` says that the prompt ends inside a reasoning block.
    Raises InvalidRequest for an unusable choice or tool, GrammarError for parameters that cannot be enforced.
    """
    schemas = dict(_name_and_parameters(tool) for tool in tools)
    if len(schemas) != len(tools):
        raise InvalidRequest("two tools have the same name", hint="rename one of them")
    wanted = _chosen(choice, list(schemas))
    if not wanted:
        return None
    lazy = choice == "auto"
    rules = Rules()
    calls = _calls(family, rules, {name: _arguments(name, schemas[name], rules) for name in wanted}, parallel, lazy)
    if lazy:
        return ToolGrammar(rules.text(calls), True, _triggers(family, wanted))
    start, end, after = _REASONING.get(family, _THINK)
    thought = f"{rules.until(end)} {literal(after) if after else ''} [ \\n]{{0,4}}"
    reasoning = thought if reasoning_open else f"({literal(start)} {thought})?"
    return ToolGrammar(rules.text(f"{reasoning} ({calls})"), False)


def _name_and_parameters(tool: Mapping[str, Any]) -> tuple[str, Any]:
    function = tool.get("function", tool)
    name = cast(Mapping[str, Any], function).get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
        raise InvalidRequest(f"a tool has the name {name!r}", hint="use 1 to 128 letters, digits and _ . : / -")
    parameters = cast(Mapping[str, Any], function).get("parameters")
    return name, {"type": "object", "properties": {}} if parameters is None else parameters


def _chosen(choice: str | Mapping[str, Any], names: list[str]) -> list[str]:
    """The tools that may be called; empty for none."""
    if choice == "none" or (choice == "auto" and not names):
        return []
    if choice in ("auto", "required"):
        if not names:
            raise InvalidRequest("tool_choice is required, but there are no tools", hint="give tools, or leave tool_choice out")
        return names
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        function = choice.get("function", choice)
        name = cast(Mapping[str, Any], function).get("name") if isinstance(function, Mapping) else None
        if name in names:
            return [cast(str, name)]
        hint = f"the tools are: {', '.join(names)}" if names else "no tools are given"
        raise InvalidRequest(f"tool_choice names the tool {name!r}, which is not given", hint=hint)
    raise InvalidRequest(f"tool_choice is {choice!r}", hint='use none, auto, required or {"type": "function", "function": {"name": …}}')


def _arguments(name: str, parameters: Any, rules: Rules) -> str:
    if not isinstance(parameters, Mapping | bool):
        raise GrammarError(f"the parameters of tool {name} are not a JSON schema", hint="give an object schema")
    try:
        return schema_rule(cast(Mapping[str, Any] | bool, parameters), rules, only_object=True)
    except GrammarError as error:
        raise GrammarError(f"tool {name}: {error.message}", hint=error.hint, tool=name, **error.details) from None


def _calls(family: Family, rules: Rules, arguments: Mapping[str, str], parallel: bool, lazy: bool) -> str:
    """The body of one call, or of several where the family can."""

    def each(before: str, between: str, after: str = "") -> str:
        """One alternative per tool around its name and its arguments."""
        return either(*(f"{before} {literal(name)} {between} {rule} {after}" for name, rule in arguments.items()))

    def as_object(key: str, first: str = "", extra: str = "") -> str:
        """An object with the name, then the arguments under `key`."""
        forms = (f"{_NAME} colon {json_literal(name)} comma {json_literal(key)} colon {rule}" for name, rule in arguments.items())
        return rules.add("object", f'"{{" ws {first} {either(*forms)} {extra} ws "}}"')

    def several(call: str, separator: str) -> str:
        return f"{call} ({separator} {call})*" if parallel else call

    match family:
        case Family.HERMES:
            call = rules.add("call", f'"<tool_call>" [ \\n]{{0,2}} {as_object("arguments")} [ \\n]{{0,2}} "</tool_call>"')
            return several(call, r"[ \n]{0,2}")
        case Family.LLAMA3:
            kind = f"({json_literal('type')} colon {json_literal('function')} comma)?"
            call = as_object("parameters", first=kind)
            return several(call if lazy else f'"<|python_tag|>"? {call}', r'("; " | ";" | "\n")')
        case Family.JSON:
            return several(as_object("arguments"), r'"\n"')
        case Family.MISTRAL:
            call_id = rf'(comma {json_literal("id")} colon "\"" [a-zA-Z0-9]{{9}} "\"")?'
            listed = several(as_object("arguments", extra=call_id), "comma")
            named = rules.add("call", each('"[TOOL_CALLS]"', '("[CALL_ID]" [a-zA-Z0-9]{9})? "[ARGS]"'))
            return f'"[TOOL_CALLS]" [ \\n]? "[" ws {listed} ws "]" | {several(named, "")}'
        case Family.DEEPSEEK:
            begin, end = literal("<｜tool▁call▁begin｜>"), literal("<｜tool▁call▁end｜>")
            fenced = each(literal("<｜tool▁call▁begin｜>function<｜tool▁sep｜>"), r'"\n```json\n"', rf'"\n```" {end}')
            bare = each(begin, literal("<｜tool▁sep｜>"), end)
            calls = either(*(several(rules.add("call", form), r'"\n"?') for form in (fenced, bare)))
            return rf'"<｜tool▁calls▁begin｜>" "\n"? {calls} "\n"? "<｜tool▁calls▁end｜>"'
        case Family.GPT_OSS:
            # One call per message: <|call|> ends the generation.
            kind = '" "? ("<|constrain|>"? "json")? "<|message|>"'
            in_channel = each('"<|channel|>commentary to=functions."', kind)
            in_role = each('" to=functions."', f'"<|channel|>commentary" {kind}')
            return f"{in_channel} | {in_role}"


def _triggers(family: Family, names: list[str]) -> tuple[str, ...]:
    """Where a call has surely begun: after the family's marker, or for bare objects once the name of a tool is complete."""
    match family:
        case Family.HERMES:
            # Not at the marker: Qwen3-Coder goes on with `<function=`, and is left alone.
            return (_trigger("<tool_call>", r"[ \n]{0,2}\{" + _begun(_GAP, '"name"')),)
        case Family.MISTRAL:
            return (_trigger("[TOOL_CALLS]", f"(?:{_GAP}\\[?|{_any_prefix(names)})"),)
        case Family.DEEPSEEK:
            return (_trigger("<｜tool▁calls▁begin｜>", r"\n?"),)
        case Family.GPT_OSS:
            some = _any_prefix(names)
            role = rf"(?:^|assistant)( to=functions\.{some}){_END}"
            return (_trigger("<|channel|>commentary to=functions.", some), role)
        case Family.LLAMA3 | Family.JSON:
            blank = r"(?: |\n[ \t]{0,20})?"
            known = "|".join(_escaped(name) for name in names)
            kind = f'(?:"type": ?"function",{blank})?' if family is Family.LLAMA3 else ""
            key = "parameters" if family is Family.LLAMA3 else "arguments"
            name = rf'\{{{blank}{kind}"name": ?"(?:{known})"'
            begun = _begun(",", _GAP, f'"{key}":')
            return (rf"^\s{{0,8}}(?:<\|python_tag\|>)?\s{{0,8}}({name}{begun}){_END}",)


def _trigger(marker: str, begun: str) -> str:
    """A regex for output that ends in `marker`, or in the marker and a beginning of what follows it."""
    return f"({_escaped(marker)}{begun}){_END}"


def _escaped(text: str) -> str:
    """`text` for ECMAScript's regular expressions, which know fewer escapes than Python's."""
    return re.sub(r"([\\^$.*+?()\[\]{}|])", r"\\\1", text)


def _begun(*parts: str) -> str:
    """Every beginning of the parts in a row; _GAP stands for itself, other parts are text."""
    pieces = [piece for part in parts for piece in ([part] if part == _GAP else map(_escaped, part))]
    form = ""
    for piece in reversed(pieces):
        form = f"{piece}{form}" if piece == _GAP else f"(?:{piece}{form})?"
    return form


def _any_prefix(names: list[str]) -> str:
    return f"(?:{'|'.join(_begun(name) for name in names)})"
