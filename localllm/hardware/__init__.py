"""What this machine has and what of it this process may use: cores, RAM, accelerators, power, memory bandwidth.

Everything is read through `Sources`, so that a recorded machine can stand in for this one; only `detect` and `physical_cores` look
at the real one by themselves. llama.cpp is never touched here: what it sees comes in as plain data from a probe child.
Unknown stays unknown: a reading that cannot be true is None and a warning, never a number.
"""

from __future__ import annotations

from localllm.hardware.cores import physical_cores
from localllm.hardware.devices import Device
from localllm.hardware.machine import Hardware, detect
from localllm.hardware.memory import Memory
from localllm.hardware.sources import Sources, this_machine

__all__ = ["Device", "Hardware", "Memory", "Sources", "detect", "physical_cores", "this_machine"]
