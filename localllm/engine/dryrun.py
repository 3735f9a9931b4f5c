"""`python -m localllm.engine.dryrun`: what configs would take, by asking llama.cpp itself, without allocating it.

`{"configs": [EngineConfig…]}` comes in on stdin; for each, lines of JSON go out: `{"stage": "model" | "context"}` when it begins to
load one, then what localllm.dry.DryRun holds, or `{"error": LocalLLMError.to_json()}`. It runs in a process of its own, since
llama.cpp ends it over damaged files and combinations it does not like, and since devices give back their memory only when it ends.
Recurrent states and outputs are allocated even so.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from localllm import wire
from localllm.engine.config import EngineConfig
from localllm.errors import LocalLLMError

LIFE_S = 300.0
"""An orphan ends by itself."""


def dry_runs(configs: Iterable[EngineConfig]) -> Iterator[dict[str, Any]]:
    """The lines that answer `configs`; a model is opened once for all that place it alike, one after the other."""
    from localllm.engine.opening import context_params, open_model
    from localllm.llama.breakdown import account
    from localllm.llama.context import Context
    from localllm.llama.model import Model

    opened: tuple[EngineConfig, Model] | None = None
    for config in configs:
        try:
            if opened is None or not _same_model(opened[0], config):
                yield {"stage": "model"}
                if opened is not None:
                    opened[1].close()
                    opened = None
                opened = config, open_model(config, no_alloc=True)
            yield {"stage": "context"}
            context = Context(opened[1], context_params(config, opened[1]))
            rows, exact = account(context)
            yield {"rows": [asdict(row) for row in rows], "n_cells": context.n_ctx, "exact": exact}
            context.close()
        except LocalLLMError as error:
            yield {"error": error.to_json()}


def _same_model(one: EngineConfig, other: EngineConfig) -> bool:
    fields = ("model_path", "n_gpu_layers", "tensor_split", "main_gpu", "split_mode", "overrides", "load_mode")
    return all(getattr(one, field) == getattr(other, field) for field in fields)


def main() -> None:
    """Answer stdin; C code that prints must not get between the lines."""
    faulthandler.enable(all_threads=False)
    faulthandler.dump_traceback_later(LIFE_S, exit=True)
    out = os.dup(1)
    os.dup2(2, 1)
    configs = [wire.decode(EngineConfig, each) for each in json.load(sys.stdin)["configs"]]
    with open(out, "w", encoding="utf-8") as stdout:
        for line in dry_runs(configs):
            print(json.dumps(line), file=stdout, flush=True)
    sys.stderr.flush()
    # A GPU driver's destructors can only make trouble now.
    os._exit(0)


if __name__ == "__main__":
    main()
