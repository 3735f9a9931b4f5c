"""What a header means for llama.cpp's memory: which layers keep what for each token and for each sequence.

Everything here restates llama.cpp's own rules (src/models/*.cpp, llama-hparams.cpp, llama_model::create_memory) for the build that
localllm is pinned to. An architecture whose caches have rules of their own, or that is newer than this file, gets a `doubt`: its
figures are a guess that only a dry run can confirm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from localllm.gguf import Array, Header
from localllm.plan import families
from localllm.plan.spec import FlashAttention, KVType, LoadMode, Overrides, Shape, SplitMode, padded

CELLS = 256
"""llama.cpp rounds a context up to a multiple of this."""
DEFAULT_CELLS = 8192
RECURRENT_RESIDENTS = 4
"""The engine's: each sequence of a recurrent model has a state of its own, so few are kept."""


@dataclass(frozen=True, slots=True)
class Layer:
    """What one block keeps; widths in numbers, not bytes."""

    k_width: int = 0
    """For each cell; 0 is none."""
    v_width: int = 0
    window: bool = False
    states: tuple[int, ...] = ()
    """For each sequence, in 32-bit floats: the tensors of a recurrent layer."""


@dataclass(frozen=True)
class Architecture:
    """A header's facts that memory depends on."""

    name: str
    layers: tuple[Layer, ...]
    """All blocks, appended prediction heads included: what n_gpu_layers counts, but for the output."""
    n_trunk: int
    """Blocks without the prediction heads (MTP), which are not loaded."""
    n_swa: int
    """The sliding window in tokens; 0 without."""
    mla: bool
    """Keys and values are one compressed vector."""
    v_width_max: int
    """Without flash attention every layer's values take the room of the widest."""
    k_heads: frozenset[int]
    """Widths of one head's keys."""
    v_heads: frozenset[int]
    n_heads: int
    """Of queries, in the layer with the most."""
    n_embd: int
    n_vocab: int
    n_ctx_train: int
    n_ff: int
    """Of the widest dense layer; 0 where all feed-forwards are experts."""
    n_ff_expert: int
    n_expert: int
    n_expert_used: int
    state_width: int
    """Numbers that a recurrent layer mixes for each token; 0 without such layers."""
    tied: bool
    """The output is the embedding once more."""
    doubt: str = ""
    """Why cache and placement may differ; empty for a known architecture."""

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def recurrent(self) -> bool:
        """Whether each sequence has a state of its own."""
        return self.name in families.RECURRENT or self.name in families.HYBRID

    @property
    def windowed(self) -> bool:
        """Whether some layers keep only a window."""
        return any(layer.window for layer in self.layers)

    def shape(
        self,
        n_ctx: int = 0,
        *,
        n_seq: int = 1,
        n_resident: int = 0,
        n_draft: int = 0,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_gpu_layers: int = -1,
        tensor_split: tuple[float, ...] = (),
        main_gpu: int = 0,
        split_mode: SplitMode = "layer",
        overrides: Overrides = (),
        type_k: KVType = "f16",
        type_v: KVType = "f16",
        flash_attn: FlashAttention = "auto",
        swa_full: bool = False,
        n_threads: int = 1,
        load_mode: LoadMode = "auto",
    ) -> Shape:
        """What llama.cpp is told when an engine is asked for this, every limit of engine and library applied.

        The parameters are EngineConfig's; `n_ctx` 0 is the engine's default.
        """
        n_ctx = n_ctx or min((self.n_ctx_train or DEFAULT_CELLS) * n_seq, DEFAULT_CELLS)
        n_seq_max = n_seq + (min(n_resident, RECURRENT_RESIDENTS) if self.recurrent else n_resident)
        n_batch = max(n_batch, n_seq_max)
        n_ubatch = min(n_ubatch, n_batch)
        if self.n_swa:
            n_batch = n_ubatch
        n_outputs = min(max(n_seq * (n_draft + 1), n_seq_max), n_batch)
        return Shape(
            n_ctx=padded(n_ctx, CELLS),
            n_gpu_layers=self.n_layers + 1 if n_gpu_layers < 0 else min(n_gpu_layers, self.n_layers + 1),
            tensor_split=tensor_split,
            main_gpu=main_gpu,
            split_mode=split_mode,
            overrides=overrides,
            n_seq_max=n_seq_max,
            n_outputs=n_outputs,
            n_batch=min(n_batch, n_ctx),
            n_ubatch=min(n_ubatch, n_ctx),
            type_k=type_k,
            type_v=type_v,
            flash_attn=flash_attn,
            swa_full=swa_full,
            n_threads=n_threads,
            load_mode=load_mode,
        )


def read(header: Header) -> Architecture:
    """The facts of a header; never fails, but says in `doubt` what it could not make sense of."""
    return _Reader(header).read()


class _Reader:
    """One header on its way to an Architecture."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.name = header.architecture
        self.n_layers = header.n_layers
        self.doubts: list[str] = []
        if self.name not in families.KNOWN:
            self.doubts.append(f"the caches of {self.name or 'this architecture'} are not known by formula")

    def read(self) -> Architecture:
        n_trunk = self.n_layers - min(self.number("nextn_predict_layers"), self.n_layers)
        names = {tensor.name for tensor in self.header.tensors}
        if n_trunk < self.n_layers and "blk.0.attn_norm.weight" not in names:
            self.doubts.append("the file holds only a prediction head")
        windows, n_swa = self.windows(n_trunk)
        heads = self.each("attention.head_count")
        kv_heads = self.each("attention.head_count_kv", heads)
        k_widths, v_widths = self.widths(heads[0] if heads else 0, kv_heads, windows)
        mla = self.number("attention.key_length_mla") > 0 and self.number("attention.value_length_mla") > 0
        attends, states = self.attends(kv_heads, n_trunk), self.states(kv_heads, n_trunk, heads[0] if heads else 0)
        layers = tuple(
            Layer(
                k_width=k_widths[i] if attends[i] else 0,
                v_width=v_widths[i] if attends[i] and not mla else 0,
                window=windows[i],
                states=states[i],
            )
            for i in range(self.n_layers)
        )
        hidden = self.each("feed_forward_length")
        return Architecture(
            name=self.name,
            layers=layers,
            n_trunk=n_trunk,
            n_swa=n_swa,
            mla=mla,
            v_width_max=max(v_widths, default=0),
            k_heads=frozenset(self.head("key", heads, window) for window in set(windows)),
            v_heads=frozenset(self.head("value", heads, window) for window in set(windows)),
            n_heads=max(heads, default=0),
            n_embd=self.header.n_embd,
            n_vocab=self.header.n_vocab,
            n_ctx_train=self.header.n_ctx_train,
            n_ff=max(hidden, default=0),
            n_ff_expert=max(self.each("expert_feed_forward_length"), default=0),
            n_expert=self.number("expert_count"),
            n_expert_used=max(self.each("expert_used_count"), default=0),
            state_width=self.state_width() if any(states) else 0,
            tied="output.weight" not in names and self.name not in families.ENCODERS,
            doubt="; ".join(self.doubts),
        )

    def number(self, key: str, default: int = 0) -> int:
        value = self.header.get(key)
        return int(value) if isinstance(value, int) and value >= 0 else default

    def each(self, key: str, default: Sequence[int] = ()) -> list[int]:
        """A number for every layer: llama.cpp takes one for all or a list of just that length."""
        value = self.header.get(key)
        if isinstance(value, Array):
            given = [int(each) for each in value.values() if not isinstance(each, str)]
            if len(given) == self.n_layers:
                return given
            self.doubts.append(f"{key} lists {len(given)} of {self.n_layers} layers")
        elif isinstance(value, int):
            return [int(value)] * self.n_layers
        return list(default) or [0] * self.n_layers

    def head(self, part: str, heads: Sequence[int], window: bool) -> int:
        """Width of one head's keys (part `key`) or values."""
        usual = self.header.n_embd // heads[0] if heads and heads[0] else 0
        width = self.number(f"attention.{part}_length", usual) if usual else 0
        return self.number(f"attention.{part}_length_swa", width) if window else width

    def widths(self, n_heads: int, kv_heads: Sequence[int], windows: Sequence[bool]) -> tuple[list[int], list[int]]:
        """Of all heads' keys and values, for each layer."""
        sizes = [{window: self.head(part, [n_heads], window) for window in (False, True)} for part in ("key", "value")]
        k, v = ([size[window] * count for window, count in zip(windows, kv_heads, strict=True)] for size in sizes)
        return k, v

    def windows(self, n_trunk: int) -> tuple[list[bool], int]:
        """Which layers keep a window only, and how long it is."""
        none = [False] * self.n_layers
        given = self.header.get("attention.sliding_window")
        n_swa = int(given) if isinstance(given, int) else 0
        if self.name in ("lfm2", "lfm2moe"):
            if self.name == "lfm2moe" or not n_swa:
                return none, 0
            return [count > 0 and i < n_trunk for i, count in enumerate(self.each("attention.head_count_kv"))], n_swa
        rule = families.WINDOWS.get(self.name)
        if rule is None:
            return none, 0
        if self.name == "exaone4" and n_trunk != families.EXAONE4_WINDOWED_LAYERS:
            return none, n_swa
        if self.name == "llama4" and given is not None and not n_swa:
            return none, 0
        if not n_swa and rule.optional:
            return none, 0
        if rule.n_swa and (not n_swa or self.name in families.WINDOW_IS_FIXED):
            n_swa = rule.n_swa
        pattern = self.header.get("attention.sliding_window_pattern")
        if isinstance(pattern, Array):
            listed = [bool(each) for each in pattern.values()][: self.n_layers]
            return listed + [False] * (self.n_layers - len(listed)), n_swa
        period = int(pattern) if isinstance(pattern, int) else rule.period
        if not period and not isinstance(pattern, int):
            self.doubts.append("the file does not say which layers have a sliding window")
        full = 0 if rule.full_first else period - 1
        return [i < n_trunk and (period == 0 or i % period != full) for i in range(self.n_layers)], n_swa

    def attends(self, kv_heads: Sequence[int], n_trunk: int) -> list[bool]:
        """Which layers keep keys and values of their own."""
        last = n_trunk
        if self.name in families.NO_CACHE or self.name in families.RECURRENT:
            last = 0
        elif self.name == "gemma3n":
            last = min(families.GEMMA3N_KV_LAYERS, self.n_layers)
        elif self.name == "gemma4":
            last = self.n_layers - min(self.number("attention.shared_kv_layers"), self.n_layers)
        elif self.name in families.HEADLESS_RECURRENT or self.name in families.BOTH:
            # their filters do not know of prediction heads, which get a cache that nothing uses
            last = self.n_layers
        elif self.name in families.NEMOTRON:
            hidden = self.each("feed_forward_length")
            return [heads > 0 and width == 0 for heads, width in zip(kv_heads, hidden, strict=True)]
        recurs = [False] * self.n_layers if self.name in families.BOTH else self.recurs(kv_heads, n_trunk)
        return [i < last and not recurs[i] for i in range(self.n_layers)]

    def recurs(self, kv_heads: Sequence[int], n_trunk: int) -> list[bool]:
        """Which layers are recurrent."""
        layers = range(self.n_layers)
        if self.name in families.RECURRENT or self.name in families.BOTH:
            return [i < n_trunk for i in layers]
        if self.name in families.HEADLESS_RECURRENT:
            return [i < n_trunk and kv_heads[i] == 0 for i in layers]
        if self.name in families.NEMOTRON:
            hidden = self.each("feed_forward_length")
            return [i < n_trunk and kv_heads[i] == 0 and hidden[i] == 0 for i in layers]
        if self.name in families.INTERVAL_RECURRENT:
            if self.header.get("attention.recurrent_layers") is not None:
                return [bool(each) and i < n_trunk for i, each in enumerate(self.each("attention.recurrent_layers"))]
            interval = max(self.number("full_attention_interval", families.INTERVAL_RECURRENT[self.name]), 1)
            return [i < n_trunk and (i + 1) % interval != 0 for i in layers]
        return [False] * self.n_layers

    def states(self, kv_heads: Sequence[int], n_trunk: int, n_heads: int) -> list[tuple[int, ...]]:
        """llama_hparams::n_embd_r and n_embd_s, for each layer."""
        sizes = self.state_sizes(n_heads)
        return [sizes if recurs else () for recurs in self.recurs(kv_heads, n_trunk)]

    def state_width(self) -> int:
        kda = 3 * max(self.each("attention.head_count"), default=0) * self.number("kda.head_dim")
        inner = self.number("ssm.inner_size") + 2 * self.number("ssm.group_count") * self.number("ssm.state_size")
        return max(kda, inner, self.header.n_embd)

    def state_sizes(self, n_heads: int) -> tuple[int, int]:
        """Floats of the rolling part (a convolution's last inputs, shifted tokens) and of the state itself."""
        n_embd = self.header.n_embd
        if wkv := self.number("wkv.head_size"):
            return self.number("token_shift_count", 2) * n_embd, n_embd * wkv
        kernel, inner, state = self.number("ssm.conv_kernel"), self.number("ssm.inner_size"), self.number("ssm.state_size")
        s = state * inner
        kda = self.number("kda.head_dim")
        if self.name == "minimax-01":
            s = self.number("attention.key_length", n_embd // max(n_heads, 1)) ** 2 * n_heads
        elif kda:
            s = kda * kda * n_heads
        if shortconv := self.number("shortconv.l_cache"):
            return n_embd * (shortconv - 1), s
        if kda:
            return 3 * (kernel - 1 if kernel else 3) * n_heads * kda, s
        return max(kernel - 1, 0) * (inner + 2 * self.number("ssm.group_count") * state), s
