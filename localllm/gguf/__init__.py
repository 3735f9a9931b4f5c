"""What a model file says about itself, read without trusting it and without touching the weights.

`read_model` is the gate that every file passes before llama.cpp sees it: whatever the bytes are, it
answers within a second and 200 MB with a Header, or raises ModelError. `parse_header` does the same
over any random-access source, such as HTTP ranges. What the values mean for memory or speed is not
known here.
"""

from localllm.gguf.header import Array, Header, Scalar, Tensor, Value
from localllm.gguf.outline import write_outline
from localllm.gguf.parser import parse_header
from localllm.gguf.split import joined, read_header, read_model

__all__ = ["Array", "Header", "Scalar", "Tensor", "Value", "joined", "parse_header", "read_header", "read_model", "write_outline"]
