# SPDX-License-Identifier: Apache-2.0
"""KDCI's options that are not of the paper: each is what it says, by hand in a few lines."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdci_ext import KDCI, ConfounderDictionary, PriorCompensation


def dictionary(dtype: torch.dtype = torch.float64) -> ConfounderDictionary:
    """3 prototypes of 5 classes."""
    none = torch.empty(0)
    z = 3 * torch.randn(3, 5, dtype=dtype)
    return ConfounderDictionary(z, torch.tensor([0.5, 0.3, 0.2], dtype=dtype), none, none, none)


def lambdas(c: PriorCompensation, s: Tensor, d: ConfounderDictionary) -> Tensor:
    """The attention by the paper's formula, its scores by the temperature."""
    scores = torch.tanh((s @ c.w_query.T)[:, None] + d.prototypes @ c.w_key.T) @ c.w_score
    scores = scores / c.attention_temperature
    if c.weighting == "posterior":
        scores = scores + d.proportions.log()
    return scores.softmax(1)


OPTIONS = (
    {"attention_temperature": 0.25},
    {"projection": True},
    {"projection": True, "attention_temperature": 3.0, "scale": 2.0},
    {"projection": True, "weighting": "posterior"},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_temperature_and_projection_by_hand(options):
    """S + W_p sum_i lambda_i P_i z_i: values, and by the loss the gradients of all parameters."""
    c = PriorCompensation(5, 6, **options).double()
    d = dictionary()
    s = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    t = torch.randn(4, 5, dtype=torch.float64)

    def by_hand() -> Tensor:
        values = (
            d.prototypes if c.weighting == "posterior" else d.proportions[:, None] * d.prototypes
        )
        prior = c.scale * lambdas(c, s, d) @ values
        return s + (prior if c.w_project is None else prior @ c.w_project.T)

    torch.testing.assert_close(c(s, d), by_hand(), rtol=1e-9, atol=1e-12)
    p = (t / 3).softmax(1)
    expected = 9 * (p * (p.log() - (by_hand() / 3).log_softmax(1))).sum() / 4
    loss = c.loss(s, t, d, temperature=3.0)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    inputs = (s, *c.parameters())
    for got, wanted in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)
        assert float(wanted.abs().sum()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_projected_prior_is_not_lost_in_the_rounding_of_the_logits(dtype):
    """Logits of 1000 leave bfloat16 no digit for a prior of 1, which the sum in float32 keeps."""
    c = PriorCompensation(5, 6, projection=True)
    d = dictionary(torch.float32)
    s = torch.full((2, 5), 1000.0, dtype=dtype)
    wide = s.float()
    prior = (lambdas(c, wide, d) * d.proportions) @ d.prototypes
    expected = (wide + prior @ c.w_project.T).to(dtype)
    assert c(s, d).dtype == dtype
    torch.testing.assert_close(c(s, d), expected, rtol=0, atol=2e-3)


def test_the_gain_scales_the_initial_weights_and_nothing_else():
    drawn = []
    for gain in (1.0, 0.5):
        torch.manual_seed(0)
        drawn.append(PriorCompensation(5, 6, init_gain=gain))
    for one, half in zip(*(c.parameters() for c in drawn), strict=True):
        torch.testing.assert_close(half, one / 2)


@pytest.mark.parametrize("weighting", ["paper", "posterior"])
@pytest.mark.parametrize("attention", ["learned", "uniform", "random"])
def test_attention_weights_are_those_that_compensate(attention, weighting, monkeypatch):
    """Also in pieces of one row; random ones are drawn anew, as in each call."""
    c = PriorCompensation(5, 6, attention=attention, weighting=weighting).double()
    d = dictionary()
    s = torch.randn(4, 5, dtype=torch.float64)
    values = d.prototypes if weighting == "posterior" else d.proportions[:, None] * d.prototypes
    torch.manual_seed(3)
    weights = c.attention_weights(s, d)
    torch.manual_seed(3)
    torch.testing.assert_close(c(s, d) - s, weights @ values, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(weights.sum(1), torch.ones(4, dtype=torch.float64))
    if attention == "learned":
        monkeypatch.setattr("kdci_ext.modules.DIAGNOSED_VALUES", 1)
        torch.testing.assert_close(c.attention_weights(s, d), weights, rtol=1e-12, atol=1e-14)


def test_a_lower_temperature_concentrates_attention():
    d = dictionary(torch.float32)
    s = 3 * torch.randn(64, 5)
    entropies = []
    for temperature in (10.0, 1.0, 0.01):
        torch.manual_seed(0)
        c = PriorCompensation(5, 6, attention_temperature=temperature)
        entropies.append(float(torch.special.entr(c.attention_weights(s, d)).sum(1).mean()))
    assert entropies == sorted(entropies, reverse=True)
    assert entropies[0] > 1.09 > 0.2 > entropies[-1]  # log 3 = 1.0986


def test_shuffled_prototypes_are_those_of_k_means_with_their_columns_in_another_order():
    rows = torch.randn(40, 6) * torch.arange(1, 7)
    plain, shuffled = KDCI(6, 4), KDCI(6, 4, prototypes="shuffled")
    for kdci in (plain, shuffled):
        kdci.update(rows, torch.Generator().manual_seed(1))
    torch.testing.assert_close(shuffled.prototypes.sort(1)[0], plain.prototypes.sort(1)[0])
    assert torch.equal(shuffled.proportions, plain.proportions)
    orders = [
        row.argsort()[other.argsort().argsort()]
        for row, other in zip(plain.prototypes, shuffled.prototypes, strict=True)
    ]
    assert len({tuple(order.tolist()) for order in orders}) > 1  # an order for each prototype
    again = KDCI(6, 4, prototypes="shuffled")
    again.update(rows, torch.Generator().manual_seed(1))
    assert torch.equal(again.prototypes, shuffled.prototypes)


@pytest.mark.parametrize("weighting", ["paper", "posterior"])
@pytest.mark.parametrize("attention", ["learned", "random"])
def test_classes_add_the_log_prior_of_the_teachers_predictions(attention, weighting):
    """Logit adjustment: S + tau log p(class), whatever attention does; no class is -inf."""
    rows = 2 * torch.randn(50, 5)
    rows[:, 0] += 3
    rows[:, 4] -= 1e4
    kdci = KDCI(5, 4, 6, prototypes="classes", scale=0.5, attention=attention, weighting=weighting)
    kdci.update(rows)
    s = torch.randn(7, 5)
    log_p = rows.softmax(1).mean(0).clamp(min=torch.finfo(torch.float32).tiny).log()
    torch.testing.assert_close(kdci(s), s + 0.5 * log_p, rtol=1e-5, atol=1e-5)
    assert kdci(s).isfinite().all()


@pytest.mark.parametrize("name", ["attention_temperature", "init_gain"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_factors_must_be_positive(name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must be finite and > 0"):
        KDCI(5, 4, **{name: value})


def test_an_unknown_dictionary_is_named():
    with pytest.raises(ValueError, match=r"prototypes='shufled' .* did you mean 'shuffled'"):
        KDCI(5, 4, prototypes="shufled")


def test_options_are_part_of_the_repr_and_survive_a_state_dict():
    kdci = KDCI(5, 4, 6, projection=True, attention_temperature=0.5)
    kdci.update(torch.randn(20, 5))
    assert "attention_temperature=0.5" in repr(kdci)
    assert "projection=True" in repr(kdci)
    other = KDCI(5, 4, 6, projection=True, attention_temperature=0.5)
    other.load_state_dict(kdci.state_dict())
    s = torch.randn(3, 5)
    assert torch.equal(other(s), kdci(s))
    with pytest.raises(RuntimeError, match="w_project"):
        KDCI(5, 4, 6).load_state_dict(kdci.state_dict())


@pytest.mark.parametrize("options", [{"projection": True}, {"attention_temperature": 0.5}], ids=str)
def test_the_options_compile(options):
    kdci = KDCI(5, 4, 6, **options)
    kdci.update(torch.randn(20, 5))
    s, t = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    compiled = torch.compile(kdci.loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(s, t, 2.0), kdci.loss(s, t, 2.0))
