"""What the tests share: one thread, no network, no GPU, seeds, narrow random models, the chi-square test."""

import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_configure(config):
    """`-m slow` runs what needs minutes; without -m, all but that."""
    config.addinivalue_line("markers", "slow: needs minutes; .ci/run runs it too")
    config.option.markexpr = config.option.markexpr or "not slow"


@pytest.fixture(autouse=True)
def seeds():
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared():
    """The folder of real data that may lie beside the checkout."""
    folder = ROOT.parent / "shared"
    if not folder.exists():
        pytest.skip("no ../shared")
    return folder


@pytest.fixture(scope="session")
def qwen_tokenizer(shared):
    """The folder with Qwen's own tokenizer and generation_config.json, without weights."""
    return shared / "qwen-tokenizer"


def narrow(architecture="Qwen2", dtype=torch.float32, vocab_size=24, seed=0, **config):
    """A narrow model of an architecture of transformers, with random weights."""
    import transformers

    shape = dict(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.25,
        pad_token_id=0, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    shape.update(config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = getattr(transformers, architecture + "Config")(**shape)
        model = getattr(transformers, architecture + "ForCausalLM")(config)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.05 * torch.randn_like(p)  # the biases and the norms as well
    return model.to(dtype).eval()


@pytest.fixture
def model():
    """A narrow Qwen2 with random weights and a vocabulary of 24, in float64."""
    return narrow(dtype=torch.float64)


@pytest.fixture(scope="session")
def qwen_checkpoint(qwen_tokenizer, tmp_path_factory):
    """A folder like Qwen2.5's: its tokenizer and generation config, but narrow and with random weights."""
    folder = tmp_path_factory.mktemp("qwen")
    narrow(
        vocab_size=151936, hidden_size=16, intermediate_size=32, head_dim=4, tie_word_embeddings=True,
        initializer_range=0.02, pad_token_id=None, eos_token_id=151645,
    ).save_pretrained(folder)  # fmt: skip
    for file in qwen_tokenizer.iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def chi_square(observed, expected):
    """p-value of counts (K,) against those expected (K,); cells that expect fewer than 5 become one."""
    observed, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (observed, expected))
    assert torch.isclose(observed.sum(), expected.sum(), rtol=1e-6)
    rare = expected < 5
    if rare.any():
        observed = torch.cat((observed[~rare], observed[rare].sum()[None]))
        expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    assert not ((expected == 0) & (observed > 0)).any(), "what cannot happen has happened"
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic / 2).item()


def subprocess_of(*argv, launcher=(), **more):
    """`python train.py ...` as a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, ROOT / "train.py", *argv]
    more |= {"capture_output": True, "text": True, "timeout": 500, "env": environment}
    return subprocess.run(list(map(str, command)), **more)


@pytest.fixture
def command(monkeypatch, capsys):
    """command(main, argument, ...) within this process: (exit status, standard output, standard error)."""

    def run(main, *argv):
        monkeypatch.setattr(sys, "argv", [sys.modules[main.__module__].__file__, *map(str, argv)])
        capsys.readouterr()
        try:
            status = main()
        except SystemExit as stop:
            status = stop.code
        return status or 0, *capsys.readouterr()

    return run


def generate(model, prompts, max_new_tokens, eos_ids):
    """Greedy completions by transformers' generate, one prompt at a time, without padding."""
    out = []
    for p in prompts:
        ids = torch.tensor([p], device=model.device)
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                               max_new_tokens=max_new_tokens, eos_token_id=sorted(eos_ids), temperature=None,
                               top_p=None, top_k=None, repetition_penalty=1.0)  # fmt: skip
        out.append([whole[0, len(p) :].tolist()])
    return out


def metrics(folder):
    """The lines of a run's metrics.jsonl without their seconds."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def plain_scores(model, prompts, completions, temperature):
    """Log-probs and entropies (B, T), one row at a time without padding, from whole logits."""
    logp, H = [], []
    for p, c in zip(prompts, completions):
        logits = model(torch.tensor([p + c], device=model.device)).logits[0, len(p) - 1 : -1]
        every = torch.log_softmax(logits / temperature, -1)
        logp.append(every.gather(1, torch.tensor(c, device=model.device)[:, None])[:, 0])
        H.append(torch.special.entr(every.exp()).sum(-1))
    return [torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (logp, H)]
