"""The gate calls each byte reasoning or answer, however the output is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.prompt.gate import Part, ReasoningGate

CALL = '<tool_call>{"name"'


def answer(pieces: list[bytes], *, opened: bool = False) -> bytes:
    """What a listener behind the gate hears: kept pieces count once the part is known."""
    gate, kept = ReasoningGate("<think>", "</think>", opened=opened), b""
    for piece in pieces:
        part = gate.push(piece)
        kept = b"" if part is Part.REASONING else kept + piece
    return kept


@pytest.mark.parametrize(
    "output, opened, heard",
    [
        (CALL, False, CALL),
        ("<think>say " + CALL + "</think>yes", False, "yes"),
        (" \n<think>a</think>b", False, "b"),
        ("a</think>" + CALL, True, CALL),
        ("still " + CALL, True, ""),
        ("<thing>", False, "<thing>"),
        ("<think></think>", False, ""),
        ("x<think>y</think>", False, "x<think>y</think>"),
    ],
)
def test_only_the_answer_is_heard(output: str, opened: bool, heard: str) -> None:
    assert answer([bytes([b]) for b in output.encode()], opened=opened) == heard.encode()


@given(st.text(alphabet="<>/thinkx ", max_size=30), st.booleans())
def test_byte_by_byte_nothing_of_the_answer_is_lost_or_doubled(tail: str, opened: bool) -> None:
    output = f"{'' if opened else '<think>'}plan</think>{tail}"
    assert answer([bytes([b]) for b in output.encode()], opened=opened) == tail.encode()
