"evaluate, embed and nearest: numbers against scikit-learn and torchmetrics, any model and loader, bounded memory"
import pickle

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, Learner, RandTransform, Resize
from PIL import Image
from scipy.optimize import brentq
from sklearn.metrics import average_precision_score, recall_score, roc_auc_score, roc_curve
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.retrieval import retrieval_average_precision, retrieval_hit_rate

import discloss.evaluate as module
from discloss.core import with_head
from discloss.evaluate import (Embeddings, Evaluation, Verification, embed, evaluate, fit_scores, nearest, retrieval, unknown_table, verification)
from discloss.geometry import class_moments, get_features
from discloss.heads import LinearHead
from discloss.losses.lgm import LGMLoss

def clusters(n=200, d=6, K=5, spread=1., seed=0):
    g = torch.Generator().manual_seed(seed)
    targ = torch.randint(0, K, (n,), generator=g)
    return torch.randn(K,d, generator=g)[targ] + spread*torch.randn(n,d, generator=g), targ

def similarities(feats, metric):
    x = feats.double()
    return F.cosine_similarity(x[:,None], x, dim=-1) if metric == 'cosine' else -torch.cdist(x, x, compute_mode='donot_use_mm_for_euclid_dist')

# Retrieval

@pytest.mark.parametrize('metric', ['cosine','euclidean'])
def test_retrieval_against_torchmetrics(metric):
    feats,targ = clusters()
    sim,n = similarities(feats, metric),len(feats)
    want = {'recall@1': [], 'recall@5': [], 'mAP': []}
    for i in range(n):
        others = torch.arange(n) != i
        s,same = sim[i,others]-sim.min()+1,targ[others] == targ[i] # torchmetrics ignores scores below 0
        for k in 1,5: want[f'recall@{k}'].append(retrieval_hit_rate(s, same, k).item())
        want['mAP'].append(retrieval_average_precision(s, same).item())
    found = retrieval(feats, targ, metric=metric)
    for k,v in want.items(): assert found[k] == pytest.approx(np.mean(v), abs=1e-6), k

def test_average_precision_with_ties_is_scikit_learns():
    g = torch.Generator().manual_seed(0)
    feats,targ = torch.randint(-1, 2, (60,2), generator=g).float(), torch.randint(0, 3, (60,), generator=g)
    sim = -torch.cdist(feats.double(), feats.double())
    want = []
    for i in range(60):
        others = torch.arange(60) != i
        want.append(average_precision_score(targ[others] == targ[i], sim[i,others].round(decimals=9)))
    assert retrieval(feats, targ, metric='euclidean')['mAP'] == pytest.approx(np.mean(want), abs=1e-9)

def test_ties_count_against_the_query():
    collapsed = torch.ones(4,2)
    assert retrieval(collapsed, torch.tensor([0,0,1,1]), k=(1,2,3)) == pytest.approx({'recall@1': 0, 'recall@2': 0, 'recall@3': 1, 'mAP': 1/3})

def test_a_class_with_one_image_is_no_query():
    feats,targ = torch.tensor([[1.,0.],[1.,.1],[0.,1.]]), torch.tensor([0,0,1])
    assert retrieval(feats, targ, 1) == pytest.approx({'recall@1': 1, 'mAP': 1})
    assert all(np.isnan(v) for v in retrieval(feats, torch.arange(3)).values())

def test_pieces_give_what_the_whole_gives(monkeypatch):
    feats,targ = clusters()
    whole,v = retrieval(feats, targ),verification(feats, targ)
    pieces = module._pieces
    monkeypatch.setattr(module, '_pieces', lambda x: pieces(x, size=7*len(x)))
    assert retrieval(feats, targ) == pytest.approx(whole, abs=1e-12)
    parts = verification(feats, targ)
    assert np.array_equal(parts.tar, v.tar) and np.array_equal(parts.far, v.far)

class Largest(TorchDispatchMode):
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        res = func(*args, **(kwargs or {}))
        for o in res if isinstance(res, (tuple,list)) else [res]:
            if isinstance(o, torch.Tensor): self.n = max(self.n, o.numel())
        return res

@pytest.mark.parametrize('f', [retrieval, verification])
def test_memory_does_not_grow_with_pairs(f):
    feats,targ = clusters(4000, 2)
    with Largest() as m: f(feats, targ)
    assert m.n <= max(2**21, 2*2**20) < 4000**2

# Verification

@pytest.mark.parametrize('metric', ['cosine','euclidean'])
def test_verification_against_scikit_learn(metric):
    feats,targ = clusters()
    i,j = torch.triu_indices(200, 200, 1)
    score,same = similarities(feats, metric)[i,j],targ[i] == targ[j]
    far,tar,_ = roc_curve(same, score, drop_intermediate=False)
    v = verification(feats, targ, metric)
    assert v.auroc == pytest.approx(roc_auc_score(same, score), abs=1e-5)
    assert v.eer == pytest.approx(brentq(lambda x: 1-x-np.interp(x, far, tar), 0, 1), abs=1e-4)
    for rate in 0.001,0.01,0.1:
        assert v.tar_at(rate) == pytest.approx(tar[far <= rate].max(), abs=1e-3)
        accepted = score >= v.threshold_at(rate)
        assert accepted[~same].double().mean() <= rate + 1e-3
        assert accepted[same].double().mean() == pytest.approx(v.tar_at(rate), abs=1e-3)

def test_verification_of_known_cases():
    apart = verification(torch.tensor([[1.,0.],[1.,0.],[0.,1.],[0.,1.]]), torch.tensor([0,0,1,1]))
    assert (apart.eer, apart.auroc, apart.tar_at(0), apart.tar_at(0.5)) == (0, 1, 1, 1)
    assert apart.threshold_at(0) == pytest.approx(1, abs=1e-5) and apart.threshold_at(1) == pytest.approx(0, abs=1e-5)
    steps = Verification(np.array([np.inf,.9,.5]), np.array([0,.6,1]), np.array([0,.25,1])) # A rate that is met exactly
    assert (steps.tar_at(.25), steps.threshold_at(.25), steps.tar_at(.24)) == (.6, .9, 0)
    collapsed = verification(torch.ones(4,2), torch.tensor([0,0,1,1]))
    assert (collapsed.eer, collapsed.auroc, collapsed.tar_at(0.9)) == (0.5, 0.5, 0)
    assert collapsed.threshold_at(0.9) == np.inf
    for targ in torch.arange(4), torch.zeros(4).long(): # No pair of one class; none of two
        v = verification(torch.randn(4,2), targ)
        assert np.isnan(v.eer) and np.isnan(v.auroc)
    alone = verification(torch.randn(1,2), torch.zeros(1).long())
    assert np.isnan([alone.eer, alone.auroc, alone.tar_at(.1), alone.threshold_at(.1)]).all()
    one = verification(torch.randn(4,2), torch.zeros(4).long())
    assert np.isnan([one.tar_at(.1), one.threshold_at(.1)]).all()
    assert np.isnan(verification(torch.randn(4,2), torch.arange(4)).tar_at(.1))

# Unknown inputs

def test_scores_by_loops():
    train,feats = clusters(100),clusters(30, seed=1)[0]
    logits = torch.randn(30,5)
    s = fit_scores(feats, logits, train, k=3)
    means = class_moments(*train).means
    assert torch.allclose(s['max softmax'], logits.double().softmax(1).amax(1))
    for i,x in enumerate(feats.double()):
        assert s['class mean'][i].item() == pytest.approx(-min((x-mu).norm().item() for mu in means))
        cos = sorted((F.cosine_similarity(x, t.double(), dim=0).item() for t in train[0]), reverse=True)
        assert s['neighbours'][i].item() == pytest.approx(cos[2])

def test_unknown_table_against_scikit_learn():
    g = torch.Generator().manual_seed(0)
    a,b = torch.randn(500, generator=g).double()+1.5,torch.randn(300, generator=g).double()
    row = unknown_table(dict(s=a), dict(s=b), 0.9).loc['s']
    assert row.AUROC == roc_auc_score([1]*500+[0]*300, torch.cat([a,b]))
    assert 0.9 <= row['known accepted'] <= 0.903
    assert row['unknown accepted'] == (b >= row.threshold).double().mean().item()
    few = dict(s=torch.tensor([0.,1.]))
    assert unknown_table(few, few, 0.9).loc['s','known accepted'] == 1 # Never fewer than asked for
    with pytest.raises(ValueError, match='accept must be in'): unknown_table(dict(s=a), dict(s=b), 0)

def test_likelihood_of_a_mixture():
    torch.manual_seed(0)
    head = LGMLoss(covariance='diagonal').head(3, 4).eval()
    x = torch.randn(7,3)
    score = fit_scores(x, head(x).detach(), head=head)['likelihood']
    gaussians = [torch.distributions.Normal(m, v.exp().sqrt()) for m,v in zip(head.means, head.log_var)]
    density = torch.stack([g.log_prob(x).sum(1) for g in gaussians], 1) + head.log_prior
    want = torch.logsumexp(density.double(), 1).detach()
    assert torch.allclose(score-score[0], want-want[0], atol=1e-5) # Up to the constant of the normal distribution
    assert 'likelihood' not in fit_scores(x, head(x).detach(), head=LinearHead(3,4))

# evaluate

def model_and_loaders():
    torch.manual_seed(0)
    feats,targ = clusters(300, 6, 5, 0.7)
    model = nn.Sequential(nn.Linear(6,8), nn.ReLU(), LinearHead(8,5))
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        F.cross_entropy(model(feats[:200])['logits'], targ[:200]).backward()
        opt.step()
        opt.zero_grad()
    return model,*(DataLoader(TensorDataset(feats[s], targ[s]), 32) for s in (slice(200), slice(200,300)))

def test_a_plain_model_and_pytorch_loaders():
    model,train,valid = model_and_loaders()
    unseen = DataLoader(TensorDataset(*clusters(40, 6, 3, seed=5)), 16)
    ev = evaluate(model, valid, train=train, unseen=unseen, unknown=[torch.randn(30,6)*3], vocab='abcde')
    feats,logits,targ = get_features(model, valid)
    d = ev.dict()
    assert d['accuracy'] == pytest.approx((logits.argmax(1) == targ).double().mean().item())
    assert ev.recalls.tolist() == pytest.approx(recall_score(targ, logits.argmax(1), average=None).tolist())
    assert d['mean recall'] == pytest.approx(ev.recalls.mean()) and d['lowest recall'] == ev.recalls.min()
    assert d['mAP'] == retrieval(feats, targ)['mAP']
    assert d['unseen classes: recall@1'] == retrieval(*get_features(model, unseen)[::2])['recall@1']
    assert 0.5 < d['unknown inputs, max softmax: AUROC'] <= 1 or d['unknown inputs, neighbours: AUROC'] > 0.5
    assert ev.confusion.to_numpy().sum() == 100 and ev.confusion.to_numpy().trace() == round(100*d['accuracy'])
    wrong = ev.confused(100)
    assert wrong.images.sum() == 100-ev.confusion.to_numpy().trace() and (wrong.true != wrong.predicted).all()
    html = ev._repr_html_()
    assert 'alt=' in html and 'equal error rate' in html

def test_without_training_images():
    model,_,valid = model_and_loaders()
    ev = evaluate(model, valid, unknown=[(torch.randn(30,6),)])
    assert list(ev.unknown.index) == ['max softmax']
    assert 'nearest mean accuracy' not in ev.dict() and ev.unknown.shape == (1,4)
    raw = torch.randn(100,6)
    one, batches = (evaluate(model, valid, unknown=o).unknown for o in (raw, raw.split(30)))
    assert one.equals(batches)
    assert evaluate(model, valid).unknown is None

def test_a_class_without_images():
    logits,targ = torch.eye(4)[[0,1,3,3]],torch.tensor([0,1,3,1])
    ev = Evaluation((torch.randn(4,2), logits, targ))
    assert ev.recalls.isna().tolist() == [False,False,True,False]
    assert ev.dict()['mean recall'] == pytest.approx((1+.5+1)/3)

bad = {
    'no dl': (lambda m,t,v: evaluate(m), TypeError, 'needs dl='),
    'no labels': (lambda m,t,v: evaluate(m, [torch.randn(4,6)]), ValueError, 'dl must give labels'),
    'labels beyond': (lambda m,t,v: evaluate(m, [(torch.randn(4,6), torch.tensor([0,1,2,7]))]), ValueError, r'give images of other classes as unseen'),
    'wrong vocab': (lambda m,t,v: evaluate(m, v, vocab='abc'), ValueError, 'vocab must have 5 names, got 3'),
    'wrong far': (lambda m,t,v: evaluate(m, v, far=2), ValueError, r'far must be in \(0, 1\], got 2'),
    'wrong metric': (lambda m,t,v: evaluate(m, v, metric='l1'), ValueError, "metric must be one of"),
    'too many neighbours': (lambda m,t,v: evaluate(m, v, train=t, neighbors=999).table(), ValueError, 'k must be in 1..200'),
    'NaN': (lambda m,t,v: evaluate(m, [(torch.full((4,6), torch.nan), torch.arange(4))]), ValueError, 'must be finite'),
    'files without transform': (lambda m,t,v: embed(m, [np.zeros((4,4,3), dtype=np.uint8)]), TypeError, 'needs transform='),
    'nothing to embed': (lambda m,t,v: embed(m, []), ValueError, 'at least one image'),
    'no such folder': (lambda m,t,v: embed(m, 'nowhere/here'), FileNotFoundError, 'no file or folder'),
    'no gallery': (lambda m,t,v: nearest(m, torch.randn(2,6)), TypeError, 'needs gallery='),
    'k too large': (lambda m,t,v: nearest(m, torch.randn(2,6), 201, t), ValueError, 'k must be in 1..200'),
}
@pytest.fixture(scope='module')
def plain(): return model_and_loaders()

@pytest.mark.parametrize('name', bad)
def test_bad_input(plain, name):
    f,error,says = bad[name]
    with pytest.raises(error, match=says): f(*plain)

# fastai's loaders, files, folders and images

class Spoil(RandTransform):
    "An augmentation that one cannot overlook, of training images only"
    split_idx = 0
    def encodes(self, x: torch.Tensor): return x*0

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp('photos')
    rng = np.random.default_rng(0)
    for i in range(30):
        f = folder/['red','green','blue'][i%3]/f'{i:02d}.png'
        f.parent.mkdir(exist_ok=True)
        a = rng.integers(0, 60, (10,12,3))
        a[...,i%3] += 150
        Image.fromarray(a.astype(np.uint8)).save(f)
    block = DataBlock((ImageBlock,CategoryBlock), get_items=lambda p: sorted(p.glob('*/*.png')), get_y=lambda f: f.parent.name,
                      item_tfms=Resize(8), batch_tfms=Spoil(p=1.))
    dls = block.dataloaders(folder, bs=4, num_workers=0, device='cpu')
    torch.manual_seed(0)
    body = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3,4))
    body.n_feats = 4
    loss = LGMLoss()
    return Learner(dls, with_head(body, loss, 3), loss_func=loss), folder

def test_a_learner(photos):
    learn,folder = photos
    ev = evaluate(learn, unknown=learn.dls.test_dl([np.zeros((8,8,3), dtype=np.uint8)]*3))
    assert ev.vocab == ['blue','green','red'] and len(ev.targ) == len(learn.dls.valid_ds)
    assert list(ev.unknown.index) == ['max softmax','class mean','neighbours','likelihood']
    feats,targ = ev.train
    assert len(feats) == len(learn.dls.train_ds) and learn.dls.train_ds.split_idx == 0
    # in the order of the set and without augmentation, which makes all images equal
    files = list(learn.dls.train_ds.items)
    assert torch.allclose(feats, embed(learn, files).feats, atol=1e-6) and feats.std(0).max() > 0.01
    assert [learn.dls.vocab[i] for i in targ] == [f.parent.name for f in files]

def test_embed_reads_pictures_upright(tmp_path):
    picture = Image.fromarray(np.arange(6*4*3, dtype=np.uint8).reshape(6,4,3))
    exif = Image.Exif()
    exif[0x0112] = 6 # To be turned by a quarter
    picture.save(tmp_path/'a.png', exif=exif)
    seen = []
    def transform(im): return seen.append(im.size) or torch.zeros(2)
    embed(nn.Linear(2, 3), [tmp_path/'a.png', Image.open(tmp_path/'a.png')], transform)
    assert seen == [(6,4)]*2

def test_embed_takes_what_one_has(photos):
    learn,folder = photos
    files = sorted(folder.glob('*/*.png'))
    want = embed(learn, files)
    assert want.feats.shape == (30,4) and want.targ is None and want.items == files
    assert torch.equal(embed(learn, folder).feats, want.feats)
    assert torch.equal(embed(learn, str(files[0])).feats, want.feats[:1])
    images = [Image.open(f) for f in files[:3]]
    assert torch.allclose(embed(learn, images).feats, want.feats[:3])
    assert torch.allclose(embed(learn, images[0]).feats, want.feats[:1])
    assert torch.allclose(embed(learn, [np.array(o) for o in images]).feats, want.feats[:3])
    labelled = embed(learn, learn.dls.test_dl(files, with_labels=True))
    assert torch.equal(labelled.feats, want.feats) and len(labelled.targ) == 30
    batch = learn.dls.test_dl(files).one_batch()[0]
    assert torch.allclose(embed(learn, batch).feats, want.feats[:len(batch)])
    def transform(im): return torch.tensor(np.array(im.resize((8,8)))).permute(2,0,1)/255
    assert embed(learn.model, folder, transform).feats.shape == (30,4)
    with pytest.raises(TypeError, match='dls.valid'): embed(learn, learn.dls)

def test_nearest(photos):
    learn,folder = photos
    files = list(learn.dls.train_ds.items)
    found = nearest(learn, files[:3], k=2)
    assert found.index[:,0].tolist() == [0,1,2] and found.similarity[:,0].tolist() == pytest.approx([1,1,1])
    assert [row[0] for row in found.names] == [f.parent.name for f in files[:3]]
    assert len(found.plot().axes) == 9 and 'image/png' in found._repr_mimebundle_()[0]
    assert [f for row in nearest(learn, files[:1], 1, gallery=files).names for f in row] == [files[0].stem]
    x = torch.rand(5,3,8,8)
    for query in x, [Image.open(files[0])], learn.dls.valid: nearest(learn, query, 2, gallery=x).plot()
    e = nearest(learn, x, 5, gallery=x, metric='euclidean')
    assert e.index[:,0].tolist() == [0,1,2,3,4] and e.similarity[:,0].tolist() == pytest.approx([0]*5, abs=1e-6)

def test_embeddings_say_what_they_are_in_a_line():
    feats = torch.zeros(1200, 3)
    assert repr(Embeddings(feats, None, ['a.png'])) == 'Embeddings(1,200 images, 3 features, no labels)'
    some = Embeddings(feats, torch.arange(1200) % 7, None)
    assert '7 classes' in repr(some) and some[0] is some.feats and len(some) == 3
    assert pickle.loads(pickle.dumps(some)).items is None
