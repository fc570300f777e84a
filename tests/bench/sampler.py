"""Tokens a second of rollout.sample and of transformers' generate, in turn, by the clock on the wall.

    python tests/bench/sampler.py [--model DIR] [--rows 16 64] [--tokens 128] [--device cuda] [--out FILE]

Both sample at temperature 1 from the full distribution, 8 completions of each prompt. Tokens behind the end
of a completion do not count. Without --model there are 512 rows, on one thread of the CPU:

on the task    the embedded policy answers its problems: similar lengths, and many completions are the same
off the task   the embedded policy goes on after random prompts, and nothing ends: all long, most different
unequal        a narrow model ends a completion with the same probability at every token: half of them within
               24 tokens, and all within 192

A ratio is that of two runs in a row, so a steady load on the machine matters little. The median is reported.
"""

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import rollout
from arithmetic import problems

NOTHING = {10**6}  # an id that no token has


def ours(model, prompts, T, eos_ids, seed):
    groups = rollout.sample(model, prompts, 8, T, 1.0, eos_ids, torch.Generator().manual_seed(seed))
    return [completion for group in groups for completion in group]


@torch.inference_mode()
def generate(model, prompts, T, eos_ids, seed):
    """The same by transformers: prompts padded on the left, then one call."""
    torch.manual_seed(seed)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    rows = model.generate(
        ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=T,
        num_return_sequences=8, eos_token_id=sorted(eos_ids), pad_token_id=0, use_cache=True,
    )[:, width:].tolist()  # fmt: skip
    ends = [next((i + 1 for i, y in enumerate(row) if y in eos_ids), T) for row in rows]
    return [row[:end] for row, end in zip(rows, ends)]


def small_cases():
    """Name, model, prompts, tokens at most, and end-of-sequence ids of what the head of this file lists."""
    model, tokenizer, eos_ids = rollout.load_policy(rollout.TINY)
    known = [tokenizer(prompt)["input_ids"] for prompt, _ in problems("heldout", 64)]
    yield "on the task", model, known, 40, eos_ids
    rng = random.Random(0)
    yield "off the task", model, [[rng.randrange(2, 17) for _ in p] for p in known], 40, NOTHING
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model, p = Qwen2ForCausalLM(config).eval(), 1 - 0.5 ** (1 / 24)
    model.lm_head = torch.nn.Linear(128, 512)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()[0] = math.log(p * 511 / (1 - p))
    yield "unequal", model, [[1 + i, 7, 3] for i in range(64)], 192, {0}


def cases_of(o):
    """The same for a checkpoint: random prompts of 32 to 64 ids, with --rows completions together."""
    model, tokenizer, eos_ids = rollout.load_policy(o.model, o.device)
    rng = random.Random(0)
    for rows in o.rows:
        lengths = [rng.randint(32, 64) for _ in range(rows // 8)]
        prompts = [[rng.randrange(len(tokenizer)) for _ in range(length)] for length in lengths]
        yield f"{rows} rows", model, prompts, o.tokens, eos_ids


def compare(model, prompts, T, eos_ids, repeats):
    """Both in turn, after a short call each: tokens a second, their ratio, and what was made."""
    speeds = {ours: [], generate: []}
    for repeat in range(-1, repeats):
        for sampler in speeds:
            began = time.perf_counter()
            made = sampler(model, prompts, T if repeat >= 0 else min(T, 20), eos_ids, repeat + 1)
            if repeat >= 0:
                speeds[sampler].append(sum(map(len, made)) / (time.perf_counter() - began))
    return {
        "ratio": median(mine / theirs for mine, theirs in zip(*speeds.values())),
        **{sampler.__name__: median(values) for sampler, values in speeds.items()},
        "completions": len(made),
        "different": len(set(map(tuple, made))),
        "mean length": sum(map(len, made)) / len(made),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out")
    o = parser.parse_args()
    if not o.model:
        torch.set_num_threads(1)
    figures = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    for name, *case in cases_of(o) if o.model else small_cases():
        figures[name] = result = compare(*case, o.repeats)
        print(name, *(f"{key} {value:,.2f}" for key, value in result.items()), sep="   ", flush=True)
    if o.out:
        Path(o.out).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
