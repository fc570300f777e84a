"""Where the embedded base policy comes from: a supervised warm start, from nothing, in minutes.

    python warmstart.py --out tiny

A base model is skilled, has habits, and slips. So is this one, in this order:

1. *Skills*: chains of thought by three strategies (precedence, the leftmost pair, any pair), without a mistake.
2. *Habits*: nearly all chains join the leftmost pair. The rest joins any pair (`--wander`) or, rarer still,
   respects precedence (`--share`). Besides, any result is a wrong digit with probability `--slip`. The mixture
   goes over from phase 1's to this one gradually, in the first half of the phase, so that no skill is lost.

Skill must come first: a base that begins the right strategy but can never carry it through earns no
reward with it, and no method of reinforcement learning can find what is never rewarded. The shares are the
knobs of the embedded task: they say how often the right strategy is tried, and how often some other one is.
The result is an ordinary Hugging Face checkpoint folder: Qwen2 architecture, safetensors, tokenizer, chat template.
"""

import argparse
import math
import random
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from arithmetic import anywhere, chain_of_thought, correct, leftmost, problems

VOCABULARY = ["<|pad|>", "<|endoftext|>", *"0123456789", *"+*=}"]
SKILLS = 0.4, 0.4  # shares of the right strategy and of any pair in phase 1


def make_tokenizer():
    """Qwen2's kind of tokenizer with one token for each character, and one for `\\boxed{`; the chat template adds nothing."""
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(VOCABULARY)}, merges=[],
        unk_token="<|pad|>", eos_token="<|endoftext|>", pad_token="<|pad|>",
    )  # fmt: skip
    tokenizer.add_tokens(["\\boxed{"])
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def make_model(hidden, layers, seed):
    """A narrow Qwen2 with random weights, four heads and two of keys and values."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(VOCABULARY) + 1, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0, do_sample=True)
    return model


def example(rng, prompts, shares, slip):
    """One (prompt, completion) of a mixture of strategies, whose shares are those of `correct` and `anywhere`."""
    prompt, (right, wander) = rng.choice(prompts), shares
    strategy = rng.choices((correct, anywhere, leftmost), (right, wander, 1 - right - wander))[0]
    return prompt, chain_of_thought(prompt, strategy, slip, rng)


def batch(rng, tokenizer, prompts, size, shares, slip):
    """Token ids (B, T) and labels (B, T), -100 on prompt and padding; the end of sequence is learnt."""
    rows = []
    for prompt, completion in (example(rng, prompts, shares, slip) for _ in range(size)):
        prompt, completion = (tokenizer(text)["input_ids"] for text in (prompt, completion))
        rows.append((prompt + completion + [tokenizer.eos_token_id], len(prompt)))
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([[-100] * p + ids[p:] + [-100] * (width - len(ids)) for ids, p in rows])
    return ids, labels


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="checkpoint folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data (default 0)")
    parser.add_argument("--hidden", type=int, default=64, help="hidden size (default 64)")
    parser.add_argument("--layers", type=int, default=2, help="layers (default 2)")
    parser.add_argument("--skill-steps", type=int, default=2400, help="steps of phase 1 (default 2400)")
    parser.add_argument("--habit-steps", type=int, default=600, help="steps of phase 2 (default 600)")
    parser.add_argument("--skills", help="keep phase 1's policy in this folder, or start from it if it is there (default: neither)")
    parser.add_argument("--batch", type=int, default=128, help="chains of thought a step (default 128)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate of AdamW, cosine to 0 (default 3e-3)")
    parser.add_argument("--share", type=float, default=0.0005, help="share of the right strategy in phase 2 (default 0.0005)")
    parser.add_argument("--wander", type=float, default=0.01, help="share of chains that join any pair in phase 2 (default 0.01)")
    parser.add_argument("--slip", type=float, default=0.2, help="probability that a step's result is a wrong digit (default 0.2)")
    o = parser.parse_args()

    prompts = [prompt for prompt, _ in problems("warmstart", 40_000)]
    tokenizer, model = make_tokenizer(), make_model(o.hidden, o.layers, o.seed)
    phases = {"skills": (o.skill_steps, o.lr), "habits": (o.habit_steps, o.lr / 3)}
    if o.skills and Path(o.skills).is_dir():
        model = Qwen2ForCausalLM.from_pretrained(o.skills)
        del phases["skills"]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    for phase, (steps, peak) in phases.items():
        rng = random.Random(f"warmstart/{o.seed}/{phase}")
        optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        progress = tqdm(range(steps), desc=phase)
        for step in progress:
            for group in optimizer.param_groups:
                group["lr"] = peak * min(1, (step + 1) / 50) * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)
            fade = min(1.0, 2 * step / steps) if phase == "habits" else 0.0
            shares = [a ** (1 - fade) * b**fade for a, b in zip(SKILLS, (o.share, o.wander))]  # geometrically
            ids, labels = batch(rng, tokenizer, prompts, o.batch, shares, fade * o.slip)
            logits = model(ids).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 50 == 0:
                progress.set_postfix(loss=f"{loss.item():.3f}")
        if phase == "skills" and o.skills:
            model.save_pretrained(o.skills)
    model.save_pretrained(o.out)
    tokenizer.save_pretrained(o.out)
    print(f"wrote {o.out}")


if __name__ == "__main__":
    main()
