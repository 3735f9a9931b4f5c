"""Measuring: the engine beside a bare loop and the bindings' high-level class, in interleaved rounds. Nothing else needs it."""
