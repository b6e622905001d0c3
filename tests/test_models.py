"A model of one's own: with_head finds the classifier, or says in one sentence why it cannot and what to do."
import re, warnings

import numpy as np
import pytest
import torch
import torch.nn as nn
from zoo import batch, images, libraries, of_timm, one_step, refused, zoo

from discloss.core import find_head, with_head
from discloss.losses.center import CenterLoss
from discloss.specs import all_losses

@pytest.mark.parametrize('name', zoo)
def test_home_made(name):
    make, (kind, want), kwargs = zoo[name]
    model = make()
    x = batch(model)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        try: model, layer, norm = one_step(model, x, CenterLoss(), **kwargs)
        except (TypeError, ValueError, AttributeError, UserWarning) as e:
            assert kind == 'says', e
            assert re.search(want, str(e), re.S), e
            return
    assert (kind, want) == ('layer', layer)
    if x.is_meta: return
    assert norm > 0
    assert model.eval()(x).shape == (4,3)

quick = '''torchvision resnet18, torchvision squeezenet1_0, torchvision mobilenet_v3_small, timm test_resnet, timm test_vit,
    timm levit_128s, timm mobilenetv3_small_050, transformers ViT, transformers DeiT WithTeacher, transformers Swin, fastai xresnet18'''
quick = [k.strip() for k in quick.split(',')]
published = [(library, name) for library,o in libraries.items() for name in o.names]

def marks(library, name): return [] if f'{library} {name}' in quick else pytest.mark.slow

@pytest.mark.parametrize('library, name', [pytest.param(*k, marks=marks(*k)) for k in published])
def test_published(library, name):
    torch.manual_seed(0)
    model = libraries[library].make(name)
    want = refused.get(f'{library} {name}')
    try: model, layer, norm = one_step(model, images(model, library, name), CenterLoss(), 10)
    except (TypeError, ValueError) as e:
        assert want and re.search(want, str(e), re.S), e
        return
    assert want is None and norm > 0, layer

@pytest.mark.parametrize('name, size', [('test_vit', 'num_features'), ('mobilenetv3_small_050', 'head_hidden_size')])
def test_body_of_timm(name, size):
    "The sentence for a body of timm, and what it says works"
    body = of_timm(name, num_classes=0)
    with pytest.raises(ValueError, match=f'model.n_feats = model.{size}'): with_head(body, CenterLoss(), 3)
    body.n_feats = getattr(body, size)
    x = images(body, 'timm', name)
    model, layer, norm = one_step(body, x, CenterLoss())
    assert layer == '1' and norm > 0

def test_convolution_as_classifier():
    "The sentence for a convolution as classifier, and what it says works"
    model = libraries['torchvision'].make('squeezenet1_1')
    with pytest.raises(ValueError, match=r"'classifier.1', Conv2d.*nn.Identity\(\) in its place and set model.n_feats = 512"):
        with_head(model, CenterLoss(), 3)
    model.classifier[1] = nn.Identity()
    model.n_feats = 512
    model, layer, norm = one_step(model, torch.randn(2,3,64,64), CenterLoss())
    assert layer == '1' and norm > 0

def test_compiled_copy_is_its_own():
    "The copy of a compiled model has its own head, the original keeps its classifier"
    model = torch.compile(zoo['float64'][0]().float(), backend='eager')
    before = model(torch.ones(2,8))
    new = with_head(model, CenterLoss(), 5)
    assert new.eval()(torch.ones(2,8)).shape == (2,5)
    assert torch.equal(model(torch.ones(2,8)), before)

def test_second_head_replaces_the_first():
    from discloss.losses.arcface import ArcFaceLoss
    for name,(make,(kind,_),kwargs) in zoo.items():
        if kind != 'layer' or name == 'on_meta': continue
        model = with_head(make(), CenterLoss(), 3, **({} if kwargs.get('x') else kwargs))
        again = with_head(model, ArcFaceLoss(), 3)
        assert type(find_head(again)) is type(ArcFaceLoss().head(6, 3)), name

@pytest.mark.parametrize('number', [int, np.int64])
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_head_of_a_body_has_its_dtype(dtype, number):
    "A number of numpy says as well how many features there are"
    body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)).to(dtype)
    body.n_feats = number(5)
    for name in 'center', 'cosface', 'lgm':
        model = with_head(body, all_losses()[name](), 3)
        assert model[0][2].out_features == 5
        assert {p.dtype for p in model.parameters()} == {dtype}
        model.eval()(torch.randn(4, 6, dtype=dtype))
