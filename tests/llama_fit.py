"""llama.cpp's own answer to what fits, `common_fit_params`, to compare ours with.

It is a C++ function of a library that the wheel brings beside the package, and it needs more of the system (OpenSSL) than llama.cpp
itself: `why_not()` says what keeps it from loading here, for skipping a test. Like a dry run, it runs in a child with fake GPUs.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # as a script, the folder above `tests` is not on the path
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from localllm import wire
from localllm.engine.config import EngineConfig
from tests import fake_gpu

_SYMBOL = (
    "_Z17common_fit_paramsPKcP18llama_model_paramsP20llama_context_paramsPfP32llama_model_tensor_buft_overridePmjPK22"
    "common_fit_extra_model14ggml_log_level"
)
_WARN = 3
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Fit:
    """What llama.cpp would load."""

    fits: bool
    """Whether it projects that the rest fits."""
    n_gpu_layers: int
    """-1 is all."""
    n_ctx: int
    tensor_split: tuple[float, ...]
    """Empty when it left it alone."""
    overrides: tuple[tuple[str, str], ...]

    def applied(self, config: EngineConfig) -> EngineConfig:
        """`config` as llama.cpp would have it."""
        from dataclasses import replace

        return replace(config, n_gpu_layers=self.n_gpu_layers, n_ctx=self.n_ctx, tensor_split=self.tensor_split, overrides=self.overrides)


def fit(config: EngineConfig, gpus: Sequence[fake_gpu.FakeGpu], *, margin_bytes: int = 1 << 30, n_ctx_min: int = 4096) -> Fit:
    """What llama.cpp makes of `config` on these devices; it changes what is left at its default: layers, split, overrides, n_ctx = 0."""
    asked = wire.encode({"config": config, "margin_bytes": margin_bytes, "n_ctx_min": n_ctx_min})
    done = subprocess.run(
        fake_gpu.command(gpus, __file__),
        input=asked,
        capture_output=True,
        timeout=_TIMEOUT_S,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    return wire.decode(Fit, json.loads(done.stdout))


@cache
def why_not() -> str:
    """Why it cannot be called here; empty when it can."""
    done = subprocess.run([sys.executable, "-P", __file__, "--check"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no reason given"])[-1]


def _function() -> Any:
    import llama_cpp

    from localllm.llama import lib

    assert lib.raw  # loads the libraries that this one needs
    folder = Path(llama_cpp.__file__).parent.parent / "lib"
    paths = sorted(folder.glob("libllama-common.so.*")) + sorted(folder.glob("libllama-common*.dylib"))
    if not paths:
        raise OSError(f"there is no libllama-common in {folder}")
    function = getattr(ctypes.CDLL(str(paths[0])), _SYMBOL)
    function.restype = ctypes.c_int
    return function


class _Override(ctypes.Structure):
    _fields_ = [("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p)]


def _fit(config: EngineConfig, margin_bytes: int, n_ctx_min: int) -> dict[str, Any]:
    """Call it."""
    from localllm.engine.opening import context_params, open_model
    from localllm.llama import buffers
    from localllm.llama.context import native
    from localllm.llama.lib import api

    model = open_model(config, no_alloc=True)
    context = native(model, context_params(config, model))
    context.n_ctx = config.n_ctx
    model.close()
    params = api.llama_model_default_params()
    params.n_gpu_layers = config.n_gpu_layers
    n_devices, n_overrides = api.llama_max_devices(), int(api._lib.llama_max_tensor_buft_overrides())
    split = (ctypes.c_float * n_devices)()
    overrides = (_Override * n_overrides)()
    margins = (ctypes.c_size_t * n_devices)(*[margin_bytes] * n_devices)
    path = os.fsencode(config.model_path)
    status = _function()(path, ctypes.byref(params), ctypes.byref(context), split, overrides, margins, n_ctx_min, None, _WARN)
    shares = [float(share) for share in split]
    while shares and not shares[-1]:
        shares.pop()
    placed = [(each.pattern.decode(), buffers.describe(each.buffer_type).name) for each in overrides if each.pattern]
    return {
        "fits": status == 0,
        "n_gpu_layers": params.n_gpu_layers,
        "n_ctx": context.n_ctx or config.n_ctx,
        "tensor_split": shares,
        "overrides": placed,
    }


def main() -> None:
    if sys.argv[1:] == ["--check"]:
        _function()
        return
    asked = json.load(sys.stdin)
    print(json.dumps(_fit(wire.decode(EngineConfig, asked["config"]), asked["margin_bytes"], asked["n_ctx_min"])), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
