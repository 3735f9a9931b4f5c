"""`python -m localllm.llama.probe`: one line of JSON about llama.cpp as it is installed here, on stdout.

It runs in a process of its own, since loading the libraries may end it: a missing library, an instruction
that this CPU lacks, a driver that crashes. Whoever starts it reads the line, or how it died.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any


def probe() -> dict[str, Any]:
    """What this process gets: version, backends, devices, and the files that the libraries came from."""
    import llama_cpp

    from localllm.llama import lib

    own = (Path(llama_cpp.__file__).parent / "lib").resolve()
    return {
        "version": llama_cpp.__version__,
        "build": lib.build(),
        "backends": _backends(),
        "gpu_offload": bool(lib.api.llama_supports_gpu_offload()),
        "devices": [asdict(device) for device in lib.devices()],
        "libraries": (libraries := _libraries()),
        "foreign": [path for path in libraries if Path(path).resolve().parent != own],
    }


def _backends() -> list[str]:
    """Names of the backends compiled in or loaded, also those that find no device: CPU, CUDA, Vulkan, MTL, …"""
    from localllm.llama.lib import _bind as bind  # pyright: ignore[reportPrivateUsage]

    count = bind("ggml_backend_reg_count", ctypes.c_size_t)
    get = bind("ggml_backend_reg_get", ctypes.c_void_p, ctypes.c_size_t)
    name = bind("ggml_backend_reg_name", ctypes.c_char_p, ctypes.c_void_p)
    return [name(get(i)).decode("utf-8", "replace") for i in range(count())]


def _libraries() -> list[str]:
    """Files of llama.cpp's libraries mapped into this process; empty where the system does not tell (macOS)."""
    import psutil

    try:
        maps = psutil.Process().memory_maps()
    except (AttributeError, OSError, psutil.Error):
        return []
    paths = {str(each.path) for each in maps}
    return sorted(path for path in paths if Path(path).name.removeprefix("lib").startswith(("ggml", "llama.", "llama-")))


def main() -> None:
    """Print the line; C code that prints must not get into it."""
    faulthandler.enable(all_threads=False)
    out = os.dup(1)
    os.dup2(2, 1)
    line = json.dumps(probe()) + "\n"
    with open(out, "w", encoding="utf-8") as stdout:
        stdout.write(line)
    sys.stderr.flush()
    # A GPU driver's destructors can only make trouble now.
    os._exit(0)


if __name__ == "__main__":
    main()
