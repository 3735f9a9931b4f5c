"""Our check of signatures against RFC 8032's vectors, against the cryptography package, and against forgers."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from localllm.bundle.ed25519 import L, P, verify

# RFC 8032, 7.1: public key, message, signature.
VECTORS = [
    (
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
]


@pytest.mark.parametrize("key, message, signature", VECTORS)
def test_the_rfc(key: str, message: str, signature: str) -> None:
    public, text, sig = map(bytes.fromhex, (key, message, signature))
    assert verify(public, text, sig)
    assert not verify(public, text + b"\0", sig)


@given(st.binary(max_size=300), st.binary(min_size=32, max_size=32), st.integers(0, 511))
@settings(max_examples=20, deadline=None)
def test_what_cryptography_signs_and_no_bit_of_it_changed(message: bytes, seed: bytes, bit: int) -> None:
    key = Ed25519PrivateKey.from_private_bytes(seed)
    public, signature = key.public_key().public_bytes_raw(), key.sign(message)
    assert verify(public, message, signature)
    changed = bytearray(signature)
    changed[bit // 8] ^= 1 << bit % 8
    assert not verify(public, message, bytes(changed))
    other = bytearray(public)
    other[bit // 16] ^= 1 << bit % 8
    assert not verify(bytes(other), message, signature)


def test_a_signature_has_one_form_only() -> None:
    public, message, signature = (bytes.fromhex(text) for text in VECTORS[1])
    response = int.from_bytes(signature[32:], "little")
    assert not verify(public, message, signature[:32] + (response + L).to_bytes(32, "little"))


@pytest.mark.parametrize("y", [0, 1, P - 1, P, P + 1, 2**255 - 1])
@pytest.mark.parametrize("sign", [0, 1])
def test_a_key_that_signs_everything_is_no_key(y: int, sign: int) -> None:
    # With a public key of small order, R = s * B fits many messages: here s = 0, R the neutral point.
    key = (y | sign << 255).to_bytes(32, "little")
    neutral = (1).to_bytes(32, "little")
    assert not any(verify(key, bytes([n]), neutral + bytes(32)) for n in range(16))


@pytest.mark.parametrize("key, signature", [(31, 64), (33, 64), (32, 63), (32, 65), (0, 0)])
def test_lengths(key: int, signature: int) -> None:
    assert not verify(bytes(key), b"", bytes(signature))
