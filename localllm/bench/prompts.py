"""Prompts that nobody has sent before, as sentences of everyday words drawn by a seed.

Text and not random token ids, because those make answers that are no valid UTF-8, which slows some
arms down and not others. The sentences mean nothing.
"""

from __future__ import annotations

import random

_ADJECTIVES = ("quiet", "old", "small", "bright", "heavy", "early", "narrow", "warm", "distant", "simple", "careful", "green", "patient")
_NOUNS = ("harbour", "teacher", "engine", "garden", "letter", "river", "market", "window", "bridge", "recipe", "signal", "captain")
_VERBS = ("follows", "carries", "answers", "opens", "measures", "finds", "repairs", "describes", "keeps", "crosses", "counts", "paints")
_ENDS = ("slowly", "twice", "before noon", "without a sound", "again", "near the door", "with care", "every morning", "for a friend")


def prose(seed: str, words: int) -> str:
    """At least `words` words; the same for the same seed, and another from its first words on for another seed."""
    draw = random.Random(seed)
    out = [f"{draw.randrange(10**6)} notes."]
    n = 2
    while n < words:
        subject = f"The {draw.choice(_ADJECTIVES)} {draw.choice(_NOUNS)}"
        sentence = f"{subject} {draw.choice(_VERBS)} the {draw.choice(_NOUNS)} {draw.choice(_ENDS)}."
        out.append(sentence)
        n += len(sentence.split())
    return " ".join(out)
