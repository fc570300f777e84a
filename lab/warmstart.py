"""Where the embedded base policy comes from: supervised learning from random weights, in minutes.

    python -m lab.warmstart --out DIR        tiny/ was made with the defaults

A base model has skills, has habits, and makes slips. So does this one. It learns them in two phases:

1. *Skills*: chains of thought by three strategies (precedence, the leftmost pair, any pair), without a slip.
2. *Habits*: nearly all chains join the leftmost pair. A few join any pair (`--wander`) or, still fewer,
   respect precedence (`--share`). Each result is a wrong digit with probability `--slip`. The mixture changes
   from that of phase 1 to this one gradually, in the first half of the phase, so that no skill is lost.

Skills come first: a base policy that begins the right strategy but cannot carry it through earns no reward
with it, and reinforcement learning does not find what is never rewarded. `--share` and `--wander` set how
often the right strategy, or some other one, is tried. The result is an ordinary Hugging Face checkpoint
folder: Qwen2 architecture, safetensors, tokenizer, chat template.
"""

import argparse
import math
import random

import torch
from tqdm import tqdm
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from arithmetic import chain_of_thought, correct, leftmost, problems

VOCABULARY = ["<|pad|>", "<|endoftext|>", *"0123456789", *"+*=}"]
HIDDEN, LAYERS = 64, 2
STEPS = {"skills": 2400, "habits": 600}
PEAK = {"skills": 3e-3, "habits": 1e-3}  # learning rate of AdamW, cosine to 0
BATCH = 128  # chains of thought
SKILLS = 0.4, 0.4  # shares of the right strategy and of any pair in phase 1


def anywhere(operators, rng=random):
    """No idea: any pair."""
    return rng.randrange(len(operators))


def make_tokenizer():
    """A tokenizer of Qwen2's kind: one token per character and one for `\\boxed{`; an empty chat template."""
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(VOCABULARY)}, merges=[],
        unk_token="<|pad|>", eos_token="<|endoftext|>", pad_token="<|pad|>",
    )  # fmt: skip
    tokenizer.add_tokens(["\\boxed{"])
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def make_model():
    """A narrow Qwen2 with random weights: four attention heads, two heads of keys and values."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(VOCABULARY) + 1, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0, do_sample=True)
    return model


def batch(rng, tokenizer, prompts, shares, slip):
    """Token ids (B, T) and labels (B, T), -100 on prompt and padding; the end of sequence is a label.

    The chains are a mixture of strategies; shares: those of `correct` and `anywhere`.
    """
    rows, (right, wander) = [], shares
    for _ in range(BATCH):
        prompt = rng.choice(prompts)
        strategy = rng.choices((correct, anywhere, leftmost), (right, wander, 1 - right - wander))[0]
        chain = chain_of_thought(prompt, strategy, slip, rng)
        prompt, chain = (tokenizer(text)["input_ids"] for text in (prompt, chain))
        rows.append((prompt + chain + [tokenizer.eos_token_id], len(prompt)))
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([[-100] * p + ids[p:] + [-100] * (width - len(ids)) for ids, p in rows])
    return ids, labels


def command_line():
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m lab.warmstart", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    for name, kind, default, text in (
        ("share", float, 0.0005, "share of the right strategy in phase 2"),
        ("wander", float, 0.01, "share of chains that join any pair in phase 2"),
        ("slip", float, 0.2, "probability that a result is a wrong digit"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default {default})")
    parser.add_argument("--out", required=True, help="checkpoint folder to write")
    return parser.parse_args()


def train(model, tokenizer, prompts, phase, o):
    """One phase of supervised learning, in place."""
    steps, peak = STEPS[phase], PEAK[phase]
    rng = random.Random(f"warmstart/0/{phase}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0, fused=True)
    progress = tqdm(range(steps), desc=phase)
    for step in progress:
        cosine = 0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, (step + 1) / 50) * cosine
        fade = min(1.0, 2 * step / steps) if phase == "habits" else 0.0
        shares = [a ** (1 - fade) * b**fade for a, b in zip(SKILLS, (o.share, o.wander))]  # geometrically
        ids, labels = batch(rng, tokenizer, prompts, shares, fade * o.slip)
        logits = model(ids).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


def main():
    o = command_line()
    prompts = [prompt for prompt, _ in problems("warmstart", 40_000)]
    tokenizer, model = make_tokenizer(), make_model()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    for phase in STEPS:
        train(model, tokenizer, prompts, phase, o)
    model.save_pretrained(o.out)
    tokenizer.save_pretrained(o.out)
    print(f"wrote {o.out}")


if __name__ == "__main__":
    main()
