"""Device mistakes, found without a GPU: scoring, an update and a decoding step on a pretended accelerator.

Its tensors have a shape, a dtype and a device, but hold nothing. A tensor left on the CPU, a look at what a
tensor holds, and dtypes that do not go together are errors there. It does not see values, autocast, random
generators, streams and CUDA graphs.

    python tests/test_device.py      the outcome of each check: "right", or the error

This is a process of its own, since PyTorch never forgets a device that it was told of. The API is private.
Where it is missing, the tests are skipped.
"""

import json
import subprocess
import sys

import pytest
import torch
from conftest import narrow

import entropy
import rollout

PROMPTS, COMPLETIONS = [[3, 1, 4], [2]], [[5, 6], [7, 8, 9, 11]]


def pretended():
    """The device, and the mode in which its tensors hold nothing."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("pretended")
    FakeTensorMode.avoid_device_init = True  # torch.tensor(..., device=...) is not to ask the backend
    return torch.device("pretended", 0), FakeTensorMode(allow_non_fake_inputs=True)


def onto(device, model, dtype=torch.float32):
    """Moves the model to the device. Module.to cannot, so new parameters take the place of the old ones."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(torch.empty_like(p, device=device, dtype=dtype))
        for name, b in module._buffers.items():
            module._buffers[name] = torch.empty_like(b, device=device)
    return model


def scoring(device, model):
    """Log-probs and entropies, and their gradients."""
    onto(device, model)
    logp, H = entropy.score(model, PROMPTS, COMPLETIONS, 0.7)
    assert (logp.device, logp.dtype, logp.shape) == (device, torch.float32, (2, 4)) and H.device == device
    (logp.sum() + H.sum()).backward()
    assert all(p.grad.device == device for p in model.parameters())


def updating(device, model):
    """Steps of AdamW, where the gradients with respect to log-probs and entropies are known."""
    onto(device, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    # One token on the CPU: of a single number the value is kept, so `backward` may ask whether it is zero.
    for dlogp, dentropy in (torch.tensor([[0.1]]), torch.tensor([[0.0]])), (torch.tensor([[0.1]]),) * 2:
        entropy.backward(model, [[3, 1, 4]], [[5]], dlogp, dentropy)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def decoding(device, model, spoil=None):
    """A step of the sampler in bf16, after `spoil` has done something to its rows."""
    onto(device, model, torch.bfloat16)
    with torch.no_grad():
        ids, lengths = torch.zeros(2, 3, dtype=torch.long, device=device), torch.tensor([3, 1], device=device)
        prefilled = model.base_model(input_ids=ids, use_cache=True).past_key_values
        rows = rollout.rows_for(model, prefilled, 8, 20, 6, {0, 5})
        rows.begin(prefilled, lengths, torch.rand(8, 6, device=device), 4)
        if spoil:
            spoil(rows)
        for temperature in 1.0, 0.0:
            rollout.advance(model, rows, 6, 16, temperature)
    assert rows.token.device == device and rows.layers[1].keys.dtype == torch.bfloat16
    assert rows.layers[0].keys.shape[2] == 128  # as on a GPU


def left_on_the_cpu(rows):
    rows.noise = rows.noise.cpu()


def looked_at(rows):
    rows.update = lambda *args: rollout.Rows.update(rows, *args) if rows.ended.any() else None


def of_another_dtype(rows):
    rows.layers[1].keys = rows.layers[1].keys.float()


MISTAKES = {
    left_on_the_cpu: "FakeTensorDeviceMismatchError",
    looked_at: "DataDependentOutputException",
    of_another_dtype: "RuntimeError: Expected query, key, and value to have the same dtype",
}


def outcomes():
    """The outcome of each check and of each mistake, by name."""
    checks = [(scoring,), (updating,), (decoding,), *((decoding, mistake) for mistake in MISTAKES)]
    models, found = [narrow() for _ in checks], {}
    device, mode = pretended()
    for (check, *spoil), model in zip(checks, models):
        name = (spoil or [check])[0].__name__
        try:
            with mode:
                check(device, model, *spoil)
            found[name] = "right"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


@pytest.fixture(scope="module")
def found():
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=300)
    if "ImportError" in done.stderr:
        pytest.skip("this PyTorch has no pretended devices")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("check", ["scoring", "updating", "decoding"])
def test_all_tensors_are_on_the_device_fit_together_and_are_not_looked_at_while(check, found):
    assert found[check] == "right"


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_the_decoding_step_fails_if_a_tensor_is(mistake, found):
    assert found[mistake.__name__].startswith(MISTAKES[mistake])


if __name__ == "__main__":
    print(json.dumps(outcomes(), indent=1))
