"""Which token prefixes are in the KV cache, and whose cells they are: a radix trie.

Each owner (a llama.cpp sequence id) holds one path from the root; owners with a common beginning
share its nodes, exactly as `Context.share` lets them share cells. So the trie's `size` is the
number of cells in use. It knows tokens and owners; it does not touch llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

Tokens = Sequence[int]


def common_prefix(a: Tokens, a_start: int, b: Tokens, b_start: int) -> int:
    """How many tokens a[a_start:] and b[b_start:] have in common at their start."""
    limit = min(len(a) - a_start, len(b) - b_start)
    if a[a_start : a_start + limit] == b[b_start : b_start + limit]:
        return limit
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        if a[a_start + low : a_start + middle] == b[b_start + low : b_start + middle]:
            low = middle
        else:
            high = middle
    return low


@dataclass(slots=True, eq=False)
class _Node:
    edge: list[int]
    parent: _Node | None
    owners: set[int] = field(default_factory=set[int])
    children: dict[int, _Node] = field(default_factory=dict[int, "_Node"])


class PrefixTrie:
    """Paths of tokens, each held by an owner; lists of token ids in, lengths out."""

    def __init__(self) -> None:
        self._root = _Node([], None)
        self._ends: dict[int, _Node] = {}
        self._lengths: dict[int, int] = {}
        self.size = 0
        """Tokens stored, shared ones counted once."""

    def __contains__(self, owner: int) -> bool:
        return owner in self._ends

    def length(self, owner: int) -> int:
        """Tokens on the owner's path; 0 when it has none."""
        return self._lengths.get(owner, 0)

    def tokens(self, owner: int) -> list[int]:
        """The owner's path from the root."""
        edges: list[list[int]] = []
        node = self._ends.get(owner)
        while node is not None:
            edges.append(node.edge)
            node = node.parent
        return [token for edge in reversed(edges) for token in edge]

    def matches(self, tokens: Tokens) -> dict[int, int]:
        """Each owner's number of leading tokens in common with `tokens`, owners without any left out."""
        out: dict[int, int] = {}
        node, depth = self._root, 0
        while depth < len(tokens) and (child := node.children.get(tokens[depth])) is not None:
            same = common_prefix(child.edge, 0, tokens, depth)
            depth += same
            out.update(dict.fromkeys(child.owners, depth))
            if same < len(child.edge):
                break
            node = child
        return out

    def fork(self, source: int, owner: int, length: int) -> None:
        """Start `owner`'s path as the first `length` tokens of `source`'s."""
        if owner in self._ends:
            raise ValueError(f"owner {owner} already has a path")
        if not 0 <= length <= self.length(source):
            raise ValueError(f"owner {source} holds {self.length(source)} tokens, not {length}")
        path = list(self._path(source))
        node, depth = self._root, 0
        for step in path:
            if depth == length:
                break
            node = step if depth + len(step.edge) <= length else self._split(step, length - depth)
            node.owners.add(owner)
            depth += len(node.edge)
        self._ends[owner] = node
        self._lengths[owner] = length

    def extend(self, owner: int, tokens: Tokens) -> list[tuple[int, int, int]]:
        """Append `tokens` to the owner's path.

        Where another owner already holds the same continuation the paths join; each such stretch is
        returned as (other owner, start, end) so that the caller can share its cells.
        """
        node = self._ends.get(owner, self._root)
        depth = self._lengths.get(owner, 0)
        end = depth + len(tokens)
        rest = list(tokens)
        joined: list[tuple[int, int, int]] = []
        while rest and (child := node.children.get(rest[0])) is not None:
            same = common_prefix(child.edge, 0, rest, 0)
            other = next(iter(child.owners))
            node = child if same == len(child.edge) else self._split(child, same)
            node.owners.add(owner)
            joined.append((other, depth, depth + same))
            depth += same
            rest = rest[same:]
        if rest:
            if node is not self._root and node.owners == {owner} and not node.children:
                node.edge.extend(rest)
            else:
                leaf = _Node(rest, node, {owner})
                node.children[rest[0]] = leaf
                node = leaf
            self.size += len(rest)
        self._ends[owner] = node
        self._lengths[owner] = end
        return joined

    def remove(self, owner: int) -> int:
        """Forget the owner's path; returns how many tokens nobody holds any more."""
        before = self.size
        node = self._ends.pop(owner, None)
        self._lengths.pop(owner, None)
        while node is not None and node is not self._root:
            parent = node.parent
            assert parent is not None
            node.owners.discard(owner)
            if not node.owners:
                del parent.children[node.edge[0]]
                self.size -= len(node.edge)
            node = parent
        return before - self.size

    def covered(self, owner: int) -> list[int]:
        """Other owners whose whole path is a beginning of this owner's path."""
        nodes = set(map(id, self._path(owner))) | {id(self._root)}
        return [o for o, end in self._ends.items() if o != owner and id(end) in nodes]

    def held(self, owners: set[int], *, also: int = -1, length: int = 0) -> int:
        """Tokens that `owners` hold together, and the first `length` of the owner `also`."""
        total, stack = 0, [self._root]
        while stack:
            for child in stack.pop().children.values():
                if not owners.isdisjoint(child.owners):
                    total += len(child.edge)
                    stack.append(child)
        depth = 0
        for node in self._path(also):
            if depth < length and owners.isdisjoint(node.owners):
                total += min(len(node.edge), length - depth)
            depth += len(node.edge)
        return total

    def unique(self, owner: int) -> int:
        """Tokens that only this owner holds: what removing it would free."""
        return sum(len(node.edge) for node in self._path(owner) if node.owners == {owner})

    def _path(self, owner: int) -> Iterator[_Node]:
        path: list[_Node] = []
        node = self._ends.get(owner)
        while node is not None and node is not self._root:
            path.append(node)
            node = node.parent
        return reversed(path)

    def _split(self, node: _Node, length: int) -> _Node:
        """Cut a node's edge after `length` tokens; returns the upper half, which keeps all owners."""
        parent = node.parent
        assert parent is not None
        upper = _Node(node.edge[:length], parent, set(node.owners))
        parent.children[upper.edge[0]] = upper
        node.edge = node.edge[length:]
        node.parent = upper
        upper.children[node.edge[0]] = node
        return upper
