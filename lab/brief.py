"""A pretrained model that answers short arithmetic briefly: a base for steps of half a minute on a CPU.

    python -m lab.brief --model DIR_OR_HUB_ID --out DIR     writes a checkpoint, train.jsonl, heldout.jsonl

A chat model explains at length, or needs worked examples in every prompt. Here it answers CHATS problems with
three worked examples before it, SAMPLES times each. Its answers that end and have a box, right or wrong, then
teach the same weights to answer so without the examples, in one pass. So form and errors are its own: nothing
is learned from a right answer that the model did not give. The chat template loses its system message. The
problems that are written have numbers of one digit, those that teach the form have two.
"""

import argparse
import json
import random
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import parallel
import reward
import rollout
import train
from data import UserError, encode_problems

CHATS, SAMPLES = 128, 4  # problems, answers of each
BATCH, LR = 16, 2e-5  # completions a step; AdamW
TRAIN, HELD_OUT = 4000, 256  # problems that are written
TOKENS = 48  # of an answer, at most
EXAMPLES = (
    ("31 + 14 x 3", "14 x 3 = 42, 31 + 42 = 73. \\boxed{73}"),
    ("52 - 17 - 60", "52 - 17 = 35, 35 - 60 = -25. \\boxed{-25}"),
    ("24 x 5 + 38", "24 x 5 = 120, 120 + 38 = 158. \\boxed{158}"),
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def ask(expression):
    """The prompt for an expression. It asks for a box, so data.py adds no instruction."""
    return f"Calculate {expression} into \\boxed{{}}."


def problems(count, rng, low, high):
    """`count` different problems (expression, answer): numbers from low to high, after x from 2 to 9."""
    found = {}
    while len(found) < count:
        first = rng.randint(low, high)
        expression, total, product = str(first), 0, first  # the value is total + product
        for _ in range(2):
            operator = rng.choice("+-x")
            number = rng.randint(2, 9) if operator == "x" else rng.randint(low, high)
            expression += f" {operator} {number}"
            if operator == "x":
                product *= number
            else:
                total, product = total + product, number if operator == "+" else -number
        found[expression] = str(total + product)
    return list(found.items())


def own_answers(model, tokenizer, eos_ids, asked, seed):
    """The model's brief answers, with EXAMPLES before each question: [(expression, completion ids)]."""
    examples = [{"role": role, "content": text} for question, answer in EXAMPLES
                for role, text in (("user", ask(question)), ("assistant", answer))]  # fmt: skip
    chats = [[*examples, {"role": "user", "content": ask(expression)}] for expression, _ in asked]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    generator, kept, rewards = torch.Generator().manual_seed(seed), [], []
    for i in tqdm(range(0, len(prompts), 32), "own answers"):
        groups = rollout.sample(model, prompts[i : i + 32], SAMPLES, TOKENS, 1.0, eos_ids, generator)
        for (expression, answer), group in zip(asked[i : i + 32], groups):
            texts = tokenizer.batch_decode(group, skip_special_tokens=True)
            rewards += reward.grade_all(texts, [answer] * SAMPLES)
            kept += [(expression, completion) for completion, text in zip(group, texts)
                     if completion[-1] in eos_ids and reward.extract_answer(text)]  # fmt: skip
    print(f"with examples {sum(rewards) / len(rewards):.1%} right; {len(kept)} of {len(rewards)} are kept")
    return kept


def learn(model, tokenizer, kept, rng, o):
    """One pass over the answers: the mean log-prob of a batch's tokens rises."""
    asked = [(ask(expression), completion) for expression, completion in kept]
    rows = encode_problems(tokenizer, asked, 10**6, "--model")
    rng.shuffle(rows)
    optimizer = parallel.adamw(model, LR)
    for i in tqdm(range(0, len(rows), BATCH), "learning"):
        prompts, completions = zip(*rows[i : i + BATCH])
        lengths = torch.tensor([len(c) for c in completions])
        gradient = -(torch.arange(lengths.max()) < lengths[:, None]).float() / lengths.sum()
        batch = SimpleNamespace(prompts=prompts, completions=completions)
        parallel.backward(model, batch, gradient, torch.zeros_like(gradient), o)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def main():
    parser = argparse.ArgumentParser(prog="python -m lab.brief", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model", required=True, help="checkpoint folder or hub id of a Qwen chat model")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="as in train.py")
    parser.add_argument("--seed", type=int, default=0)
    own = parser.parse_args()
    rng, out = random.Random(f"brief/{own.seed}"), Path(own.out)
    o = SimpleNamespace(device="cpu", precision=own.precision, micro_batch=2048, temperature=1.0)
    taught, asked = problems(CHATS, rng, 10, 99), problems(TRAIN + HELD_OUT, rng, 1, 9)
    try:
        out.mkdir(parents=True, exist_ok=True)
        model, tokenizer, eos_ids = rollout.load_policy(own.model)
    except (UserError, OSError) as error:
        parser.exit(2, f"lab.brief: error: {error}\n")
    kept = own_answers(train.sampling_copy(model, o), tokenizer, eos_ids, taught, own.seed)
    if not kept:
        parser.exit(2, f"lab.brief: error: --model {own.model}: no answer ends and has a box\n")
    tokenizer.chat_template = TEMPLATE
    learn(model, tokenizer, kept, rng, o)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for name, rows in (("train", asked[HELD_OUT:]), ("heldout", asked[:HELD_OUT])):
        lines = [json.dumps({"prompt": ask(expression), "answer": answer}) for expression, answer in rows]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
