"""Where the embedded base policy comes from: a supervised warm start, from nothing, in minutes.

    python warmstart.py --out tiny

A base model is skilled, has habits, and slips. So is this one, in this order:

1. *Skills*: chains of thought by all strategies in equal parts, without a slip. After this phase
   the policy can carry out the correct strategy of every convention whenever it begins to.
2. *Habits*: nearly all chains fold from the left; a few join pairs at random; the correct strategy
   is rare, with a share for each convention (`--shares`). A step's result is wrong with probability
   `--slip`. After this phase the policy prefers the habit, as often as the data did.

Skill must come first: a base that begins the correct strategy but cannot carry it through earns no
reward with it, and no method of reinforcement learning can find what is never rewarded.
The result is an ordinary Hugging Face checkpoint folder: Qwen2 architecture, safetensors, tokenizer, chat template.
"""

import argparse
import math
import random

import torch
from tqdm import tqdm
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from arithmetic import CONVENTIONS, chain_of_thought, correct, leftmost, problems

VOCABULARY = ["<|pad|>", "<|endoftext|>", *"0123456789", *"+-*<:=}abc"]


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
    """A narrow Qwen2 with random weights."""
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
    """One (prompt, completion)."""
    prompt = rng.choice(prompts)
    strategy = correct if rng.random() < shares[CONVENTIONS.index(prompt[0])] else leftmost
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
    parser.add_argument("--skill-steps", type=int, default=1500, help="steps of phase 1 (default 1500)")
    parser.add_argument("--habit-steps", type=int, default=1000, help="steps of phase 2 (default 500)")
    parser.add_argument("--batch", type=int, default=128, help="chains of thought a step (default 128)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate of AdamW, cosine to 0 (default 3e-3)")
    parser.add_argument("--slip", type=float, default=0.05, help="probability that a step's result is wrong (default 0.05)")
    parser.add_argument("--shares", type=float, nargs=4, default=[0.03, 0.015, 0.0075, 0.004], metavar="S",
                        help="share of the correct strategy for the conventions * + - < in phase 2")  # fmt: skip
    o = parser.parse_args()

    rng = random.Random(f"warmstart/{o.seed}")
    prompts = [prompt for prompt, _ in problems("warmstart", 40_000)]
    tokenizer, model = make_tokenizer(), make_model(o.hidden, o.layers, o.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    for phase, steps, peak in (("skills", o.skill_steps, o.lr), ("habits", o.habit_steps, o.lr / 3)):
        progress = tqdm(range(steps), desc=phase)
        for step in progress:
            for group in optimizer.param_groups:
                group["lr"] = peak * min(1, (step + 1) / 50) * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)
            fade = min(1.0, 2 * step / steps) if phase == "habits" else 0.0
            shares = [0.5 ** (1 - fade) * share**fade for share in o.shares]  # from one half to its share, geometrically
            ids, labels = batch(rng, tokenizer, prompts, o.batch, shares, fade * o.slip)
            logits = model(ids).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 50 == 0:
                progress.set_postfix(loss=f"{loss.item():.3f}")
        model.save_pretrained(o.out + "-" + phase); tokenizer.save_pretrained(o.out + "-" + phase)
    model.save_pretrained(o.out)
    tokenizer.save_pretrained(o.out)
    print(f"wrote {o.out}")


if __name__ == "__main__":
    main()
