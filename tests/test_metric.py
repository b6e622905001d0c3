"AnyPML beside pytorch-metric-learning itself, reference points, samplers, and batches without pairs."
import copy, pickle, sys, warnings
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from fastai.callback.data import WeightedDL
from fastai.data.core import DataLoaders, TfmdDL
from fastcore.meta import method
from pytorch_metric_learning import distances, losses, miners

from discloss.bodies import small_body
from discloss.contract import check_loss
from discloss.core import with_head
from discloss.data import ImageTensors, class_balanced
from discloss.learner import fit, partner_share, with_partners
from discloss.losses.circle import CirclePairLoss
from discloss.losses.cosface import CosFaceLoss
from discloss.losses.soft_nn import SoftNNLoss
from discloss.metric import AnyPML, FocalLoss, LogitAdjustedLoss, pml_names, references
from discloss.runs import loss_learner
from discloss.specs import all_losses, loss_label, parse_losses
from discloss.study import tensor_loaders

needs = dict(RankedListLoss=dict(margin=0.5, Tn=1))

@pytest.fixture
def batch():
    gen = torch.Generator().manual_seed(0)
    return torch.randn(20, 8, generator=gen), torch.arange(20) % 5

@pytest.mark.parametrize('name', pml_names())
def test_every_loss_gives_the_library_s_value(name, batch):
    x, y = batch
    loss = AnyPML(name, lam=2., ce=0.5, options=needs.get(name))
    torch.manual_seed(0)
    head = loss.head(8, 5)
    sizes = dict(num_classes=5, embedding_size=8)
    proxies = bool(list(head.learned))
    if name == 'P2SGradLoss': sizes = dict(num_classes=5, descriptors_dim=8)
    theirs = getattr(losses, name)(**needs.get(name, {}), **(sizes if proxies else {}))
    with torch.no_grad():
        for k,p in theirs.named_parameters(): p.copy_(head.learned[k])
    out = head(x.requires_grad_())
    torch.manual_seed(1)
    ours = loss(out, y)
    torch.manual_seed(1)
    want = 2*theirs(x, y) + 0.5*F.cross_entropy(out['logits'], y)
    assert torch.allclose(ours, want.reshape(()), rtol=1e-5)
    ours.backward()
    assert x.grad.isfinite().all()
    if proxies: assert all(p.grad.abs().sum() > 0 for p in head.learned.values())

@pytest.mark.parametrize('name', pml_names('miners'))
def test_every_miner_gives_the_library_s_value(name, batch):
    x, y = batch
    loss, miner = AnyPML('TripletMarginLoss', name, ce=0.), getattr(miners, name)()
    out = loss.head(8, 5)(x)
    torch.manual_seed(1)
    ours = loss(out, y)
    torch.manual_seed(1)
    want = losses.TripletMarginLoss()(x, y, miner(x, y)) + F.cross_entropy(out['logits'], y)
    assert torch.allclose(ours, want, rtol=1e-5)

def test_options_name_distances(batch):
    x, y = batch
    loss = AnyPML('TripletMarginLoss', options=dict(distance='CosineSimilarity', margin=0.3))
    out = loss.head(8, 5)(x)
    theirs = losses.TripletMarginLoss(distance=distances.CosineSimilarity(), margin=0.3)
    assert torch.allclose(loss(out, y), theirs(x, y)+F.cross_entropy(out['logits'], y))

def test_alone_the_classifier_is_a_probe(batch):
    x, y = batch
    feats = {}
    for ce in 0., 1.:
        loss, x = AnyPML('SupConLoss', ce=ce), x.detach().requires_grad_()
        torch.manual_seed(0)
        head = loss.head(8, 5)
        loss(head(x), y).backward()
        feats[ce] = x.grad
        assert head.fc.weight.grad.abs().sum() > 0
    alone = x.detach().requires_grad_()
    losses.SupConLoss()(alone, y).backward()
    assert torch.allclose(feats[0.], alone.grad, atol=1e-7)
    assert not torch.allclose(feats[1.], alone.grad, atol=1e-3)

def test_heads_start_from_weights_of_their_own():
    loss = AnyPML('ProxyAnchorLoss')
    a, b = (loss.head(8, 5).learned['proxies'] for _ in range(2))
    assert not torch.equal(a, b)

def test_making_a_loss_draws_no_random_numbers():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    AnyPML('SoftTripleLoss', 'DistanceWeightedMiner')
    assert torch.equal(before, torch.get_rng_state())

def test_class_weights_on_duplicates(batch):
    "A class of weight 0 counts as little as if it were not there, for losses of single samples"
    x, y = batch
    loss = AnyPML('ArcFaceLoss', weight=[0.,1.,1.,1.,1.])
    out = loss.head(8, 5)(x)
    plain = AnyPML('ArcFaceLoss')
    there = y > 0
    kept = {k: v[there] if len(v) == len(y) else v for k,v in out.items()}
    assert torch.allclose(loss(out, y), plain(kept, y[there]), rtol=1e-5)

@pytest.mark.parametrize('name', ['SupConLoss', 'ProxyAnchorLoss', 'TripletMarginLoss', 'CircleLoss'])
def test_equal_class_weights_change_nothing(name, batch):
    x, y = batch
    out = AnyPML(name).head(8, 5)(x)
    assert torch.allclose(AnyPML(name)(out, y), AnyPML(name, weight=[2.]*5)(out, y), rtol=1e-5)

def test_weights_without_meaning_are_refused(batch):
    x, y = batch
    loss = AnyPML('HistogramLoss', weight=[1.]*5)
    with pytest.raises(ValueError, match='weight has no meaning for HistogramLoss'): loss(loss.head(8, 5)(x), y)

@pytest.mark.parametrize('error,args,says', [
    (ValueError, dict(pml='SupCon'), 'pml must be one of AngularLoss'),
    (ValueError, dict(pml='CrossBatchMemory'), 'keeps samples of earlier batches'),
    (ValueError, dict(miner='HardMiner'), 'miner must be one of AngularMiner'),
    (ValueError, dict(options=dict(temp=1)), "SupConLoss and no miner .* refuse options={'temp': 1}"),
    (ValueError, dict(pml='SphereFaceLoss', options=dict(margin=0.3)), 'refuse options'),
    (TypeError, dict(options=3), 'options must be a dict'),
    (TypeError, dict(options=dict(distance=distances.LpDistance())), 'by the name of its class'),
    (ValueError, dict(lam=-1), 'lam must be a number at least 0'),
])
def test_bad_settings(error, args, says):
    with pytest.raises(error, match=says): AnyPML(**args)

def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pytorch_metric_learning', None)
    with pytest.raises(ImportError, match=r"pip install 'discloss\[metric\]'"): AnyPML()

def test_reference_points_are_ordinary_losses():
    made = {k: f() for k,f in references.items()}
    assert list(parse_losses(made)) == list(references)
    assert not set(c.__name__ for c in all_losses().values()) & {'AnyPML', 'FocalLoss'}
    for loss in made.values():
        again = pickle.loads(pickle.dumps(loss))
        assert again.hparams == loss.hparams and loss_label(again) == loss_label(loss)

@pytest.mark.parametrize('name', references)
def test_reference_points_keep_their_promises(name): check_loss(references[name]())

def test_focal_is_torchvision_s_for_two_classes():
    from torchvision.ops import sigmoid_focal_loss
    z, y = torch.randn(16, dtype=torch.float64), torch.arange(16) % 2
    ours = FocalLoss(gamma=2., reduction='none')(torch.stack([torch.zeros_like(z), z], 1), y)
    assert torch.allclose(ours, sigmoid_focal_loss(z, y.double(), alpha=-1, gamma=2))

def test_logit_adjustment_finds_balanced_classes():
    "With the true frequencies in the loss, the best constant logits are equal"
    counts = [90, 9, 1]
    y = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    z = nn.Parameter(torch.tensor([1.,0.,-1.]))
    loss, opt = LogitAdjustedLoss(counts), torch.optim.LBFGS([z], max_iter=200, tolerance_grad=1e-9)
    def step():
        opt.zero_grad()
        value = loss(z.expand(100, 3), y)
        value.backward()
        return value
    opt.step(step)
    assert torch.allclose(z, z.mean(), atol=1e-3)

def test_logit_adjustment_keeps_its_promises(): check_loss(LogitAdjustedLoss([5,4,3,2,1]), only=('stateless', 'pure', 'bad_inputs', 'float64', 'reduces', 'halves', 'compiles'))

def test_logit_adjustment_refuses():
    with pytest.raises(ValueError, match='counts must be a positive number for each class'): LogitAdjustedLoss([1,0])
    with pytest.raises(ValueError, match='one number for each of the 4 classes, got 2'): LogitAdjustedLoss([1,2])(torch.randn(3,4), torch.tensor([0,1,2]))

def test_partner_share_by_counting():
    labels, bs = torch.tensor([0]*6+[1]*3+[2]), 4
    gen = torch.Generator().manual_seed(0)
    rows = torch.stack([labels[torch.randperm(10, generator=gen)[:bs]] for _ in range(20_000)])
    met = ((rows[:,:,None] == rows[:,None]).sum(2) > 1).float().mean().item()
    # Drawn without replacement, here as if with it
    assert abs(partner_share(labels, bs) - met) < 0.05

@pytest.mark.parametrize('loss', [AnyPML('SupConLoss'), AnyPML('ProxyAnchorLoss', weight=[1,2])], ids=lambda l: l.name)
def test_compiled_it_goes_through_one_operator(loss):
    x, y, found = torch.randn(8, 4), torch.arange(8) % 2, []
    head = loss.head(4, 2)
    for f in loss, torch.compile(loss, backend='aot_eager', fullgraph=True):
        head.zero_grad()
        value = f(head(x), y)
        value.backward()
        found.append([value.detach(), *(p.grad.clone() for p in head.parameters())])
    for plain,compiled in zip(*found): assert torch.allclose(plain, compiled, atol=1e-5)

def pair_losses(): return [SoftNNLoss(), CirclePairLoss(), AnyPML('SupConLoss')]

@pytest.mark.parametrize('loss', pair_losses(), ids=lambda l: l.name)
def test_a_batch_without_pairs_is_named_once(loss):
    x, y = torch.randn(4, 8), torch.arange(4)
    head = loss.head(8, 5)
    with pytest.warns(UserWarning, match='no two of the 4 in this batch are of one class'): loss(head(x), y)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        loss(head(x), y)
        fresh = copy.deepcopy(loss)
        fresh._warned = False
        fresh(head(x), y//2)
        with torch.no_grad(): fresh(head.eval()(x), y)

def test_losses_with_proxies_need_no_pairs():
    pairs = {k: AnyPML(k, options=needs.get(k)).pairs for k in pml_names()}
    alone = {k for k,v in pairs.items() if not v}
    assert {'ArcFaceLoss', 'ProxyAnchorLoss', 'SphereFaceLoss', 'SoftTripleLoss', 'P2SGradLoss'} <= alone
    assert not {'SupConLoss', 'MarginLoss', 'TripletMarginLoss'} & alone

@pytest.mark.parametrize('n,want', [(2,'few'), (40,'many')])
def test_losses_with_pairs_get_partners_where_batches_lack_them(n, want):
    "Of 40 classes with 4 images each, a batch of 8 holds hardly two of one class; of two classes it does"
    y = torch.arange(160) % n
    x = torch.randint(0, 255, (160,1,8,8), dtype=torch.uint8)
    dls = tensor_loaders([(x, y)]*3, [str(i) for i in range(n)], bs=8)
    changed = with_partners(dls, SoftNNLoss())
    assert with_partners(dls, CosFaceLoss()) is dls
    if want == 'few': assert changed is dls
    else: assert all((b.bincount()[b.unique()] == 4).all() for _,b in changed.train)
    learn = loss_learner(SoftNNLoss(), dls, partial(small_body, width=4))
    assert (learn.dls is dls) == (want == 'few')

def _backwards(dl): return list(range(dl.n))[::-1]

class Backwards(TfmdDL):
    def get_idxs(self): return _backwards(self)

def _own_loaders(way):
    images = [(torch.zeros(1,8,8), i % 40) for i in range(160)]
    if way == 'balanced': return class_balanced(_own_loaders(None), 2)
    if way == 'weights': train = WeightedDL(images, bs=8, wgts=torch.ones(160))
    elif way == 'class': train = Backwards(images, bs=8)
    elif way == 'argument': train = TfmdDL(images, bs=8, get_idxs=method(_backwards))
    elif way == 'shuffle': train = TfmdDL(images, bs=8, shuffle=True, shuffle_fn=lambda idxs: idxs)
    else: train = TfmdDL(images, bs=8, shuffle=True)
    return DataLoaders(train, TfmdDL(images, bs=8))

@pytest.mark.parametrize('way', ['balanced', 'weights', 'class', 'argument', 'shuffle', None])
def test_loaders_that_draw_in_a_way_of_their_own_stay(way):
    dls = _own_loaders(way)
    assert (with_partners(dls, SoftNNLoss()) is dls) == (way is not None)

def test_fit_gives_partners_too():
    y = torch.arange(160) % 40
    x = torch.randint(0, 255, (160,1,8,8), dtype=torch.uint8)
    dls = tensor_loaders([(x, y)]*3, [str(i) for i in range(40)], bs=8)
    learn = fit(dls, small_body(width=4), SoftNNLoss(), 1)
    assert learn.dls.train.one_batch()[1].bincount().max() == 4
