"""The options that say how to load a model: one table for every command that loads or plans one, in llama.cpp's spelling.

Knows how they are written and what they wish; what comes of it is the planner's business. A command takes them all with

    @loading_flags
    def command(model: ..., *, loading: LoadingFlags) -> None: ...
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_type_hints

import typer

from localllm.errors import UsageError

if TYPE_CHECKING:
    from localllm.gguf import Header
    from localllm.loading import Planned
    from localllm.plan.question import OtherQuant
    from localllm.plan.spec import Wishes

PANEL = "Loading"
ALL_LAYERS = 1 << 20
"""Of more layers than any model has: all of them."""
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
SPLIT_MODES = ("layer", "none", "row")
LOAD_MODES = ("auto", "none", "mmap", "mlock")
FLASH = ("auto", "on", "off")


def _option(*names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, show_default=False, rich_help_panel=PANEL)


@dataclass(frozen=True, slots=True)
class LoadingFlags:
    """What was given; None and empty were not."""

    ctx_size: Annotated[int | None, _option("--ctx-size", "--ctx", "-c", help="KV cells in all; 0 chooses.")] = None
    n_gpu_layers: Annotated[
        int | None, _option("--n-gpu-layers", "--gpu-layers", "--ngl", "-ngl", help="Layers on the GPU; -1 takes all.")
    ] = None
    kv: Annotated[str | None, _option("--kv", metavar="TYPE", help="Type of the whole KV cache: f16, q8_0, q4_0, …")] = None
    type_k: Annotated[str | None, _option("--cache-type-k", "-ctk", metavar="TYPE", help="Of its keys.")] = None
    type_v: Annotated[str | None, _option("--cache-type-v", "-ctv", metavar="TYPE", help="Of its values.")] = None
    flash_attn: Annotated[str | None, _option("--flash-attn", "-fa", metavar="auto|on|off", help="Flash attention.")] = None
    parallel: Annotated[int | None, _option("--parallel", "-np", help="Requests decoded at once.")] = None
    threads: Annotated[int | None, _option("--threads", "-t", help="CPU threads; 0 takes the physical cores.")] = None
    batch_size: Annotated[int | None, _option("--batch-size", "-b", help="Rows of a batch.")] = None
    ubatch_size: Annotated[int | None, _option("--ubatch-size", "-ub", help="Rows computed at once.")] = None
    tensor_split: Annotated[str | None, _option("--tensor-split", "-ts", metavar="3,1", help="Share of each GPU.")] = None
    main_gpu: Annotated[int | None, _option("--main-gpu", "-mg", help="The GPU to use with split mode none.")] = None
    split_mode: Annotated[str | None, _option("--split-mode", "-sm", metavar="layer|none|row", help="How GPUs share a model.")] = None
    override_tensor: Annotated[
        list[str] | None,
        _option("--override-tensor", "-ot", metavar="REGEX=DEVICE", help="Place tensors by name; may be repeated."),
    ] = None
    cpu_moe: Annotated[bool, _option("--cpu-moe", "-cmoe", help="Keep all experts on the CPU.")] = False
    n_cpu_moe: Annotated[int | None, _option("--n-cpu-moe", "-ncmoe", help="Keep the experts of so many first layers on the CPU.")] = None
    swa_full: Annotated[bool, _option("--swa-full", help="Keep sliding windows in full.")] = False
    load_mode: Annotated[str | None, _option("--load-mode", metavar="auto|none|mmap|mlock", help="How the file becomes memory.")] = None
    draft: Annotated[
        str | None, _option("--draft", "--model-draft", "-md", metavar="MODEL", help="A small model to draft for this one.")
    ] = None
    n_draft: Annotated[int | None, _option("--draft-max", "--n-draft", help="Tokens drafted at a time.")] = None
    gpu_memory: Annotated[
        list[str] | None,
        _option("--gpu-memory", metavar="8GiB|GPU=8GiB", help="Take no more of a GPU, or of each; may be repeated."),
    ] = None
    reserve: Annotated[str | None, _option("--reserve", metavar="1GiB", help="Keep so much of every memory free.")] = None
    strict: Annotated[bool, _option("--strict", help="Refuse rather than give up anything.")] = False

    def settings(self) -> dict[str, Any]:
        """Those that are settings as well, under the settings' names; None is not given."""
        return {
            "n_ctx": self.ctx_size,
            "n_gpu_layers": None if self.n_gpu_layers is None else max(self.n_gpu_layers, -1),
            "n_seq": self.parallel,
            "n_threads": self.threads,
            "type_k": self.type_k or self.kv,
            "type_v": self.type_v or self.kv,
            "flash_attn": self.flash_attn,
        }

    def wishes(self, given: Mapping[str, Any], draft: Header | None = None) -> Wishes:
        """What the user wishes: these flags, and of the settings those that are `given` (see `given_settings`).

        Raises UsageError for what makes no sense.
        """
        from localllm.plan.spec import Wishes

        for name, value, choices in (
            ("--cache-type-k", given.get("type_k"), KV_TYPES),
            ("--cache-type-v", given.get("type_v"), KV_TYPES),
            ("--flash-attn", given.get("flash_attn"), FLASH),
            ("--split-mode", self.split_mode, SPLIT_MODES),
            ("--load-mode", self.load_mode, LOAD_MODES),
        ):
            if value is not None and value not in choices:
                raise UsageError(f"{name} {value} makes no sense", hint=f"use {', '.join(choices)}")
        for name, number, least in (
            ("--parallel", given.get("n_seq"), 1),
            ("--batch-size", self.batch_size, 1),
            ("--ubatch-size", self.ubatch_size, 1),
            ("--main-gpu", self.main_gpu, -1),
            ("--n-cpu-moe", self.n_cpu_moe, 0),
            ("--draft-max", self.n_draft, 0),
        ):
            if number is not None and number < least:
                raise UsageError(f"{name} {number} makes no sense", hint=f"use {least} or more")
        values: dict[str, Any] = {
            "n_ctx": given.get("n_ctx") or None,
            "n_gpu_layers": given.get("n_gpu_layers"),
            "type_k": given.get("type_k"),
            "type_v": given.get("type_v"),
            "flash_attn": given.get("flash_attn"),
            "n_seq": given.get("n_seq"),
            "n_batch": self.batch_size,
            "n_ubatch": self.ubatch_size,
            "n_threads": given.get("n_threads") or None,
            "tensor_split": parse_split(self.tensor_split),
            "main_gpu": self.main_gpu,
            "split_mode": self.split_mode,
            "overrides": parse_overrides(self.override_tensor or ()),
            "n_cpu_moe": ALL_LAYERS if self.cpu_moe else self.n_cpu_moe,
            "swa_full": True if self.swa_full else None,
            "load_mode": self.load_mode,
            "gpu_memory": parse_limits(self.gpu_memory or ()),
            "reserve_bytes": None if self.reserve is None else parse_size("--reserve", self.reserve),
            "strict": self.strict,
            "draft": draft,
            "n_draft": self.n_draft,
        }
        return Wishes(**values)

    def plan(
        self,
        path: Path,
        given: Mapping[str, Any],
        *,
        dry: bool = True,
        header: Header | None = None,
        quants: Sequence[OtherQuant] = (),
        **fixed: Any,
    ) -> Planned:
        """How to load the model at `path`, confirmed by a dry run; with its `header`, it need not be here yet.

        `quants` are other files of it, `fixed` fields of Wishes that the command itself decides.

        Raises what making a plan raises: DoesNotFit before anything is loaded.
        """
        from dataclasses import replace

        from localllm.gguf import read_model
        from localllm.library import resolve_model
        from localllm.loading import make_plan
        from localllm.paths import directories

        draft = read_model(resolve_model(self.draft)) if self.draft else None
        wishes = replace(self.wishes(given, draft), **fixed)
        return make_plan(path, wishes, directories().state, header=header, quants=quants, dry=dry)


def given_settings(loaded: Any) -> dict[str, Any]:
    """Of settings.Loaded, the values that somebody set, by a flag, a variable or the file; the rest is the planner's to choose."""
    return {key: getattr(loaded.settings, key) for key, origin in loaded.origins.items() if origin != "default"}


def loading_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command all these options in place of its parameter `loading`."""
    hints = get_type_hints(LoadingFlags, include_extras=True)
    names = [field.name for field in fields(LoadingFlags)]
    own = inspect.signature(command, eval_str=True)
    parameters = [parameter for name, parameter in own.parameters.items() if name != "loading"]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=getattr(_NOT_GIVEN, name), annotation=hints[name]) for name in names
    ]

    @functools.wraps(command)
    def with_options(**arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in names}
        command(**arguments, loading=LoadingFlags(**given))

    wrapper = cast(Any, with_options)
    wrapper.__signature__ = own.replace(parameters=[*parameters, *options])
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in (*parameters, *options)}
    return with_options


_NOT_GIVEN = LoadingFlags()


def parse_split(text: str | None) -> tuple[float, ...]:
    """`3,1` as shares. Raises UsageError."""
    if text is None:
        return ()
    try:
        shares = tuple(float(part) for part in text.replace("/", ",").split(","))
    except ValueError:
        shares = ()
    if not shares or not all(0 <= share < float("inf") for share in shares) or not any(shares):
        raise UsageError(f"--tensor-split {text} makes no sense", hint="give a share for each GPU, as 3,1")
    return shares


def parse_overrides(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """`REGEX=DEVICE`, several with commas between, as llama.cpp takes them. Raises UsageError."""
    pairs: list[tuple[str, str]] = []
    for part in ",".join(texts).split(",") if texts else ():
        pattern, equals, device = part.rpartition("=")
        if not (pattern and equals and device):
            raise UsageError(f"--override-tensor {part} makes no sense", hint=r"write REGEX=DEVICE, as blk\.1\.=CPU")
        pairs.append((pattern, device))
    return tuple(pairs)


def parse_limits(texts: Iterable[str]) -> dict[str, int]:
    """`8GiB` for every device, `CUDA0=8GiB` or `0=8GiB` for one. Raises UsageError."""
    limits: dict[str, int] = {}
    for text in (part for each in texts for part in each.split(",")):
        device, _, size = text.rpartition("=")
        limits[device or "all"] = parse_size("--gpu-memory", size)
    return limits


def parse_size(option: str, text: str) -> int:
    """A size such as `8GiB`, in bytes. Raises UsageError."""
    from localllm.settings import parse_bytes

    size = parse_bytes(text)
    if not isinstance(size, int):
        try:
            size = int(text)
        except ValueError as error:
            raise UsageError(f"{option} {text} is not a size", hint="write it like 8GiB or 500MB") from error
    if size < 0:
        raise UsageError(f"{option} {text} is negative", hint="write it like 8GiB or 500MB")
    return size
