"What the notebook of `prune` cannot show: every head, torchvision's networks, a run that is cut off, other processes, ONNX and torch.compile."
import numpy as np
import pytest
import torch
import torch.nn as nn
from fastai.vision.all import ImageDataLoaders, Learner, PILImageBW, Resize, accuracy, aug_transforms, set_seed
from PIL import Image
from torch import Tensor
from torchvision.models import resnet18, resnet50
from torchvision.models.resnet import Bottleneck, ResNet

import discloss.pruning
from discloss.bodies import small_body
from discloss.specs import all_losses
from discloss.core import disc_learner, find_head, with_head
from discloss.data import image_dls
from discloss.losses.center import CenterLoss
from discloss.losses.cross_entropy import CrossEntropy
from discloss.pruning import calibration_batches, count_ops, find_stages, prune, prune_methods

@pytest.fixture(scope='module')
def dls(): return image_dls('digits')

@pytest.fixture(scope='module')
def dls32(): return image_dls('digits', size=32, channels=3, n_train=300, bs=32)

def images(dls): return dls.valid.one_batch()[0].as_subclass(Tensor)

def small(loss=None, width=8):
    set_seed(0)
    return with_head(small_body(width=width), loss or CenterLoss(), 10)

def quiet(learn):
    learn.no_bar().__enter__()
    learn.logger = lambda *a: None
    return learn

@pytest.mark.parametrize('name', all_losses())
def test_every_head(dls, name):
    "Pruned in the middle of training, a network of any loss trains on"
    loss = all_losses()[name]()
    model = small(loss)
    out = prune(model, dls, 0.4, n_images=128, n_points=3, show=False)
    n = lambda m: sum(p.numel() for p in m.parameters())
    assert n(out) < n(model) and type(find_head(out)[1]) is type(find_head(model)[1])
    x, y = (o.as_subclass(Tensor) for o in dls.valid.one_batch())
    value = loss(out.train()(x), y)
    value.backward()
    assert value.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in out.parameters())
    assert out.eval()(x).shape == (len(x), 10)

@pytest.mark.parametrize('arch,stages,method', [(resnet18, 8, 'cpli'), (resnet50, 32, 'he')])
def test_torchvision(dls32, arch, stages, method):
    set_seed(0)
    model = with_head(arch(num_classes=10), CenterLoss(), 10).eval()
    before = {k: v.clone() for k,v in model.state_dict().items()}
    x = images(dls32)[:4]
    found = find_stages(model, x)
    assert len(found) == stages
    out = prune(model, dls32, {s.producer: s.channels//2 for s in found[:4]}, method=method, n_images=32, show=False)
    assert out.pruned['after']['multiply_adds'] == count_ops(out, x)['multiply_adds'] < count_ops(model, x)['multiply_adds']
    assert out(x).isfinite().all() and not out.training
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())

def test_bottlenecks(dls32):
    "Both inner convolutions of each bottleneck, with all methods"
    set_seed(0)
    model = ResNet(Bottleneck, [1,1,1,1], num_classes=10, width_per_group=16)
    half = {s.producer: s.channels//2 for s in find_stages(model.eval(), images(dls32)[:2])[:4]}
    outs = [prune(model, dls32, half, method=m, n_images=32, show=False) for m in prune_methods]
    assert len({o.pruned['after']['multiply_adds'] for o in outs}) == 1 and len(outs[0].pruned['stages']) == 4
    assert all(a['error'] <= a['error_removed'] for o in outs[:2] for a in o.pruned['stages'])

def test_disc_learner(dls32):
    learn = quiet(disc_learner(dls32, resnet18, CenterLoss(), pretrained=False))
    stages = find_stages(learn.model, images(dls32)[:2])
    out = prune(learn.model, dls32, {s.producer: s.channels//2 for s in stages[:4]}, method='taylor', n_images=32, show=False)
    assert len(stages) == 8
    again = quiet(Learner(dls32, out, loss_func=CenterLoss(), metrics=accuracy))
    again.fit_one_cycle(1, 1e-3)
    assert np.isfinite(again.validate()[0])

class Cut(Exception): pass

def test_goes_on_where_it_was_cut(dls, tmp_path, monkeypatch):
    model, file, stage = small(), tmp_path/'half.pth', discloss.pruning._prune_stage
    kw = dict(n_images=200, n_points=4, show=False)
    whole = prune(model, dls, 0.5, **kw)
    calls = []
    def cut(*a):
        calls.append(a[1])
        if len(calls) == 2: raise Cut
        return stage(*a)
    monkeypatch.setattr(discloss.pruning, '_prune_stage', cut)
    with pytest.raises(Cut): prune(model, dls, 0.5, checkpoint=file, **kw)
    assert file.exists() and len(calls) == 2
    out = prune(model, dls, 0.5, checkpoint=file, **kw)
    assert len(calls) == 2+2 # three stages, one of which was there
    assert out.pruned == whole.pruned and all(torch.equal(a, b) for a,b in zip(out.state_dict().values(), whole.state_dict().values()))
    prune(model, dls, 0.5, checkpoint=file, **kw)
    assert len(calls) == 4 # all there
    for other in (dict(ratio=0.4), dict(method='he'), dict(seed=1), dict(model=small(width=4)), dict(dls=image_dls('digits', seed=5))):
        with pytest.raises(ValueError, match='belongs to another model, other data or other arguments'):
            prune(**{**dict(model=model, dls=dls, ratio=0.5, checkpoint=file), **kw, **other})
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match='not a checkpoint that can be read'): prune(model, dls, 0.5, checkpoint=file, **kw)
    with pytest.raises(FileNotFoundError, match='make it first'): prune(model, dls, 0.5, checkpoint=tmp_path/'nowhere'/'a.pth', **kw)

def test_calibration_is_without_chance(tmp_path):
    "Random augmentation is off, and the choice of images depends on the seed alone, for loaders of any kind"
    gen = np.random.default_rng(0)
    for i in range(24):
        (tmp_path/str(i%2)).mkdir(exist_ok=True)
        Image.fromarray(gen.integers(0, 255, (12,12), dtype=np.uint8)).save(tmp_path/str(i%2)/f'{i}.png')
    dls = ImageDataLoaders.from_folder(tmp_path, valid_pct=0.3, seed=0, img_cls=PILImageBW, item_tfms=Resize(8), batch_tfms=aug_transforms(size=8), bs=4, num_workers=0)
    def batches(state, **kw):
        set_seed(state); dls.train.one_batch()
        return torch.cat([x for x,_ in calibration_batches(dls, 10, **kw)])
    assert torch.equal(batches(1), batches(2)) and batches(1).shape == (10,1,8,8)
    assert not torch.equal(batches(1), batches(1, seed=7))
    set_seed(3); a = torch.rand(3); set_seed(3); calibration_batches(dls, 10); assert torch.equal(a, torch.rand(3))

def test_learner_export(dls, tmp_path, run):
    out = prune(small(), dls, 0.5, n_images=200, n_points=4, show=False)
    learn = quiet(Learner(dls, out, loss_func=CenterLoss(), metrics=accuracy, path=tmp_path))
    learn.fit_one_cycle(1, 3e-3)
    probs = learn.get_preds()[0]
    learn.export('learn.pkl')
    np.save(tmp_path/'x.npy', dls.valid_ds.x.numpy())
    np.save(tmp_path/'p.npy', probs.numpy())
    run("""
import numpy as np, torch
from fastai.learner import load_learner
learn = load_learner('learn.pkl')
with learn.no_bar(): got = learn.get_preds(dl=learn.dls.test_dl(list(torch.from_numpy(np.load('x.npy')))))[0].numpy()
assert np.abs(got-np.load('p.npy')).max() < 1e-5
assert learn.model.pruned['after']['multiply_adds'] < learn.model.pruned['before']['multiply_adds']
""")

def test_onnx(dls, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime'); pytest.importorskip('onnxscript')
    out, x = prune(small(), dls, 0.5, n_images=200, n_points=4, show=False).eval(), images(dls)
    batch = torch.export.Dim('batch')
    torch.onnx.export(out, (x,), str(tmp_path/'small.onnx'), dynamo=True, dynamic_shapes=({0: batch},), input_names=['images'], output_names=['logits'], verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path/'small.onnx'), providers=['CPUExecutionProvider'])
    for x in x, x[:5]:
        got, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad(): assert np.abs(got - out(x).numpy()).max() < 1e-4

def test_compile(dls):
    out, x = prune(small(width=4), dls, 0.5, n_images=200, n_points=4, show=False).eval(), images(dls)
    with torch.no_grad(): assert torch.allclose(torch.compile(out)(x), out(x), atol=1e-5)

def test_wide_linear_layer(dls, monkeypatch):
    "A linear layer after flattened maps, as in torchvision's VGG: groups of features for each channel, as many samples for the LASSO as it needs, and no matrix of all features"
    gen, problem, seen = torch.Generator().manual_seed(0), discloss.pruning.lasso_problem, []
    X, R, A = (torch.randn(*s, generator=gen).double() for s in ((40,3000), (40,6), (40,6)))
    A2 = (1+A.abs())**2/((1+A.abs())**2).mean(0)
    for X in X, 1+1e-6*X: # Any, and nearly all the same
        V, lam = discloss.pruning.least_squares(X, R, 1+A.abs(), ridge=1e-2), 1e-2*X.square().mean()
        exact = torch.stack([X.T@torch.linalg.solve(X@X.T/40 + lam*torch.diag(1/a), r)/40 for a,r in zip(A2.T, R.T)], 1)
        assert torch.allclose(V, exact, rtol=1e-4, atol=1e-5*exact.abs().max())
    set_seed(0)
    model = with_head(nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(32*49, 2048), nn.ReLU(), nn.Linear(2048, 10)), CenterLoss(), 10)
    def watched(X, *args):
        seen.append(tuple(X.shape))
        return problem(X, *args)
    monkeypatch.setattr(discloss.pruning, 'lasso_problem', watched)
    errors = {m: prune(model, dls, {'0': 24}, method=m, reconstruct=True, n_images=800, show=False).pruned['stages'][0]['error'] for m in ('cpli','he','magnitude')}
    assert seen == [(400,32,49)]*2
    assert max(errors['he'], errors['cpli']) < min(.1, 1.5*errors['magnitude'])
