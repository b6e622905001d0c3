"Properties of every loss on random inputs: shapes, dtypes, labels, and features from 1e-6 to 1e6. A few hundred examples by default, more than 10,000 with `-m slow`."
import copy, random

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from discloss.specs import all_losses

dtypes = torch.float16, torch.bfloat16, torch.float32, torch.float64

@st.composite
def batches(draw, dtypes=dtypes):
    "What makes a batch: samples, features, classes, dtype, scale, labels, and the seed of features and weights"
    n, c = draw(st.integers(1, 12)), draw(st.integers(2, 8))
    return dict(n=n, c=c, d=draw(st.integers(c-1, 16)), dtype=draw(st.sampled_from(dtypes)), scale=10**draw(st.floats(-6, 6)), offset=draw(st.sampled_from([0., 0., 1., 100.])),
                labels=draw(st.lists(st.integers(0, c-1), min_size=n, max_size=n)), label_dtype=draw(st.sampled_from([torch.int64, torch.int32, torch.uint16, torch.uint8])), seed=draw(st.integers(0, 2**31)))

def drawn(name, b):
    "Every second time a loss as it is, else with one hyper-parameter drawn from its examples, where it goes with the others and with the batch"
    cls, rnd = all_losses()[name], random.Random(b['seed'])
    loss = cls()
    names = sorted(loss.hypers.keys() & loss.hparams.keys())
    if not names or rnd.random() < 0.5: return loss
    k = rnd.choice(names)
    try:
        other = cls(**{k: rnd.choice(loss.hypers[k].examples())})
        other.head(b['d'], b['c'])
        return other
    except ValueError: return loss

class Example:
    "A batch with a head: `value(feats)` is the loss of a fresh copy of the head, which therefore has moved nothing before"
    def __init__(self, loss, b):
        gen = torch.Generator().manual_seed(b['seed'])
        self.b, self.loss = b, loss
        self.x = (b['scale']*(torch.randn(b['n'], b['d'], generator=gen, dtype=torch.float64) + b['offset'])).to(b['dtype'])
        self.y = torch.tensor(b['labels'], dtype=b['label_dtype'])
        torch.manual_seed(b['seed'])
        self.head = loss.head(b['d'], b['c']).to(b['dtype']).train()
    def losses(self, x=None, order=None, reduction='none'):
        x, y = self.x if x is None else x, self.y
        if order is not None: x, y = x[order], y[order]
        self.loss.reduction = reduction
        torch.manual_seed(self.b['seed']) # Of lots, where a head draws them
        return self.loss(copy.deepcopy(self.head)(x), y)

def finite(loss, b):
    "Value and gradient are finite, in float32 or float64; or the error is a ValueError that names what is not finite"
    e = Example(loss, b)
    x = e.x.detach().requires_grad_()
    try: value = e.losses(x, reduction='mean')
    except ValueError as error:
        assert 'must be finite, got NaN or infinity in' in str(error) and b['dtype'] == torch.float16, error
        return 'overflowed before the loss saw it'
    assert value.isfinite() and value.dtype == torch.promote_types(b['dtype'], torch.float32), value
    value.backward()
    assert x.grad.isfinite().all() or b['dtype'] == torch.float16 and too_large(e, x), x.grad

def too_large(e, x):
    "Are the entries that are not finite, in float64, larger than float16 can say?"
    feats = x.detach().double().requires_grad_()
    head = copy.deepcopy(e.head).double()
    torch.manual_seed(e.b['seed'])
    e.loss(head(feats), e.y).backward()
    return (x.grad.isfinite() | (feats.grad.abs() > 3e4)).all()

def permuted(loss, b):
    "In another order the samples have the same losses"
    e = Example(loss, b)
    order = torch.randperm(b['n'], generator=torch.Generator().manual_seed(b['seed']))
    a, b_ = e.losses()[order], e.losses(order=order)
    assert torch.allclose(a, b_, rtol=1e-6, atol=1e-9*a.abs().max().item()), (a, b_)

def reduced(loss, b):
    "'none' gives one loss for each sample, of which 'mean' and 'sum' are mean and sum"
    e = Example(loss, b)
    none, mean, total = (e.losses(reduction=r) for r in ('none','mean','sum'))
    assert none.shape == (b['n'],) and mean.shape == total.shape == ()
    tol = 1e-6 if b['dtype'] == torch.float64 else 1e-4
    assert torch.allclose(mean, none.mean(), rtol=tol, atol=tol*none.abs().max().item()) and torch.allclose(total, none.sum(), rtol=tol, atol=b['n']*tol*none.abs().max().item())

def descends(loss, b):
    "Against its gradient, the loss of free features goes down"
    e = Example(loss, b)
    x = e.x.detach().requires_grad_()
    value = e.losses(x, reduction='mean')
    value.backward()
    g = x.grad
    # The change that a step of the relative size 1e-4 promises; nothing is promised where rounding is larger
    step = 1e-4*x.detach().norm()/g.norm().clamp_min(1e-300)
    promised = step*g.square().sum()
    if not promised > 1e-9*(1+value.detach().abs()): return 'nothing promised'
    lower = [e.losses(x.detach() - step*s*g, reduction='mean').item() < value.item() for s in (1., .1, .01, 1e-3, 1e-4)]
    assert any(lower), (value.item(), promised.item())

properties = dict(finite=(finite, dtypes), permuted=(permuted, dtypes[3:]), reduced=(reduced, dtypes[1:]), descends=(descends, dtypes[3:]))

def check(name, prop, examples, record_property):
    f, kinds = properties[prop]
    tried, vacuous = 0, 0
    @settings(max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(batches(kinds))
    def holds(b):
        nonlocal tried, vacuous
        tried += 1
        vacuous += f(drawn(name, b), b) is not None
    holds()
    assert tried >= examples and vacuous <= tried/2
    record_property('examples', {name: tried})

cases = [(name, prop) for name in all_losses() for prop in properties]

@pytest.mark.parametrize('name, prop', cases)
def test_property(name, prop, record_property): check(name, prop, 8, record_property)

@pytest.mark.slow
@pytest.mark.parametrize('name, prop', cases)
def test_property_often(name, prop, record_property):
    "10,000 examples and more over all losses and properties"
    check(name, prop, -(-10_000//len(cases))+1, record_property)
