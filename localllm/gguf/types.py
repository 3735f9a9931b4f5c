"""The numbers of the GGUF format and their meaning: value types, tensor types, file types.

They are written down here because `import gguf` costs numpy and much else; the tests hold them against
the gguf package and against llama.cpp's own tables.
"""

from __future__ import annotations

from struct import Struct

UINT32, STRING, ARRAY = 4, 8, 9

SCALARS: dict[int, tuple[str, Struct]] = {
    0: ("UINT8", Struct("<B")),
    1: ("INT8", Struct("<b")),
    2: ("UINT16", Struct("<H")),
    3: ("INT16", Struct("<h")),
    UINT32: ("UINT32", Struct("<I")),
    5: ("INT32", Struct("<i")),
    6: ("FLOAT32", Struct("<f")),
    7: ("BOOL", Struct("<?")),
    10: ("UINT64", Struct("<Q")),
    11: ("INT64", Struct("<q")),
    12: ("FLOAT64", Struct("<d")),
}
"""Value types of fixed size: name and layout."""

SCALAR_CODES = {name: layout.format[1:] for name, layout in SCALARS.values()}
"""Name -> struct's letter."""

TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}
"""Tensor types: name, weights in a block, bytes of a block."""

RETIRED_TENSOR_TYPES = frozenset({4, 5, 31, 32, 33, 36, 37, 38})
"""Q4_2, Q4_3 and the repacked Q4_0 and IQ4_NL: llama.cpp reads them no more."""

FILE_TYPES: dict[int, str] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4",
    39: "NVFP4",
    40: "Q1_0",
    41: "Q2_0",
}
"""`general.file_type`, llama.cpp's LLAMA_FTYPE: the recipe that chose each tensor's type."""
