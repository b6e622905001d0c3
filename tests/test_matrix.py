"Every loss in every situation: a cell passes, or discloss refuses with an error that says why, which it may do only in situations marked `may_refuse`."
import copy, functools, os, random, subprocess, sys, tempfile, traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn as nn
import torch.nn.functional as F
from fastai.callback.channelslast import ChannelsLast
from fastai.vision.all import (Callback, ClassificationInterpretation, CutMix, GradientAccumulation, GradientClip, Learner, MixUp, ProgressCallback, accuracy, default_device,
                               noop, plt, set_seed)

import discloss
from discloss.bodies import small_body
from discloss.core import Other, find_head, training_head, with_head
from discloss.data import ImageTensorLoaders, ImageTensors, image_dls
from discloss.learner import TrainMetrics, disc_learner
from discloss.specs import all_losses

situations = {} # Name -> (function, may the loss refuse?)

def situation(name, may_refuse=False):
    def _add(f):
        situations[name] = f, may_refuse
        return f
    return _add

# ---- what all cells use

@functools.cache
def images(size=8, channels=1): return image_dls('digits', size=size, channels=channels, n_train=100)

def loaders(n=64, bs=16, drop_last=True, **kwargs):
    "64 digits to train on, and 33 to validate on: their last batch is a single image"
    dls = images(**kwargs)
    def part(dl, n): return ImageTensors(dl.dataset.x[:n], dl.dataset.y[:n], dl.dataset.vocab, dl.dataset.split_idx)
    train = dls.train.new(part(dls.train, n), bs=bs, drop_last=drop_last)
    train.rng = random.Random(0)
    return ImageTensorLoaders(train, dls.valid.new(part(dls.valid, 33), bs=16), device=default_device())

def silent(learn):
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    return learn

def learner(loss, tmp=None, dls=None, model=None, **kwargs):
    set_seed(0)
    dls = dls or loaders()
    return silent(Learner(dls, with_head(small_body(width=8, n_feats=16) if model is None else model, loss, dls.c), loss_func=loss, path=tmp, **{'metrics': accuracy, **kwargs}))

def state(m): return {k: v.detach().clone() for k,v in m.state_dict().items()}
def changed(before, m): return [k for k,v in m.state_dict().items() if not torch.equal(v, before[k])]

def check_trained(learn, before):
    "Losses and weights are finite, and every parameter moved"
    assert learn.recorder.values and np.isfinite(np.array(learn.recorder.values, float)).all(), learn.recorder.values
    for k,v in learn.model.state_dict().items(): assert v.isfinite().all(), f'{k} is not finite'
    moved = changed(before, learn.model)
    assert all(k in moved for k,p in learn.model.named_parameters() if p.requires_grad), f'only {moved} moved'

def train(learn, epochs=1, lr=1e-2):
    before = state(learn.model)
    learn.fit(epochs, lr)
    check_trained(learn, before)
    return learn

def batch(dls, n=16):
    x, y = dls.valid.one_batch()
    return x[:n].as_subclass(torch.Tensor), y[:n].as_subclass(torch.Tensor)

def tiny(weights=None, pretrained=False):
    "As small as an architecture for `vision_learner` can be"
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))

# ---- training

@situation('plain fit')
def plain_fit(loss, tmp):
    learn = learner(loss, lr=1e-2)
    x, y = (o.as_subclass(torch.Tensor) for o in learn.dls.train.new(shuffle=False, bs=64).one_batch())
    def value():
        learn.model.train()
        with torch.no_grad(): return loss(copy.deepcopy(learn.model)(x), y).item()
    before = value()
    train(learn, 4)
    assert value() < before

@situation('plain PyTorch loop')
def plain_loop(loss, tmp):
    "Without a Learner, on batches as they come from fastai's loaders, which are of tensor subclasses"
    learn = learner(loss)
    model, values = learn.model.train(), []
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = learn.dls.train.one_batch()
    assert type(x) is not torch.Tensor and type(y) is not torch.Tensor
    head = find_head(model)
    before = state(head)
    with torch.no_grad(): loss(model(x), y)
    assert not changed(before, head), f'{changed(before, head)} moved without gradients'
    for _ in range(5):
        value = loss(model(x), y)
        assert type(value) is torch.Tensor
        opt.zero_grad()
        value.backward()
        opt.step()
        values.append(value.item())
    assert values[-1] < values[0], values

@situation('fine_tune of disc_learner')
def fine_tune(loss, tmp):
    learn = silent(disc_learner(loaders(), tiny, loss, pretrained=False, n_in=1, lin_ftrs=[16]))
    before = state(learn.model)
    learn.fine_tune(1, 1e-2)
    check_trained(learn, before)

@situation('freeze, unfreeze, rates by layer')
def freeze(loss, tmp):
    learn = silent(disc_learner(loaders(), tiny, loss, pretrained=False, n_in=1, lin_ftrs=[16]))
    body, head = learn.model[0][0].weight, learn.model[1]
    learn.freeze()
    before, fixed = body.detach().clone(), state(head)
    learn.fit(1, 1e-2)
    assert torch.equal(body, before) and changed(fixed, head)
    learn.unfreeze()
    learn.fit_one_cycle(1, slice(1e-4, 1e-2))
    assert not torch.equal(body, before)
    rates = [o['lr'] for o in learn.opt.hypers]
    assert rates == sorted(rates) and rates[0] < rates[-1]

@situation('to_fp16')
def to_fp16(loss, tmp): train(learner(loss).to_fp16())

class Autocast(Callback):
    "What fastai's `MixedPrecision` does, on the CPU too"
    order = 10
    def before_batch(self):
        self.cast = torch.autocast(self.dls.device.type, dtype=torch.bfloat16)
        self.cast.__enter__()
    def after_loss(self):
        self.cast.__exit__(None, None, None)
        assert self.loss.dtype == torch.float32

@situation('bfloat16 autocast')
def bf16(loss, tmp):
    learn = train(learner(loss, cbs=Autocast()))
    assert all(v.dtype != torch.bfloat16 for v in learn.model.state_dict().values())

class Steps(Callback):
    "Counts the optimizer's steps and measures the gradient before each"
    order = 90
    def before_fit(self): self.norms = []
    def before_step(self): self.norms.append(torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None]).norm().item())

@situation('gradient accumulation')
def accumulation(loss, tmp):
    steps = Steps()
    train(learner(loss, cbs=[GradientAccumulation(32), steps]))
    assert len(steps.norms) == 2

@situation('gradient clipping')
def clipping(loss, tmp):
    steps = Steps()
    train(learner(loss, cbs=[GradientClip(0.01), steps]))
    assert max(steps.norms) < 0.0101

@situation('MixUp', may_refuse=True)
def mixup(loss, tmp): train(learner(loss, cbs=MixUp()))

@situation('CutMix', may_refuse=True)
def cutmix(loss, tmp): train(learner(loss, cbs=CutMix()))

@situation('label smoothing', may_refuse=True)
def label_smoothing(loss, tmp):
    if 'label_smoothing' in loss.hparams: return train(learner(type(loss)(label_smoothing=0.1)))
    class Smooth(Callback):
        def before_batch(self): self.learn.yb = F.one_hot(self.y.long(), 10)*0.9 + 0.01,
    train(learner(loss, cbs=Smooth()))

@situation('train_metrics=True')
def train_metrics(loss, tmp):
    learn = learner(loss, cbs=TrainMetrics())
    learn.recorder.train_metrics = True
    train(learn, 2)
    assert learn.recorder.metric_names[1:-1] == ['train_loss', 'train_accuracy', 'valid_loss', 'valid_accuracy']
    assert 0 <= learn.recorder.values[-1][1] <= 1

@situation('channels_last')
def channels_last(loss, tmp):
    plain, last = train(learner(loss)), train(learner(loss, cbs=ChannelsLast()))
    assert last.model[0][1][0].weight.is_contiguous(memory_format=torch.channels_last)
    for (k,a),b in zip(plain.model.state_dict().items(), last.model.state_dict().values()): assert torch.allclose(a, b, rtol=1e-2, atol=1e-3), k

@situation('last batch of one')
def last_of_one(loss, tmp): train(learner(loss, dls=loaders(n=33, drop_last=False)))

@situation('batch larger than the data', may_refuse=True)
def too_large_a_batch(loss, tmp):
    with pytest.raises(ValueError, match='more than the 100 training images'): image_dls('digits', n_train=100, bs=200)
    train(silent(disc_learner(loaders(n=12, bs=16), tiny, loss, pretrained=False, n_in=1)))

@situation('saved, loaded, gone on')
def resumed(loss, tmp):
    "Interrupted after the first epoch and gone on in another learner: to the last bit the weights of a run without interruption"
    class Remember(Callback):
        def after_epoch(self):
            if self.epoch > 0: return
            self.learn.save('half')
            self.rngs = torch.get_rng_state(), self.dls.train.rng.getstate()
    class Restore(Callback):
        def before_train(self):
            if self.epoch > 1: return
            torch.set_rng_state(remember.rngs[0])
            self.dls.train.rng.setstate(remember.rngs[1])
    remember = Remember()
    whole = learner(loss, tmp, cbs=remember)
    whole.fit_one_cycle(3, 1e-2)
    again = learner(copy.deepcopy(loss), tmp)
    again.load('half')
    before = state(again.model)
    again.fit_one_cycle(3, 1e-2, start_epoch=1, cbs=Restore())
    assert changed(before, again.model)
    for k,v in whole.model.state_dict().items(): assert torch.equal(v, again.model.state_dict()[k]), k

# ---- after training

@functools.cache
def trained_learner(name):
    learn = learner(all_losses()[name](), tempfile.mkdtemp())
    learn.fit_one_cycle(2, 1e-2)
    return learn

def trained(f):
    "The test gets a trained learner, and must leave its model as it was"
    @functools.wraps(f)
    def _f(loss, tmp):
        learn = trained_learner(loss.name)
        before = state(learn.model)
        f(learn)
        assert not changed(before, learn.model), f'changed {changed(before, learn.model)}'
    return _f

@situation('lr_find')
@trained
def lr_find(learn):
    res = learn.lr_find(show_plot=False, num_it=8)
    assert np.isfinite(res.valley)

@situation('validate')
@trained
def validate(learn):
    value, acc = learn.validate()
    logits, targ = learn.get_preds(act=noop)
    assert abs(value-F.cross_entropy(logits, targ).item()) < 1e-4*(1+value) and 0 <= acc <= 1

@situation('get_preds(with_loss=True)')
@trained
def get_preds(learn):
    probs, targ, losses = learn.get_preds(with_loss=True)
    assert probs.shape == (33,10) and torch.allclose(probs.sum(1), torch.ones(33), atol=1e-5)
    assert torch.allclose(losses, F.nll_loss(probs.clamp_min(1e-30).log(), targ, reduction='none'), rtol=1e-3, atol=1e-4)

@situation('predict')
@trained
def predict(learn):
    name, idx, p = learn.predict(learn.dls.valid_ds[0][0])
    assert str(name) == learn.dls.vocab[p.argmax()] and idx == p.argmax()

@situation('TTA')
@trained
def tta(learn):
    probs, targ = learn.tta(n=2)
    assert probs.shape == (33,10) and torch.allclose(probs.sum(1), torch.ones(33), atol=1e-5)

@situation('Interpretation')
@trained
def interpretation(learn):
    interp = ClassificationInterpretation.from_learner(learn)
    cm = interp.confusion_matrix()
    assert cm.sum() == 33 and abs(np.trace(cm)/33-learn.validate()[1]) < 1e-6
    assert list(interp.top_losses(3)[0]) == sorted(interp.top_losses(3)[0], reverse=True)
    interp.plot_top_losses(2)
    plt.close('all')

@situation('show_results')
@trained
def show_results(learn):
    learn.show_results(max_n=2)
    plt.close('all')

@situation('summary')
@trained
def summary(learn):
    text = str(learn.summary())
    assert 'Total params' in text and type(learn.loss_func).__name__ in text

# ---- other models

@situation('timm model')
def timm_model(loss, tmp):
    import timm
    dls = loaders(n=16, bs=8, size=32)
    train(learner(loss, dls=dls, model=timm.create_model('test_resnet', num_classes=10, in_chans=1)))
    learn = silent(disc_learner(dls, 'test_resnet', loss, pretrained=False, n_in=1))
    assert isinstance(find_head(learn.model), type(loss.head(16,10)))
    train(learn)

class HomeMade(nn.Module):
    "Two inputs for the classifier, which is neither called fc nor the last that is registered"
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict(dict(classifier=nn.Linear(20, 10), features=nn.Linear(64, 20)))
    def forward(self, x): return self.parts['classifier'](torch.tanh(self.parts['features'](x.flatten(1))))

@situation('home-made model')
def home_made(loss, tmp):
    set_seed(0)
    dls, model = loaders(), with_head(HomeMade(), loss, 10, layer='parts.classifier')
    assert isinstance(model.parts['classifier'], type(loss.head(20,10))) and isinstance(model.parts['features'], nn.Linear)
    train(silent(Learner(dls, model, loss_func=loss, metrics=accuracy)))

@situation('model without a Linear layer')
def without_linear(loss, tmp):
    body = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match='no nn.Linear to replace.*n_feats'): with_head(body, loss, 10)
    body.n_feats = 16
    train(learner(loss, model=body))

# ---- other trainers

def small_model(loss, seed=0):
    "Two layers and the head of a loss, for 8 inputs and 4 classes; with 12 samples"
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(8, 6), nn.Tanh())
    body.n_feats = 6
    return with_head(body, loss, 4).train(), torch.randn(12, 8), torch.arange(12) % 4

def steps_by_hand(loss, n=2):
    model, x, y = small_model(loss)
    opt = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(n):
        opt.zero_grad()
        loss(model(x), y).backward()
        opt.step()
    return model.state_dict()

def check_same(loss, model):
    "Two steps of another trainer are two steps by hand"
    for k,v in steps_by_hand(loss).items(): assert torch.allclose(v, model.state_dict()[k], atol=1e-5), k

@situation('Lightning')
def lightning_trainer(loss, tmp):
    L = pytest.importorskip('lightning')
    class Classifier(L.LightningModule):
        def __init__(self, model, loss):
            super().__init__()
            self.model,self.loss = model,loss
        def training_step(self, batch, i): return self.loss(self.model(batch[0]), batch[1])
        def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.05)
    model, x, y = small_model(loss)
    dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=12)
    trainer = L.Trainer(max_epochs=2, accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                        default_root_dir=tmp)
    trainer.fit(Classifier(model, loss), dl)
    check_same(loss, model)

@situation('accelerate')
def accelerate_loop(loss, tmp):
    Accelerator = pytest.importorskip('accelerate').Accelerator
    model, x, y = small_model(loss)
    accelerator = Accelerator(cpu=True)
    prepared, opt = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.05))
    for _ in range(2):
        opt.zero_grad()
        accelerator.backward(loss(prepared(x), y))
        opt.step()
    check_same(loss, accelerator.unwrap_model(prepared))

class ByName(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, x, labels=None): return dict(logits=self.model(x))

@situation('Trainer of transformers')
def transformers_trainer(loss, tmp):
    transformers = pytest.importorskip('transformers')
    model, x, y = small_model(loss)
    args = transformers.TrainingArguments(str(tmp), max_steps=2, learning_rate=0.05, optim='sgd', lr_scheduler_type='constant', max_grad_norm=0., save_strategy='no',
                                          per_device_train_batch_size=12, use_cpu=True, report_to='none', disable_tqdm=True)
    def as_inputs(rows): return dict(x=torch.stack([x for x,_ in rows]), labels=torch.stack([y for _,y in rows]))
    def loss_of(out, y, num_items_in_batch=None): return loss(out['logits'], y)
    trainer = transformers.Trainer(ByName(model), args, train_dataset=torch.utils.data.TensorDataset(x, y), data_collator=as_inputs, compute_loss_func=loss_of)
    trainer.train()
    check_same(loss, model)

# ---- gradients of other kinds

def gradients(loss, forward):
    model, x, y = small_model(loss)
    x.requires_grad_()
    loss(forward(model, x), y).backward()
    return [x.grad, *(p.grad for p in model.parameters())]

def as_tuple(model, x):
    "The reentrant form of checkpointing knows tuples only: the dict goes in and out as one"
    from torch.utils.checkpoint import checkpoint
    names = []
    def values(x):
        out = model(x)
        names[:] = out
        return tuple(out.values())
    out = checkpoint(values, x, use_reentrant=True)
    return dict(zip(names, out))

@situation('activation checkpointing')
def checkpointing(loss, tmp):
    "Over the whole model, in both forms, with the gradients of a plain pass"
    from torch.utils.checkpoint import checkpoint
    plain = gradients(loss, lambda model, x: model(x))
    for form in as_tuple, lambda model, x: checkpoint(model, x, use_reentrant=False):
        for a,b in zip(plain, gradients(loss, form)):
            assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-6))

@situation('training loss in evaluation')
def training_loss_in_evaluation(loss, tmp):
    "The value of training, gradients by the input, nothing moves, and a step along the gradient (FGSM) raises the loss"
    model, x, y = small_model(loss)
    want = loss(copy.deepcopy(model)(x), y)
    before = state(model.eval())
    x.requires_grad_()
    frozen = copy.deepcopy(loss).eval()
    with training_head(model): value = frozen(model(x), y)
    grad, = torch.autograd.grad(value, x)
    assert torch.allclose(value, want, atol=1e-6) and not changed(before, model) and not any(m.training for m in model.modules())
    assert grad.isfinite().all() and grad.abs().sum() > 0
    with training_head(model), torch.no_grad(): worse = frozen(model(x + 1e-3*grad.sign()), y)
    assert worse > value
    assert model(x).shape == (12,4)

@situation('vmap and hessian')
def functional_gradients(loss, tmp):
    "Gradients sample by sample by torch.func, where a loss is separable, and a symmetric hessian by the features of two samples"
    loss = type(loss)(reduction='sum')
    head = loss.head(6, 4).double().train()
    gen = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 6, generator=gen, dtype=torch.float64), torch.arange(5) % 4
    def value(x, y): return loss(head(x), y)
    if loss.separable:
        each = torch.func.vmap(torch.func.grad(lambda x, y: value(x[None], y[None])))(x, y)
        whole = torch.func.grad(lambda x: value(x, y))(x)
        assert torch.allclose(each, whole, atol=1e-9)
    h = torch.func.hessian(lambda x: value(x, y[:2]))(x[:2]).reshape(12, 12)
    assert h.isfinite().all() and torch.allclose(h, h.T, atol=1e-6*(1+h.abs().max().item()))
    slope = torch.func.grad(lambda x: value(x, y))(x)
    with forward_ad.dual_level(): # Last, for it moves the centers, as any training step does
        along = forward_ad.unpack_dual(value(forward_ad.make_dual(x, x), y)).tangent
    assert torch.allclose(along, (slope*x).sum(), atol=1e-9)

@situation('class weights')
def class_weights(loss, tmp):
    "Weights of one change nothing; others give the weighted mean, as in F.cross_entropy"
    model, x, y = small_model(loss)
    def value(**kwargs): return type(loss)(**kwargs)(copy.deepcopy(model)(x), y)
    w = [1., 2., 0., 5.]
    losses, by = value(reduction='none'), torch.tensor(w)[y]
    assert torch.allclose(value(weight=[1.]*4), value())
    assert torch.allclose(value(weight=w), (losses*by).sum()/by.sum())

@situation('drawn hyper-parameters')
def drawn_hypers(loss, tmp):
    "One step with each of some allowed values: finite values and gradients"
    for name,hyper in loss.hypers.items():
        if name not in loss.hparams or isinstance(hyper, Other): continue
        value = hyper.examples()[-1]
        try: drawn = type(loss)(**{name: value})
        except ValueError as e:
            assert name in str(e), e # Two hyper-parameters that exclude each other
            continue
        model, x, y = small_model(drawn)
        out = drawn(model(x), y)
        out.backward()
        assert out.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None), f'{name}={value}'

# ---- compiled, exported, in other processes

@situation('torch.compile')
def compiled(loss, tmp):
    dls = loaders(n=16, bs=16)
    plain, comp = (learner(loss, dls=dls) for _ in range(2))
    torch._dynamo.reset()
    comp.model.compile(backend='aot_eager')
    comp.loss_func = torch.compile(loss, backend='aot_eager', fullgraph=True)
    (x,y) = batch(dls)
    for learn in (plain, comp):
        learn.model.train()
        opt = torch.optim.SGD(learn.model.parameters(), lr=0.01)
        for _ in range(2):
            opt.zero_grad()
            learn.loss_func(learn.model(x), y).backward()
            opt.step()
    for (k,a),b in zip(plain.model.state_dict().items(), comp.model.state_dict().values()): assert torch.allclose(a, b, rtol=1e-3, atol=1e-5), k

@pytest.mark.parametrize('name', ['ldmat', 'pedcc', 'pod'])
def test_compiled_numbers_may_change(name):
    "A schedule changes a number: the compiler makes a symbol of it, which is no number to check"
    loss = all_losses()[name]()
    head, y = loss.head(16, 4), torch.arange(8) % 4
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend='aot_eager', fullgraph=True)
    for factor in (1., 1.1, 1.2):
        for k,v in type(loss)().hparams.items():
            if isinstance(v, float) and k != 'scale': setattr(loss, k, v*factor) # The head has it too
        x = torch.randn(8, 16)
        with torch.no_grad(): out = head(x)
        assert torch.allclose(compiled(out, y), loss(out, y), rtol=1e-4)

@functools.cache
def exported_program(name):
    learn = trained_learner(name)
    x = batch(learn.dls)[0].cpu()
    model = copy.deepcopy(learn.model).cpu().eval()
    with torch.no_grad(): want = model(x)
    n = torch.export.Dim('batch', min=2, max=1024)
    return model, torch.export.export(model, (x,), dynamic_shapes=({0: n},)), x, want

@situation('torch.export')
def exported(loss, tmp):
    model, program, x, want = exported_program(loss.name)
    assert torch.allclose(program.module()(x), want, rtol=1e-4, atol=1e-5)
    assert torch.allclose(program.module()(x[:5]), want[:5], rtol=1e-4, atol=1e-5)

@situation('ONNX')
def onnx(loss, tmp):
    import onnxruntime
    model, program, x, want = exported_program(loss.name)
    torch.onnx.export(program, f=str(tmp/'model.onnx'), verbose=False)
    session = onnxruntime.InferenceSession(str(tmp/'model.onnx'), providers=['CPUExecutionProvider'])
    for o in x, x[:5]:
        got, = session.run(None, {session.get_inputs()[0].name: o.numpy()})
        assert np.allclose(got, want[:len(o)].numpy(), rtol=1e-3, atol=1e-4)

@functools.cache
def loaded_elsewhere():
    "The probabilities of all losses for the same images, from exported learners in one new process"
    tmp = Path(tempfile.mkdtemp())
    for name in all_losses(): trained_learner(name).export(tmp/f'{name}.pkl')
    torch.save(loaders().valid_ds.x.cpu(), tmp/'images.pt')
    code = """
import torch
from pathlib import Path
from fastai.learner import load_learner
images, out = list(torch.load('images.pt', weights_only=True)), {}
for f in Path().glob('*.pkl'):
    learn = load_learner(f)
    out[f.stem] = learn.get_preds(dl=learn.dls.test_dl(images))[0]
torch.save(out, 'out.pt')
"""
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=tmp, capture_output=True, text=True)
    assert res.returncode == 0, res.stderr[-3000:]
    return torch.load(tmp/'out.pt', weights_only=True)

@situation('export, load_learner elsewhere')
def load_elsewhere(loss, tmp): assert torch.allclose(loaded_elsewhere()[loss.name], trained_learner(loss.name).get_preds()[0], atol=1e-5)

STEPS = """
import os, torch, torch.nn as nn, torch.distributed as dist
from discloss.specs import all_losses
from discloss.core import with_head

rank, world = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
if world > 1: dist.init_process_group('gloo', init_method='file://' + os.environ['MEET'], rank=rank, world_size=world)
gen = torch.Generator().manual_seed(0)
x, y = torch.randn(16, 6, generator=gen), torch.arange(16) % 4
out = {}
for name, cls in all_losses().items():
    loss = cls()
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6,5), nn.ReLU())
    body.n_feats = 5
    model = with_head(body, loss, 4)
    state = model
    if world > 1: model = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        opt.zero_grad()
        loss(model(x[rank::world]), y[rank::world]).backward()
        opt.step()
    out[name] = state.state_dict()
torch.save(out, f'{world}-{rank}.pt')
if world > 1: dist.barrier(); dist.destroy_process_group()
"""

@functools.cache
def ddp_states():
    "The states after three steps on the same sixteen samples, by one process and by both of two"
    tmp = Path(tempfile.mkdtemp())
    procs = [subprocess.Popen([sys.executable, '-W', 'ignore', '-c', STEPS], cwd=tmp, env={**os.environ, 'RANK': str(rank), 'WORLD_SIZE': str(world), 'MEET': str(tmp/'meet')},
                              stderr=subprocess.PIPE, text=True) for world in (1,2) for rank in range(world)]
    for p in procs:
        _, err = p.communicate(timeout=300)
        assert p.returncode == 0, err[-3000:]
    return [torch.load(tmp/f'{f}.pt', weights_only=True) for f in ('1-0','2-0','2-1')]

@situation('two processes (DDP)')
def two_processes(loss, tmp):
    "A step of two processes equals the step of one"
    alone, first, second = (s[loss.name] for s in ddp_states())
    for k in alone:
        assert torch.allclose(first[k], second[k], atol=1e-6), f'{k} differs between the two processes'
        assert torch.allclose(alone[k], first[k], atol=1e-5), f'{k} differs from that of one process'

# ---- the table

@pytest.mark.parametrize('situation', situations)
@pytest.mark.parametrize('name', all_losses())
def test_cell(name, situation, tmp_path, record_property):
    record_property('cell', (name, situation))
    f, may_refuse = situations[situation]
    try: f(all_losses()[name](), tmp_path)
    except (NotImplementedError, TypeError, ValueError) as e:
        ours = Path(discloss.__file__).parent in Path(traceback.extract_tb(e.__traceback__)[-1].filename).parents
        if not (may_refuse and ours): raise
        says = str(e).split(':\n\t')[-1] # What fastai puts before the errors of callbacks does not count
        assert len(says) > 40, f'a refusal must say why, and says only: {says}'
        record_property('refused', f'{type(e).__name__}: {says}')
