"What the notebook of `prune` cannot show: families of networks, every head, bad input, a run that is cut off, other processes, ONNX."
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.nn.utils.prune as masks
import torchvision
from fastai.vision.all import ImageDataLoaders, Learner, PILImageBW, Resize, accuracy, aug_transforms, set_seed
from PIL import Image
from torch import Tensor
from torchvision.models import resnet18, resnet50
from torchvision.models.resnet import Bottleneck, ResNet

import discloss.pruning
from discloss.bodies import small_body
from discloss.core import find_head, with_head
from discloss.data import image_dls
from discloss.learner import TrainMetrics, disc_learner
from discloss.losses.center import CenterLoss
from discloss.losses.cross_entropy import CrossEntropy
from discloss.pruning import (Stage, calibration_batches, chain_ends, cost_table, count_ops, find_stages, loss_weights, prune,
                              prune_methods, taylor_importance)
from discloss.specs import all_losses

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
    out = prune(model, 0.4, dls, n_images=128, n_points=3, show=False)
    n = lambda m: sum(p.numel() for p in m.parameters())
    assert n(out) < n(model) and type(find_head(out)) is type(find_head(model))
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
    out = prune(model, {s.producer: s.channels//2 for s in found[:4]}, dls32, method=method, n_images=32, show=False)
    assert out.pruned['after']['multiply_adds'] == count_ops(out, x)['multiply_adds'] < count_ops(model, x)['multiply_adds']
    assert out(x).isfinite().all() and not out.training
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())

def test_bottlenecks(dls32):
    "Both inner convolutions of each bottleneck, with all methods"
    set_seed(0)
    model = ResNet(Bottleneck, [1,1,1,1], num_classes=10, width_per_group=16)
    half = {s.producer: s.channels//2 for s in find_stages(model.eval(), images(dls32)[:2])[:4]}
    outs = [prune(model, half, dls32, method=m, n_images=32, show=False) for m in prune_methods]
    assert len({o.pruned['after']['multiply_adds'] for o in outs}) == 1 and len(outs[0].pruned['stages']) == 4
    assert all(a['error'] <= a['error_removed'] for o in outs[:2] for a in o.pruned['stages'])

def test_disc_learner(dls32):
    learn = quiet(disc_learner(dls32, resnet18, CenterLoss(), pretrained=False))
    stages = find_stages(learn.model, images(dls32)[:2])
    out = prune(learn.model, {s.producer: s.channels//2 for s in stages[:4]}, dls32, method='taylor', n_images=32, show=False)
    assert len(stages) == 8
    again = quiet(Learner(dls32, out, loss_func=CenterLoss(), metrics=accuracy))
    again.fit_one_cycle(1, 1e-3)
    assert np.isfinite(again.validate()[0])

class Cut(Exception): pass

def test_goes_on_where_it_was_cut(dls, tmp_path, monkeypatch):
    model, file, repair = small(), tmp_path/'half.pth', Stage.repair
    kw = dict(n_images=200, n_points=4, show=False)
    whole = prune(model, 0.5, dls, **kw)
    calls = []
    def cut(self, *args):
        calls.append(self)
        if len(calls) == 2: raise Cut
        return repair(self, *args)
    monkeypatch.setattr(Stage, 'repair', cut)
    with pytest.raises(Cut): prune(model, 0.5, dls, checkpoint=file, **kw)
    assert file.exists() and len(calls) == 2
    out = prune(model, 0.5, dls, checkpoint=file, **kw)
    assert len(calls) == 2+2 # three stages, one of which was there
    assert out.pruned == whole.pruned
    assert all(torch.equal(a, b) for a,b in zip(out.state_dict().values(), whole.state_dict().values()))
    prune(model, 0.5, dls, checkpoint=file, **kw)
    assert len(calls) == 4 # all there
    others = dict(ratio=0.4), dict(method='he'), dict(seed=1), dict(model=small(width=4)), dict(dls=image_dls('digits', seed=5))
    for other in others:
        with pytest.raises(ValueError, match='belongs to another model, other data or other arguments'):
            prune(**{**dict(model=model, dls=dls, ratio=0.5, checkpoint=file), **kw, **other})
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match='not a checkpoint that can be read'): prune(model, 0.5, dls, checkpoint=file, **kw)
    with pytest.raises(FileNotFoundError, match='make it first'): prune(model, 0.5, dls, checkpoint=tmp_path/'nowhere'/'a.pth', **kw)

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
    out = prune(small(), 0.5, dls, n_images=200, n_points=4, show=False)
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
    out, x = prune(small(), 0.5, dls, n_images=200, n_points=4, show=False).eval(), images(dls)
    batch = torch.export.Dim('batch')
    torch.onnx.export(out, (x,), str(tmp_path/'small.onnx'), dynamo=True, dynamic_shapes=({0: batch},), input_names=['images'], output_names=['logits'], verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path/'small.onnx'), providers=['CPUExecutionProvider'])
    for x in x, x[:5]:
        got, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad(): assert np.abs(got - out(x).numpy()).max() < 1e-4

def test_compile(dls):
    out, x = prune(small(width=4), 0.5, dls, n_images=200, n_points=4, show=False).eval(), images(dls)
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
    errors = {m: prune(model, {'0': 24}, dls, method=m, reconstruct=True, n_images=800, show=False).pruned['stages'][0]['error'] for m in ('cpli','he','magnitude')}
    assert seen == [(400,32,49)]*2
    assert max(errors['he'], errors['cpli']) < min(.1, 1.5*errors['magnitude'])

# Networks of each family, with random weights: name -> (how many stages, smallest size of images)
torchvision_nets = dict(
    alexnet=(5,96), vgg11_bn=(8,64), resnet18=(8,64), wide_resnet50_2=(32,64), resnext50_32x4d=(16,64), squeezenet1_1=(1,64),
    densenet121=(58,64), googlenet=(20,96), inception_v3=(45,300), mobilenet_v2=(20,64), mobilenet_v3_small=(13,64), mnasnet0_5=(20,64),
    shufflenet_v2_x0_5=(17,64), regnet_x_400mf=(22,64), regnet_y_400mf=(16,64), efficientnet_b0=(19,64), efficientnet_v2_s=(39,64),
    maxvit_t=(12,224))
timm_nets = dict(
    densenet121=(58,64), darknet17=(6,64), cspresnet50=(34,64), inception_v3=(45,96), vovnet39a=(3,64), ese_vovnet19b_dw=(7,64),
    mobilenetv2_050=(20,64), mobilenetv3_small_050=(14,64), tf_efficientnet_b0=(19,64), tf_efficientnetv2_b0=(22,64),
    resnetv2_50=(32,64), resnet10t=(6,64), resnet18d=(10,64), seresnet18=(16,64), resnetblur18=(5,64), ecaresnet26t=(18,64),
    skresnet18=(8,64), dla34=(15,64), hrnet_w18_small=(35,64), ghostnet_050=(9,64), regnetx_002=(13,64), regnety_002=(13,64),
    xception41=(28,64), lcnet_050=(15,64), fbnetc_100=(23,64), mixnet_s=(14,64), selecsls42b=(19,64), gernet_s=(22,64),
    hardcorenas_a=(14,64), tinynet_e=(15,64), rexnet_100=(18,64), halonet26t=(12,256), convnext_atto=(12,64), poolformer_s12=(12,64))
quick = 'mobilenet_v2','resnext50_32x4d','timm densenet121','timm mobilenetv3_small_050','timm regnety_002','timm ese_vovnet19b_dw'
families = {**{k: ('', k, *v) for k,v in torchvision_nets.items()}, **{f'timm {k}': ('timm', k, *v) for k,v in timm_nets.items()}}

def make(lib, name):
    set_seed(0)
    if lib: return pytest.importorskip('timm').create_model(name, num_classes=10)
    more = dict(init_weights=True) if name in ('googlenet','inception_v3') else {}
    return getattr(torchvision.models, name)(num_classes=10, **more)

def settle(model, x):
    "Statistics of these images for batch norms, and no scale near 0, so that activations neither vanish nor grow"
    for m in model.modules():
        if hasattr(m, 'momentum'): m.momentum = None
    for k,p in model.named_parameters():
        if p.ndim < 2 and not k.endswith('bias') or 'scale' in k: nn.init.uniform_(p, 0.5, 1.5)
    with torch.no_grad(): model.train()(x)
    return model.eval()

def logits(model, x):
    with torch.no_grad(): return model.eval()(x)

def check_exact(model, x, stages):
    "Channels that are dead where they are read: the same outputs with them and without them"
    gen = np.random.default_rng(0)
    whole, dead, cut = logits(model, x), deepcopy(model), deepcopy(model)
    for s in stages:
        keep = np.sort(gen.permutation(s.channels)[:(s.channels+1)//2])
        for name in (s.consumer, *(reads for reads,_ in s.gates)):
            w = dead.get_submodule(name).weight.data
            gone = np.setdiff1d(np.arange(s.channels), keep)
            w.view(len(w), s.channels, -1)[:,gone] = 0
        s.shrink(cut, keep)
    want, got = logits(dead, x), logits(cut, x)
    size = want.abs().max()
    assert size > 0 and (got-want).abs().max() < 1e-3*size, (got-want).abs().max()/size
    assert (whole-want).abs().max() > 1e-2*size # There was something to lose
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in model.parameters())
    cut.train()(x) # It trains on

@pytest.mark.parametrize('net', [pytest.param(k, marks=[] if k in quick else pytest.mark.slow) for k in families])
def test_families(net):
    lib, name, n, size = families[net]
    x = torch.randn(2, 3, size, size)
    model = settle(make(lib, name), x)
    stages = find_stages(model, x)
    assert len(stages) == n
    check_exact(model, x, stages)

@pytest.mark.parametrize('name', ['mobilenet_v2','efficientnet_b0'])
def test_half_of_a_mobile_network(dls32, name):
    model = make('', name).eval()
    out = prune(model, 0.5, dls32, method='magnitude', n_images=8, show=False)
    assert 0.47 < out.pruned['after']['multiply_adds']/out.pruned['before']['multiply_adds'] <= 0.5
    assert logits(out, images(dls32)).isfinite().all()

class Frozen(nn.Module): # As in detection networks
    def __init__(self, n):
        super().__init__()
        for k in 'weight','bias','running_mean','running_var': self.register_buffer(k, torch.rand(n)+0.5)
    def forward(self, x):
        scale = self.weight*(self.running_var+1e-5).rsqrt()
        return x*scale[:,None,None] + (self.bias-self.running_mean*scale)[:,None,None]

class Own(nn.BatchNorm2d): # A subclass that still treats channels one by one
    def forward(self, x): return super().forward(x).clamp(-1, 1)

class Mixing(nn.BatchNorm2d): # And one that does not
    def forward(self, x): return super().forward(x)/x.abs().mean(1, keepdim=True).add(1)

class Standardised(nn.Conv2d): # Weights are normalised over the inputs, so inputs cannot go one by one
    def forward(self, x): return self._conv_forward(x, F.normalize(self.weight, dim=(1,2,3)), self.bias)

class Swish(nn.Module):
    def forward(self, x): return x*x.sigmoid()

class Gate(nn.Module):
    def __init__(self, n, own):
        super().__init__()
        self.reads, self.gives, self.own = nn.Conv2d(n, 4, 1), nn.Conv2d(4, n, 1), own
    def forward(self, x):
        s = self.gives(F.relu(self.reads(x.mean((2,3), keepdim=True)))).sigmoid()
        return x*s if self.own else x*s.flip(1)

class Chunks(nn.Module):
    def forward(self, x): return torch.cat(x.chunk(2, 1), 1)

def chain(*layers, n=8, last=None):
    set_seed(0)
    return nn.Sequential(nn.Conv2d(3, n, 3), *layers, last or nn.Conv2d(n, 4, 3), nn.Flatten(), nn.LazyLinear(5))

passes = {
    'frozen norm': lambda: chain(Frozen(8)), 'torchvision frozen norm': lambda: chain(torchvision.ops.FrozenBatchNorm2d(8)),
    'subclass of a norm': lambda: chain(Own(8)), 'instance norm': lambda: chain(nn.InstanceNorm2d(8, affine=True)),
    'activation of its own': lambda: chain(Swish()), 'PReLU': lambda: chain(nn.PReLU(8)), 'one PReLU for all': lambda: chain(nn.PReLU()),
    'depthwise': lambda: chain(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)),
    'two filters a channel': lambda: chain(nn.Conv2d(8, 16, 3, groups=8), last=nn.Conv2d(16, 4, 3)),
    'grouped': lambda: chain(nn.Conv2d(8, 8, 3, groups=4), nn.BatchNorm2d(8)),
    'gate': lambda: chain(Gate(8, True)), 'chunks put together again': lambda: chain(Chunks()), 'softmax over positions': lambda: chain(nn.Flatten(2), nn.Softmax(2), nn.Unflatten(2, (10,10))),
    'unshuffle': lambda: chain(nn.PixelUnshuffle(2), last=nn.Conv2d(32, 4, 3)), 'upsampling': lambda: chain(nn.Upsample(scale_factor=2)),
    'standardised producer': lambda: nn.Sequential(Standardised(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.LazyLinear(5))}
ends = {
    'group norm': (lambda: chain(nn.GroupNorm(2, 8)), 'GroupNorm'), 'norm over channels': (lambda: chain(Mixing(8)), 'Mixing'),
    'softmax over channels': (lambda: chain(nn.Softmax2d()), 'Softmax2d'), 'shuffle': (lambda: chain(nn.ChannelShuffle(2)), 'ChannelShuffle'),
    'gate of others': (lambda: chain(Gate(8, False)), 'mul'),
    'groups that do not fit': (lambda: chain(nn.Conv2d(8, 6, 3, groups=2), nn.Conv2d(6, 6, 3, groups=3), last=nn.Conv2d(6, 4, 3)), '3 groups'),
    'standardised consumer': (lambda: chain(last=Standardised(8, 4, 3)), 'Standardised'),
    'a single channel': (lambda: chain(n=1), 'a single channel')}

def ready(make, x):
    model = make()
    model(x)
    return model.eval()

@pytest.mark.parametrize('case', passes)
def test_passes(case):
    x = torch.randn(2, 3, 12, 12)
    model = ready(passes[case], x)
    stage = find_stages(model, x)[0]
    assert stage.producer == '0' and stage.channels == (4 if case == 'grouped' else 8)
    check_exact(model, x, [stage])

@pytest.mark.parametrize('case', ends)
def test_ends(case):
    make, word = ends[case]
    x = torch.randn(2, 3, 12, 12)
    assert word in chain_ends(ready(make, x), x)['0']

def test_says_where_every_chain_ends():
    x = torch.randn(2, 3, 64, 64)
    with pytest.raises(ValueError, match=r'no channels to prune: those of features.0.0 end at features.0.1 \(LayerNorm2d\)'):
        find_stages(torchvision.models.convnext_tiny(num_classes=10), x)
    assert set(chain_ends(resnet18(), x).values()) >= {'add in layer1.0', 'several layers: layer2.0.conv1 (Conv2d), layer2.0.downsample.0 (Conv2d)'} \
        or 'add in layer1.0' in chain_ends(resnet18(), x).values()

def test_images_that_do_not_fit(dls, dls32):
    "Grey images and an RGB network, one image, images that are too small: one sentence, or no fault"
    rgb = with_head(resnet18(num_classes=10), CenterLoss(), 10)
    with pytest.raises(ValueError, match=r'ResNet does not take images of shape \(1, 8, 8\): its convolution conv1 takes 3 channels, not 1') as e:
        prune(rgb, 0.5, dls, n_images=8)
    assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match='does not take images of shape'): find_stages(make('', 'alexnet'), torch.randn(2, 3, 16, 16))
    assert len(find_stages(rgb, images(dls32)[:1])) == 8
    one = image_dls('digits', bs=1, n_train=60)
    out = prune(small(), 0.5, one, method='taylor', n_images=3, show=False)
    assert out.pruned['after']['multiply_adds'] < out.pruned['before']['multiply_adds']

class Winding(nn.Module): # A forward that depends on values
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
    def forward(self, x): return self.conv(x).mean((2,3)) if x.sum() > 0 else self.conv(-x).mean((2,3))

def masked():
    model = small()
    masks.l1_unstructured(next(m for m in model.modules() if isinstance(m, nn.Conv2d)), 'weight', 0.5)
    return model

def poisoned():
    model = small()
    with torch.no_grad(): next(model.parameters())[0] = np.nan
    return model

first = '0.0.0'
refusals = {
    'ratio of 0': (dict(ratio=0), 'must be between 0 and 1'), 'ratio of 1.5': (dict(ratio=1.5), 'must be between 0 and 1'),
    'ratio out of reach': (dict(ratio=0.995), 'of the multiply-adds can go'), 'no such stage': (dict(ratio={'0.9': 3}), 'there is no stage'),
    'no channel left': (dict(ratio={first: 0}), 'must keep 1 to'), 'too many channels': (dict(ratio={first: 99}), 'must keep 1 to'),
    'half a channel': (dict(ratio={first: 1.5}), 'must keep 1 to'), 'no convolution': (dict(model=nn.Linear(64, 10)), 'no nn.Conv2d'),
    'winding': (dict(model=Winding()), 'torch.fx cannot follow'), 'masked': (dict(model=masked), 'make them plain parameters'),
    'too few images': (dict(n_images=3, n_points=1), 'too few calibration images'), 'too many images': (dict(n_images=9999), 'n_images'),
    'NaN': (dict(model=poisoned), 'finite|NaN|nan'), 'method': (dict(method='random'), 'method must be one of'), 'mu': (dict(mu=0), 'mu must'),
    'clip': (dict(clip=-1), 'clip must'), 'points': (dict(n_points=0), 'n_points must'), 'ridge': (dict(ridge=0), 'ridge must'),
    'not a model': (dict(model=small_body), 'expected a torch.nn.Module or a fastai Learner'), 'dls': (dict(dls=[1]), 'fastai DataLoaders'),
    'no dls': (dict(dls=None), 'a model with dls'), 'classes': (dict(model=lambda: with_head(small_body(), CenterLoss(), 5)), '5|class')}

@pytest.mark.parametrize('case', refusals)
def test_refuses(dls, case):
    kw, says = refusals[case]
    kw = {**dict(model=small, dls=dls, ratio=0.5), **kw}
    if callable(kw['model']) and not isinstance(kw['model'], nn.Module) and kw['model'] is not small_body: kw['model'] = kw['model']()
    state = {k: v.clone() for k,v in kw['model'].state_dict().items()} if isinstance(kw['model'], nn.Module) else {}
    with pytest.raises((TypeError, ValueError), match=says): prune(**kw)
    assert all(torch.equal(v, state[k]) or v.isnan().any() for k,v in (kw['model'].state_dict() if state else {}).items())

def test_learner_for_a_learner(dls, capsys):
    learn = quiet(Learner(dls, small(), loss_func=CenterLoss(), metrics=accuracy, lr=0.02, wd=0.1, cbs=TrainMetrics()))
    learn.fit(1, 1e-2)
    out = prune(learn, 0.5, n_images=200)
    table = capsys.readouterr().out
    assert all(k in table for k in ('parameters','multiply_adds','accuracy','ms','before','after'))
    assert isinstance(out, Learner) and out.loss_func is learn.loss_func and out.dls is dls and (out.lr, out.wd) == (0.02, 0.1)
    assert [type(o) for o in out.cbs] == [type(o) for o in learn.cbs] and all(o.learn is out for o in out.cbs)
    assert all(o.learn is learn for o in learn.cbs)
    quiet(out).fit(1, 1e-3)
    assert len(out.validate()) == 2 and count_ops(out.model, images(dls)) == out.model.pruned['after']

def test_cost_table(dls):
    model = small().eval()
    out = prune(model, 0.5, dls, method='taylor', n_images=50, show=False)
    table = cost_table(dls, before=model.train(), after=out)
    hand = np.mean([(logits(deepcopy(model), x.as_subclass(Tensor)).argmax(1) == y.as_subclass(Tensor)).float().mean() for x,y in dls.valid])
    right = np.concatenate([(logits(deepcopy(model), x.as_subclass(Tensor)).argmax(1) == y.as_subclass(Tensor)).numpy() for x,y in dls.valid])
    assert table.loc['before','accuracy'] == pytest.approx(right.mean()) and model.training
    assert table.loc['after','multiply_adds'] < table.loc['before','multiply_adds'] and (table.ms > 0).all()

def test_keeping_all_changes_nothing(dls):
    model, x = small().eval(), images(dls)
    batches = calibration_batches(dls, 200)
    for method in prune_methods:
        same = deepcopy(model)
        for s in find_stages(model, x):
            seen = s.observe(model, same, batches, 4)
            kept, _, _ = s.select(same, seen, s.channels, method)
            s.shrink(same, kept)
            assert s.repair(same, seen, kept)['error'] < 1e-6
        assert torch.allclose(logits(same, x), logits(model, x), atol=1e-4)

def test_observe(dls):
    "What is seen are the layer's own inputs, outputs and gradients"
    model, x = small().eval(), images(dls)
    stage, following = find_stages(model, x)[:2]
    batches = calibration_batches(dls, 60)
    other = deepcopy(model)
    with torch.no_grad(): other.get_submodule(stage.producer).weight.mul_(0.5)
    seen = stage.observe(model, other, batches, 5, 0, following)
    W, b = stage.weights(model)
    own = stage.observe(model, model, batches, 5)
    fits = torch.einsum('nck,dck->nd', own['X'].double(), W) + b
    assert torch.allclose(fits.float(), own['Y'], atol=1e-4) # Patches and targets are of the same positions
    assert torch.equal(own['Y'], seen['Y']) and not torch.allclose(own['X'], seen['X']) # Y of the original, X of what is pruned
    xs, ys = (torch.cat(o) for o in zip(*batches))
    losses = F.cross_entropy(logits(other, xs), ys, reduction='none')
    assert torch.allclose(seen['loss'], losses, atol=1e-5)
    for s,k in (stage, 'own'), (following, 'next'): # Taylor's importance, by hand
        def off(m, args): return args[0]*mask.expand_as(args[0]),
        mask = torch.ones(1, s.channels, 1, 1, requires_grad=True)
        rows = []
        for i in range(4):
            hook = s.layer(other).register_forward_pre_hook(off)
            other.eval()
            g, = torch.autograd.grad(F.cross_entropy(other(xs[i:i+1]), ys[i:i+1]), mask)
            hook.remove()
            rows.append(g.flatten().abs())
        got, want = seen[k][:4], torch.stack(rows)
        assert torch.allclose(got/got.max(), want/want.max(), atol=1e-4)

@pytest.mark.parametrize('mode', ['zeros','reflect'])
def test_patches(mode):
    "Strides, dilation, padding and oblong kernels"
    from discloss.pruning import _patches, _positions, _rows
    conv = nn.Conv2d(4, 3, (3,2), stride=(2,1), padding=(1,2), dilation=(1,2), padding_mode=mode)
    x, gen = torch.randn(2, 4, 9, 7), torch.Generator().manual_seed(0)
    out = conv(x)
    pos = _positions(out, 6, gen)
    assert pos.shape == (2, 6) and all(len(set(p.tolist())) == 6 for p in pos)
    X = _patches(conv, x, pos, out.shape[-1], 4)
    want = torch.einsum('nck,dck->nd', X, conv.weight.flatten(2)) + conv.bias
    assert torch.allclose(_rows(out, pos), want, atol=1e-5)

def test_repair_beats_heuristics(dls):
    "What is missing is less after the least squares, by a lot, and no choice of channels makes up for it"
    learn = quiet(Learner(dls, small(width=16), loss_func=CenterLoss()))
    learn.fit_one_cycle(4, 1e-2)
    outs = {m: prune(learn.model, 0.5, dls, method=m, n_images=300, n_points=6, show=False) for m in prune_methods}
    accs = cost_table(dls, **outs).accuracy
    assert accs[['cpli','he']].min() > accs[['taylor','magnitude']].max()
    for m in 'cpli','he':
        for s in outs[m].pruned['stages']: assert s['error'] < 0.7*s['error_removed']

def test_ties_of_the_loss_weights():
    "In closed form"
    g = torch.tensor([[3., 0.], [0., -1.]])
    size = (10/4)**.5
    want = torch.tensor([[0.5+1.5, 0.5], [0.5, 0.5+1/size]])
    assert torch.allclose(loss_weights(g, 0.5, 1.5), want)
    acts = torch.arange(8.).reshape(1, 2, 4)
    assert torch.allclose(taylor_importance(acts, -torch.ones(1, 2, 4)), torch.tensor([[1.5, 5.5]]))

@pytest.mark.parametrize('bias', [False, True])
def test_the_repair_is_in_the_network(bias):
    "What the next layer sees is as near to the original as `repair` says, constants included"
    set_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=bias), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(96, 4))
    batches = [(torch.rand(64, 1, 8, 8)+1, torch.randint(0, 4, (64,)))]
    x = batches[0][0]
    for _ in range(30): model.train()(x)
    model.eval()
    stage = find_stages(model, x)[0]
    seen = stage.observe(model, model, batches, 16) # All positions
    small = deepcopy(model)
    stage.shrink(small, [0,1,2,3])
    told = stage.repair(small, seen, [0,1,2,3])
    with torch.no_grad(): want, got = model[:4](x), small[:4](x)
    scale = (model[3].weight/(model[3].running_var+model[3].eps).sqrt())[:,None,None]
    Y = want/scale
    error = ((got-want)/scale).square().sum()/(Y-Y.mean((0,2,3), keepdim=True)).square().sum()
    assert error.item() == pytest.approx(told['error'], rel=1e-3) and told['error'] < told['error_removed']/2

def test_importance_keeps_the_largest():
    from discloss.pruning import _stays_next
    seen = dict(next=torch.tensor([[1., 5., 2., 9.], [1., 3., 2., 7.]]), g=torch.zeros(6, 8))
    following = Stage('c', (), 'd', None, 4)
    assert _stays_next(seen, following, {'c': 2}).tolist() == [0, 0, 1, 1, 0, 0, 1, 1] # Two outputs a channel

def test_options_of_cpli_do_something(dls):
    model, kw = small(), dict(n_images=200, n_points=4, show=False)
    states = [prune(model, 0.5, dls, **o, **kw).state_dict() for o in ({}, dict(by_loss=False), dict(by_importance=False), dict(method='he'), dict(ridge=1.))]
    for i,a in enumerate(states):
        for b in states[:i]: assert any(a[k].shape != b[k].shape or not torch.allclose(a[k], b[k], atol=1e-4) for k in a)

def test_modes_stay(dls):
    model = small()
    model.train()
    model[0][0].eval()
    before = [m.training for m in model.modules()]
    out = prune(model, 0.5, dls, method='taylor', n_images=50, show=False)
    assert [m.training for m in out.modules()] == [m.training for m in model.modules()] == before

class Twice(nn.Module): # One convolution, used twice
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 3), nn.LazyLinear(5)
    def forward(self, x): return self.fc(self.b(self.a(self.a(x))).flatten(1))

class Auxiliary(nn.Module): # A second reader, in training only
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3), nn.Conv2d(6, 4, 3), nn.LazyLinear(5)
    def forward(self, x):
        x = self.a(x)
        out = self.fc(self.b(x).flatten(1))
        return (out, self.c(x).mean()) if self.training else out

class Branches(nn.Module): # The batch norm is not all that reads the consumer
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4), nn.LazyLinear(5)
    def forward(self, x):
        x = self.b(self.a(x))
        return self.fc((self.norm(x)+x).flatten(1))

def test_more_than_one_use():
    x = torch.randn(2, 3, 12, 12)
    assert [s.producer for s in find_stages(ready(Twice, x), x)] == ['b']
    assert 'in training' in chain_ends(ready(Auxiliary, x), x)['a']
    assert find_stages(ready(Branches, x), x)[0].norm is None

def test_equal_channels_are_folded(dls):
    model = small().eval()
    stage = find_stages(model, images(dls))[0]
    with torch.no_grad():
        for name in (stage.producer, *stage.between):
            for t in model.get_submodule(name).state_dict().values():
                if t.ndim: t[1] = t[0]
    out = prune(model, {stage.producer: stage.channels-1}, dls, n_images=200, show=False)
    assert out.pruned['stages'][0]['error_removed'] < 1e-8

def test_scores_of_the_heuristics(dls):
    "Magnitude: sums of absolute weights, as by hand"
    model = small().eval()
    stage = find_stages(model, images(dls))[1]
    seen = stage.observe(model, model, calibration_batches(dls, 60))
    w = model.get_submodule(stage.producer).weight
    kept, score, lam = stage.select(model, seen, 3, 'magnitude')
    hand = torch.stack([f.abs().sum() for f in w])
    assert torch.allclose(score, hand) and kept == sorted(hand.argsort(descending=True)[:3].tolist()) and lam is None
    kept, score, _ = stage.select(model, seen, 3, 'taylor')
    assert torch.allclose(score, seen['own'].mean(0)) and kept == sorted(score.argsort(descending=True)[:3].tolist())

def test_calibration_is_what_validation_sees(tmp_path):
    gen = np.random.default_rng(0)
    for i in range(24):
        (tmp_path/str(i%2)).mkdir(exist_ok=True)
        Image.fromarray(gen.integers(0, 255, (12,12), dtype=np.uint8)).save(tmp_path/str(i%2)/f'{i}.png')
    dls = ImageDataLoaders.from_folder(tmp_path, valid_pct=0.3, seed=0, img_cls=PILImageBW, item_tfms=Resize(8),
                                       batch_tfms=aug_transforms(size=8, max_rotate=45, p_affine=1.), bs=4, num_workers=0)
    n = len(dls.train_ds)
    got = torch.cat([x for x,_ in calibration_batches(dls, n)]).flatten(1)
    want = torch.cat([b[0].as_subclass(Tensor) for b in dls.test_dl(list(dls.train_ds.items))]).flatten(1)
    def in_order(t): return t[np.lexsort(t.T.numpy())]
    assert torch.allclose(in_order(got), in_order(want), atol=1e-5)

def test_gates_shrink_with_their_channels(dls32):
    "The layers inside a gate are no stages of their own: they follow"
    model = make('', 'mobilenet_v3_small').eval()
    stages = find_stages(model, images(dls32)[:2])
    inner = {gives for s in stages for _,gives in s.gates}
    assert len(inner) == 9 and not inner & {s.consumer for s in stages}
    out = prune(model, {s.producer: s.channels//2 for s in stages if s.gates}, dls32, method='magnitude', n_images=8, show=False)
    for s in stages:
        for reads,gives in s.gates:
            assert out.get_submodule(reads).in_channels == out.get_submodule(gives).out_channels == s.channels//2
