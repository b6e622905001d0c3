"torchvision's models: a plain Learner without callbacks, and pretrained weights. Everything else that a Learner does is in test_matrix.py, for every loss."
import numpy as np
import pytest
import torch
from fastai.vision.all import Learner, accuracy, set_seed
from test_matrix import loaders, silent, train
from torchvision.models import ResNet18_Weights, resnet18

from discloss.core import with_head
from discloss.learner import disc_learner
from discloss.losses.sigma2r import Sigma2RLoss

@pytest.fixture(scope='module')
def dls(): return loaders(size=32, channels=3)

def test_plain_learner(dls):
    set_seed(0)
    learn = train(silent(Learner(dls, with_head(resnet18(num_classes=10), Sigma2RLoss(), 10), loss_func=Sigma2RLoss(), metrics=accuracy)))
    probs = learn.get_preds()[0]
    assert probs.shape == (33,10) and torch.allclose(probs.sum(1), torch.ones(33), atol=1e-5)

def test_pretrained(dls, tmp_path, monkeypatch):
    "Pretrained weights arrive in the body, which starts frozen (the file that torchvision would download is put in its place)"
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    file = tmp_path/'hub'/'checkpoints'/ResNet18_Weights.DEFAULT.url.split('/')[-1]
    file.parent.mkdir(parents=True)
    torch.manual_seed(7)
    torch.save(resnet18().state_dict(), file)
    want = torch.load(file, weights_only=True)['conv1.weight']
    learn = silent(disc_learner(dls, resnet18, Sigma2RLoss()))
    assert torch.equal(learn.model[0][0].weight.cpu(), want)
    assert [all(p.requires_grad for p in g if p.ndim > 1) for g in learn.opt.param_lists] == [False, False, True]
    learn.fine_tune(1, 1e-3)
    assert np.isfinite(learn.validate()[0]) and not torch.equal(learn.model[0][0].weight.cpu(), want)
