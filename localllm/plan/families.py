"""llama.cpp's architectures by the memory they keep: data, restated from the build that localllm is pinned to.

Sources: llama_model::create_memory (src/llama-model.cpp), llm_arch_is_recurrent and llm_arch_is_hybrid (src/llama-arch.cpp), and
load_arch_hparams of each src/models/*.cpp. What is not listed is not known.
"""

from __future__ import annotations

from dataclasses import dataclass


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ENCODERS = _names("bert modern-bert nomic-bert nomic-bert-moe neo-bert jina-bert-v2 jina-bert-v3 eurobert")
"""They see all tokens at once and end in embeddings: no cache, no logits."""
NO_CACHE = ENCODERS | _names("gemma-embedding dream llada llada-moe rnd1")
"""Diffusion models, too, see all tokens at once."""
RECURRENT = _names("mamba mamba2 rwkv6 rwkv6qwen2 rwkv7 arwkv7")
"""A state for each sequence, nothing for each token."""
HEADLESS_RECURRENT = _names("jamba granitehybrid lfm2 lfm2moe plamo2 kimi-linear kimi-k3 bailingmoe3")
"""A layer without KV heads is recurrent."""
INTERVAL_RECURRENT = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "minimax-01": 8}
"""Every n-th layer has attention, unless the file lists them; the others are recurrent."""
NEMOTRON = _names("nemotron_h nemotron_h_moe")
"""A layer is recurrent, attention or feed-forward, and only one of them."""
BOTH = _names("falcon-h1")
"""Every layer has attention and a state."""
HYBRID = HEADLESS_RECURRENT | INTERVAL_RECURRENT.keys() | NEMOTRON | BOTH


@dataclass(frozen=True, slots=True)
class Window:
    """How an architecture mixes sliding-window layers with full ones."""

    period: int = 0
    """Of so many layers one has full attention; 0: the file lists them."""
    full_first: bool = False
    """It is the first of them, not the last."""
    n_swa: int = 0
    """The window where the file does not tell, in tokens."""
    optional: bool = False
    """Without a window in the file there are no such layers."""


WINDOWS: dict[str, Window] = {
    "afmoe": Window(4, optional=True),
    "cohere2": Window(4),
    "cohere2moe": Window(4, full_first=True),
    "exaone4": Window(4, n_swa=4096),
    "exaone-moe": Window(4, n_swa=128),
    "gemma2": Window(2, n_swa=4096),
    "gemma3": Window(6, optional=True),
    "gemma3n": Window(5),
    "gemma4": Window(),
    "gpt-oss": Window(2),
    "granite_swa": Window(),
    "laguna": Window(4, full_first=True, optional=True),
    "llama4": Window(4, n_swa=8192),
    "maple": Window(),
    "mellum": Window(4, optional=True),
    "mimo2": Window(),
    "muse-glimmer": Window(4),
    "olmo2": Window(4, optional=True),
    "plamo3": Window(8, optional=True),
    "smallthinker": Window(4, full_first=True, n_swa=4096, optional=True),
    "spark2_5": Window(),
    "step35": Window(),
}
WINDOW_IS_FIXED = _names("llama4 smallthinker")
"""They use their own window whatever the file says."""

FULL = _names(
    """
    llama deci falcon grok gpt2 gptj gptneox mpt baichuan starcoder refact bloom stablelm qwen qwen2 qwen2moe qwen2vl qwen3 qwen3moe
    qwen3vl qwen3vlmoe phi2 phi3 phimoe plamo codeshell orion internlm2 minicpm minicpm3 gemma starcoder2 xverse command-r dbrx olmo olmoe
    openelm arctic deepseek deepseek2 deepseek2-ocr chatglm glm4 glm4moe bitnet jais jais2 nemotron exaone granite granitemoe chameleon plm
    bailingmoe bailingmoe2 dots1 arcee ernie4_5 ernie4_5-moe hunyuan-moe hunyuan-dense hunyuan_vl hy_v3 smollm3 seed_oss grovemoe apertus
    minimax-m2 cogvlm pangu-embedded mistral3 mistral4 paddleocr llama-embed maincoder talkie
    """
)
"""Attention to all tokens in every layer."""
KNOWN = FULL | WINDOWS.keys() | HYBRID | RECURRENT | NO_CACHE

GEMMA3N_KV_LAYERS = 20
EXAONE4_WINDOWED_LAYERS = 64
"""Only the model with this many layers has windows."""

OUTPUT_FIRST = _names("gemma3n gemma4")
"""Their tied output is made before the embedding, which is then made again, even where both lie together."""
