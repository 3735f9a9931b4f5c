"""Train the demo models on the synthetic corpus and write them as GGUF.

    python train.py --size large --minutes 60 --out build
    python train.py --size small --minutes 20 --out build

Needs: torch, tokenizers, gguf, numpy. Runs on a 2-core CPU. Both sizes share one tokenizer
(byte-level BPE, 2,048 tokens, ChatML control tokens), so `small` can draft for `large`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import corpus
import gguf
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

HERE = Path(__file__).parent
CONTEXT = 1024
VOCAB = 2048
BOS, EOS, START, END = "<|bos|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = [BOS, EOS, START, END]
# gpt-2's split with single digits, the pattern llama.cpp calls "refact"/"starcoder"
SPLIT = r"\d"
TEMPLATE = (
    "{%- if tools %}{{- '<|im_start|>system\\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}"
    "{{- 'You may call tools:' }}{%- for tool in tools %}{{- '\\n' + (tool.function | tojson) }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if not (loop.first and message.role == 'system') %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- endif %}"
    "{%- if message.tool_calls %}{%- for call in message.tool_calls %}"
    '{{- \'<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{%- if call.function.arguments is string %}{{- call.function.arguments }}{%- else %}{{- call.function.arguments | tojson }}{%- endif %}"
    "{{- '}\\n</tool_call>' }}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@dataclass(frozen=True)
class Shape:
    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int


SHAPES = {
    "large": Shape(layers=4, width=256, heads=4, kv_heads=1, hidden=768),
    "small": Shape(layers=1, width=256, heads=4, kv_heads=1, hidden=256),
}


def render(messages: corpus.Messages) -> str:
    return "".join(f"{START}{m['role']}\n{m['content']}{END}\n" for m in messages)


def train_tokenizer(path: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = ("\n".join(m["content"] for m in c) for c in itertools.islice(corpus.conversations(7), 60_000))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))
    return tokenizer


class Attention(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.s, self.dim = s, s.width // s.heads
        self.q = nn.Linear(s.width, s.heads * self.dim, bias=False)
        self.k = nn.Linear(s.width, s.kv_heads * self.dim, bias=False)
        self.v = nn.Linear(s.width, s.kv_heads * self.dim, bias=False)
        self.o = nn.Linear(s.heads * self.dim, s.width, bias=False)

    def forward(self, x, rope):
        b, t, _ = x.shape
        q = rotate(self.q(x).view(b, t, self.s.heads, self.dim), rope).transpose(1, 2)
        k = rotate(self.k(x).view(b, t, self.s.kv_heads, self.dim), rope).transpose(1, 2)
        v = self.v(x).view(b, t, self.s.kv_heads, self.dim).transpose(1, 2)
        repeat = self.s.heads // self.s.kv_heads
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


def rotate(x, rope):
    """Rotary embedding over neighbouring pairs, llama.cpp's LLAMA_ROPE_TYPE_NORM."""
    cos, sin = rope
    t = x.shape[1]
    a, b = x.float()[..., 0::2], x.float()[..., 1::2]
    cos, sin = cos[None, :t, None], sin[None, :t, None]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).type_as(x)


class Block(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.attn_norm, self.ffn_norm = nn.RMSNorm(s.width, eps=1e-5), nn.RMSNorm(s.width, eps=1e-5)
        self.attn = Attention(s)
        self.gate = nn.Linear(s.width, s.hidden, bias=False)
        self.up = nn.Linear(s.width, s.hidden, bias=False)
        self.down = nn.Linear(s.hidden, s.width, bias=False)

    def forward(self, x, rope):
        x = x + self.attn(self.attn_norm(x), rope)
        h = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    def __init__(self, s: Shape, vocab: int):
        super().__init__()
        self.s = s
        self.embed = nn.Embedding(vocab, s.width)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = nn.RMSNorm(s.width, eps=1e-5)
        angle = torch.outer(
            torch.arange(CONTEXT).float(), 10_000.0 ** (-torch.arange(0, s.width // s.heads, 2).float() / (s.width // s.heads))
        )
        self.rope = (angle.cos(), angle.sin())
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * s.layers) if name.endswith(("o.weight", "down.weight")) else 1))

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, self.rope)
        return self.norm(x) @ self.embed.weight.T


def batches(tokenizer: Tokenizer, seed: int, size: int, length: int):
    """Endless (size, length + 1) int64 batches of packed conversations, each opened by BOS."""
    stream, buffer = corpus.conversations(seed), []
    bos = tokenizer.token_to_id(BOS)
    while True:
        need = size * (length + 1)
        while len(buffer) < need:
            texts = [render(next(stream)) for _ in range(256)]
            for encoded in tokenizer.encode_batch(texts):
                buffer += [bos, *encoded.ids]
        chunk, buffer = buffer[:need], buffer[need:]
        yield torch.tensor(chunk).view(size, length + 1)


def train(shape: Shape, tokenizer: Tokenizer, minutes: float, seed: int, length: int, size: int) -> tuple[Llama, float]:
    torch.manual_seed(seed)
    model = Llama(shape, tokenizer.get_vocab_size())
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=3e-3, betas=(0.9, 0.95), fused=True
    )
    began, seen, average = time.time(), 0, None
    for step, batch in enumerate(batches(tokenizer, seed + 100, size, length)):
        progress = (time.time() - began) / (minutes * 60)
        if progress >= 1:
            break
        lr = 3e-3 * min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += batch.numel()
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if step % 50 == 0:
            print(
                f"step {step} loss {average:.4f} lr {lr:.5f} tokens {seen / 1e6:.2f}M {seen / (time.time() - began):.0f} tok/s", flush=True
            )
    return model, average


def write_gguf(model: Llama, tokenizer: Tokenizer, name: str, path: Path) -> None:
    s = model.s
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name(name)
    writer.add_description("Tiny demo model trained on a synthetic corpus; for trying out the software, not for knowledge.")
    writer.add_license("mit")
    writer.add_size_label(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(s.width)
    writer.add_block_count(s.layers)
    writer.add_feed_forward_length(s.hidden)
    writer.add_head_count(s.heads)
    writer.add_head_count_kv(s.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(s.width // s.heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(tokenizer.get_vocab_size())
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    spec = json.loads(tokenizer.to_str())["model"]
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda kv: kv[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("starcoder")  # single digits, then GPT-2's split: what train_tokenizer does
    writer.add_token_list([t for t, _ in vocab])
    writer.add_token_types([gguf.TokenType.CONTROL if t in SPECIAL else gguf.TokenType.NORMAL for t, _ in vocab])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in spec["merges"]])
    writer.add_bos_token_id(tokenizer.token_to_id(BOS))
    writer.add_eos_token_id(tokenizer.token_to_id(END))
    writer.add_eot_token_id(tokenizer.token_to_id(END))
    writer.add_pad_token_id(tokenizer.token_to_id(EOS))
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)
    half = lambda p: p.detach().to(torch.float16).numpy()
    full = lambda p: p.detach().to(torch.float32).numpy()
    writer.add_tensor("token_embd.weight", half(model.embed.weight))
    for i, b in enumerate(model.blocks):
        writer.add_tensor(f"blk.{i}.attn_norm.weight", full(b.attn_norm.weight))
        writer.add_tensor(f"blk.{i}.attn_q.weight", half(b.attn.q.weight))
        writer.add_tensor(f"blk.{i}.attn_k.weight", half(b.attn.k.weight))
        writer.add_tensor(f"blk.{i}.attn_v.weight", half(b.attn.v.weight))
        writer.add_tensor(f"blk.{i}.attn_output.weight", half(b.attn.o.weight))
        writer.add_tensor(f"blk.{i}.ffn_norm.weight", full(b.ffn_norm.weight))
        writer.add_tensor(f"blk.{i}.ffn_gate.weight", half(b.gate.weight))
        writer.add_tensor(f"blk.{i}.ffn_up.weight", half(b.up.weight))
        writer.add_tensor(f"blk.{i}.ffn_down.weight", half(b.down.weight))
    writer.add_tensor("output_norm.weight", full(model.norm.weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    vocab_file = HERE / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(vocab_file)) if vocab_file.exists() else train_tokenizer(vocab_file)
    model, loss = train(SHAPES[args.size], tokenizer, args.minutes, args.seed, args.length, args.batch)
    torch.save(model.state_dict(), args.out / f"demo-{args.size}.pt")
    write_gguf(model, tokenizer, f"localllm demo {args.size}", args.out / f"demo-{args.size}-f16.gguf")
    print(f"final loss {loss:.4f}")


if __name__ == "__main__":
    main()
