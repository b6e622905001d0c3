"A catalogue of bad inputs: each gives one clear error of a documented type, before any training time is lost, and leaves models and files as they were."
import json, math, os, resource, runpy, sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from fastai.vision.all import DataBlock, DataLoaders, Learner
from PIL import Image
from test_matrix import loaders, silent, state, tiny

from discloss.bodies import small_body
from discloss.callbacks import PODSchedule
from discloss.compare import compare
from discloss.comparison import save_outputs
from discloss.contract import check_loss
from discloss.core import DiscLoss, with_head
from discloss.data import ImageTensors, class_balanced, folder_items, image_dls, labels_of, load_arrays, to_pixels
from discloss.geometry import Geometry, GeometryCallback, get_features
from discloss.learner import disc_learner
from discloss.losses.cc import CCLoss
from discloss.losses.center import CenterLoss, center_loss
from discloss.losses.cosface import CosFaceLoss
from discloss.losses.cross_entropy import CrossEntropy
from discloss.losses.gsoftmax import gsoftmax_loss
from discloss.losses.ldmat import LDMATLoss
from discloss.losses.pedcc import PEDCCLoss, simplex
from discloss.losses.pod import PODLoss
from discloss.losses.sigma2r import Sigma2RLoss
from discloss.losses.so_softmax import SOSoftmaxLoss
from discloss.pruning import _save
from discloss.specs import all_losses, parse_entries, parse_losses
from discloss.store import append_result, read_results, write_whole
from discloss.tune import tune

def refusal(f, *says, error=(TypeError, ValueError)):
    "The message of the error that `f` must raise: one sentence or two, with all of `says` in it"
    with pytest.raises(error) as e: f()
    text = str(e.value).split(':\n\t')[-1] # What fastai puts before the errors of callbacks does not count
    assert 20 < len(text) < 1000 and '\n' not in text.strip(), text
    for o in says: assert str(o) in text, f'{o!r} is not in: {text}'
    return text

def tree(folder): return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(Path(folder).rglob('*'))}

# ---- what comes into a loss: tried with every loss

n_in, n_out, n = 12, 5, 20

class Made:
    "A loss with its head and a good batch"
    def __init__(self, loss):
        torch.manual_seed(0)
        self.loss, self.head, self.x, self.y = loss, loss.head(n_in, n_out).train(), torch.randn(n, n_in), torch.arange(n) % n_out
    @property
    def out(self): return self.head(self.x)
    @property
    def logits(self): return self.out['logits']
    def with_logits(self, f): return {**self.out, 'logits': f(self.logits)}

def needs(loss): return {k for k,required in loss._loss_takes.items() if required}

batches = { # Name -> (what the loss gets, what the message says)
    'label too large':            (lambda m: (m.out, m.y+1), (f'in 0..{n_out-1}', 'got 5')),
    'label negative':             (lambda m: (m.out, m.y-1), (f'in 0..{n_out-1}', 'got -1')),
    'ignore_index -100':          (lambda m: (m.out, torch.where(m.y == 0, -100, m.y)), ('got -100',)),
    'targets of shape (n, 1)':    (lambda m: (m.out, m.y[:,None]), ('shape', '(20, 1)')),
    'targets without dimension':  (lambda m: (m.out, m.y[0]), ('shape', 'got ()')),
    'too few targets':            (lambda m: (m.out, m.y[:-1]), ('19 targets', '(20, 5)')),
    'too many targets':           (lambda m: (m.out, torch.cat([m.y, m.y])), ('40 targets', '(20, 5)')),
    'float targets':              (lambda m: (m.out, m.y.float()), ('integer dtype', 'torch.float32')),
    'bool targets':               (lambda m: (m.out, m.y > 2), ('integer dtype', 'torch.bool')),
    'complex targets':            (lambda m: (m.out, m.y + 0j), ('integer dtype', 'complex')),
    'one-hot targets':            (lambda m: (m.out, F.one_hot(m.y)), ('(20, 5)',)),
    'soft targets':               (lambda m: (m.out, F.one_hot(m.y)*0.9 + 0.02), ('MixUp', 'several labels', 'CrossEntropy(label_smoothing=0.1)')),
    'targets are a list':         (lambda m: (m.out, m.y.tolist()), ('tensor of class indices', 'list')),
    'targets are an array':       (lambda m: (m.out, m.y.numpy()), ('tensor of class indices', 'ndarray')),
    'targets are None':           (lambda m: (m.out, None), ('tensor of class indices', 'NoneType')),
    'targets on another device':  (lambda m: (m.out, m.y.to('meta')), ('one device', 'cpu and meta')),
    'NaN logits':                 (lambda m: (m.with_logits(lambda o: o*math.nan), m.y), ('logits must be finite', '100 of 100')),
    'one infinite logit':         (lambda m: (m.with_logits(lambda o: o.masked_fill(F.one_hot(torch.zeros(n, dtype=torch.long), n_out).bool() & (torch.arange(n) == 3)[:,None], math.inf)), m.y), ('finite', '1 of 100')),
    'logits of integers':         (lambda m: (m.with_logits(torch.Tensor.long), m.y), ('floating point', 'torch.int64')),
    'complex logits':             (lambda m: (m.with_logits(lambda o: o + 0j), m.y), ('floating point', 'complex')),
    'logits of one image':        (lambda m: (m.with_logits(lambda o: o[0]), m.y), ('shape (20, classes)', '(5,)')),
    'logits for each pixel':      (lambda m: (m.with_logits(lambda o: o[:,:,None,None].expand(-1,-1,4,4)), m.y), ('shape (20, classes)', '(20, 5, 4, 4)')),
    'logits of one class':        (lambda m: (m.with_logits(lambda o: o[:,:1]), m.y*0), ('two at least', '(20, 1)')),
    'empty batch':                (lambda m: (m.head(m.x[:0]), m.y[:0]), ('batch is empty',)),
    'predictions are None':       (lambda m: (None, m.y), ('logits', 'NoneType')),
    'predictions are an empty tuple': (lambda m: ((), m.y), ('logits', 'tuple')),
    'two outputs':                (lambda m: ((m.logits, m.logits), m.y), ('tuple of 2 outputs', 'auxiliary')),
    'a dict without what is needed': (lambda m: (dict(pixels=m.x), m.y), ('with_head', "'pixels'")),
    'predictions are an array':   (lambda m: (m.logits.detach().numpy(), m.y), ('logits', 'ndarray')),
    'NaN features':               (lambda m: (m.head(m.x*math.nan), m.y), ('finite',)),
    'bare logits in training':    (lambda m: (m.logits, m.y), ('with_head', "the model gave 'logits'")),
}

@pytest.mark.parametrize('case', batches)
def test_batch(case, record_property):
    make, says = batches[case]
    tried = 0
    for name, cls in all_losses().items():
        m = Made(cls())
        if case == 'bare logits in training' and needs(m.loss) <= {'logits'}: continue
        before = state(m.head)
        try: said = refusal(lambda: m.loss(*make(m)), *says)
        except BaseException as e: raise AssertionError(f'{name}: {e}') from e
        assert all(torch.equal(v, before[k]) for k,v in m.head.state_dict().items()), f'{name}: the head has changed'
        m.loss(m.head(m.x), m.y) # And goes on as if nothing had been
        tried += 1
    assert tried
    record_property('bad', (case, said))

def test_head_of_another_loss(record_property):
    "All pairs of losses whose heads give other things"
    made, said, tried = {k: Made(cls()) for k,cls in all_losses().items()}, None, 0
    for a,ma in made.items():
        for b,mb in made.items():
            if needs(ma.loss) <= set(mb.out): continue
            before = state(mb.head)
            try: said = refusal(lambda: ma.loss(mb.head(mb.x), mb.y), type(ma.loss).__name__, 'with_head')
            except BaseException as e: raise AssertionError(f'{a} with the head of {b}: {e}') from e
            assert all(torch.equal(v, before[k]) for k,v in mb.head.state_dict().items()), f'{a} changed the head of {b}'
            tried += 1
    assert tried >= 40
    record_property('bad', ('head of another loss', said))

def test_reduction(record_property):
    for cls in all_losses().values():
        said = refusal(lambda: cls(reduction='avg'), "('mean', 'sum', 'none')", "'avg'")
        m = Made(cls())
        m.loss.reduction = 'avg'
        refusal(lambda: m.loss(m.head(m.x), m.y), "('mean', 'sum', 'none')", "'avg'")
    record_property('bad', ('unknown reduction', said))

@pytest.mark.parametrize('value', [math.inf, math.nan], ids=str)
def test_hyper_parameter_not_finite(value, record_property):
    "Each float of each loss: refused when the loss is made, or at the first batch"
    said = None
    for cls in all_losses().values():
        for k,v in cls().hparams.items():
            if isinstance(v, float): said = refusal(lambda: (m := Made(cls(**{k: value}))).loss(m.head(m.x), m.y), k)
    record_property('bad', (f'a hyper-parameter of {value}', said))

hparams = { # Name -> (the call, what the message says)
    'negative weight':      (lambda: CenterLoss(lam=-1), ('lam', 'at least 0', '-1')),
    'weight of NaN':        (lambda: CenterLoss(lam=math.nan), ('lam', 'at least 0', 'nan')),
    'alpha of 2':           (lambda: CenterLoss(alpha=2), ('alpha', '[0, 1]', '2')),
    'negative scale':       (lambda: CosFaceLoss(scale=-30.), ('scale', 'above 0', '-30')),
    'scale of zero':        (lambda: PEDCCLoss(scale=0), ('scale', 'above 0', '0')),
    'width as a float':     (lambda: PEDCCLoss(embed=64.), ('embed', 'whole number', '64.0')),
    'undeclared':           (lambda: CenterLoss().set_hparams(gamma=1), ('lam, alpha', 'gamma')),
    'negative margin':      (lambda: PEDCCLoss(margin=-0.1), ('margin', 'at least 0', '-0.1')),
    'root below one':       (lambda: PEDCCLoss(root=0.5), ('root', 'at least 1', '0.5')),
    'unknown shift':        (lambda: Sigma2RLoss(shift='rel'), ('shift', "'relative', 'absolute'", "'rel'")),
    'negative slope':       (lambda: Sigma2RLoss(slope=-1), ('slope', 'at least 0', '-1')),
    'distance of zero':     (lambda: LDMATLoss(delta=0), ('delta', 'above 0', '0')),
    'slack of one':         (lambda: LDMATLoss(slack=1), ('slack', '[0, 1)', '1')),
    'momentum of zero':     (lambda: LDMATLoss(momentum=0), ('momentum', '(0, 1]', '0')),
    'unknown mode':         (lambda: CCLoss(mode='diff'), ('mode', "'difference'", "'diff'")),
    'unknown corr_reduction': (lambda: PODLoss(corr_reduction='avg'), ('corr_reduction', "'dim'", "'avg'")),
    'goals the wrong way':  (lambda: SOSoftmaxLoss(goals=(0.,1.)), ('goal', 'greater', '(0.0, 1.0)')),
    'goals not a pair':     (lambda: SOSoftmaxLoss(goals=(1.,)), ('goals', 'pair', '(1.0,)')),
    'label_smoothing of 2': (lambda: CrossEntropy(label_smoothing=2), ('label_smoothing', '[0, 1]', '2')),
    'centers of another width': (lambda: center_loss(torch.randn(4,3), torch.arange(4), torch.zeros(4,2)), ('centers', '(classes, 3)', '(4, 2)')),
    'scaled logits as cosines': (lambda: gsoftmax_loss(30*torch.eye(4), torch.arange(4)), ('cosine', '[-1, 1]', '30')),
    'too few dimensions for a simplex': (lambda: simplex(10, 3), ('10 points', '3 dimensions', '9')),
    'one point':            (lambda: simplex(1, 3), ('at least 2 points', '1 points')),
}

# ---- models

plain = nn.Sequential(nn.Conv2d(1,4,3), nn.Flatten(), nn.Linear(144,10))
models = {
    'loss class for an instance':     (lambda: with_head(plain, CenterLoss, 10), ('CenterLoss()', 'class')),
    'loss of PyTorch':                (lambda: with_head(plain, nn.CrossEntropyLoss(), 10), ('DiscLoss', 'CrossEntropyLoss')),
    'model without a Linear layer':   (lambda: with_head(nn.Conv2d(1,4,3), CenterLoss(), 10), ('nn.Linear', 'n_feats')),
    'unknown layer':                  (lambda: with_head(plain, CenterLoss(), 10, layer='fc'), ("'fc'", "'2'")),
    'a layer that is no classifier':  (lambda: with_head(plain, CenterLoss(), 10, layer='0'), ("'0'", 'Conv2d')),
    'a single class':                 (lambda: with_head(plain, CenterLoss(), 1), ('2 classes', '1 classes')),
    'no class':                       (lambda: with_head(plain, CenterLoss(), 0), ('2 classes', '0 classes')),
    'number of classes not whole':    (lambda: with_head(plain, CenterLoss(), 2.5), ('whole number', '2.5')),
    'number of classes as text':      (lambda: with_head(plain, CenterLoss(), '10'), ('whole number', "'10'")),
    'model that is none':             (lambda: with_head('resnet18', CenterLoss(), 10), ('model', 'str')),
    'too few features for the head':  (lambda: with_head(small_body(n_feats=4), PEDCCLoss(), 10), ('10 points', '4 dimensions', 'n_feats=9')),
    'check_loss of a class':          (lambda: check_loss(CenterLoss), ('DiscLoss', 'CenterLoss')),
    'more classes in the data than in the model': (lambda: fit(n_out=5), ('in 0..4',)),
    'name of a loss for a learner':   (lambda: disc_learner(loaders(), tiny, 'center', pretrained=False, n_in=1), ('DiscLoss', "'center'")),
    'batch larger than the data':     (lambda: disc_learner(loaders(n=12, bs=16), tiny, CenterLoss(), pretrained=False, n_in=1), ('12 samples', '16')),
    'images of NaN':                  (lambda: fit(images=math.nan), ('finite', 'input images')),
    'PODSchedule without its head':   (lambda: fit(cbs=PODSchedule()), ('PODHead', 'CenterHead')),
    'unknown measure':                (lambda: GeometryCallback(show='nc9'), ('nc9', 'nc1')),
    'features of no batch':           (lambda: get_features(plain, []), ('no batch',)),
    'features without labels to match': (lambda: Geometry(torch.randn(4,3), torch.arange(3)), ('shape (4,)', '(3,)')),
    'class_balanced that does not fit': (lambda: class_balanced(loaders().train, per_class=3), ('divide the batch size', '3', '16')),
}

def fit(n_out=10, images=0., cbs=None):
    "Train a learner on bad things: it must stop in the first batch, its weights as they were"
    learn = silent(Learner(loaders(), with_head(small_body(width=8, n_feats=16), CenterLoss(), n_out), loss_func=CenterLoss(), cbs=cbs))
    if images: learn.model.register_forward_pre_hook(lambda m,args: (args[0]*images,))
    before, steps = {k: v.clone() for k,v in learn.model.named_parameters()}, []
    try: learn.fit(1)
    except (TypeError, ValueError):
        assert not learn.recorder.losses
        assert all(torch.equal(v, before[k]) for k,v in learn.model.named_parameters())
        raise

# ---- data

def data(tmp, name, **arrays):
    good, _ = load_arrays('digits')
    np.savez(tmp/f'{name}.npz', **{**{k: v[:60] for k,v in good.items()}, **arrays})
    return name

def image_folder(tmp, **kinds):
    for name,files in kinds.items():
        (tmp/'folder'/name).mkdir(parents=True)
        for i in range(files): Image.fromarray(np.full((8,8), 20*i, np.uint8)).save(tmp/'folder'/name/f'{i}.png')
    return tmp/'folder'

def torn(file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    return file

def damaged(tmp):
    folder = image_folder(tmp, a=5, b=5)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64,64), np.uint8)).save(folder/'b'/'9.png')
    torn(folder/'b'/'9.png', 900)
    return folder

def text_as_image(tmp):
    folder = image_folder(tmp, a=5, b=5)
    (folder/'b'/'9.png').write_text('not an image')
    return folder

def strange_class(tmp):
    folder = image_folder(tmp, **{'train/a': 5, 'train/b': 5, 'valid/c': 2})
    return folder

def flat_images(tmp):
    folder = image_folder(tmp, a=5, b=5)
    for f in folder.rglob('*.png'): Image.fromarray(np.full((8,8), 255, np.uint8)).save(f)
    return folder

def digits(**kwargs): return image_dls('digits', **kwargs)

sets = { # Name -> (call with a folder, what the message says)
    'unknown data set':           (lambda t: image_dls('cifra10', root=t), ("'cifra10'", "'cifar10'")),
    'half-written data':          (lambda t: load_arrays(torn(t/f"{data(t,'x')}.npz", 800).stem, t), ('x.npz', 'whole copy')),
    'data that are no archive':   (lambda t: ((t/'x.npz').write_bytes(os.urandom(500)), load_arrays('x', t)), ('x.npz', 'whole copy')),
    'empty data file':            (lambda t: ((t/'x.npz').write_bytes(b''), load_arrays('x', t)), ('x.npz', 'whole copy')),
    'an array is missing':        (lambda t: (np.savez(t/'x.npz', x_train=np.zeros(3)), load_arrays('x', t)), ('x.npz', 'y_train')),
    'pickled objects in data':    (lambda t: load_arrays(data(t, 'x', y_train=np.array([{}]*60, dtype=object)), t), ('x.npz', 'allow_pickle')),
    'pixels of floats':           (lambda t: load_arrays(data(t, 'x', x_train=np.zeros((60,8,8))), t), ('uint8', 'float64')),
    'images with four channels':  (lambda t: load_arrays(data(t, 'x', x_train=np.zeros((60,8,8,4), np.uint8)), t), ('1 or 3', '(60, 8, 8, 4)')),
    'flat images':                (lambda t: load_arrays(data(t, 'x', x_train=np.zeros((60,64), np.uint8)), t), ('height, width', '(60, 64)')),
    'empty data set':             (lambda t: load_arrays(data(t, 'x', x_train=np.zeros((0,8,8), np.uint8), y_train=np.zeros(0, int)), t), ('none of them 0', '(0, 8, 8)')),
    'fewer labels than images':   (lambda t: load_arrays(data(t, 'x', y_train=np.zeros(7, int)), t), ('60 class indices', '(7,)')),
    'labels of floats':           (lambda t: load_arrays(data(t, 'x', y_train=np.zeros(60)), t), ('class indices', 'float64')),
    'negative labels in data':    (lambda t: load_arrays(data(t, 'x', y_train=np.arange(60)-3), t), ('labels', '-3')),
    'a label of a billion':       (lambda t: load_arrays(data(t, 'x', y_test=np.full(60, 10**9)), t), ('120 images', '1000000000')),
    'labels beyond CIFAR-10':     (lambda t: load_arrays(data(t, 'cifar10', y_train=np.full(60, 12)), t), ('10 classes', '12')),
    'a folder of one class':      (lambda t: image_dls(image_folder(t, a=3)), ('two or more', "['a']")),
    'a folder without images':    (lambda t: image_dls(image_folder(t, a=0, b=0)), ('no images',)),
    'one class with images':      (lambda t: image_dls(image_folder(t, a=3, b=0)), ('two or more', "['a']")),
    'a class of one image':       (lambda t: image_dls(image_folder(t, a=9, b=1), bs=2), ('test set', 'b (1)', 'at least 3')),
    'other classes to validate on': (lambda t: image_dls(strange_class(t)), ('valid', "['c']")),
    'a half-written image':       (lambda t: image_dls(damaged(t), bs=2), ('9.png', 'damaged', 'skip_bad')),
    'text with the name of an image': (lambda t: image_dls(text_as_image(t), bs=2), ('9.png', 'not an image')),
    'splits one level too high':  (lambda t: image_dls(image_folder(t, **{'x/a': 3, 'x/b': 3, 'y/a': 3, 'y/b': 3})), ('look like splits', 'splits=dict(')),
    'two validation sets':        (lambda t: image_dls(image_folder(t, **{'train/a': 3, 'train/b': 3, 'val/a': 3, 'valid/a': 3})), ("['val', 'valid']",)),
    'training images without classes': (lambda t: image_dls(image_folder(t, train=3, test=3)), ('no folder for each class',)),
    'an archive of images':       (lambda t: ((t/'x.zip').write_bytes(b'PK'), image_dls(t/'x.zip')), ('x.zip', 'unpack')),
    'images of one colour':       (lambda t: image_dls(flat_images(t), bs=2, size=8), ('255 everywhere', 'stats=')),
    'images too large for memory': (lambda t: image_dls(image_folder(t, a=3, b=3), size=100_000), ('GB', 'smaller size')),
    'batch size of zero':         (lambda t: digits(bs=0), ('bs', 'at least 1', '0')),
    'batch size of 2.5':          (lambda t: digits(bs=2.5), ('bs', 'whole number', '2.5')),
    'batch size above the data':  (lambda t: digits(bs=5000), ('5000', '1149')),
    'no training images':         (lambda t: digits(n_train=0), ('n_train', 'at least 1', '0')),
    'fewer images than classes':  (lambda t: digits(n_train=5), ('n_train', 'at least 10', 'got 5')),
    'nearly all images':          (lambda t: digits(n_train=1145), ('n_train', 'at most 1,139', '1,149 for all', 'got 1,145')),
    'a number as data':           (lambda t: image_dls(3), ('data', 'folder of images', 'int')),
    'arrays as data':             (lambda t: image_dls(np.zeros((8,8))), ('data', 'folder of images', 'ndarray')),
    'nothing as data':            (lambda t: load_arrays(None), ('data', '.npz file', 'NoneType')),
    'a number as folder':         (lambda t: folder_items(3), ('path', 'a folder', 'int')),
    'all images to validate on':  (lambda t: digits(valid_pct=1.), ('valid_pct', 'between 0 and 1', '1.0')),
    'two channels':               (lambda t: digits(channels=2), ('1 or 3', '2')),
    'size of zero':               (lambda t: digits(size=0), ('size', 'at least 1', '0')),
    'negative shift':             (lambda t: digits(pad=-1), ('pad', 'at least 0', '-1')),
    'unknown device':             (lambda t: digits(device='tpu9'), ('device', 'tpu9')),
    'a GPU that is not there':    (lambda t: digits(device='cuda:99'), ('device', 'cuda:99')),
    'predictions for no image':   (lambda t: digits().test_dl([]), ('at least one image',)),
    'label that is no class':     (lambda t: digits().test_dl([(np.zeros((8,8), np.uint8), 'ten')], with_labels=True), ('0..9', 'got ten', "vocab='own'")),
    'label out of range':         (lambda t: digits().test_dl([(np.zeros((8,8), np.uint8), 10)], with_labels=True), ('0..9', 'got 10')),
    'several labels an image':    (lambda t: digits().test_dl([(np.zeros((8,8), np.uint8), [1,2])], with_labels=True), ('one label', '[1, 2]')),
    'images without labels as labelled': (lambda t: digits().test_dl([np.zeros((8,8), np.uint8)], with_labels=True), ('pairs', 'ndarray')),
    'soft labels in data':        (lambda t: ImageTensors(torch.zeros(4,1,8,8).byte(), torch.rand(4,3), list('abc')), ('MixUp', '(4, 3)')),
    'labels of an unlabelled set': (lambda t: labels_of(digits().test_dl([np.zeros((8,8), np.uint8)])), ('no labels',)),
    'image of floats':            (lambda t: to_pixels(np.zeros((8,8))), ('uint8', 'float64')),
    'image of no pixels':         (lambda t: to_pixels(np.zeros((0,8), np.uint8)), ('uint8', '(0, 8)')),
    'channels as text':           (lambda t: to_pixels(np.zeros((8,8), np.uint8), channels='1'), ('1 or 3', "'1'")),
    'image that is a number':     (lambda t: to_pixels(3), ('path', 'int')),
}

# ---- comparisons

quick = dict(epochs=1, seeds=1, show=False)
comparisons = {
    'unknown loss':                  (lambda t: compare('centre'), ("'centre'", "did you mean 'center'")),
    'no loss':                       (lambda t: compare(''), ('no loss', 'center')),
    'unreadable losses':             (lambda t: compare('center(lam='), ('center(lam=', 'cannot read')),
    'losses with a null byte':       (lambda t: compare('center\0'), ('cannot read',)),
    'losses nested too deeply':      (lambda t: compare('('*5000), ('cannot read',)),
    'unknown hyper-parameter':       (lambda t: compare('center(scale=1)'), ("'scale'", 'lam, alpha')),
    "a paper's letter":              (lambda t: compare('center(lambda=1)'), ('lambda', 'is lam here')),
    'a value without a name':        (lambda t: compare('center(0.1)'), ('0.1', 'name=value')),
    'hyper-parameter of a wrong type': (lambda t: compare('center(lam=high)'), ('lam', 'high')),
    'a call as a hyper-parameter':   (lambda t: compare('center(lam=print(1))'), ('plain value', 'print(1)')),
    'an infinite hyper-parameter':   (lambda t: compare('crossentropy,center(lam=1e999)', **quick), ('lam', 'inf')),
    'two losses for a label':        (lambda t: compare(dict(a='center(lam=[0.1,0.2])')), ('names 2 losses', 'one is wanted')),
    'a typo in a dict of losses':    (lambda t: compare(dict(a='centre')), ("unknown loss 'centre'", "'center'")),
    'a class among the losses':      (lambda t: compare([CenterLoss]), ('instances of DiscLoss', 'CenterLoss')),
    'a loss of PyTorch to compare':  (lambda t: compare(dict(ce=nn.CrossEntropyLoss()), **quick), ('DiscLoss', 'CrossEntropyLoss')),
    'no epochs':                     (lambda t: compare(epochs=0), ('epochs', 'at least 1', '0')),
    'half an epoch':                 (lambda t: compare(epochs=0.5), ('epochs', 'at least 1', '0.5')),
    'no seeds':                      (lambda t: compare(seeds=0), ('seeds', 'at least 1', 'got 0')),
    'half a seed':                   (lambda t: compare(seeds=3.5), ('seeds must be a whole number, or a list', '3.5')),
    'no number of seeds':            (lambda t: compare(seeds=None), ('seeds must be a whole number, or a list', 'None')),
    'a seed twice':                  (lambda t: compare(seeds=[1,1]), ('seeds', 'different', '[1, 1]')),
    'images too small for a network': (lambda t: compare(arch='lenetpp', size=4, **quick), ('crossentropy: lenetpp', '(1, 4, 4)', 'channels first')),
    'a seed as number of seeds':     (lambda t: compare(seeds=20_261_126), ('seeds', 'at most 10,000', 'a list', '20,261,126')),
    'a negative seed':               (lambda t: compare(seeds=[0,-1]), ('seed', '-1')),
    'learning rate of NaN':          (lambda t: compare(lr=math.nan), ('lr', 'positive', 'nan')),
    'learning rate of infinity':     (lambda t: compare(lr=math.inf), ('lr', 'positive', 'inf')),
    'a learning rate in words':      (lambda t: compare(lr='fast'), ('lr', "'fast'")),
    'an array of bad rates':         (lambda t: compare(lr=np.array([.1,-1.])), ('lr', 'positive', '-1.0')),
    'a learning rate twice':         (lambda t: compare(lr=[.1,.1]), ('lr', 'different')),
    'negative weight decay':         (lambda t: compare(wd=-1.), ('wd', 'at least 0', '-1')),
    'no features':                   (lambda t: compare(n_feats=0), ('n_feats', 'at least 1', '0')),
    'no batch':                      (lambda t: compare(bs=0), ('bs', 'at least 1', '0')),
    'unknown body':                  (lambda t: compare(arch='resnet99'), ("'resnet99'", 'resnet9')),
    'data that are a number':        (lambda t: compare(data=3), ('data', 'DataLoaders', 'int')),
    'a data block to compare':       (lambda t: compare('center', DataBlock()), ('.dataloaders(source)',)),
    'a data block to tune':          (lambda t: tune('center', DataBlock()), ('.dataloaders(source)',)),
    'data before losses':            (lambda t: compare(loaders(), 'center'), ('first the losses, then the data', 'Loaders')),
    'a data block before losses':    (lambda t: compare(DataBlock(), 'center'), ('first the losses, then the data', 'DataBlock')),
    'a folder before losses':        (lambda t: compare(t, 'center'), ('first the losses, then the data',)),
    'a name of data before losses':  (lambda t: compare('digits', 'center'), ('first the losses, then the data', "'digits'")),
    'data before the loss to tune':  (lambda t: tune(loaders(), 'center'), ('first the loss, then the data', 'Loaders')),
    'a size for loaders':            (lambda t: compare(data=loaders(), size=3), ('size', 'DataLoaders')),
    'trained weights of a body':     (lambda t: compare(pretrained=True, **quick), ('small_body', 'a file')),
    'weights that are no weights':   (lambda t: (t/'w.pth').write_text('hello') and compare(weights=t/'w.pth', **quick), ('w.pth', 'not a file of weights')),
    'weights of another network':    (lambda t: torch.save(nn.Linear(2,3).state_dict(), t/'w.pth') or compare(weights=t/'w.pth', **quick), ('w.pth', 'do not fit')),
    'a callback for all runs':       (lambda t: compare(cbs=PODSchedule()), ('function', 'PODSchedule')),
    'a body too small for one loss': (lambda t: compare('center,pedcc', n_feats=2), ('pedcc', '2 dimensions')),
}

catalogue = {**{k: (lambda tmp, f=f: f(), says) for d in (hparams, models) for k,(f,says) in d.items()}, **sets, **comparisons}
assert len(catalogue) == sum(map(len, (hparams, models, sets, comparisons))), 'two entries have one name'

@pytest.mark.parametrize('case', catalogue)
def test_catalogue(case, tmp_path, record_property):
    f, says = catalogue[case]
    before = state(plain)
    record_property('bad', (case, refusal(lambda: f(tmp_path), *says).replace(str(tmp_path), '…')))
    assert all(torch.equal(v, before[k]) for k,v in plain.state_dict().items())

# ---- folders and files

def test_results_that_are_not_whole(tmp_path):
    "Whatever stands in results.jsonl and runs/: whole results count, everything else is passed over and left as it is"
    args = dict(losses='crossentropy', out=tmp_path, n_train=100, bs=50, **quick)
    want = compare(**args).table()
    good = (tmp_path/'results.jsonl').read_bytes()
    row = json.loads(good)
    file, = (tmp_path/'runs').iterdir()
    def changed(**kw): return json.dumps({**row, **kw}).encode()
    strange = [b'\xff\xfe\0\0', b'null', b'[1, 2]', b'"key"', b'{"key": 3}', b'{"key": ["a"]}', b'['*100_000, b'9'*10_000, good[:-40], json.dumps({'key': row['key']}).encode(),
               changed(config={**row['config'], 'lr': 1}), changed(epochs=3), changed(test=None), changed(test={}), changed(test=dict(accuracy=None)), changed(valid={}),
               changed(epochs=[{}]), changed(seconds=None), changed(config=None), b'{"key": "a", "config": ' + b'['*100_000]
    for junk in strange:
        (tmp_path/'results.jsonl').write_bytes(junk + b'\n')
        assert compare(**args).table().equals(want)
        lines = (tmp_path/'results.jsonl').read_bytes()
        assert lines.startswith(junk + b'\n') and lines.count(b'\n') == 2
    for junk in b'', b'PK\3\4 nothing', file.read_bytes()[:300]:
        (tmp_path/'results.jsonl').write_bytes(good)
        file.write_bytes(junk)
        cmp = compare(**args)
        assert cmp.table().equals(want) and not cmp.feats
    np.savez(file, **{k: np.zeros((4,2)) for k in ('targ','pred','conf','prob','feats')})
    assert not compare(**args).feats

@pytest.mark.parametrize('taken', ['a file', 'below a file', 'table.md is a folder', 'cannot be written'])
def test_unwritable_folder(taken, tmp_path, record_property):
    "Found before the first run"
    (tmp_path/'file').write_text('mine')
    (tmp_path/'o'/'table.md').mkdir(parents=True)
    (tmp_path/'locked').mkdir(mode=0o555)
    out = {'a file': tmp_path/'file', 'below a file': tmp_path/'file'/'o', 'table.md is a folder': tmp_path/'o', 'cannot be written': tmp_path/'locked'}[taken]
    if taken == 'cannot be written' and os.geteuid() == 0: out = Path('/proc/discloss') # Root may write everywhere else
    before = {k: v for k,v in tree(tmp_path).items() if 'runs' not in k}
    said = refusal(lambda: compare(out=out, epochs=10**6, show=False), error=OSError)
    assert {k: v for k,v in tree(tmp_path).items() if 'runs' not in k} == before
    record_property('bad', (f'output folder: {taken}', said.replace(str(tmp_path), '…')))

def test_full_disk(tmp_path, record_property):
    "A limit on the size of files cuts writes off as a full disk does: the error names the file, and files stay as they were"
    results, table = tmp_path/'r.jsonl', tmp_path/'t.md'
    append_result(results, dict(key='a', value='x'*600))
    write_whole(table, lambda p: p.write_text('old'))
    before, limits = tree(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    for what in (lambda: append_result(results, dict(key='b', value='x'*600)), lambda: write_whole(table, lambda p: p.write_text('x'*5000)),
                 lambda: _save(tmp_path/'c.pt', state=torch.randn(5000)), lambda: save_outputs(tmp_path/'f.npz', dict(feats=np.random.rand(500,8)))):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1])) # No file can grow beyond 1000 bytes, and a longer write is cut off
        try: what()
        except OSError as e: said = str(e)
        else: raise AssertionError('no error')
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert tree(tmp_path) == before and str(tmp_path) in said and 'make room or choose another folder' in said
    append_result(results, dict(key='c'))
    assert list(read_results(results)) == ['a', 'c']
    record_property('bad', ('full disk', said.replace(str(tmp_path), '…')))

# ---- the command line

commands = {
    'command: unknown loss':       (['--losses', 'centre'], "unknown loss 'centre'"),
    'command: negative weight':    (['--losses', 'center(lam=-1)'], 'lam must be a number at least 0, got -1'),
    'command: no file of weights': (['--weights', 'w.pth'], 'no file of weights'),
    'command: unknown data':       (['--data', 'cifra10'], "did you mean 'cifar10'?"),
    'command: unknown body':       (['--arch', 'resnet99'], "unknown arch 'resnet99'"),
    'command: no epochs':          (['--epochs', '0'], 'epochs must be a whole number, at least 1, got 0'),
    'command: batch too large':    (['--bs', '5000'], 'more than the 1149 training images'),
    'command: folder taken':       (['--out', 'taken/out'], 'taken'),
    'command: unknown device':     (['--device', 'tpu9'], "device must be one that works here, such as cpu, got 'tpu9'"),
    'command: epochs in words':    (['--epochs', 'ten'], "invalid int value: 'ten'"),
    'command: seeds in words':     (['--seeds', 'ten'], "seeds must be whole numbers separated by commas, got 'ten'"),
    'command: no threads':         (['--threads', '0'], 'threads must be a whole number, at least 1, got 0'),
    'command: nothing to tune':    (['--arch', 'lenetpp', '--pretrained'], 'lenetpp has no trained weights to download: give weights of your own'),
    'command: no report':          (['--report', 'nothing'], 'nothing holds no comparison'),
    'command: unknown option':     (['--epoch_count', '3'], 'unrecognized arguments: --epoch_count'),
    'command: NaN as a rate':      (['--lr', 'nan'], "lr must be positive, or 'find', got nan"),
}

@pytest.mark.parametrize('case', commands)
def test_command(case, tmp_path, monkeypatch, capsys, record_property):
    args, says = commands[case]
    (tmp_path/'taken').write_text('a file, not a folder')
    (tmp_path/'command.py').write_text('import sys\nfrom discloss.command import main\nsys.exit(main())')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('DISCLOSS_DATA', str(tmp_path))
    monkeypatch.setattr(sys, 'argv', ['discloss_compare', *args])
    with pytest.raises(SystemExit) as e: runpy.run_path('command.py', run_name='__main__')
    said = e.value.code if isinstance(e.value.code, str) else capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code not in (0, None) and says in said and len(said.splitlines()) == 1 and 'Errno' not in said, said
    assert not list(tmp_path.rglob('table.md')) and (tmp_path/'taken').read_text() == 'a file, not a folder'
    record_property('bad', (case, said.replace(str(tmp_path), '…')))

def test_at_least_sixty(): assert len(batches) + len(catalogue) + len(commands) >= 60

def test_class_weights_are_no_dict():
    with pytest.raises(TypeError, match='in the order of the classes'): CrossEntropy(weight={0: 5., 1: 1.})

@pytest.mark.parametrize('weight', ['balanced', 3, True, torch.ones(3,3), ['a','b'], [None,1.]])
def test_class_weights_are_numbers(weight):
    with pytest.raises(TypeError, match='weight must be numbers, one for each class'):
        CrossEntropy(weight=weight)

def test_two_losses_of_one_label():
    "None is dropped without a word"
    class OwnLoss(CenterLoss): pass
    class Other(CenterLoss): name = 'own'
    for losses in [OwnLoss(), Other()], ['center', type('CenterLoss', (CenterLoss,), {})()]:
        with pytest.raises(ValueError, match='two different losses are called'): parse_losses(losses)
    a, b = torch.ones(12), torch.ones(12)
    b[-1] = 2
    assert list(parse_losses('center,center')) == ['center']
    (k, (loss, fit)), = parse_entries(dict(a='center(lam=0.1, lr=0.02)')).items()
    assert (k, loss.lam, fit) == ('a', 0.1, dict(lr=0.02))
    assert len(parse_losses([CenterLoss(weight=a), CenterLoss(weight=a.clone())])) == 1
    assert len(parse_losses([CenterLoss(weight=a), CenterLoss(weight=b)])) == 2
    assert list(parse_losses(dict(a=OwnLoss(), b=Other()))) == ['a', 'b']

@pytest.mark.parametrize('gives, came', [
    (lambda ce: ce.mean(), r'shape \(\)'), (lambda ce: ce[:3], r'shape \(3,\)'),
    (lambda ce: ce[:,None], r'shape \(8, 1\)'), (lambda ce: (ce, ce), 'tuple'),
    (lambda ce: None, 'NoneType')])
def test_own_loss_gives_one_value_a_sample(gives, came):
    "Else class weights and reductions would mean something else, without a word"
    class Own(DiscLoss):
        def loss(self, logits, targ):
            return gives(F.cross_entropy(logits, targ, reduction='none'))
    with pytest.raises(ValueError, match=r'Own.loss must give one .* \(8,\), got ' + came):
        Own(weight=[1.,2.])(torch.randn(8,2), torch.arange(8)%2)

def test_own_head_is_a_module():
    class Own(CrossEntropy):
        def head(self, n_in, n_out): self.made = n_in
    with pytest.raises(TypeError, match='Own.head must return a module, got NoneType'):
        with_head(small_body(), Own(), 10)
