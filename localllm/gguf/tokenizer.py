"""The tokenizer in a header: whether its lists fit together, and the hashes that tell two tokenizers apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from localllm.gguf.cursor import Cursor
from localllm.gguf.header import Array, Value

PREFIX = "tokenizer.ggml."
TOKENS, MERGES = PREFIX + "tokens", PREFIX + "merges"
SCORES, TOKEN_TYPES = PREFIX + "scores", PREFIX + "token_type"
PADDING = PREFIX + "padding_token_id"
UNUSED = (5).to_bytes(4, "little")
"""Type of the tokens that fill a vocabulary up to a round number."""

_TYPES = {TOKENS: ("STRING",), MERGES: ("STRING",), SCORES: ("FLOAT32",), TOKEN_TYPES: ("INT32", "UINT32")}


def hashes(cursor: Cursor, metadata: Mapping[str, Value]) -> tuple[str, str]:
    """Header's `tokenizer_hash` and `vocab_hash`, both empty without tokens; raises ModelError for lists that do not fit.

    Trailing unused tokens are left out: models of one family are padded to different sizes (Qwen2.5:
    151,936 and 152,064). So is the padding token, which differs between otherwise equal tokenizers.
    """
    arrays = {key: _array(cursor, key, metadata[key]) for key in _TYPES if key in metadata}
    tokens = arrays.get(TOKENS)
    if tokens is None:
        return "", ""
    for key in (SCORES, TOKEN_TYPES):
        # llama.cpp takes one of each per token; older builds do not look where the list ends
        if key in arrays and arrays[key].length < tokens.length:
            raise cursor.damaged(f"{key} has {arrays[key].length:,} entries for {tokens.length:,} tokens")
    used = _used(cursor, tokens, arrays.get(TOKEN_TYPES))
    cut = {key: cursor.sha256(arrays[key].offset, used * 4) for key in (SCORES, TOKEN_TYPES) if key in arrays}
    cut[TOKENS] = _hash_of_strings(cursor, tokens, used)

    tokenizer = hashlib.sha256()
    for key in sorted(metadata):
        if key.startswith(PREFIX) and key != PADDING:
            value = metadata[key]
            said = cut.get(key) or (value.sha256 if isinstance(value, Array) else repr(value))
            tokenizer.update(f"{key}={said}\n".encode("utf-8", "replace"))
    vocab = hashlib.sha256(f"{metadata.get(PREFIX + 'model')!r}\n{cut[TOKENS]}".encode("utf-8", "replace"))
    return tokenizer.hexdigest(), vocab.hexdigest()


def _array(cursor: Cursor, key: str, value: Value) -> Array:
    # a list of smaller elements would be read beyond its end
    if not isinstance(value, Array) or value.type not in _TYPES[key]:
        raise cursor.damaged(f"{key} is not a list of {' or '.join(_TYPES[key])}")
    return value


def _used(cursor: Cursor, tokens: Array, types: Array | None) -> int:
    """How many tokens there are before the padding."""
    used = tokens.length
    if types is None:
        return used
    data = cursor.slice(types.offset, used * 4)
    while used and data[used * 4 - 4 : used * 4] == UNUSED:
        used -= 1
    return used


def _hash_of_strings(cursor: Cursor, array: Array, count: int) -> str:
    if count == array.length:
        return array.sha256
    cursor.back_to(array.offset)
    cursor.strings(count)
    return cursor.sha256(array.offset, cursor.position - array.offset)
