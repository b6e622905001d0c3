"Geometry: the formulas against other libraries, special cases, and features of any loader"
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.vision.all import Callback, CategoryBlock, DataBlock, Datasets, ImageBlock, Learner, Resize, load_learner
from PIL import Image
from sklearn.metrics import calinski_harabasz_score
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import multiclass_calibration_error

from discloss.core import find_head, with_head
from discloss.geometry import (Geometry, GeometryCallback, calibration_error, class_moments, geometry_measures, get_features,
                               head_weight, knn_accuracy, ncm_accuracy, nearest_mean, reliability)
from discloss.heads import LinearHead
from discloss.losses.center import CenterLoss

def clusters(n=120, d=5, K=4, seed=0):
    torch.manual_seed(seed)
    targ = torch.arange(n) % K
    return torch.randn(n,d) + 2*torch.randn(K,d)[targ], targ

def simplex(K, d):
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(d,K, dtype=torch.float64))[0]
    return (torch.eye(K, dtype=torch.float64)-1/K) @ basis.T * math.sqrt(K/(K-1))

# Moments and ratios

def test_moments_by_hand():
    m = class_moments(torch.tensor([[0.,0.],[2.,0.],[5.,5.],[5.,7.],[9.,9.]]), torch.tensor([0,0,2,2,3]), n_out=5)
    assert m.n.tolist() == [2,0,2,1,0]
    assert m.var[[0,2,3]].tolist() == [1,1,0] and m.var[[1,4]].isnan().all()
    assert m.means[0].tolist() == [1,0] and m.means[3].tolist() == [9,9]

@pytest.mark.parametrize('spread,dtype', [(0.1,torch.float32), (1e-4,torch.float64), (1e-6,torch.float64)])
def test_variance_of_a_small_class_far_away(spread, dtype):
    torch.manual_seed(0)
    x = (1e4 + spread*torch.randn(500,8, dtype=torch.float64)).to(dtype)
    truth = float(x.numpy().astype(np.longdouble).var(0).sum())
    assert abs(class_moments(x, torch.zeros(500).long()).var.item()/truth - 1) < 1e-6

def test_moments_in_chunks_are_those_of_the_whole():
    # more values than a chunk holds: 2**22 / 4096 columns is 1,024 rows
    torch.manual_seed(0)
    x,y = torch.randn(1500,4096), torch.arange(1500) % 3
    m = class_moments(x, y)
    for j in range(3):
        own = x[y==j].double()
        assert torch.allclose(m.means[j], own.mean(0), atol=1e-12)
        assert m.var[j].item() == pytest.approx((own-own.mean(0)).square().sum(1).mean().item(), rel=1e-10)

def test_ratio_is_calinski_harabasz():
    feats,targ = clusters(200)
    K,n = 4,200
    score = calinski_harabasz_score(feats.double(), targ)
    assert Geometry(feats, targ).variance_ratio == pytest.approx((n-K)/(2*K)/score, rel=1e-9)

def test_ratio_by_hand():
    x,y = torch.tensor([[0.,1.],[0.,-1.],[10.,1.],[10.,-1.]]), torch.tensor([0,0,1,1])
    g = Geometry(x, y)
    assert (g.intra, g.inter, g.variance_ratio) == (1, 100, 0.01)
    assert Geometry(x, y*3).variance_ratio == 0.01 # Classes 1 and 2 do not occur
    assert Geometry(x, torch.tensor([0,1,1,0])).variance_ratio == math.inf # Equal means

def test_classes_count_the_same_however_many_samples():
    x,y = torch.tensor([[0.,1.],[0.,-1.],[10.,2.],[10.,-2.]]), torch.tensor([0,0,1,1])
    more = torch.cat([x, x[:2], x[:2]]), torch.cat([y, y[:2], y[:2]])
    for k in 'intra','inter','variance_ratio','nc1','nc2_norm','nc2_angle':
        assert getattr(Geometry(*more), k) == pytest.approx(getattr(Geometry(x, y), k), abs=1e-12), k
    assert Geometry(x, y).intra == 2.5

# Neural collapse

@pytest.mark.parametrize('d', [2,3,10])
def test_nc1_is_the_trace_with_the_pseudo_inverse(d):
    feats,targ = clusters(120, d)
    g = Geometry(feats, targ)
    x = feats.double()
    Sw = sum(torch.outer(a-g.means[j], a-g.means[j]) for a,j in zip(x, targ))/120
    Sb = g.centered.T @ g.centered/4
    assert g.nc1 == pytest.approx((torch.trace(Sw @ torch.linalg.pinv(Sb, hermitian=True))/4).item(), rel=1e-9)

def test_nc1_leaves_out_directions_without_means():
    torch.manual_seed(0)
    targ = torch.arange(1000) % 10
    plane = torch.linalg.qr(torch.randn(32,2))[0].T # Two dimensions inside of 32
    feats = (torch.randn(1000,2) + 5*torch.randn(10,2)[targ]) @ plane
    assert Geometry(feats, targ).nc1 == pytest.approx(Geometry(feats @ plane.T, targ).nc1, rel=1e-6)

def test_simplex_and_square():
    y = torch.arange(4)
    for x in simplex(4,6), 7*simplex(4,6)+100:
        g = Geometry(x, y)
        assert g.nc2_norm < 1e-7 and g.nc2_angle < 1e-7 and g.cos_margin == pytest.approx(4/3, rel=1e-9)
    square = Geometry(torch.tensor([[1.,1.],[-1.,1.],[-1.,-1.],[1.,-1.]]), y)
    assert square.nc2_angle == pytest.approx(4/9) and square.nc2_norm == 0

def test_nc2_norm_is_the_coefficient_of_variation():
    # centered means -4, -1, 5 on a line
    g = Geometry(torch.tensor([[0.,0.],[3.,0.],[9.,0.]]), torch.arange(3))
    assert g.nc2_norm == pytest.approx(np.std([4,1,5], ddof=1)/np.mean([4,1,5]))

def test_nc3():
    etf,y = simplex(4,6), torch.arange(4)
    def nc3(weight, shift=0): return Geometry(etf+shift, y, weight=weight).nc3
    assert nc3(3*etf, 5) == pytest.approx(0, abs=1e-12)
    assert nc3(-etf) == pytest.approx(4)
    assert nc3(etf[[1,2,3,0]]) == pytest.approx(2+2/3)
    assert nc3(etf+1) > 0.1 # The same classifier, another weight
    assert math.isnan(nc3(None)) and math.isnan(nc3(etf[:3])) and math.isnan(nc3(torch.randn(4,5)))

def test_nc3_of_classes_that_occur():
    etf = simplex(4,6)
    some = torch.tensor([0,2,3])
    weight = etf[some] - etf[some].mean(0)
    wide = torch.randn(4,6, dtype=torch.float64)
    wide[some] = weight
    logits = torch.zeros(3,4)
    assert Geometry(etf[some], some, logits, wide).nc3 == pytest.approx(0, abs=1e-12)
    assert math.isnan(Geometry(etf[some], some, logits, torch.cat([wide, wide])).nc3) # Another number of classes

def test_nc4_and_nearest_mean():
    feats,targ = clusters(300, 6)
    means = class_moments(feats, targ).means
    dists = torch.stack([(x-means).square().sum(1) for x in feats.double()])
    assert nearest_mean(feats, means).tolist() == dists.argmin(1).tolist()
    assert Geometry(feats, targ, -dists).nc4 == 0 and Geometry(feats, targ, dists).nc4 == 1

def test_nearest_mean_never_chooses_an_absent_class():
    means = torch.tensor([[math.nan]*2, [5.,5.], [9.,9.]])
    assert nearest_mean(torch.zeros(3,2), means).tolist() == [1,1,1]

def test_cosine_margins_by_loops():
    feats,targ = clusters(60)
    g = Geometry(feats, targ)
    for center,origin in ((True, g.means.mean(0)), (False, torch.zeros(5))):
        def margin(x, j):
            cos = [F.cosine_similarity(x-origin, mu-origin, dim=0) for mu in g.means]
            return (cos[j] - max(c for k,c in enumerate(cos) if k != j)).item()
        want = [margin(x, j) for x,j in zip(feats.double(), targ)]
        assert g.cosine_margins(center).tolist() == pytest.approx(want, abs=1e-9)
    assert torch.allclose(Geometry(feats, 2*targ+1).cosine_margins(), g.cosine_margins())

# Classifiers and calibration, against scikit-learn and torchmetrics

def test_simple_classifiers():
    feats,targ = clusters(400)
    (a,b),(ya,yb) = feats.split(200), targ.split(200)
    assert ncm_accuracy(a, ya, b, yb) == pytest.approx(NearestCentroid().fit(a.double(), ya).score(b.double(), yb))
    for metric in 'euclidean','cosine':
        assert knn_accuracy(a, ya, b, yb, 3, metric) == pytest.approx(KNeighborsClassifier(3, metric=metric).fit(a, ya).score(b, yb))
    with pytest.raises(ValueError, match=r'k must be in 1..200'): knn_accuracy(a, ya, b, yb, 201)

def test_calibration_by_hand():
    sure,right = torch.tensor([[0.9,0.1]]*4), torch.tensor([0,0,0,1])
    r = reliability(sure, right, n_bins=4)
    assert r.n.tolist() == [0,0,0,4] and r.acc[3] == 0.75 and r.acc[:3].isnan().all()
    assert calibration_error(sure, right) == pytest.approx(0.15)
    with pytest.raises(ValueError, match='give softmax'): calibration_error(sure*5, right)

def test_bins_are_closed_on_the_left():
    # confidences that lie on edges: 0.5, 0.75 and 1 in four bins
    probs = torch.tensor([[0.5,0.5],[0.75,0.25],[1.,0.]], dtype=torch.float64)
    assert reliability(probs, torch.tensor([0,0,0]), n_bins=4).n.tolist() == [0,0,1,2]

@pytest.mark.parametrize('bins', [5,15,40])
def test_calibration_against_torchmetrics(bins):
    torch.manual_seed(0)
    logits,targ = 2*torch.randn(2000,10, dtype=torch.float64), torch.randint(0, 10, (2000,))
    probs = logits.softmax(1)
    want = multiclass_calibration_error(probs, targ, 10, n_bins=bins, norm='l1').item()
    assert calibration_error(probs, targ, bins) == pytest.approx(want, abs=1e-6)
    if bins == 15: assert Geometry(torch.randn(2000,2), targ, logits).ece == calibration_error(probs, targ)

# The object

def test_names_and_nans():
    feats,targ = clusters()
    logits,weight = torch.randn(120,4), torch.randn(4,5)
    def nans(g): return [k for k,v in g.dict().items() if math.isnan(v)]
    assert nans(Geometry(feats, targ, logits, weight)) == []
    assert nans(Geometry(feats, targ)) == ['nc3','nc4','ece']
    assert set(geometry_measures)-set(nans(Geometry(feats, targ*0, logits, weight))) == {'intra','nc4','ece'} # One class
    assert list(Geometry(feats, targ).dict()) == list(geometry_measures)
    assert all(type(v) is float for v in Geometry(feats, targ, logits, weight).dict().values())
    assert list(Geometry(feats, targ).table().index) == list(geometry_measures)

def test_measures_are_computed_once(monkeypatch):
    import discloss.geometry as module
    calls,moments = [],module.class_moments
    monkeypatch.setattr(module, 'class_moments', lambda *a: calls.append(1) or moments(*a))
    g = module.Geometry(*clusters(), torch.randn(120,4), torch.randn(4,5))
    first = g.dict()
    g.feats = None # Nothing is computed a second time
    assert g.dict() == first and len(calls) == 1

def test_bad_input():
    feats,targ = clusters()
    bad = feats.clone()
    bad[-1,-1] = math.nan # The last column, the last row
    with pytest.raises(ValueError, match='feats must be finite'): Geometry(bad, targ)
    with pytest.raises(ValueError, match='logits must be finite'): Geometry(feats, targ, bad)
    with pytest.raises(ValueError, match=r'shape \(120,\)'): Geometry(feats, targ[:-1])
    with pytest.raises(TypeError, match='floating point'): Geometry(feats.long(), targ)
    with pytest.raises(ValueError, match=r'in 0..3 \(4 classes\), got 6'): Geometry(feats, targ*2, torch.randn(120,4))

# Features of any model and loader

x,y = torch.randn(10,8, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 3

def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8,6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), LinearHead(6,3))

class Named(nn.Module):
    "A model whose arguments have names, as those of Hugging Face, and whose output has logits"
    def __init__(self):
        super().__init__()
        self.body,self.head = nn.Linear(8,6),LinearHead(6,3)
    def forward(self, pixel_values, labels=None): return dict(logits=self.head(self.body(pixel_values)))

loaders = {
    'pairs': [(x[:7],y[:7]), (x[7:],y[7:])],
    'lists': [[x,y]],
    'a PyTorch loader': DataLoader(TensorDataset(x, y), 4),
    'a PyTorch loader without labels': DataLoader(TensorDataset(x), 4),
    'tuples of one': [(x[:7],), (x[7:],)],
    'bare tensors': [x[:7],x[7:]],
    'a dict of one': [dict(image=x, label=y)],
    'a dict of one without labels': [dict(image=x)],
}

@pytest.mark.parametrize('name', loaders)
def test_loaders(name):
    model = small_model()
    feats,logits,targ = get_features(model, loaders[name])
    model.eval()
    assert torch.allclose(feats, model[:4](x)) and torch.allclose(logits, model(x))
    assert targ is None if 'without' in name or name in ('tuples of one','bare tensors') else targ.tolist() == y.tolist()

def test_named_inputs():
    model = Named()
    for batch in dict(pixel_values=x, labels=y), dict(pixel_values=x, label=y, idx=y), dict(pixel_values=x):
        feats,logits,targ = get_features(model, [batch])
        assert torch.allclose(feats, model.body(x))
        assert (targ is None) == (len(batch) == 1)

def test_two_inputs():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.head = LinearHead(8,3)
        def forward(self, a, b): return self.head(a+b)
    assert torch.allclose(get_features(Two(), [(x,x,y)])[0], 2*x)

def test_the_model_is_left_as_it_was():
    model = small_model()
    model[1].eval() # A frozen batch norm, as in transfer learning
    before = {k: v.clone() for k,v in model.state_dict().items()}
    def same(): return model.training and model[3].training and not model[1].training and not model[4]._forward_pre_hooks
    get_features(model, loaders['pairs'])
    assert same()
    with pytest.raises(RuntimeError): get_features(model, [(x,y), (x[:,:5],y)])
    assert same() and all(torch.equal(v, before[k]) for k,v in model.state_dict().items())

def test_layers_maps_and_tokens():
    model = small_model()
    for head in '0', model[0]: assert torch.equal(get_features(model, [(x,y)], head=head)[0], x)
    class Maps(LinearHead):
        def forward(self, maps): return super().forward(maps.mean((2,3)))
    class Tokens(LinearHead):
        def forward(self, tokens): return super().forward(tokens.mean(1))
    maps,tokens = torch.randn(4,6,5,5), torch.randn(4,7,6)
    assert torch.allclose(get_features(Maps(6,3), [(maps,y[:4])])[0], maps.mean((2,3)), atol=1e-6)
    assert torch.allclose(get_features(Tokens(6,3), [(tokens,y[:4])])[0], tokens.mean(1), atol=1e-6)

def test_float64_stays_float64():
    feats,logits,_ = get_features(small_model().double(), [x.double()])
    assert feats.dtype == logits.dtype == torch.float64

def pictures(folder, n=12):
    for i in range(n):
        f = folder/('ab'[i%2])/f'{i}.png'
        f.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(np.full((8,8,3), 10*i, dtype=np.uint8)).save(f)
    return sorted(folder.glob('*/*.png'))

def test_fastai_loaders(tmp_path):
    files = pictures(tmp_path)
    block = DataBlock((ImageBlock,CategoryBlock), get_items=lambda p: files, get_y=lambda f: f.parent.name, item_tfms=Resize(8))
    dls = block.dataloaders(tmp_path, bs=4, num_workers=0, device='cpu')
    model = nn.Sequential(nn.Flatten(), nn.Linear(192,2))
    for dl in dls.valid, dls.test_dl(files, with_labels=True):
        feats,_,targ = get_features(model, dl)
        assert len(feats) == len(targ) == len(dl.dataset) and type(targ) is torch.Tensor
    feats,logits,targ = get_features(model, dls.test_dl(files))
    assert feats.shape == (12,192) and targ is None
    learn = Learner(dls, model)
    assert torch.equal(get_features(learn, dls.test_dl(files))[0], feats)
    with pytest.raises(TypeError, match='dls.valid'): get_features(model, dls)
    with pytest.raises(TypeError, match='embed takes files'): get_features(model, [files])

bad_loaders = {
    'nothing': ([], ValueError, 'gave no batch'),
    'words': ([(x,['a']*10)], TypeError, 'labels must be a tensor'),
    'a number': ([3], TypeError, 'a batch must be tensors'),
    'other names': ([dict(a=x, b=x)], ValueError, "the batch has none of them"),
}
@pytest.mark.parametrize('name', bad_loaders)
def test_bad_loaders(name):
    dl,error,says = bad_loaders[name]
    with pytest.raises(error, match=says): get_features(small_model(), dl)

def test_bad_models():
    with pytest.raises(TypeError, match='must be an nn.Module or a Learner'): get_features(3, [x])
    model = small_model()
    with pytest.raises(ValueError, match='did not use its layer'): get_features(model, [x], head=nn.Linear(2,2))
    with pytest.raises(ValueError, match='no labels'): Geometry.from_model(model, [x])

def test_head_weight():
    assert head_weight(nn.Linear(6,4)).shape == head_weight(LinearHead(6,4)).shape == (4,6)
    assert head_weight(nn.Flatten()) is None

# The callback

def learner(tmp_path=None, cbs=None):
    tfms = [[x.__getitem__],[y.__getitem__]]
    dls = Datasets(list(range(10)), tfms, splits=[range(10)]*2).dataloaders(bs=5, num_workers=0, device='cpu')
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(8,6), nn.ReLU())
    body.n_feats = 6
    loss = CenterLoss()
    learn = Learner(dls, with_head(body, loss, 3), loss_func=loss, cbs=cbs, path=tmp_path)
    learn.remove_cbs([o for o in learn.cbs if type(o).__name__ == 'ProgressCallback'])
    learn.logger = lambda *_: None
    return learn

def test_callback_measures_what_get_features_gives():
    learn = learner(cbs=GeometryCallback())
    learn.fit(2)
    want = Geometry.from_model(learn, learn.dls.valid).dict()
    for k,v in want.items(): assert learn.geometry.records[-1][k] == pytest.approx(v, rel=1e-4, abs=1e-6), k
    assert list(learn.recorder.values[-1][-2:]) == pytest.approx([want['variance_ratio'], want['nc1']], rel=1e-4)
    assert not learn.metrics and not find_head(learn.model)._forward_pre_hooks

def test_callback_stays_out_of_the_way(tmp_path):
    learn = learner(tmp_path, GeometryCallback())
    learn.fit(1)
    records = list(learn.geometry.records)
    res = learn.validate()
    preds,_ = learn.get_preds()
    learn.lr_find(num_it=20, show_plot=False)
    assert learn.geometry.records == records and len(res) == 3
    learn.export('m.pkl')
    loaded = load_learner(tmp_path/'m.pkl')
    assert loaded.geometry.records == records

def test_trackers_see_the_columns():
    learn = learner(cbs=GeometryCallback(show='nc4'))
    learn.fit(5, 0., cbs=EarlyStoppingCallback('nc4', comp=np.less, min_delta=0.5))
    assert len(learn.geometry.records) < 5
    with pytest.raises(ValueError, match='nc5'): GeometryCallback(show=['nc1','nc5'])

def test_an_interrupted_fit_leaves_nothing():
    class Stop(Callback):
        def after_pred(self):
            if not self.training: raise KeyboardInterrupt
    learn = learner(cbs=GeometryCallback())
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Stop())
    learn.fit(1)
    learn.fit(1)
    assert not learn.metrics and [r['epoch'] for r in learn.geometry.records] == [0,1]

@pytest.mark.parametrize('where', ['the last logit','the last feature'])
def test_divergence_gives_nan(where):
    learn = learner(cbs=GeometryCallback())
    learn.fit(1)
    layer = find_head(learn.model).fc if where == 'the last logit' else learn.model[0][0]
    with torch.no_grad(): layer.weight[-1,-1] = math.nan
    learn.validate()
    assert all(math.isnan(v) for v in learn.geometry.last.values()) and len(learn.geometry.last) == len(geometry_measures)
