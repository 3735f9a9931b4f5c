"""The trie against a dictionary of plain lists."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localllm.engine.prefix import PrefixTrie, common_prefix

# few different tokens, so that paths meet and part everywhere
tokens = st.lists(st.integers(0, 2), max_size=12)
owners = st.integers(0, 5)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("extend"), owners, tokens),
        st.tuples(st.just("remove"), owners),
        st.tuples(st.just("fork"), owners, owners, st.integers(0, 12)),
        st.tuples(st.just("cut"), owners, st.integers(0, 12)),
    ),
    max_size=40,
)


def naive_common(a: list[int], b: list[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def prefixes(paths: dict[int, list[int]]) -> set[tuple[int, ...]]:
    """One element per token that a trie must store."""
    return {tuple(path[:n]) for path in paths.values() for n in range(1, len(path) + 1)}


@given(tokens, st.integers(0, 3), tokens, st.integers(0, 3))
def test_common_prefix_counts_equal_leading_tokens(a: list[int], a_start: int, b: list[int], b_start: int) -> None:
    a, b = [9] * a_start + a, [8] * b_start + b
    assert common_prefix(a, a_start, b, b_start) == naive_common(a[a_start:], b[b_start:])


@given(st.integers(0, 300), st.integers(0, 300))
def test_common_prefix_finds_a_late_difference(same: int, more: int) -> None:
    assert common_prefix([1] * same + [2] * more, 0, [1] * same + [3] * more, 0) == same


@settings(max_examples=300)
@given(operations, tokens, st.sets(owners), owners, st.integers(0, 12))
def test_a_trie_says_what_lists_say(steps: list[tuple], query: list[int], some: set[int], also: int, length: int) -> None:  # type: ignore[type-arg]
    trie, paths = PrefixTrie(), dict[int, list[int]]()
    for step in steps:
        before = prefixes(paths)
        match step:
            case ("extend", owner, more):
                path = paths.get(owner, [])
                joined = trie.extend(owner, more)
                # each stretch was another's already, they follow one another, and nothing was left out
                at = len(path)
                for other, start, end in joined:
                    assert start == at
                    assert start < end
                    assert other != owner
                    assert paths[other][:end] == (path + more)[:end]
                    at = end
                rest = {tuple((path + more)[:n]) for n in range(at + 1, len(path + more) + 1)}
                others = prefixes({o: p for o, p in paths.items() if o != owner})
                assert not rest & others
                paths[owner] = path + more
            case ("remove", owner):
                paths.pop(owner, None)
                assert trie.remove(owner) == len(before) - len(prefixes(paths))
            case ("fork", source, owner, length):
                if owner in paths or length > len(paths.get(source, [])):
                    with pytest.raises(ValueError, match=f"owner {owner if owner in paths else source}"):
                        trie.fork(source, owner, length)
                else:
                    trie.fork(source, owner, length)
                    paths[owner] = paths.get(source, [])[:length]
            case ("cut", owner, length):
                # what the pool does to truncate
                kept = trie.tokens(owner)[:length]
                trie.remove(owner)
                trie.extend(owner, kept)
                paths[owner] = paths.get(owner, [])[:length]
            case _:
                raise AssertionError(step)
        assert trie.size == len(prefixes(paths))
    for owner in range(6):
        path = paths.get(owner, [])
        assert (owner in trie) == (owner in paths)
        assert trie.length(owner) == len(path)
        assert trie.tokens(owner) == path
        others = {o: p for o, p in paths.items() if o != owner}
        assert trie.unique(owner) == len(prefixes({owner: path}) - prefixes(others))
        if owner in paths:
            assert sorted(trie.covered(owner)) == sorted(o for o, p in others.items() if path[: len(p)] == p)
    held = {o: p for o, p in paths.items() if o in some}
    assert trie.held(some) == len(prefixes(held))
    beginning = paths.get(also, [])[:length]
    assert trie.held(some, also=also, length=length) == len(prefixes(held) | prefixes({also: beginning}))
    assert trie.matches(query) == {o: n for o, p in paths.items() if (n := naive_common(p, query))}


def test_an_emptied_trie_holds_nothing() -> None:
    trie = PrefixTrie()
    trie.extend(0, [1, 2, 3])
    trie.fork(0, 1, 2)
    trie.extend(1, [9])
    assert trie.size == 4
    assert trie.remove(0) == 1
    assert trie.remove(1) == 3
    assert trie.remove(1) == 0
    assert trie.size == 0
    assert trie.matches([1, 2, 3]) == {}
