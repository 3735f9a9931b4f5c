"""Which JSON Schema keywords can be enforced, their shapes, and the exact conjunction of two schemas.

Knows nothing of grammars. A keyword is enforced, or is an annotation, or is a GrammarError that names it
and its place: none is ever skipped in silence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, cast

from localllm.errors import GrammarError

Schema = dict[str, Any]

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
ANNOTATIONS = (
    *("title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly", "discriminator"),
    *("$schema", "$id", "$comment", "$defs", "definitions"),
)
COMBINATORS = ("$ref", "allOf", "anyOf", "oneOf", "nullable")
_DRAFT4 = "write exclusiveMinimum/exclusiveMaximum as numbers (draft 6 and later)"
_HINTS = {
    "not": "list what is allowed instead (enum, pattern, anyOf)",
    "if": "use anyOf with one branch per case",
    "patternProperties": "use properties, or additionalProperties for all keys",
    "multipleOf": "use an enum, or say it in the description",
    "uniqueItems": "use minItems and maxItems, or say it in the description",
    "$anchor": "refer with #/$defs/name",
    "$dynamicRef": "refer with $ref and #/$defs/name",
}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and (isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)))


def _is_schema(value: Any) -> bool:
    return isinstance(value, bool | dict)


def _is_schemas(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(_is_schema(v) for v in cast(list[Any], value))


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in cast(list[Any], value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_map(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_schema(s) for s in cast(Schema, value).values())


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and value != []


def _is_type(value: Any) -> bool:
    names: list[Any] = cast(list[Any], value) if isinstance(value, list) else [value]
    return bool(names) and all(name in TYPES for name in names)


_COUNT = (_is_count, "a whole number from 0")
_NUMBER = (_is_number, "a finite number; " + _DRAFT4)
_SCHEMAS = (_is_schemas, "a list of schemas, not empty")
_TEXT = (_is_text, "a string")
_MAP = (_is_map, "an object of schemas")
_SCHEMA = (_is_schema, "a schema; several schemas for a tuple are called prefixItems")

KEYWORDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "type": (_is_type, "one or several of " + ", ".join(TYPES)),
    "enum": (_is_list, "a list of values, not empty"),
    "const": (lambda v: True, "a value"),
    "$ref": _TEXT, "allOf": _SCHEMAS, "anyOf": _SCHEMAS, "oneOf": _SCHEMAS, "nullable": (lambda v: isinstance(v, bool), "true or false"),
    "properties": _MAP, "additionalProperties": _SCHEMA, "required": (_is_names, "a list of names"),
    "minProperties": _COUNT, "maxProperties": _COUNT,
    "items": _SCHEMA, "prefixItems": _SCHEMAS, "minItems": _COUNT, "maxItems": _COUNT,
    "uniqueItems": (lambda v: v is False, "false: that items differ cannot be enforced"),
    "minLength": _COUNT, "maxLength": _COUNT, "pattern": _TEXT, "format": _TEXT,
    "minimum": _NUMBER, "maximum": _NUMBER, "exclusiveMinimum": _NUMBER, "exclusiveMaximum": _NUMBER,
}  # fmt: skip

# Keywords that say nothing about other types; they tell the type where none is written.
TYPE_KEYWORDS: Mapping[str, tuple[str, ...]] = {
    "object": ("properties", "additionalProperties", "required", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}


def fail(path: str, problem: str, hint: str) -> NoReturn:
    raise GrammarError(f"JSON schema at {path}: {problem}", hint=hint, path=path)


def constraints(schema: Schema, path: str) -> Schema:
    """`schema` without annotations, every keyword checked; `const` becomes `enum`, `type` a list."""
    out: Schema = {}
    for keyword, value in schema.items():
        if keyword in ANNOTATIONS or keyword.startswith("x-"):
            if keyword == "$id" and path != "#":
                fail(f"{path}/$id", "an embedded $id changes what $ref means", "remove it, and refer with #/$defs/name")
            continue
        if keyword not in KEYWORDS:
            hint = _HINTS.get(keyword, "remove it, and check the answer yourself where you need it")
            fail(f"{path}/{keyword}", f"{keyword!r} cannot be enforced", hint)
        valid, expected = KEYWORDS[keyword]
        if not valid(value):
            hint = _HINTS.get(keyword, f"give {expected}")
            fail(f"{path}/{keyword}", f"{keyword!r} must be {expected}", hint)
        if keyword == "type" and not isinstance(value, list):
            value = [value]
        if keyword != "uniqueItems":
            out[keyword] = value
    if "const" in out:
        value = out.pop("const")
        out["enum"] = [v for v in out.get("enum", [value]) if same(v, value)]
    return out


def same(a: Any, b: Any) -> bool:
    """Equality as JSON Schema has it: 1 is 1.0, but true is not 1, at any depth."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        pairs = zip(cast(list[Any], a), cast(list[Any], b), strict=False)
        return len(cast(list[Any], a)) == len(cast(list[Any], b)) and all(same(x, y) for x, y in pairs)
    if isinstance(a, dict) and isinstance(b, dict):
        x, y = cast(Schema, a), cast(Schema, b)
        return x.keys() == y.keys() and all(same(x[k], y[k]) for k in x)
    return bool(a == b)


def has_type(value: Any, name: str) -> bool:
    if isinstance(value, bool) or value is None:
        return name == ("null" if value is None else "boolean")
    if isinstance(value, int | float):
        return name == "number" or (name == "integer" and value == int(value))
    return name == ("string" if isinstance(value, str) else "array" if isinstance(value, list) else "object")


def admits(schema: Schema, value: Any, path: str) -> bool:
    """Whether an enum value satisfies the keywords beside the enum; structural ones are an error."""
    tests: dict[str, Callable[[Any, Any], bool]] = {
        "type": lambda v, names: any(has_type(v, name) for name in names),
        "minLength": lambda v, n: not isinstance(v, str) or len(v) >= n,
        "maxLength": lambda v, n: not isinstance(v, str) or len(v) <= n,
        "minimum": lambda v, n: not _is_number(v) or v >= n,
        "maximum": lambda v, n: not _is_number(v) or v <= n,
        "exclusiveMinimum": lambda v, n: not _is_number(v) or v > n,
        "exclusiveMaximum": lambda v, n: not _is_number(v) or v < n,
    }
    for keyword, argument in schema.items():
        if keyword == "enum":
            continue
        if keyword not in tests:
            hint = f"remove {keyword!r}: the listed values say it all"
            fail(f"{path}/{keyword}", f"{keyword!r} beside enum or const cannot be enforced", hint)
        if not tests[keyword](value, argument):
            return False
    return True


def conjunction(a: Schema, b: Schema, path: str) -> Schema | None:
    """The constraints that hold where both hold (neither has combinators); None when nothing satisfies both."""
    out = dict(a)
    for keyword, value in b.items():
        if keyword not in out:
            out[keyword] = value
            continue
        mine = out[keyword]
        if keyword in ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"):
            out[keyword] = max(mine, value)
        elif keyword in ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"):
            out[keyword] = min(mine, value)
        elif keyword == "type":
            out[keyword] = [t for t in TYPES if _within(t, mine) and _within(t, value)]
        elif keyword == "enum":
            out[keyword] = [v for v in mine if any(same(v, w) for w in value)]
        elif keyword == "required":
            out[keyword] = list(dict.fromkeys([*mine, *value]))
        elif keyword == "items":
            out[keyword] = both([mine, value])
        elif keyword not in ("properties", "additionalProperties") and not same(mine, value):
            fail(f"{path}/{keyword}", f"two different values of {keyword!r} cannot be combined", "write the combined value in one place")
    if ("prefixItems" in a) != ("prefixItems" in b) and ("items" in (b if "prefixItems" in a else a)):
        fail(f"{path}/prefixItems", "'prefixItems' cannot be combined with the 'items' of another schema", "write both in one schema")
    if properties := _properties(a, b):
        out["properties"] = properties
    extra = [s["additionalProperties"] for s in (a, b) if "additionalProperties" in s]
    if extra:
        out["additionalProperties"] = both(extra)
    return None if out.get("type") == [] or out.get("enum") == [] else out


def _within(name: str, types: list[str]) -> bool:
    return name in types or (name == "integer" and "number" in types)


def _properties(a: Schema, b: Schema) -> Schema:
    """A property that only one side declares meets the other side's additionalProperties."""
    names = [*a.get("properties", {}), *b.get("properties", {})]
    out: Schema = {}
    for name in dict.fromkeys(names):
        meeting = [s.get("properties", {}).get(name, s.get("additionalProperties", True)) for s in (a, b)]
        out[name] = both(meeting)
    return out


def both(schemas: list[Any]) -> Any:
    """One schema for all of `schemas`, put off with allOf unless it is plain."""
    if any(s is False for s in schemas):
        return False
    different: list[Any] = []
    for schema in schemas:
        if schema is not True and schema != {} and schema not in different:
            different.append(schema)
    return True if not different else different[0] if len(different) == 1 else {"allOf": different}
