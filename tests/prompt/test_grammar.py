from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from localllm.errors import GrammarError
from localllm.prompt.gbnf import Rules
from localllm.prompt.grammar import FORMATS, json_object_gbnf, response_format_to_gbnf, schema_to_gbnf
from tests.prompt.gbnf import Grammar, LlamaVocab

slow_ok = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])

NODE = {
    "$defs": {
        "node": {"type": "object", "properties": {"value": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}}, "required": ["value"]}
    },
    "$ref": "#/$defs/node",
}
TREE = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "kids": {"type": "array", "items": {"$ref": "#"}}},
    "required": ["name"],
}
BASE = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
CHOICE = {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"$ref": "#"}}]}

# schema, accepted texts, refused texts
CASES: list[tuple[Any, list[str], list[str]]] = [
    (True, ["1", '"a"', "null", "[]", '{"a": [1, {"b": null}]}', "-1.5e-7"], ["", "tru", "{", "[1,]", "01", "1.", "nul", '"\n"']),
    ({}, ["1", "{}"], ["", "x"]),
    ({"type": "boolean"}, ["true", "false"], ["True", "null", "1"]),
    ({"type": "null"}, ["null"], ["0", '""']),
    ({"type": ["integer", "null"]}, ["5", "null"], ["5.5", '"5"']),
    ({"type": "integer"}, ["0", "-1", "12345678901234567890"], ["-0", "01", "1.0", "+1", "1e3", ""]),
    ({"type": "number"}, ["0", "-1.25", "1e9", "2E-7", "0.00012345678901234567"], ["-", ".5", "5.", "1e", "1e999", "Infinity", "NaN"]),
    ({"type": "number", "minimum": 0, "maximum": 1}, ["0", "1", "0.5", "1.0", "0.000", "1.00"], ["1.01", "-0.1", "2", "1.000001"]),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 1.25}, ["0.01", "1.25", "1.2", "1.250", "1"], ["0", "0.0", "1.26", "1.2501"]),
    ({"type": "number", "minimum": -2.5, "exclusiveMaximum": -0.5}, ["-2.5", "-0.51", "-1", "-2"], ["-0.5", "-0.50", "-2.51", "0", "1"]),
    ({"type": "number", "minimum": 0.1, "maximum": 0.1}, ["0.1", "0.100"], ["0.10000001", "0", "0.09", "0.2", "0."]),
    ({"minimum": 3}, ["3", "3.5", "1000"], ["2", "2.99"]),
    (
        {"type": "string"},
        ['""', '"a b"', '"\\n\\"\\u00e9"', '"é🙂"', '"\\ud83d\\ude42"'],
        ['"', '"\\x"', '"\\ud83d"', '"\\ude42"', "a", '"\t"'],
    ),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ['"ab"', '"abc"', '"\\n🙂"'], ['"a"', '"abcd"', '"\\ud83d\\ude42"']),
    ({"type": "string", "minLength": 1}, ['"a"', '"' + "x" * 50 + '"'], ['""']),
    ({"type": "string", "maxLength": 0}, ['""'], ['"a"']),
    (
        {"enum": ["red", 3, None, True, {"a": [1, 2]}]},
        ['"red"', "3", "null", "true", '{"a": [1, 2]}', '{"a":[1,2]}'],
        ['"blue"', "1", "false"],
    ),
    ({"type": "string", "enum": ["a", 1]}, ['"a"'], ["1"]),
    ({"type": "integer", "enum": [1, 2, 3], "minimum": 2}, ["2", "3"], ["1"]),
    ({"const": 'say "hi"\n\\'}, ['"say \\"hi\\"\\n\\\\"'], ['"say"']),
    ({"const": 1, "enum": [1, 2]}, ["1"], ["2"]),
    ({"type": "string", "pattern": "^[a-c]{2,3}$"}, ['"ab"', '"abc"'], ['"a"', '"abcd"', '"ad"', '""']),
    ({"pattern": "b+"}, ['"b"', '"abc"', '"xbbx"'], ['""', '"ac"']),
    ({"pattern": "^(?:yes|no)$"}, ['"yes"', '"no"'], ['"yesno"', '"y"']),
    ({"pattern": "^a|b$"}, ['"ax"', '"xb"', '"a"'], ['"xa"', '"bx"']),
    ({"pattern": '^"\\\\[\\]^-]$'}, ['"\\"\\\\]"', '"\\"\\\\^"', '"\\"\\\\-"'], ['"\\"\\\\a"', '"\\"]"']),
    ({"pattern": r"^\d{3}-\w\s\S[^\d]\.$"}, ['"123-a xy."', '"123-_\\tx\\"."'], ['"12-a xy."', '"123-a xyz"', '"123-a x1."']),
    ({"pattern": r"^.$"}, ['"a"', '"\\""', '"\\\\"', '"\\t"', '"🙂"'], ['"\\n"', '""', '"ab"']),
    ({"pattern": r"^(a(b|c)*)?é\x41B{0}$", "minLength": 1}, ['"abbcéA"', '"éA"'], ['"abbcé"', '"éAB"']),
    ({"pattern": ""}, ['""', '"anything"'], ["1"]),
    (
        {"format": "date"},
        ['"2024-02-29"', '"1999-12-31"', '"2000-02-29"'],
        ['"2023-02-29"', '"1900-02-29"', '"2023-04-31"', '"2023-13-01"'],
    ),
    ({"format": "time"}, ['"23:59:59Z"', '"00:00:00.123+02:00"'], ['"24:00:00Z"', '"10:00"', '"10:00:00"']),
    ({"format": "date-time"}, ['"2024-02-29T10:11:12Z"'], ['"2024-02-29"', '"2024-02-30T10:11:12Z"']),
    ({"format": "uuid"}, ['"123e4567-e89b-12d3-a456-426614174000"'], ['"123e4567-e89b-12d3-a456-42661417400"']),
    ({"format": "ipv4"}, ['"127.0.0.1"', '"255.249.10.0"'], ['"256.0.0.1"', '"1.2.3"', '"01.2.3.4"']),
    ({"format": "email"}, ['"a.b+c@ex-ample.org"'], ['"a@b"', '"@x.org"', '"a..b@x.org"', '"a@-x.org"']),
    (
        {"format": "uri", "minLength": 1},
        ['"https://example.org:80/a%20b?q=1/2#f"', '"ftp://x"'],
        ['"example.org"', '"http://"', '"http://a b"'],
    ),
    ({"type": "array"}, ["[]", "[1, null]", "[[], {}]", '[\n  1,\n  "a"\n]'], ["[", "[1 2]", "[,]", "[1,\n\n2]"]),
    (
        {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
        ["[1]", "[1, 2, 3]", "[1,2]"],
        ["[]", "[1,2,3,4]", '["a"]'],
    ),
    ({"type": "array", "items": {"type": "integer"}, "minItems": 2}, ["[1, 2]", "[1,2,3,4,5]"], ["[]", "[1]"]),
    ({"type": "array", "maxItems": 0}, ["[]", "[ ]"], ["[1]"]),
    ({"type": "array", "items": False}, ["[]"], ["[1]"]),
    ({"prefixItems": [{"type": "integer"}, {"type": "string"}], "minItems": 1}, ["[1]", '[1, "a"]'], ["[]", '["a"]', '[1, "a", 2]']),
    ({"prefixItems": [{"type": "integer"}], "items": {"type": "null"}}, ["[]", "[1]", "[1, null, null]"], ["[null]", "[1, 2]"]),
    ({"prefixItems": [{"type": "integer"}], "minItems": 2, "maxItems": 2}, ["[1, {}]"], ["[1]", "[1, 2, 3]"]),
    ({"prefixItems": [{"type": "integer"}, False]}, ["[]", "[1]"], ["[1, 1]"]),
    ({"type": "object"}, ["{}", '{"a": 1}', '{"a":{"b":[]},"c":null}'], ["[]", "{a: 1}", '{"a": 1,}', '{"a"}']),
    ({"type": "object", "properties": {}}, ["{}", "{ }"], ['{"a": 1}']),
    (BASE, ['{"a": 1}', '{"a":1}', '{\n  "a": 1\n}', '{ "a": 1 }'], ["{}", '{"a": "1"}', '{"a": 1, "b": 2}', '{"a" : 1}', '{"a":\n1}']),
    (
        {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "null"}, "c": {"const": 1}}, "required": ["b"]},
        ['{"b": null}', '{"a": 1, "b": null}', '{"b": null, "c": 1}', '{"a": 1, "b": null, "c": 1}'],
        ["{}", '{"a": 1}', '{"b": null, "a": 1}', '{"b": null, "b": null}', '{"a": 1, "b": null,}'],
    ),
    (
        {"properties": {"ab": {"type": "integer"}, "a": False}, "additionalProperties": {"type": "string"}},
        ["{}", '{"ab": 1}', '{"ab": 1, "x": "y", "abc": ""}', '{"x": "y"}', '{"": "e", "b": "f"}'],
        ['{"a": "x"}', '{"ab": "x"}', '{"ab": 1, "ab": "x"}', '{"\\u0061": "x"}', '{"x": 1}'],
    ),
    (
        {"additionalProperties": {"type": "integer"}, "minProperties": 1, "maxProperties": 2},
        ['{"a": 1}', '{"a": 1, "b": 2}'],
        ["{}", '{"a": 1, "b": 2, "c": 3}', '{"a": null}'],
    ),
    (
        {"properties": {"a": {"type": "null"}, "b": {"type": "null"}, "c": {"type": "null"}}, "minProperties": 2, "maxProperties": 2},
        ['{"a": null, "b": null}', '{"a": null, "c": null}', '{"b": null, "c": null}'],
        ["{}", '{"a": null}', '{"a": null, "b": null, "c": null}'],
    ),
    (
        {"properties": {"a": {"type": "null"}}, "additionalProperties": True, "required": ["a", "z"], "maxProperties": 3},
        ['{"a": null, "z": 5}', '{"a": null, "z": 5, "q": 1}'],
        ['{"a": null}', '{"a": null, "z": 5, "q": 1, "r": 1}', '{"a": null, "q": 1}'],
    ),
    ({"type": "object", "additionalProperties": False}, ["{}"], ['{"a": 1}']),
    ({"type": "object", "maxProperties": 0}, ["{}"], ['{"a": 1}']),
    ({"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 1}]}, ["1", '"a"'], ['"ab"', "null"]),
    ({"oneOf": [BASE, False]}, ['{"a": 1}'], ["{}"]),
    ({"type": "integer", "nullable": True, "minimum": 2}, ["2", "null"], ["1"]),
    ({"allOf": [BASE]}, ['{"a": 1}'], ["{}"]),
    ({"allOf": [BASE, {"properties": {"b": {"type": "null"}}, "required": ["b"]}]}, ['{"a": 1, "b": null}'], ['{"a": 1}', '{"b": null}']),
    (
        {"allOf": [{"type": "number", "minimum": 1, "maximum": 9}, {"type": "integer", "minimum": 4, "exclusiveMaximum": 8}]},
        ["4", "7"],
        ["3", "8"],
    ),
    ({"allOf": [{"enum": [1, 2]}, {"enum": [2, 3, True]}]}, ["2"], ["1", "true"]),
    (
        {"allOf": [{"properties": {"a": {"minimum": 1}}}, {"properties": {"a": {"maximum": 2, "type": "integer"}}}], "required": ["a"]},
        ['{"a": 1}', '{"a": 2}'],
        ['{"a": 0}', '{"a": 3}', "{}"],
    ),
    (
        {"allOf": [{"properties": {"a": True}, "additionalProperties": False}, {"properties": {"b": {"type": "integer"}}}]},
        ["{}", '{"a": 1}'],
        ['{"b": 1}'],
    ),
    (
        {
            **BASE,
            "anyOf": [
                {"properties": {"b": {"type": "null"}}, "required": ["b"]},
                {"properties": {"c": {"type": "null"}}, "required": ["c"]},
            ],
        },
        ['{"a": 1, "b": null}', '{"a": 1, "c": null}'],
        ['{"a": 1}', '{"b": null}'],
    ),
    ({"$ref": "#/$defs/x~1y%20z", "$defs": {"x/y z": {"type": "null"}}, "description": "d"}, ["null"], ["1"]),
    ({"$ref": "#/definitions/a", "definitions": {"a": BASE}, "properties": {"a": {"maximum": 3}}}, ['{"a": 3}'], ['{"a": 4}', "{}"]),
    (
        NODE,
        ['{"value": 1}', '{"value": 1, "next": {"value": 2, "next": {"value": 3}}}'],
        ["{}", '{"value": 1, "next": 2}', '{"next": {"value": 1}}'],
    ),
    (TREE, ['{"name": "a", "kids": [{"name": "b"}, {"name": "c", "kids": []}]}'], ['{"name": "a", "kids": [{}]}']),
    (CHOICE, ["1", "[]", "[1, [2, []]]"], ["null", "[null]"]),
    ({"$comment": "c", "title": "t", "default": 3, "examples": [1], "deprecated": True, "x-note": 1, "type": "null"}, ["null"], ["3"]),
    ({"type": "string", "uniqueItems": False}, ['"a"'], ["1"]),
    ({"type": "string", "minLength": 1500, "maxLength": 2600}, [], ['""', '"' + "a" * 1499 + '"']),
]

UNSUPPORTED: list[tuple[Any, str]] = [
    ({"not": {}}, "#/not"),
    ({"if": {}, "then": {}}, "#/if"),
    ({"properties": {"a": {"patternProperties": {}}}}, "#/properties/a/patternProperties"),
    ({"type": "array", "uniqueItems": True}, "#/uniqueItems"),
    ({"items": {"multipleOf": 2}}, "#/items/multipleOf"),
    ({"dependentRequired": {}}, "#/dependentRequired"),
    ({"dependentSchemas": {}}, "#/dependentSchemas"),
    ({"contains": {}}, "#/contains"),
    ({"propertyNames": {}}, "#/propertyNames"),
    ({"unevaluatedProperties": False}, "#/unevaluatedProperties"),
    ({"unevaluatedItems": False}, "#/unevaluatedItems"),
    ({"$dynamicRef": "#a"}, "#/$dynamicRef"),
    ({"$anchor": "a"}, "#/$anchor"),
    ({"contentEncoding": "base64"}, "#/contentEncoding"),
    ({"madeUp": 1}, "#/madeUp"),
    ({"anyOf": [{"type": "null"}, {"then": {}}]}, "#/anyOf/1/then"),
    ({"allOf": [{"type": "object"}, {"else": {}}]}, "#/allOf/1/else"),
    ({"$defs": {"a": {"not": {}}}, "$ref": "#/$defs/a"}, "#/$defs/a/not"),
    ({"$ref": "https://example.org/schema.json"}, "#/$ref"),
    ({"$ref": "#/$defs/none"}, "#/$ref"),
    ({"$ref": "#name"}, "#/$ref"),
    ({"format": "hostname"}, "#/format"),
    ({"pattern": "^a$", "maxLength": 3}, "#/maxLength"),
    ({"pattern": "a*", "minLength": 1}, "#/minLength"),
    ({"pattern": "a", "format": "date"}, "#/format"),
    ({"enum": [{"a": 1}], "properties": {"a": {}}}, "#/properties"),
    ({"type": "object", "minProperties": 2}, "#/minProperties"),
    ({"properties": {"a": {"$id": "https://x", "type": "null"}}}, "#/properties/a/$id"),
    ({"exclusiveMinimum": True, "minimum": 1}, "#/exclusiveMinimum"),
    ({"items": [{"type": "null"}]}, "#/items"),
    ({"type": "text"}, "#/type"),
    ({"enum": []}, "#/enum"),
    ({"const": 1, "enum": 5}, "#/enum"),
    ({"required": "a"}, "#/required"),
    ({"minLength": -1}, "#/minLength"),
    ({"minLength": True}, "#/minLength"),
    ({"properties": {"a": 1}}, "#/properties"),
    ({"allOf": [{"pattern": "a"}, {"pattern": "b"}]}, "#/pattern"),
    ({"allOf": [{"prefixItems": [True]}, {"items": True}]}, "#/prefixItems"),
]

CONTRADICTIONS: list[Any] = [
    False,
    {"type": "integer", "minimum": 3, "maximum": 2},
    {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 4},
    {"type": "number", "exclusiveMinimum": 1, "maximum": 1},
    {"type": "number", "minimum": 5, "maximum": -5},
    {"type": "string", "minLength": 2, "maxLength": 1},
    {"type": "array", "minItems": 2, "maxItems": 1},
    {"type": "array", "items": False, "minItems": 1},
    {"type": "string", "enum": [1]},
    {"allOf": [{"type": "string"}, {"type": "null"}]},
    {"allOf": [{"enum": [1]}, {"enum": [2]}]},
    {"anyOf": [False]},
    {"properties": {"a": False}, "required": ["a"]},
    {"properties": {"a": True}, "minProperties": 2},
    {"properties": {"a": True, "b": True}, "required": ["a", "b"], "maxProperties": 1},
    {"additionalProperties": False, "required": ["a"]},
]

NEVER_ENDING: list[Any] = [
    {"$ref": "#"},
    {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    {"allOf": [{"$ref": "#"}, {"type": "object"}]},
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
]


@pytest.fixture(scope="module")
def llama(demo_small: Path) -> Iterator[LlamaVocab]:
    pytest.importorskip("llama_cpp")
    vocab = LlamaVocab(demo_small)
    yield vocab
    vocab.close()


@pytest.mark.parametrize("schema,accepted,refused", CASES, ids=[json.dumps(c[0])[:60] for c in CASES])
def test_table(schema: Any, accepted: list[str], refused: list[str], llama: LlamaVocab) -> None:
    gbnf = schema_to_gbnf(schema)
    grammar = Grammar(gbnf)
    for text, expected in [*((t, True) for t in accepted), *((t, False) for t in refused)]:
        assert grammar.accepts(text) is expected, text
        native = llama.grammar(gbnf)
        assert native is not None, gbnf
        with native:
            assert native.accepts(text) is expected, f"llama.cpp: {text}"
    for text in accepted:
        assert "nullable" in str(schema) or jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))


@pytest.mark.parametrize("schema,path", UNSUPPORTED, ids=[u[1] + json.dumps(u[0])[:30] for u in UNSUPPORTED])
def test_what_cannot_be_enforced_is_named_with_its_place(schema: Any, path: str) -> None:
    with pytest.raises(GrammarError) as caught:
        schema_to_gbnf(schema)
    assert f" {path}:" in caught.value.message
    assert repr(path.rsplit("/", 1)[1]) in caught.value.message or path.endswith(("$ref", "$id", "format"))
    assert caught.value.hint


@pytest.mark.parametrize("schema", CONTRADICTIONS, ids=json.dumps)
def test_a_schema_that_nothing_satisfies_is_an_error(schema: Any) -> None:
    with pytest.raises(GrammarError, match="satisfies|allows nothing"):
        schema_to_gbnf(schema)


@pytest.mark.parametrize("schema", NEVER_ENDING, ids=json.dumps)
def test_recursion_without_an_end_is_an_error(schema: Any) -> None:
    with pytest.raises(GrammarError, match="refers to itself|requires itself"):
        schema_to_gbnf(schema)


@pytest.mark.parametrize(
    "pattern",
    [
        "(?=a)",
        "(?<n>a)",
        r"(a)\1",
        r"\bx",
        r"\p{L}",
        "a**",
        "*a",
        "(a",
        "a)",
        "[a",
        "a{2,1}",
        "a{x}",
        "(a*)*",
        "a^",
        "(a$)",
        "[b-a]",
        r"\u12",
        "[]",
        "a$b",
        "\\",
    ],
)
def test_patterns_that_a_grammar_cannot_express(pattern: str) -> None:
    with pytest.raises(GrammarError, match="pattern"):
        schema_to_gbnf({"pattern": pattern})


def deep(levels: int) -> Any:
    schema: Any = {"type": "null"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def looped() -> Any:
    schema: dict[str, Any] = {}
    schema["items"] = schema
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        deep(70),
        deep(5000),
        looped(),
        {"minLength": 200_000},
        {"maximum": 10**500},
        {"minimum": float("inf")},
        {"enum": ["x" * 900_000]},
        {"properties": {"a": object()}},
        {"allOf": [{"anyOf": [{"maxLength": 10 * i + j} for i in range(3)]} for j in range(8)]},
        {"properties": {f"p{i}": {"type": "null"} for i in range(300)}, "minProperties": 150},
        {"pattern": "(" * 200 + "a" + ")" * 200},
        {"enum": ["\ud800"]},
    ],
    ids=lambda s: str(s)[:40] if not isinstance(s, dict) or "items" not in s else "deep",
)
def test_caps(schema: Any) -> None:
    with pytest.raises(GrammarError) as caught:
        schema_to_gbnf(schema)
    assert caught.value.hint
    assert str(caught.value).count("JSON schema") <= 1


def test_limits_name_their_place_too() -> None:
    with pytest.raises(GrammarError, match="at #/properties/a/items: 200,000 repetitions"):
        schema_to_gbnf({"properties": {"a": {"items": {"minLength": 200_000}}}})
    with pytest.raises(GrammarError, match="at #/properties/a: the pattern"):
        schema_to_gbnf({"properties": {"a": {"pattern": "(?=x)"}}})


def test_grammar_stays_linear_in_the_optional_properties(llama: LlamaVocab) -> None:
    def size(count: int) -> int:
        gbnf = schema_to_gbnf({"type": "object", "properties": {f"p{i:03}": {"type": "null"} for i in range(count)}})
        native = llama.grammar(gbnf)
        assert native is not None
        with native:
            assert native.accepts(f'{{"p000": null, "p{count - 1:03}": null}}')
        return len(gbnf)

    assert size(200) < 2.2 * size(100)


def test_long_repetitions_are_exact(llama: LlamaVocab) -> None:
    rules = Rules()
    gbnf = rules.text(rules.repeat(rules.add("x", '"x"'), 1500, 3700))
    with llama.grammar(gbnf) or pytest.fail("refused") as native:
        assert not native.accepts("x" * 1499)
    for count, expected in [(1500, True), (2000, True), (2500, True), (3499, True), (3700, True), (3701, False)]:
        with llama.grammar(gbnf) or pytest.fail("refused") as native:
            assert native.accepts("x" * count) is expected, count


def test_any_json_object() -> None:
    grammar = Grammar(json_object_gbnf())
    assert grammar.accepts('{"a": {"b": [1, 2.5, {"c": null}]}, "d": "\\u00e9"}')
    assert not grammar.accepts("[1]")
    assert not grammar.accepts("{}\n")


def test_blanks_cannot_go_on_for_ever() -> None:
    grammar = Grammar(json_object_gbnf())
    assert grammar.begins("{\n" + " " * 20)
    assert not grammar.begins("{\n" + " " * 21)
    assert not grammar.begins("{\n\n")
    assert not grammar.begins("{  ")


def test_response_formats() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}
    assert response_format_to_gbnf({"type": "text"}) is None
    assert response_format_to_gbnf({"type": "json_object"}) == json_object_gbnf()
    wanted = schema_to_gbnf(schema)
    assert response_format_to_gbnf({"type": "json_object", "schema": schema}) == wanted
    assert response_format_to_gbnf({"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": schema}}) == wanted
    assert response_format_to_gbnf({"type": "json_schema", "schema": schema}) == wanted


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"type": "xml"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": []},
        {"type": "json_schema", "json_schema": {"name": "n"}},
        {"type": "json_object", "schema": 3},
        {"type": ["text"]},
    ],
)
def test_bad_response_formats(bad: Any) -> None:
    with pytest.raises(GrammarError) as caught:
        response_format_to_gbnf(bad)
    assert caught.value.hint


def bounded(low: int | None, high: int | None) -> Grammar:
    bounds = {k: v for k, v in (("minimum", low), ("maximum", high)) if v is not None}
    return Grammar(schema_to_gbnf({"type": "integer", **bounds}))


@pytest.mark.parametrize("low", range(-12, 13, 4))
def test_small_integer_ranges_one_by_one(low: int) -> None:
    for high in range(low, 130, 11):
        grammar = bounded(low, high)
        assert [n for n in range(-200, 1200) if grammar.accepts(str(n))] == list(range(low, high + 1))


integers = st.one_of(st.integers(-300, 300), st.integers(-(10**25), 10**25))


def test_a_missing_bound_leaves_room_beyond_the_other() -> None:
    assert bounded(10**399, None).accepts(str(10**399 + 10**405))
    assert bounded(None, -(10**60)).accepts(str(-(10**60) - 1))
    assert not bounded(None, None).begins("1" * 41)


@slow_ok
@given(low=st.none() | integers, high=st.none() | integers, n=integers, nudge=st.integers(-2, 2))
def test_integer_ranges(low: int | None, high: int | None, n: int, nudge: int) -> None:
    assume(low is None or high is None or low <= high)
    grammar = bounded(low, high)
    edges = [b + nudge for b in (low, high) if b is not None]
    for number in (n, *edges):
        inside = (low is None or low <= number) and (high is None or number <= high)
        assert grammar.accepts(str(number)) is inside, (low, high, number)


decimals = (
    st.decimals(-200, 200, places=3)
    | st.decimals(-2, 2, places=1)
    | st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9, places=6)
)


@slow_ok
@given(
    a=decimals,
    b=decimals,
    n=decimals,
    opens=st.tuples(st.booleans(), st.booleans()),
    nudge=st.sampled_from(["0", "0.1", "-0.1", "1e-9", "-1e-9"]),
)
def test_number_ranges(a: Decimal, b: Decimal, n: Decimal, opens: tuple[bool, bool], nudge: str) -> None:
    low, high = (float(min(a, b)), float(max(a, b)))
    assume(low < high)
    grammar = Grammar(
        schema_to_gbnf(
            {"type": "number", ("exclusiveMinimum" if opens[0] else "minimum"): low, ("exclusiveMaximum" if opens[1] else "maximum"): high}
        )
    )
    exact_low, exact_high = Decimal(repr(low)), Decimal(repr(high))
    for number in (n, exact_low + Decimal(nudge), exact_high + Decimal(nudge), Decimal(0)):
        text = format(number, "f")
        inside = (exact_low < number if opens[0] else exact_low <= number) and (number < exact_high if opens[1] else number <= exact_high)
        for spelling in {text, text + ("00" if "." in text else ".0"), text.rstrip("0").rstrip(".") if "." in text else text}:
            assert grammar.accepts(spelling) is inside, (low, high, opens, spelling)


@slow_ok
@given(st.dates())
def test_every_date_is_a_date(day: datetime.date) -> None:
    assert re.fullmatch(FORMATS["date"], day.isoformat())


@slow_ok
@given(st.integers(1, 9999), st.integers(0, 13), st.integers(0, 32))
def test_no_other_date_is(year: int, month: int, day: int) -> None:
    text = f"{year:04}-{month:02}-{day:02}"
    try:
        datetime.date(year, month, day)
        real = True
    except ValueError:
        real = False
    assert bool(re.fullmatch(FORMATS["date"], text)) is real


@slow_ok
@given(
    st.text(alphabet='ab."\\\n1é-]', max_size=6),
    st.sampled_from(["a+b?", "^[ab]*$", "^[^ab]{1,3}$", "^(a|b1)*$", r"\d", r"^\w\W$", "^.b", "[.-]$", r"[\]\\]"]),
)
def test_patterns_match_as_python_matches(text: str, pattern: str) -> None:
    grammar = Grammar(schema_to_gbnf({"type": "string", "pattern": pattern}))
    expected = re.search(pattern.replace("$", r"\Z"), text, re.ASCII) is not None
    assert grammar.accepts(json.dumps(text, ensure_ascii=False)) is expected


# Schemas whose instances we can make, with a way to make them.

names = st.lists(st.sampled_from(["a", "ab", "b", "key two", 'q"uote', "é", "x-1"]), unique=True, max_size=4)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


@st.composite
def schemas(draw: st.DrawFn, depth: int = 2) -> dict[str, Any]:
    kind = draw(
        st.sampled_from(
            ["integer", "number", "string", "enum", "boolean", "null", *(["object", "map", "array", "tuple", "anyOf"] if depth else [])]
        )
    )
    inner = schemas(depth=depth - 1)
    match kind:
        case "integer":
            low = draw(st.integers(-50, 50))
            return {"type": "integer", "minimum": low, "maximum": low + draw(st.integers(0, 100))}
        case "number":
            low = draw(st.integers(-50, 50)) / 4
            return {"type": "number", "minimum": low, "exclusiveMaximum": low + draw(st.integers(1, 100)) / 8}
        case "string":
            low = draw(st.integers(0, 3))
            return {"type": "string", "minLength": low, "maxLength": low + draw(st.integers(0, 3))}
        case "enum":
            return {"enum": draw(st.lists(st.none() | st.booleans() | st.integers(-3, 3) | texts, min_size=1, max_size=4))}
        case "object":
            keys = draw(names)
            needed = [key for key in keys if draw(st.booleans())]
            extra = draw(st.sampled_from([None, False, True])) if depth < 2 else draw(st.none() | inner)
            closed = {} if extra is None else {"additionalProperties": extra}
            least = {"minProperties": draw(st.integers(0, len(keys)))} if not closed and draw(st.booleans()) else {}
            return {"type": "object", "properties": {key: draw(inner) for key in keys}, "required": needed, **closed, **least}
        case "map":
            return {"type": "object", "additionalProperties": draw(inner), "maxProperties": draw(st.integers(1, 3))}
        case "array":
            low = draw(st.integers(0, 2))
            return {"type": "array", "items": draw(inner), "minItems": low, "maxItems": low + draw(st.integers(0, 2))}
        case "tuple":
            items = draw(st.lists(inner, min_size=1, max_size=3))
            return {"type": "array", "prefixItems": items, "items": False, "minItems": draw(st.integers(0, len(items)))}
        case "anyOf":
            return {"anyOf": draw(st.lists(inner, min_size=1, max_size=3))}
        case _:
            return {"type": kind}


def instance(schema: Any, draw: st.DrawFn) -> Any:
    """A value of `schema`, object keys in the order that the grammar has."""
    if schema is True:
        return draw(st.none() | st.integers(0, 9) | texts)
    if "enum" in schema:
        return draw(st.sampled_from(schema["enum"]))
    if "anyOf" in schema:
        return instance(draw(st.sampled_from(schema["anyOf"])), draw)
    match schema["type"]:
        case "integer":
            return draw(st.integers(schema["minimum"], schema["maximum"]))
        case "number":
            steps = int((schema["exclusiveMaximum"] - schema["minimum"]) * 8) - 1
            return schema["minimum"] + draw(st.integers(0, steps)) / 8
        case "string":
            return draw(st.text(st.characters(exclude_categories=["Cs"]), min_size=schema["minLength"], max_size=schema["maxLength"]))
        case "array" if "prefixItems" in schema:
            count = draw(st.integers(schema["minItems"], len(schema["prefixItems"])))
            return [instance(item, draw) for item in schema["prefixItems"][:count]]
        case "array":
            return [instance(schema["items"], draw) for _ in range(draw(st.integers(schema["minItems"], schema["maxItems"])))]
        case "object":
            declared = schema.get("properties", {})
            must = [k for k in declared if k in schema.get("required", [])]
            optional = [k for k in declared if k not in must]
            least = max(0, schema.get("minProperties", 0) - len(must))
            chosen = set(must) | set(draw(st.lists(st.sampled_from(optional), unique=True, min_size=least)) if optional else [])
            out = {key: instance(declared[key], draw) for key in declared if key in chosen}
            extra = schema.get("additionalProperties", False)
            if extra is not False:
                free = [k for k in ("abc", "z", "zz", "é é") if k not in declared][: schema.get("maxProperties", 2)]
                for key in draw(st.lists(st.sampled_from(free), unique=True)):
                    out[key] = instance(extra, draw)
            return out
        case kind:
            return draw(st.booleans()) if kind == "boolean" else None


def mutated(value: Any, draw: st.DrawFn) -> Any:
    """Something near `value`."""
    if isinstance(value, dict) and value and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(value)))
        if draw(st.booleans()):
            return {k: v for k, v in value.items() if k != key}
        return {k: mutated(v, draw) if k == key else v for k, v in value.items()}
    if isinstance(value, list) and value and draw(st.booleans()):
        at = draw(st.integers(0, len(value) - 1))
        return draw(
            st.sampled_from([value[:at] + value[at + 1 :], [*value, value[at]], [*value[:at], mutated(value[at], draw), *value[at + 1 :]]])
        )
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value + draw(st.sampled_from([-200, -1, 1, 0.5, 200]))
    if isinstance(value, str):
        return draw(st.sampled_from([value + "abcd", value[:-1], value + "a"]))
    return draw(st.sampled_from([None, True, 17, "other", [], {}, {"new": 1}, [None, None]]))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_schemas(data: st.DataObject, llama: LlamaVocab) -> None:
    schema = data.draw(schemas())
    gbnf = schema_to_gbnf(schema)
    grammar = Grammar(gbnf)
    good = instance(schema, data.draw)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(good)
    for spelling in (
        json.dumps(good, ensure_ascii=False),
        json.dumps(good, ensure_ascii=False, separators=(",", ":")),
        json.dumps(good, ensure_ascii=False, indent=2),
    ):
        assert grammar.accepts(spelling), spelling
    bad = mutated(good, data.draw)
    text = json.dumps(bad, ensure_ascii=False)
    native = llama.grammar(gbnf)
    assert native is not None, gbnf
    with native:
        assert native.accepts(text) is grammar.accepts(text)
    if not validator.is_valid(bad):
        assert not grammar.accepts(text), text
