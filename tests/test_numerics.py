"Each loss in float32 and bfloat16 against float64, on hard inputs, with stated bounds."
import copy

import pytest
import torch
import torch.nn.functional as F

from discloss import heads
from discloss.heads import distances
from discloss.losses.circle import CircleLoss
from discloss.losses.pedcc import simplex
from discloss.losses.pod import norm_adaptive_cosine_loss, pod_loss
from discloss.losses.soft_nn import soft_nn_loss
from discloss.specs import all_losses

def features(head, c, d, seed):
    "Name -> (features, labels), in float32: what the head and the loss get, and what float64 gets is the same numbers"
    gen = torch.Generator().manual_seed(seed+1)
    def randn(*size): return torch.randn(*size, generator=gen)
    y = torch.arange(24) % c
    means = randn(c, d)
    weight = next((t.detach() for k,t in (*head.named_parameters(), *head.named_buffers()) if t.shape == (c,d)), means)
    return {'ordinary': (means[y] + 0.3*randn(24, d), y),
            'collapsed, far away': (100 + means[y] + 1e-3*randn(24, d), y),
            'cosines at 1': (3*weight[y] + 1e-3*randn(24, d), y),
            'cosines near 1': (3*weight[y] + 0.1*randn(24, d), y),
            'cosines at -1': (-3*weight[y] + 1e-3*randn(24, d), y),
            'logits of 1e4': (1e4*randn(24, d), y)}

# Stated bounds of the error of losses, and of their gradient by the features, in float32: measured errors are mostly 1e-7, and at most a fifth of these
bounds = {'ordinary': (1e-5, 1e-5), 'collapsed, far away': (1e-5, 1e-3), 'cosines at 1': (1e-4, 1e-3), 'cosines near 1': (1e-4, 1e-3), 'cosines at -1': (1e-4, 1e-3), 'logits of 1e4': (1e-5, 1e-5), '100,000 classes': (1e-4, 1e-4)}
# Where a probability is 1 to five digits, float32 knows two or three digits of its distance from 1, which is the slope of a softmax of cosines
# Each head of the ensemble of emsoftmax can have two logits that are nearly the same
wider = {('gsoftmax', 'cosines at 1'): (1e-4, 2e-2), ('emsoftmax', 'logits of 1e4'): (1e-5, 1e-3)}

def margin_bound(head, x, y):
    "The slope of ArcFace's margin is one over the sine of the angle. float32 knows a cosine near 1 to its epsilon, so it knows a sine to epsilon over the sine's square"
    w = next(t.detach() for t in head.parameters() if t.ndim == 2).double()
    cos = torch.cosine_similarity(x.double(), w[y])
    return min(1., max(1e-3, 16*torch.finfo(torch.float32).eps/(1 - cos.square()).min().item()))

def tie_bound(head, x):
    "Logits of 1e4 are known to 1e4 epsilons, and where two of them are nearly the same, a probability is known no better"
    logits = copy.deepcopy(head).double()(x.double()).get('logits')
    if logits is None: return 1e-5
    p = logits.softmax(1)
    unsure = (logits.abs().amax(1)*(p*(1-p)).amax(1)).max().item()
    return max(1e-5, 8*torch.finfo(torch.float32).eps*unsure)

# And of a loss whose logits and other inputs are rounded to bfloat16, against float64 on the same rounded numbers: it computes in float32, so only its gradient is rounded once more
bounds_bf16 = 1e-4, 1e-2

def relative(got, truth, unit=0.):
    "The largest deviation, in units of the largest value, or of `unit` where all values are smaller"
    got, truth = got.double(), truth.double()
    size = max(truth.abs().max().item(), unit)
    return (got-truth).abs().max().item()/size if size else got.abs().max().item()

def whole_way(loss, head, x, y, dtype):
    "Losses and gradient from the features on, all of it in `dtype`"
    x = x.to(dtype).requires_grad_()
    losses = loss(copy.deepcopy(head).to(dtype)(x), y)
    return losses.detach(), torch.autograd.grad(losses.mean(), x)[0]

def loss_alone(loss, out, y, dtype):
    "Losses and gradient by the logits and what has a row for each sample, of what a head gave, rounded to bfloat16, in `dtype`"
    def rounded(o): return o.detach().bfloat16().to(dtype) if o.is_floating_point() else o.clone()
    out = {k: rounded(o) for k,o in out.items()}
    rows = [o.requires_grad_() for o in out.values() if o.ndim == 2 and len(o) == len(y) and o.is_floating_point()]
    losses = loss(out, y)
    grads = torch.autograd.grad(losses.mean(), rows, allow_unused=True)
    return losses.detach(), torch.cat([g.flatten().double() for g in grads if g is not None])

def measure(name, case, c=8, d=16, seed=0):
    "Errors of losses and gradient in both dtypes. The unit of losses is at least 1, and that of the gradient by logits 1e-4: float32 cannot know how near to 1 a probability is"
    torch.manual_seed(seed)
    loss = all_losses()[name](reduction='none')
    head = loss.head(d, c).train()
    x, y = features(head, c, d, seed)[case]
    out = head(x)
    res = {}
    # Where all probabilities are near 1, nearly nothing is left of the gradient, and float32 knows few digits of it
    least = 1e-2 if case == 'cosines near 1' else 0.
    for dtype,f,args,unit in (('float32', whole_way, (head, x, y), least), ('bfloat16', loss_alone, (out, y), 1e-4)):
        (v,g),(v64,g64) = (f(loss, *args, t) for t in (getattr(torch, dtype), torch.float64))
        res[dtype] = relative(v, v64, unit=1.), relative(g, g64, unit)
    limits = dict(float32=wider.get((name, case), bounds['100,000 classes' if c == 100_000 else case]), bfloat16=bounds_bf16)
    if (name, case) == ('arcface', 'cosines at 1'): limits['float32'] = limits['float32'][0], margin_bound(head, x, y)
    if case == 'logits of 1e4': limits['float32'] = limits['float32'][0], max(limits['float32'][1], tie_bound(head, x))
    return res, limits

def check(name, case, seeds, record_property, **sizes):
    "All errors are below their bounds; those nearest to them are recorded"
    def nearness(o): return max(e/b for dtype in o[0] for e,b in zip(o[0][dtype], o[1][dtype]))
    worst = max((measure(name, case, seed=seed, **sizes) for seed in seeds), key=nearness)
    errors, limits = worst
    label = '100,000 classes' if sizes else case
    record_property('errors', {name: {label: {**errors, 'bounds': limits}}})
    for dtype,limit in limits.items():
        assert all(e <= b for e,b in zip(errors[dtype], limit)), f'{dtype}: errors of value and gradient {errors[dtype]}, bounds {limit}'

cases = [k for k in bounds if k != '100,000 classes']

@pytest.mark.parametrize('case', cases)
@pytest.mark.parametrize('name', all_losses())
def test_hard_inputs(name, case, record_property): check(name, case, range(3), record_property)

@pytest.mark.slow
@pytest.mark.parametrize('case', cases)
@pytest.mark.parametrize('name', all_losses())
def test_hard_inputs_often(name, case, record_property): check(name, case, range(48), record_property)

@pytest.mark.parametrize('name', all_losses())
def test_many_classes(name, record_property):
    "100,000 classes; fixed centroids need nearly as many features, and say so at once"
    try: check(name, 'ordinary', [0], record_property, c=100_000, d=16)
    except ValueError as e:
        assert '100000 points' in str(e) and '16 dimensions' in str(e)
        record_property('errors', {name: {'100,000 classes': str(e)}})

@pytest.mark.parametrize('far', [1e15, 1e18, 3e19, 1e25])
def test_distances_beyond_the_squares_of_float32_are_infinite_and_never_zero(far):
    x = torch.tensor([[far,0],[0,far],[0,1]], requires_grad=True)
    d = distances(x, x.detach().flip(0))
    want = torch.cdist(x.double(), x.detach().double().flip(0))
    same = want == 0
    assert (d[same] == 0).all() and (d[~same] > 0).all()
    fits = want < 1e19
    assert torch.allclose(d[fits].double(), want[fits], rtol=1e-5)
    d.sum().backward()
    assert x.grad.isfinite().all()

def _from_one(x, name):
    "A value for each row, from x and rows that are made from x"
    targ, other = torch.arange(6)//2, x.roll(1, 1)
    return dict(
        squared_distances=lambda: heads.squared_distances(x, other),
        distances=lambda: heads.distances(x, other),
        own_distances=lambda: heads.own_distances(x, other, targ),
        scaled_cosine=lambda: heads.scaled_cosine(x, other, x[0,0].exp()),
        linear_cross_entropy=lambda: heads.linear_cross_entropy(x, other, targ),
        pod=lambda: pod_loss(x, targ, F.normalize(other), reduction='none'),
        softnn=lambda: soft_nn_loss(x, targ, .3, 'none', relative=True))[name]()

@pytest.mark.parametrize('name', ['squared_distances', 'distances', 'own_distances', 'scaled_cosine',
                                  'linear_cross_entropy', 'pod', 'softnn'])
def test_a_gradient_with_a_graph_is_the_gradient(name):
    "Where one input is made from another, each way counts once"
    torch.manual_seed(0)
    x = torch.randn(6, 4, dtype=torch.float64).requires_grad_()
    plain, = torch.autograd.grad(_from_one(x, name).sum(), x)
    graph, = torch.autograd.grad(_from_one(x, name).sum(), x, create_graph=True)
    assert torch.allclose(plain, graph)
    assert torch.autograd.gradcheck(lambda x: _from_one(x, name).sum(), x)

def test_pod_does_not_reward_features_of_zero():
    zero, targ, centroids = torch.zeros(1, 6), torch.tensor([0]), simplex(4, 6).float()
    for delta in 0., 1e-3: assert norm_adaptive_cosine_loss(zero, targ, centroids, delta).item() == pytest.approx(1)

def test_a_curve_of_a_mixin_counts():
    class Straight:
        def others(self, u): return u
    class Mixed(Straight, CircleLoss): pass
    class Written(CircleLoss):
        def others(self, u): return u
    torch.manual_seed(0)
    head, targ = CircleLoss().head(5, 4), torch.arange(8) % 4
    out = head(torch.randn(8, 5))
    assert torch.equal(Mixed()(out, targ), Written()(out, targ))
    assert not torch.allclose(Mixed()(out, targ), CircleLoss()(out, targ))

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', ['center', 'sigma2r', 'ldmat', 'pod'])
def test_what_a_head_keeps_moves_in_a_model_of_half_precision(name, dtype):
    torch.manual_seed(0)
    loss, y = all_losses()[name](), torch.arange(32) % 4
    half = loss.head(16, 4).to(dtype).train()
    full = copy.deepcopy(half).float()
    before = copy.deepcopy(full.state_dict())
    for _ in range(3):
        x = torch.randn(32, 16).to(dtype).requires_grad_()
        loss(half(x), y).backward()
        loss(full(x.float()), y).backward()
    state = full.state_dict()
    moved = [k for k,v in state.items() if not torch.equal(v, before[k])]
    assert moved
    for k in moved: torch.testing.assert_close(half.state_dict()[k].float(), state[k].float(), rtol=0.02, atol=0.02)

def test_a_head_of_bfloat16_counts_on():
    loss, y = all_losses()['pod'](), torch.arange(33) % 4
    head = loss.head(16, 4).bfloat16().train()
    for _ in range(20): loss(head(torch.randn(33, 16).bfloat16()), y)
    assert head.norms[1] == 660
