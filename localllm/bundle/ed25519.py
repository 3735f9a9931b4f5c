"""Checking an ed25519 signature (RFC 8032) with nothing but the standard library, so that a stick can check itself.

Verification only: it handles no secret, so plain integers, slow and not constant-time, do no harm. Signing is left to the
`cryptography` package. Strict: every number must be in its canonical range, and points of small order are no keys.
"""

from __future__ import annotations

import hashlib

KEY_BYTES = 32
SIGNATURE_BYTES = 64

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, P - 2, P) % P
ROOT_OF_MINUS_ONE = pow(2, (P - 1) // 4, P)


class _Point:
    """A point of the twisted Edwards curve -x² + y² = 1 + d x² y² in extended coordinates: x = X/Z, y = Y/Z, T = XY/Z."""

    def __init__(self, x: int, y: int, z: int, t: int) -> None:
        self.x, self.y, self.z, self.t = x, y, z, t

    def __add__(self, other: _Point) -> _Point:
        # "add-2008-hwcd-3": complete for this curve, so it doubles too.
        a = (self.y - self.x) * (other.y - other.x) % P
        b = (self.y + self.x) * (other.y + other.x) % P
        c = 2 * self.t * other.t * D % P
        d = 2 * self.z * other.z % P
        e, f, g, h = b - a, d - c, d + c, b + a
        return _Point(e * f % P, g * h % P, f * g % P, e * h % P)

    def __mul__(self, times: int) -> _Point:
        total, power = ZERO, self
        while times:
            if times & 1:
                total += power
            power += power
            times >>= 1
        return total

    def equals(self, other: _Point) -> bool:
        return (self.x * other.z - other.x * self.z) % P == 0 and (self.y * other.z - other.y * self.z) % P == 0


ZERO = _Point(0, 1, 1, 0)


def _decode(data: bytes) -> _Point | None:
    """The point that 32 bytes mean: y, and the sign of x in the top bit. None for what is no canonical point."""
    number = int.from_bytes(data, "little")
    y, sign = number & (2**255 - 1), number >> 255
    if y >= P:
        return None
    # x² = (y² - 1) / (d y² + 1)
    x_squared = (y * y - 1) * pow(D * y * y + 1, P - 2, P) % P
    x = pow(x_squared, (P + 3) // 8, P)
    if (x * x - x_squared) % P:
        x = x * ROOT_OF_MINUS_ONE % P
    if (x * x - x_squared) % P or (x == 0 and sign):
        return None
    if x & 1 != sign:
        x = P - x
    return _Point(x, y, 1, x * y % P)


_BASE_Y = 4 * pow(5, P - 2, P) % P


def verify(public_key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` (64 bytes) is that of `public_key` (32 bytes) for `message`."""
    if len(public_key) != KEY_BYTES or len(signature) != SIGNATURE_BYTES:
        return False
    key, commitment, base = _decode(public_key), _decode(signature[:32]), _decode(_BASE_Y.to_bytes(32, "little"))
    response = int.from_bytes(signature[32:], "little")
    if key is None or commitment is None or base is None or response >= L or (key * 8).equals(ZERO):
        return False
    challenge = int.from_bytes(hashlib.sha512(signature[:32] + public_key + message).digest(), "little") % L
    return (base * response).equals(commitment + key * challenge)
