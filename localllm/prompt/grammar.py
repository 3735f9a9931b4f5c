"""JSON Schema and response_format to GBNF: what the model may write, exactly or not at all.

Every text that a grammar accepts satisfies the schema. The other way round, some satisfying texts are
left out on purpose: keys come in the declared order, then the additional ones; an object with
`properties` is closed, and an array with `prefixItems` is too, unless additionalProperties or items say
more; `oneOf` is read as `anyOf`; a schema without a type takes it from its keywords; numbers have the
spellings of `number_grammar`; blanks are bounded. What cannot be enforced is a GrammarError.
Knows nothing of llama.cpp or of tools.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, cast
from urllib.parse import unquote

from localllm.errors import GrammarError
from localllm.prompt.gbnf import Rules, either, json_literal
from localllm.prompt.json_schema import COMBINATORS, TYPE_KEYWORDS, TYPES, Schema, admits, conjunction, constraints, fail
from localllm.prompt.number_grammar import integer_range, number_range
from localllm.prompt.pattern_grammar import pattern_gbnf

MAX_DEPTH = 64
MAX_ALTERNATIVES = 256
MAX_SCHEMA_CHARACTERS = 500_000

_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_BYTE = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_DATE = (
    r"(?:\d{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)|02-(?:0[1-9]|1\d|2[0-8]))"
    r"|(?:\d\d(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)"
)
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,9})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
_URI_CHAR = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})"

# Each accepts only valid texts, in their usual forms (no leap seconds, no quoted mail boxes).
FORMATS: Mapping[str, str] = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "uuid": r"^[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}$",
    "ipv4": rf"^{_BYTE}(?:\.{_BYTE}){{3}}$",
    "email": rf"^{_ATOM}(?:\.{_ATOM})*@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{{0,61}}[A-Za-z0-9])?\.)+[A-Za-z]{{2,63}}$",
    "uri": rf"^[A-Za-z][A-Za-z0-9+.-]*://[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::\d{{1,4}})?"
    rf"(?:/{_URI_CHAR}*)*(?:\?(?:{_URI_CHAR}|[/?])*)?(?:#(?:{_URI_CHAR}|[/?])*)?$",
}


def schema_to_gbnf(schema: Mapping[str, Any] | bool) -> str:
    """The grammar (start rule `root`) of the JSON texts that satisfy `schema`; GrammarError when there is no exact one."""
    rules = Rules()
    return rules.text(schema_rule(schema, rules))


def schema_rule(schema: Mapping[str, Any] | bool, rules: Rules, *, only_object: bool = False) -> str:
    """The rule in `rules` for a whole schema; `$ref` starts at this schema."""
    try:
        text = json.dumps(schema, allow_nan=False)
        root = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"the JSON schema is not plain JSON: {error}", hint="give an object of JSON values, without cycles") from None
    if len(text) > MAX_SCHEMA_CHARACTERS:
        raise GrammarError(f"the JSON schema is longer than {MAX_SCHEMA_CHARACTERS:,} characters", hint="split it")
    try:
        converter = _Converter(root, rules)
        if only_object and not (isinstance(root, dict) and cast(Schema, root).get("type") == "object"):
            root = {"allOf": [{"$ref": "#"}, {"type": "object"}]}
        return converter.value(root, _Place())
    except RecursionError:
        raise GrammarError("the JSON schema is nested too deeply", hint="flatten it, or use $defs") from None


def json_object_gbnf() -> str:
    """The grammar of any JSON object."""
    return Rules().text("object")


def response_format_to_gbnf(response_format: Mapping[str, Any]) -> str | None:
    """The grammar for OpenAI's (or llama-server's) response_format; None for plain text."""
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind not in ("json_object", "json_schema"):
        raise GrammarError(f"response_format has the type {kind!r}", hint="use text, json_object or json_schema")
    holder = response_format
    if kind == "json_schema" and "json_schema" in response_format:
        holder = response_format["json_schema"]
        if not isinstance(holder, Mapping):
            raise GrammarError("response_format.json_schema is not an object", hint='give {"name": …, "schema": {…}}')
        holder = cast(Mapping[str, Any], holder)
    schema = holder.get("schema")
    if schema is None and kind == "json_object":
        return json_object_gbnf()
    if not isinstance(schema, Mapping | bool):
        raise GrammarError(f"response_format of type {kind} has no usable schema", hint='give the JSON schema under "schema"')
    return schema_to_gbnf(cast(Mapping[str, Any] | bool, schema))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the converter is, and which schemas it is inside of (as JSON text)."""

    path: str = "#"
    depth: int = 0
    level: frozenset[str] = frozenset()
    """Entered since the last character: meeting one again would be left recursion."""
    must: frozenset[str] = frozenset()
    """Entered with no way around: meeting one again would mean that no value ever ends."""

    def entered(self, key: str) -> _Place:
        return _Place(self.path, self.depth, self.level | {key}, self.must | {key})

    def at(self, ref: str) -> _Place:
        return _Place(ref, self.depth + 1, self.level, self.must)

    def beside(self, step: str, *, forced: bool) -> _Place:
        return _Place(f"{self.path}/{step}", self.depth + 1, self.level, self.must if forced else frozenset())

    def inside(self, step: str, *, forced: bool) -> _Place:
        return _Place(f"{self.path}/{step}", self.depth + 1, frozenset(), self.must if forced else frozenset())


class _Converter:
    """One schema document on its way into `rules`."""

    def __init__(self, root: Any, rules: Rules) -> None:
        self.root = root
        self.rules = rules
        self.names: dict[str, str] = {}

    def value(self, schema: Any, place: _Place) -> str:
        """The name of the rule for `schema`; equal schemas share one, which is what makes recursion end."""
        if schema is False:
            fail(place.path, "the schema false allows nothing", "remove this part, or give it a schema")
        if schema is True:
            return "value"
        if not isinstance(schema, dict):
            fail(place.path, "this is not a schema", "give an object, true or false")
        if place.depth > MAX_DEPTH:
            fail(place.path, f"nested more than {MAX_DEPTH} levels deep", "flatten the schema, or use $defs")
        key = json.dumps(schema)
        if key in place.level:
            fail(place.path, "the schema refers to itself without anything in between", "put the $ref inside properties or items")
        if key in place.must:
            fail(place.path, "no finite value satisfies the schema: it requires itself", "make the recursive part optional")
        if key in self.names:
            return self.names[key]
        body = constraints(cast(Schema, schema), place.path)
        if not body:
            return "value"
        name = self.names[key] = self.rules.reserve("v")
        try:
            self.rules.define(name, " | ".join(self.alternatives(body, place.entered(key))))
        except GrammarError as error:
            if "path" in error.details:
                raise
            fail(place.path, error.message, error.hint)
        return name

    def alternatives(self, body: Schema, place: _Place) -> list[str]:
        keywords = list(body)
        if keywords == ["$ref"]:
            return [self.value(self.resolve(body["$ref"], place), place.at(body["$ref"]))]
        if keywords in (["anyOf"], ["oneOf"], ["allOf"]) and (keywords != ["allOf"] or len(body["allOf"]) == 1):
            word = keywords[0]
            branches = [(i, branch) for i, branch in enumerate(body[word]) if branch is not False]
            forced = len(branches) == 1
            return [self.value(b, place.beside(f"{word}/{i}", forced=forced)) for i, b in branches] or self.nothing(place)
        plain = self.expand(body, place, ()) if any(k in body for k in COMBINATORS) else [body]
        kinds = [(schema, kind) for schema in plain for kind in self.kinds(schema)]
        place = place if len(kinds) == 1 else _Place(place.path, place.depth, place.level)
        forms = [form for schema, kind in kinds if (form := self.form(schema, kind, place)) is not None]
        return list(dict.fromkeys(forms)) or self.nothing(place)

    def nothing(self, place: _Place) -> list[str]:
        fail(place.path, "no value satisfies the schema", "its parts contradict each other: relax one of them")

    def expand(self, schema: Any, place: _Place, refs: tuple[str, ...]) -> list[Schema]:
        """The alternatives of `schema`, each free of combinators."""
        if isinstance(schema, bool):
            return [{}] if schema else []
        body = constraints(schema, place.path)
        plain: list[Schema] = [{k: v for k, v in body.items() if k not in COMBINATORS}]
        parts: list[list[Schema]] = []
        if ref := body.get("$ref"):
            if ref in refs:
                fail(place.path, f"{ref} refers to itself without anything in between", "put the $ref inside properties or items")
            parts.append(self.expand(self.resolve(ref, place), place.at(ref), (*refs, ref)))
        for i, part in enumerate(body.get("allOf", ())):
            parts.append(self.expand(part, place.beside(f"allOf/{i}", forced=True), refs))
        for word in ("anyOf", "oneOf"):
            if word in body:
                branches = (self.expand(b, place.beside(f"{word}/{i}", forced=True), refs) for i, b in enumerate(body[word]))
                parts.append([alternative for branch in branches for alternative in branch])
        for part in parts:
            if len(plain) * len(part) > MAX_ALTERNATIVES:
                fail(place.path, f"combines to more than {MAX_ALTERNATIVES} alternatives", "write fewer anyOf inside allOf")
            plain = [m for a in plain for b in part if (m := conjunction(a, b, place.path)) is not None]
        return [*plain, {"enum": [None]}] if body.get("nullable") else plain

    def resolve(self, ref: str, place: _Place) -> Any:
        if ref != "#" and not ref.startswith("#/"):
            fail(f"{place.path}/$ref", f"{ref!r} is not inside this schema", "put it under $defs and refer with #/$defs/name")
        found = self.root
        for step in unquote(ref).split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and step in found:
                found = cast(Schema, found)[step]
            elif isinstance(found, list) and step.isdecimal() and int(step) < len(cast(list[Any], found)):
                found = cast(list[Any], found)[int(step)]
            else:
                fail(f"{place.path}/$ref", f"{ref!r} does not exist", "add it, or correct the reference")
        return found

    def kinds(self, schema: Schema) -> list[str]:
        """What to write: `enum`, `value` (anything), or types."""
        if "enum" in schema:
            return ["enum"]
        told = [kind for kind, keywords in TYPE_KEYWORDS.items() if any(k in schema for k in keywords)]
        types = schema.get("type", told)
        return [t for t in TYPES if t in types and not (t == "integer" and "number" in types)] or ["value"]

    def form(self, schema: Schema, kind: str, place: _Place) -> str | None:
        """The GBNF of one kind; None when its bounds leave nothing."""
        match kind:
            case "enum":
                values = [v for v in schema["enum"] if admits(schema, v, place.path)]
                return either(*dict.fromkeys(json_literal(v) for v in values)) if values else None
            case "object":
                return self.object(schema, place)
            case "array":
                return self.array(schema, place)
            case "string":
                return self.string(schema, place)
            case "number" | "integer":
                return self.number(schema, kind)
            case _:
                return '"null"' if kind == "null" else kind

    def number(self, schema: Schema, kind: str) -> str | None:
        # Through repr, so that 0.1 means one tenth.
        bounds = {k: Decimal(repr(schema[k])) for k in TYPE_KEYWORDS["number"] if k in schema}
        if not bounds:
            return kind
        low, low_open = max(((bounds[k], k != "minimum") for k in ("minimum", "exclusiveMinimum") if k in bounds), default=(None, False))
        high, high_closed = min(((bounds[k], k == "maximum") for k in ("maximum", "exclusiveMaximum") if k in bounds), default=(None, True))
        if kind == "number":
            return number_range(low, high, low_open=low_open, high_open=not high_closed)
        first = None if low is None else math.floor(low) + 1 if low_open else math.ceil(low)
        last = None if high is None else math.ceil(high) - 1 if not high_closed else math.floor(high)
        return None if first is not None and last is not None and first > last else integer_range(first, last)

    def string(self, schema: Schema, place: _Place) -> str | None:
        low, high = schema.get("minLength", 0), schema.get("maxLength")
        if high is not None and low > high:
            return None
        if "pattern" not in schema and "format" not in schema:
            return rf'"\"" {self.rules.repeat("char", low, high)} "\""' if low or high is not None else "string"
        if "pattern" in schema and "format" in schema:
            fail(f"{place.path}/format", "'format' and 'pattern' together cannot be enforced", "keep one of them")
        if "format" in schema and schema["format"] not in FORMATS:
            fail(f"{place.path}/format", f"the format {schema['format']!r} cannot be enforced", f"use {', '.join(FORMATS)}, or a pattern")
        body, nullable = pattern_gbnf(schema.get("pattern") or FORMATS.get(schema.get("format", ""), ""), self.rules)
        if high is not None or low > (0 if nullable else 1):
            word = "maxLength" if high is not None else "minLength"
            hint = "put the length into the pattern: ^.{1,9}$"
            fail(f"{place.path}/{word}", f"{word!r} beside a pattern or format cannot be enforced", hint)
        return rf'"\"" {body} "\""'

    def array(self, schema: Schema, place: _Place) -> str | None:
        low, high, prefix = schema.get("minItems", 0), schema.get("maxItems"), schema.get("prefixItems", [])
        items = schema.get("items", not prefix or low > len(prefix))
        if items is False or False in prefix:
            prefix = prefix[: prefix.index(False)] if False in prefix else prefix
            items, high = False, min(len(prefix), high if high is not None else len(prefix))
        if high is not None and low > high:
            return None
        prefix = prefix[:high]
        names = [self.value(p, place.inside(f"prefixItems/{i}", forced=i < low)) for i, p in enumerate(prefix)]
        rest = ""
        if items is not False and (high is None or high > len(names)):
            item = self.value(items, place.inside("items", forced=low > len(names)))
            names = names or [item]
            most = None if high is None else high - len(names)
            rest = self.rules.repeat(self.rules.add("more", f"comma {item}"), max(0, low - len(names)), most)
        for i in reversed(range(len(names))):
            form = f"{'comma ' if i else ''}{names[i]} {rest}".strip() + ("" if i else " ws")
            rest = self.rules.add("items", form) if i < low else f"({form})?" if not i else self.rules.add("items", f"({form})?")
        return f'"[" ws {rest} "]"'

    def object(self, schema: Schema, place: _Place) -> str | None:
        low, high = schema.get("minProperties", 0), schema.get("maxProperties")
        required = dict.fromkeys(schema.get("required", ()))
        free = schema.get("additionalProperties", "properties" not in schema)
        declared = {**schema.get("properties", {})}
        for name in required:
            declared.setdefault(name, schema.get("additionalProperties", True))
        if any(declared[name] is False for name in required) or (high is not None and high < max(low, len(required))):
            return None
        fields = [
            (f"{json_literal(name)} colon {self.value(s, place.inside(f'properties/{name}', forced=name in required))}", name in required)
            for name, s in declared.items()
            if s is not False
        ]
        if free is False and len(fields) < low:
            return None
        if free is not False and low - len(required) > 1:
            hint = "list the keys under properties, or use minProperties 1"
            fail(f"{place.path}/minProperties", f"'minProperties' {low} cannot be enforced for free keys", hint)
        counting = low > len(required) or (high is not None and (free is not False or high < len(fields)))
        most = len(fields) if counting else 1
        # after[w]: what may follow when w declared properties are written (without counting: none, or some)
        after = self.object_ends(list(declared), free, low if counting else 0, high, most, place)
        for position in reversed(range(len(fields))):
            entry, needed = fields[position]
            now: dict[int, str | None] = {}
            for written in range(min(position, most) + 1):
                forms: list[str] = []
                following = after[min(written + 1, most)]
                if following is not None and not (counting and high is not None and written >= high):
                    forms.append(f"{'comma ' if written else ''}{entry} {following}")
                if not needed and (skipped := after[written]) is not None:
                    forms.append(skipped)
                now[written] = self.rules.add("p", " | ".join(forms)) if forms else None
            after = now
        return None if after[0] is None else f'"{{" ws {after[0]}'

    def object_ends(self, taken: list[str], free: Any, low: int, high: int | None, most: int, place: _Place) -> dict[int, str | None]:
        """The additional properties and the closing brace, by the number of declared properties written before."""
        if free is False:
            return {w: None if w < low else r'ws "}"' if w else '"}"' for w in range(most + 1)}
        value = self.value(free, place.inside("additionalProperties", forced=low > 0 and not taken))
        pair = self.rules.add("pair", f"{self.rules.key_except(taken)} colon {value}")
        more = self.rules.add("more", f"comma {pair}")
        ends: dict[int, str | None] = {}
        for w in range(most + 1):
            need, room = max(0, low - w), None if high is None else high - w
            if room is not None and (room < 0 or need > room):
                ends[w] = None
            elif w or room == 0:
                ends[w] = f'{self.rules.repeat(more, need, room)} {"ws " if w else ""}"}}"'
            else:
                some = f"{pair} {self.rules.repeat(more, max(0, need - 1), None if room is None else room - 1)} ws"
                ends[w] = f'{some} "}}"' if need else f'({some})? "}}"'
        return ends
