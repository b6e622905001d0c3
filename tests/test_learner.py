"All that a plain fastai Learner does, with torchvision's ResNet-18 and no callback."
import numpy as np
import pytest
import torch
from fastai.vision.all import ClassificationInterpretation, CutMix, Learner, MixUp, SGD, accuracy, set_seed
from torchvision.models import ResNet18_Weights, resnet18

from discloss.compare import all_losses
from discloss.core import disc_learner, with_head
from discloss.data import image_dls
from discloss.losses.sigma2r import Sigma2RLoss

@pytest.fixture(scope='module')
def dls(): return image_dls('digits', size=32, channels=3, n_train=200, bs=32)

def quiet(learn):
    learn.no_bar().__enter__()
    learn.logger = lambda *a: None
    return learn

def test_plain_learner(dls, tmp_path, run):
    set_seed(0)
    learn = quiet(Learner(dls, with_head(resnet18(num_classes=10), Sigma2RLoss(), 10), loss_func=Sigma2RLoss(), metrics=accuracy, path=tmp_path))
    learn.fit_one_cycle(2, 3e-3)
    assert len(learn.recorder.values) == 2 and np.isfinite(learn.recorder.values).all()
    assert len(learn.validate()) == 2
    probs, targ, losses = learn.get_preds(with_loss=True)
    assert torch.allclose(probs.sum(1), torch.ones(len(probs)), atol=1e-5) and losses.shape == targ.shape
    name, idx, p = learn.predict(dls.valid_ds[0][0])
    assert str(name) == dls.vocab[int(idx)]
    learn.show_results(max_n=4)
    interp = ClassificationInterpretation.from_learner(learn)
    assert interp.confusion_matrix().sum() == len(dls.valid_ds)
    interp.plot_top_losses(4)
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    learn.lr_find(show_plot=False, num_it=12)
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    for cb in MixUp(), CutMix(): learn.fit(1, 1e-3, cbs=cb)
    learn.save('model')
    probs = learn.get_preds()[0]
    learn.fit(1, 1e-3)
    learn.load('model')
    assert torch.equal(learn.get_preds()[0], probs)
    learn.export('learn.pkl')
    np.save(tmp_path/'x.npy', dls.valid_ds.x.numpy())
    np.save(tmp_path/'p.npy', probs.numpy())
    print(run("""
import numpy as np, torch
from fastai.vision.all import load_learner
learn = load_learner('learn.pkl')
x, want = torch.from_numpy(np.load('x.npy')), np.load('p.npy')
with learn.no_bar(): got = learn.get_preds(dl=learn.dls.test_dl(list(x)))[0].numpy()
assert np.abs(got-want).max() < 1e-5, np.abs(got-want).max()
assert learn.predict(x[0])[0] == learn.dls.vocab[int(want[0].argmax())]
"""))

def test_resumed_training_is_the_same(dls, tmp_path):
    "Centers are saved with the model: going on after save and load equals not having stopped"
    def learner(): return quiet(Learner(dls, with_head(resnet18(num_classes=10), Sigma2RLoss(lam=0.1), 10), loss_func=Sigma2RLoss(lam=0.1), opt_func=SGD, path=tmp_path))
    set_seed(0); a = learner()
    a.fit(1, 1e-2)
    a.save('half')
    set_seed(1); a.dls.train.rng.seed(1); a.fit(1, 1e-2, reset_opt=True)
    set_seed(5); b = learner()
    b.load('half')
    set_seed(1); b.dls.train.rng.seed(1); b.fit(1, 1e-2, reset_opt=True)
    for k,v in a.model.state_dict().items(): assert torch.equal(v, b.model.state_dict()[k]), k

@pytest.mark.parametrize('name', all_losses())
def test_disc_learner(dls, name):
    "vision_learner's ways go on working: frozen body, fine_tune, discriminative learning rates"
    loss = all_losses()[name]()
    set_seed(0)
    learn = quiet(disc_learner(dls, resnet18, loss, pretrained=False))
    learn.freeze()
    body = learn.model[0][0].weight.clone()
    learn.fit(1, 1e-3)
    assert torch.equal(learn.model[0][0].weight, body)
    learn.fine_tune(1, base_lr=1e-3, freeze_epochs=1)
    assert not torch.equal(learn.model[0][0].weight, body)
    learn.fit_one_cycle(1, slice(1e-5, 1e-3))
    lrs = [o['lr'] for o in learn.opt.hypers]
    assert lrs[0] < lrs[1] < lrs[2]
    assert np.isfinite(learn.validate()[0])

def test_pretrained(dls, tmp_path, monkeypatch):
    "Pretrained weights arrive in the body, which starts frozen (the file that torchvision would download is put in its place)"
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    file = tmp_path/'hub'/'checkpoints'/ResNet18_Weights.DEFAULT.url.split('/')[-1]
    file.parent.mkdir(parents=True)
    torch.manual_seed(7)
    torch.save(resnet18().state_dict(), file)
    want = torch.load(file, weights_only=True)['conv1.weight']
    learn = quiet(disc_learner(dls, resnet18, Sigma2RLoss()))
    assert torch.equal(learn.model[0][0].weight.cpu(), want)
    assert [all(p.requires_grad for p in g if p.ndim > 1) for g in learn.opt.param_lists] == [False, False, True]
    learn.fine_tune(1, 1e-3)
    assert np.isfinite(learn.validate()[0]) and not torch.equal(learn.model[0][0].weight.cpu(), want)
