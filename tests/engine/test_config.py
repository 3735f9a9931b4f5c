"""What a config refuses, and that it survives the pipe."""

from __future__ import annotations

import json
from typing import Any

import pytest

from localllm import wire
from localllm.engine.config import EngineConfig
from localllm.errors import InvalidRequest, UsageError

PLACED: dict[str, Any] = {
    "n_gpu_layers": 20,
    "tensor_split": (3.0, 1.0),
    "main_gpu": 1,
    "split_mode": "row",
    "overrides": ((r"blk\.0\..*", "CPU"), ("output", "CUDA1")),
}


def test_placement_survives_the_pipe() -> None:
    config = EngineConfig("m.gguf", **PLACED)
    sent = json.loads(wire.encode({"config": config}))["config"]
    assert wire.decode(EngineConfig, sent) == config
    assert hash(config) == hash(EngineConfig("m.gguf", **PLACED))


@pytest.mark.parametrize(
    "field",
    [
        {"tensor_split": [1, "2"]},
        {"overrides": [["output"]]},
        {"overrides": [["output", "CPU", "x"]]},
        {"overrides": ["output=CPU"]},
        {"split_mode": "tensor"},
    ],
)
def test_the_pipe_refuses_other_shapes(field: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        wire.decode(EngineConfig, {"model_path": "m.gguf", **field})


@pytest.mark.parametrize(
    "field",
    [
        {"tensor_split": (1.0,) * 17},
        {"tensor_split": (1.0, -1.0)},
        {"tensor_split": (float("nan"),)},
        {"tensor_split": (float("inf"), 1.0)},
        {"tensor_split": (0.0, 0.0)},
        {"main_gpu": -1},
        {"main_gpu": -2, "split_mode": "none"},
        {"overrides": (("", "CPU"),)},
        {"overrides": (("output", ""),)},
        {"overrides": (("blk[", "CPU"),)},
    ],
)
def test_placements_that_make_no_sense(field: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        EngineConfig("m.gguf", **field)
    assert caught.value.hint


def test_no_device_at_all_can_be_asked_for() -> None:
    assert EngineConfig("m.gguf", split_mode="none", main_gpu=-1).main_gpu == -1
