"""The models on this machine: what there is, where it came from, and the file that a name means.

`Library` lists, finds, records, removes and verifies; `importing`, `adopting` and `disk` build on it.
"""

from localllm.library.library import Library
from localllm.library.model import LocalModel
from localllm.library.resolve import resolve_model

__all__ = ["Library", "LocalModel", "resolve_model"]
