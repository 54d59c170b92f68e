# SPDX-License-Identifier: Apache-2.0
"""KDCI with the dictionary of another model and a learnable mapping matrix (Table 5)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdci_ext import KDCI

OPTIONS = ({}, {"weighting": "posterior"}, {"attention": "uniform"}, {"scale": 0.5})


def ready(dtype: torch.dtype = torch.float32, **options) -> KDCI:
    """A student of 5 classes, a dictionary of 3 prototypes from a model of 7 classes."""
    kdci = KDCI(5, 3, hidden_dim=6, dictionary_dim=7, **options).to(dtype)
    kdci.update(torch.randn(40, 7, dtype=dtype))
    return kdci


def by_hand(kdci: KDCI, s: Tensor) -> Tensor:
    """S + sum_i lambda_i P_i W_m z_i, with the attention over the mapped prototypes too."""
    z = kdci.prototypes @ kdci.w_map.T
    c = kdci.compensation
    if c.attention == "uniform":
        scores = s.new_zeros(len(s), len(z))
    else:
        scores = torch.tanh((s @ c.w_query.T)[:, None] + z @ c.w_key.T) @ c.w_score
    if c.weighting == "posterior":
        return s + c.scale * (scores + kdci.proportions.log()).softmax(1) @ z
    return s + c.scale * scores.softmax(1) @ (kdci.proportions[:, None] * z)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_prior_is_that_of_the_mapped_prototypes(options):
    """Values and, through loss and compensation alike, the gradients of every parameter."""
    kdci = ready(torch.float64, **options)
    s = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    t = torch.randn(4, 5, dtype=torch.float64)
    inputs = (s, *kdci.parameters())
    assert any(p is kdci.w_map for p in inputs)

    torch.testing.assert_close(kdci(s), by_hand(kdci, s), rtol=1e-6, atol=1e-9)
    p = (t / 3).softmax(1)
    expected = 9 * (p * (p.log() - (by_hand(kdci, s) / 3).log_softmax(1))).sum() / 4
    loss = kdci.loss(s, t, temperature=3.0)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)

    got = torch.autograd.grad(loss, inputs)
    wanted = torch.autograd.grad(expected, inputs)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
        assert float(other.abs().sum()) > 0


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_gradcheck_of_the_mapping(backend):
    kdci = ready(torch.float64, backend=backend)
    s = torch.randn(4, 5, dtype=torch.float64)

    def loss(w_map: Tensor) -> Tensor:
        return torch.func.functional_call(kdci, {"w_map": w_map}, (s,)).square().sum()

    assert torch.autograd.gradcheck(loss, kdci.w_map)


def test_the_mapping_learns_and_the_dictionary_does_not():
    """One optimiser over all parameters, as in anyone's loop."""
    kdci = ready()
    student = torch.randn(16, 5, requires_grad=True)
    teacher = torch.randn(16, 5)
    before = kdci.w_map.detach().clone(), kdci.prototypes.clone()
    optimizer = torch.optim.SGD([student, *kdci.parameters()], lr=0.1)
    kdci.loss(student, teacher).backward()
    optimizer.step()
    assert not torch.equal(kdci.w_map, before[0])
    assert torch.equal(kdci.prototypes, before[1])
    assert not kdci.prototypes.requires_grad


def test_attention_starts_as_without_a_mapping():
    """The mapping is drawn last: a run with another model's dictionary differs by nothing else."""
    torch.manual_seed(3)
    plain = KDCI(5, 3, hidden_dim=6)
    torch.manual_seed(3)
    mapped = KDCI(5, 3, hidden_dim=6, dictionary_dim=5)
    assert plain.w_map is None
    assert torch.equal(plain.compensation.w_key, mapped.compensation.w_key)
    # A model of as many classes is mapped as well: its classes need not be the student's.
    assert mapped.w_map.shape == (5, 5)
    assert 0 < mapped.w_map.detach().abs().max() <= 5**-0.5


def test_the_state_holds_mapping_and_dictionary():
    kdci, fresh = ready(), KDCI(5, 3, hidden_dim=6, dictionary_dim=7)
    fresh.load_state_dict(kdci.state_dict())
    logits = torch.randn(4, 5)
    assert fresh.is_ready
    assert torch.equal(fresh(logits), kdci(logits))
    assert "dictionary_dim=7" in repr(kdci)


def test_autocast_keeps_the_mapping_exact():
    kdci, logits = ready(), torch.randn(4, 5)
    expected = kdci(logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kdci(logits), expected)


def test_compiles_without_graph_breaks():
    kdci, logits = ready(), torch.randn(4, 5)
    compiled = torch.compile(kdci.forward, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(logits), kdci(logits))


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="dictionary_dim=0 must be at least 1"):
        KDCI(5, 3, dictionary_dim=0)
    with pytest.raises(TypeError, match="dictionary_dim must be an int, got float"):
        KDCI(5, 3, dictionary_dim=2.0)
    with pytest.raises(ValueError, match="dimension 1 must be 7, the dictionary_dim"):
        KDCI(5, 3, dictionary_dim=7).update(torch.randn(20, 5))
