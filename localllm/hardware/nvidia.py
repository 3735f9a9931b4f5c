"""NVIDIA's cards through NVML: no CUDA context, so it costs no memory and may be asked often."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from localllm.hardware.cards import Card, pci_id
from localllm.hardware.memory import plausible


def nvidia_cards(nvml: Any) -> tuple[list[Card], tuple[str, ...]]:
    """Every card, or its MIG instances where it is divided, and warnings. Empty without a driver.

    `nvml` is the module pynvml, or None. A question that this card or driver cannot answer leaves that answer unknown.
    """
    if nvml is None or not _succeeds(nvml.nvmlInit):
        return [], ()
    cards: list[Card] = []
    warnings: list[str] = []
    try:
        for index in range(_ask(nvml.nvmlDeviceGetCount, default=0)):
            handle = _ask(nvml.nvmlDeviceGetHandleByIndex, index)
            if handle is None:  # a card that fell off the bus fails here
                warnings.append(f"NVIDIA card {index} does not answer")
                continue
            bus = _text(getattr(_ask(nvml.nvmlDeviceGetPciInfo, handle), "busId", ""))
            slices = list(_slices(nvml, handle))
            for part in slices or [handle]:
                card, said = _card(nvml, part, pci_id(bus), is_slice=bool(slices), index=index)
                cards.append(card)
                warnings += said
    finally:
        _succeeds(nvml.nvmlShutdown)
    return cards, tuple(warnings)


def _card(nvml: Any, handle: Any, pci: str, *, is_slice: bool, index: int) -> tuple[Card, tuple[str, ...]]:
    name = _text(_ask(nvml.nvmlDeviceGetName, handle, default="")) or f"NVIDIA card {index}"
    total, free = _memory(nvml, handle)
    total, free, warnings = plausible(f"NVML: {name}", total, free)
    active = None if is_slice else _ask(getattr(nvml, "nvmlDeviceGetDisplayActive", None), handle)
    card = Card(
        name=name,
        pci=pci,
        total_bytes=total,
        free_bytes=free,
        source="NVML",
        vendor="NVIDIA",
        display=None if active is None else bool(active),
        uuid=_text(_ask(nvml.nvmlDeviceGetUUID, handle, default="")),
        slice=is_slice,
    )
    return card, warnings


def _memory(nvml: Any, handle: Any) -> tuple[int | None, int | None]:
    """(total, free) in bytes. Version 2 keeps what the driver reserves apart from what is used; free is the same in both."""
    version = getattr(nvml, "nvmlMemory_v2", None)
    answer = None if version is None else _ask(nvml.nvmlDeviceGetMemoryInfo, handle, version)
    if answer is None:  # an old driver, or an old pynvml
        answer = _ask(nvml.nvmlDeviceGetMemoryInfo, handle)
    if answer is None:  # Jetson and other chips that share the RAM
        return None, None
    return int(answer.total), int(answer.free)


def _slices(nvml: Any, handle: Any) -> Iterator[Any]:
    """Handles of the MIG instances of a card; none when it is not divided."""
    mode = _ask(getattr(nvml, "nvmlDeviceGetMigMode", None), handle)
    if mode is None or not mode[0]:
        return
    for index in range(_ask(nvml.nvmlDeviceGetMaxMigDeviceCount, handle, default=0)):
        part = _ask(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index)
        if part is not None:  # places between instances are empty
            yield part


def _ask(question: Callable[..., Any] | None, *arguments: Any, default: Any = None) -> Any:
    """NVML's answer, or `default`: it raises one class or another for everything that it does not support."""
    if question is None:
        return default
    try:
        return question(*arguments)
    except Exception:
        return default


def _succeeds(action: Callable[[], Any]) -> bool:
    try:
        action()
    except Exception:  # no driver, no permission, a driver that was updated under us
        return False
    return True


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")
