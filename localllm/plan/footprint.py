"""One model on one machine: what any shape of it takes on each device. Read once, asked hundreds of times."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from localllm.gguf import Header
from localllm.hardware import Device
from localllm.plan import architecture as architectures
from localllm.plan.buffers import buffers_of, repack_of, used_devices
from localllm.plan.cache import Cache, refusal
from localllm.plan.placement import Placement, place
from localllm.plan.spec import CPU, Amount, Shape, SplitMode
from localllm.plan.weights import Weights

_LOGIT_BYTES = 4


class Footprint:
    """The memory of a model, for a machine's devices in llama.cpp's order.

    Every method is pure and takes microseconds; what depends on overrides or on the split is worked out once for each of them.
    """

    def __init__(self, header: Header, devices: Sequence[Device] = (), *, cpu_features: Collection[str] | None = None) -> None:
        """`cpu_features` are hardware's; None or empty is unknown, which matters to where the CPU's weights lie."""
        self.header = header
        self.architecture = architectures.read(header)
        self.devices = tuple(devices)
        self._weights = Weights(header, self.architecture, self.devices, repack_of(cpu_features) if cpu_features else None)
        self._cache = Cache(self.architecture, self._weights.backend_of)
        self._places: dict[tuple[int, tuple[float, ...], SplitMode, int], Placement] = {}

    def used(self, shape: Shape) -> tuple[Device, ...]:
        """The devices that llama.cpp considers, in its order."""
        return used_devices(self.devices, shape.split_mode, shape.main_gpu)

    def placement(self, shape: Shape) -> Placement:
        """Which device has which layer; raises ValueError for a split that does not fit the devices."""
        key = (shape.n_gpu_layers, shape.tensor_split, shape.split_mode, shape.main_gpu)
        known = self._places.get(key)
        if known is None:
            names = [device.name for device in self.used(shape)]
            known = self._places[key] = place(self.architecture.n_layers, shape.n_gpu_layers, names, shape.tensor_split)
        return known

    def refusal(self, shape: Shape) -> str:
        """Why llama.cpp or the engine would not take the shape; empty when nothing speaks against it."""
        return refusal(self.architecture, shape)

    def weights(self, shape: Shape) -> Amount:
        """Bytes of weights on each device, as llama.cpp allocates them; of a mapped file, the CPU's part is the page cache's."""
        amount = self._weights.amount(self.placement(shape), shape.overrides)
        if shape.split_mode == "row" and shape.n_gpu_layers:
            return Amount(amount.by_device, amount.doubt or "split by rows, tensors are padded on every device")
        return amount

    def repacked_bytes(self, shape: Shape) -> int:
        """The part of the CPU's weights that is anonymous memory even of a mapped file."""
        return self._weights.repacked_bytes(self.placement(shape), shape.overrides)

    def largest_host_bytes(self, shape: Shape) -> int:
        """The largest tensor on the CPU that a layer computes with."""
        return self._weights.largest_bytes(self.placement(shape), shape.overrides)

    def mapped_bytes(self, shape: Shape, device: str = CPU) -> int:
        """What llama.cpp reports as weights on `device` instead, where it maps the file: a range of it."""
        return self._weights.mapped_bytes(self.placement(shape), shape.overrides, device)

    def maps_file(self, shape: Shape) -> bool:
        """Whether the CPU's weights stay in the file, mapped: what load_mode asks for, unless a device speaks against it."""
        if shape.load_mode == "auto":
            return not any(device.kind == "igpu" and device.backend != "Metal" for device in self.used(shape))
        return shape.load_mode == "mmap"

    def kv(self, shape: Shape) -> Amount:
        """Bytes of KV cache and recurrent states on each device."""
        return self._cache.amount(self.placement(shape), shape)

    def cell_bytes(self, shape: Shape) -> int:
        """What one more token of context takes in the cache, on all devices together."""
        return self._cache.cell_bytes(shape)

    def kv_read_bytes(self, shape: Shape, n_past: int) -> dict[str, int]:
        """What decoding one token reads of the cache on each device, `n_past` tokens being there."""
        return self._cache.read_bytes(shape, n_past, self.placement(shape))

    def output(self, shape: Shape) -> Amount:
        """Bytes of logits in host memory: as many rows as llama.cpp reserves, which grow to n_outputs in use."""
        rows = max(shape.n_outputs, shape.n_seq_max)
        return Amount({CPU: _LOGIT_BYTES * self.architecture.n_vocab * rows})

    def adapter(self, adapter: Header, shape: Shape) -> Amount:
        """Bytes of a LoRA adapter, loaded with the model."""
        return self._weights.adapter(adapter, self.placement(shape), shape.overrides)

    def projector(self, projector: Header, shape: Shape) -> Amount:
        """Bytes of an mmproj file's weights, which go to the first device; its compute buffers are not known here."""
        used = self.used(shape)
        device = used[0].name if used and shape.n_gpu_layers else CPU
        rule = self._weights.backend_of[device]
        n_bytes = sum(rule.size(t.type, t.shape[0] if t.shape else 1, t.n_bytes) for t in projector.tensors)
        return Amount({device: n_bytes}, "what the projector computes with is known only once it is loaded")

    def pinned_host(self, shape: Shape) -> bool:
        """Whether the CPU's weights lie in a device's pinned memory, from where it computes with them."""
        return any(buffers_of(device).pinned_host for device in self.used(shape))

    def asynchronous(self, shape: Shape) -> bool:
        """Whether llama.cpp computes on up to four batches at once, each with compute buffers of its own."""
        used = self.used(shape)
        return (
            len(used) > 1
            and shape.n_gpu_layers > self.architecture.n_layers
            and shape.split_mode == "layer"
            and not shape.overrides
            and all(buffers_of(device).asynchronous for device in used)
        )
