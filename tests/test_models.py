"""Any checkpoint, held against transformers: MODELS="DIR_OR_HUB_ID ..." python -m pytest tests/test_models.py

Without MODELS it is the embedded policy. Other architectures of random weights are in tests/test_rollout.py.
"""

import os

import pytest
import torch
from conftest import generate, plain_scores

import entropy
import rollout
from data import encode_problems
from rollout import TINY, load_policy, sample

MODELS = os.environ.get("MODELS", TINY).split()
QUESTIONS = ["1+2=", "What is 7 x 8?", "Name three primes below 30, in falling order, and add them up."]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module", params=MODELS)
def loaded(request):
    """Model in fp32, end-of-sequence ids, prompts of different length, and 2 sampled completions of each."""
    model, tokenizer, eos_ids = load_policy(request.param, DEVICE)
    questions = ["1+2=", "7*8+1=", "5+5+5+5="] if request.param == TINY else QUESTIONS
    problems = encode_problems(tokenizer, [(question, "") for question in questions], 500, "QUESTIONS")
    prompts = [ids for ids, _ in problems]
    groups = sample(model, prompts, 2, 24, 1.0, eos_ids, torch.Generator().manual_seed(0))
    return model, eos_ids, prompts, groups


@torch.no_grad()
def test_log_probs_and_entropies_are_those_of_a_plain_forward_pass_of_each_row(loaded):
    model, _, prompts, groups = loaded
    rows = [(prompt, completion) for prompt, group in zip(prompts, groups) for completion in group]
    logp, H = entropy.score(model, *zip(*rows))
    for mine, plain in zip((logp, H), plain_scores(model, *zip(*rows), 1.0)):
        torch.testing.assert_close(mine, plain, atol=2e-3, rtol=1e-3)


@torch.inference_mode()
def test_greedy_samples_equal_generates(loaded):
    model, eos_ids, prompts, _ = loaded
    assert sample(model, prompts, 1, 24, 0.0, eos_ids) == generate(model, prompts, 24, eos_ids)


@torch.inference_mode()
def test_sampled_tokens_are_those_that_the_plain_distribution_and_the_random_numbers_give(loaded):
    model, eos_ids, prompts, groups = loaded
    noise = torch.rand(len(prompts), 2, 24, generator=torch.Generator().manual_seed(0))
    same = []
    for prompt, group, u in zip(prompts, groups, noise):
        for completion, numbers in zip(group, u):
            ids = torch.tensor([prompt + completion], device=DEVICE)
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
            drawn = rollout.next_token(logits, 1.0, numbers[: len(completion)].to(DEVICE))
            same += (drawn == ids[0, len(prompt) :]).tolist()
    assert sum(same) >= len(same) - 1  # rounding may move a number across the border of two tokens
