"""Controls act like their method, on as many tokens, but on other ones."""

import pytest
import torch
from test_losses import mini_batch, options, places, push

import losses
from lab.controls import CONTROLS


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_acts_on_as_many_tokens_of_its_own_kind(name, monkeypatch):
    monkeypatch.setattr(losses, "METHODS", CONTROLS | {m: losses.METHODS[m] for m in ("kl_cov", "clip_cov")})
    monkeypatch.setitem(push.__globals__, "METHODS", losses.METHODS)
    method, kind = name[: name.index("cov") + 3], name[name.index("cov") + 4 :]
    o = options(clip_low=1.0, clip_high=99.0, cov_low=0.1, cov_high=99.0, kl_cov_ratio=0.1)
    t = mini_batch(3, B=12)
    own, other = push(method, t, o)[0], push(name, mini_batch(3, B=12), o)[0]
    chosen, wrong = other.selected, t.mask & (t.advantages < 0)
    assert chosen.sum() == own.selected.sum() > 1 and not torch.equal(chosen, own.selected)
    logp = t.logp.detach()
    rare = logp < logp[t.mask].mean()
    among = {"random": t.mask, "rare_wrong": wrong & rare, "right": t.mask & (t.advantages > 0),
             "high": t.covariance > o.cov_low}  # fmt: skip
    ranked = {"rarest_wrong": sorted(places(wrong), key=lambda at: logp[at].item()),
              "highest": sorted(places(t.mask), key=lambda at: -t.covariance[at].item())}  # fmt: skip
    if kind in ranked:
        assert places(chosen) == set(ranked[kind][: int(chosen.sum())])
    else:
        assert (chosen <= among[kind]).all()
    acts = other.token_loss - losses.METHODS[method](t, o).token_loss
    assert (acts[~(chosen | own.selected)] == 0).all()  # elsewhere the loss is the method's
