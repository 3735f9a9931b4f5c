"""Grammars for the decimal spellings of numbers inside a range. Knows digits, not JSON Schema.

Integers are exact for every bound. Bounded decimals are exact too, but written without an exponent and
with at most 24 digits beyond those of the bound. A missing bound means 40 digits, or 10 more than the
other bound has, so that a weak model cannot write digits for ever.
"""

from __future__ import annotations

from decimal import Decimal

from localllm.errors import GrammarError
from localllm.prompt.gbnf import either

FREE_DIGITS = 40
MAX_DIGITS = 400


def integer_range(low: int | None, high: int | None) -> str:
    """Every integer from `low` to `high` inclusive (low <= high), `-0` excepted."""
    _check(low, high)
    low, high = low if low is not None else 1 - _beyond(high), high if high is not None else _beyond(low) - 1
    alternatives: list[str] = []
    if low < 0:
        alternatives += [f'"-" {form}' for form in _magnitudes(max(1, -high), -low)]
    if high >= 0:
        alternatives += _magnitudes(max(0, low), high)
    return either(*alternatives)


def number_range(low: Decimal | None, high: Decimal | None, *, low_open: bool = False, high_open: bool = False) -> str | None:
    """Every plain decimal between the bounds, an open bound itself excluded; None when there is none."""
    _check(low, high)
    # A missing bound is an excluded power of ten: every number with fewer digits.
    limit_low, limit_high = Decimal(-_beyond(high)), Decimal(_beyond(low))
    low, low_open = (low, low_open) if low is not None else (limit_low, True)
    high, high_open = (high, high_open) if high is not None else (limit_high, True)
    zero = Decimal(0)
    alternatives: list[str] = []
    if low < 0:
        # copy_negate, because `-` would round to the context's 28 digits
        nearest = (high.copy_negate(), high_open) if high <= 0 else (zero, False)
        alternatives += [f'"-" {form}' for form in _decimals(*nearest, low.copy_negate(), low_open)]
    if high >= 0:
        bottom = (low, low_open) if low >= 0 else (zero, False)
        alternatives += _decimals(*bottom, high, high_open)
    return either(*alternatives) if alternatives else None


def _beyond(bound: int | Decimal | None) -> int:
    """The power of ten that stands for "no limit" opposite `bound`."""
    digits = 0 if bound is None else len(str(abs(int(bound))))
    return int(10 ** max(FREE_DIGITS, digits + 10))


def _check(*bounds: int | Decimal | None) -> None:
    if any(b is not None and not -(10**MAX_DIGITS) < b < 10**MAX_DIGITS for b in bounds):
        raise GrammarError(f"a bound has more than {MAX_DIGITS} digits", hint="use a smaller bound, or none")


def _magnitudes(low: int, high: int) -> list[str]:
    """The digits of every whole number from low to high (0 <= low <= high), no leading zero."""
    first, last = str(low), str(high)
    if len(first) == len(last):
        return [_between(first, last)]
    forms = [_between(first, "9" * len(first))]
    if (fewest := len(first) + 1) < len(last):
        forms.append(f"[1-9] [0-9]{{{fewest - 1},{len(last) - 2}}}")
    return [*forms, _between("1" + "0" * (len(last) - 1), last)]


def _between(low: str, high: str) -> str:
    """Digit strings of one length, from low to high."""
    same = next((i for i, (a, b) in enumerate(zip(low, high, strict=True)) if a != b), len(low))
    prefix = f'"{low[:same]}" ' if same else ""
    if same == len(low):
        return prefix.strip()
    a, b, rest_low, rest_high = int(low[same]), int(high[same]), low[same + 1 :], high[same + 1 :]
    forms: list[str] = []
    if rest_low.strip("0"):
        forms.append(f'"{a}" {_bounded(rest_low, up=True)}')
        a += 1
    if rest_high.strip("9"):
        forms.append(f'"{b}" {_bounded(rest_high, up=False)}')
        b -= 1
    if a <= b:
        forms.append(_span(a, b) + _any(len(rest_low)))
    return prefix + either(*forms)


def _bounded(bound: str, *, up: bool) -> str:
    """Digit strings of the bound's length, at least (`up`) or at most the bound, built from the last digit."""
    extreme, form, free = ("0" if up else "9"), "", True
    for done, digit in enumerate(reversed(bound)):
        if free and digit == extreme:
            form = _any(done + 1).strip()
            continue
        free = False
        forms = [f'"{digit}" {form}'.strip()]
        if up and digit < "9":
            forms.append(_span(int(digit) + 1, 9) + _any(done))
        if not up and digit > "0":
            forms.append(_span(0, int(digit) - 1) + _any(done))
        form = either(*forms)
    return form


def _span(a: int, b: int) -> str:
    return f'"{a}"' if a == b else f"[{a}-{b}]"


def _any(count: int) -> str:
    return f" [0-9]{{{count}}}" if count else ""


# What may follow the point, as (may there be nothing, a non-empty digit string or None); None: no way at all.
_Fraction = tuple[bool, str | None]


def _decimals(low: Decimal, low_open: bool, high: Decimal, high_open: bool) -> list[str]:
    """Spellings of the non-negative decimals from low to high."""
    if low > high:
        return []
    (a, a_rest), (b, b_rest) = _split(low), _split(high)
    if a == b:
        return _with_fraction(f'"{a}"', _inside(a_rest, low_open, b_rest, high_open))
    forms = _with_fraction(f'"{a}"', _above(a_rest, low_open))
    if b - a > 1:
        forms += _with_fraction(either(*_magnitudes(a + 1, b - 1)), (True, _DIGITS))
    return forms + _with_fraction(f'"{b}"', _below(b_rest, high_open))


def _split(number: Decimal) -> tuple[int, str]:
    if number and number.adjusted() < -MAX_DIGITS:
        raise GrammarError(f"a bound has more than {MAX_DIGITS} digits", hint="use a larger bound, or none")
    whole, _, rest = format(number, "f").partition(".")
    return int(whole), rest.rstrip("0")


def _with_fraction(whole: str, fraction: _Fraction | None) -> list[str]:
    if fraction is None:
        return []
    empty, rest = fraction
    if rest is None:
        return [whole]
    return [f'{whole} ("." {rest})?' if empty else f'{whole} "." {rest}']


_DIGITS = "[0-9] digits"


def _above(bound: str, is_open: bool) -> _Fraction:
    """Fractions at least (open: more than) `bound`, which has no trailing zero."""
    inner: _Fraction = (False, "zeros [1-9] digits") if is_open else (True, _DIGITS)
    for digit in reversed(bound):
        forms = [_follow(f'"{digit}"', inner)]
        if digit < "9":
            forms.append(f"{_span(int(digit) + 1, 9)} digits")
        inner = (False, either(*forms))
    return inner


def _below(bound: str, is_open: bool) -> _Fraction | None:
    """Fractions at most (open: less than) `bound`."""
    inner: _Fraction | None = None if is_open else (True, '"0" zeros')
    for digit in reversed(bound):
        forms = [] if inner is None else [_follow(f'"{digit}"', inner)]
        if digit > "0":
            forms.append(f"{_span(0, int(digit) - 1)} digits")
        inner = (True, either(*forms))
    return inner


def _inside(low: str, low_open: bool, high: str, high_open: bool) -> _Fraction | None:
    """Fractions between two bounds, low <= high."""
    length = max(len(low), len(high))
    a, b = low.ljust(length, "0"), high.ljust(length, "0")
    same = next((i for i in range(length) if a[i] != b[i]), length)
    if same == length:
        inner: _Fraction | None = None if low_open or high_open else (True, '"0" zeros')
    else:
        forms: list[str] = [_follow(f'"{a[same]}"', _above(low[same + 1 :], low_open))]
        if int(b[same]) - int(a[same]) > 1:
            forms.append(f"{_span(int(a[same]) + 1, int(b[same]) - 1)} digits")
        if (rest := _below(high[same + 1 :], high_open)) is not None:
            forms.append(_follow(f'"{b[same]}"', rest))
        inner = (len(low) <= same and not low_open, either(*forms))
    for i in reversed(range(same)):
        inner = None if inner is None else (len(low) <= i and not low_open, _follow(f'"{a[i]}"', inner))
    return inner


def _follow(digit: str, rest: _Fraction) -> str:
    empty, form = rest
    return digit if form is None else f"{digit} ({form})?" if empty else f"{digit} {form}"
