"The rules that make a comparison a comparison, one small test for each; and the key of a result, one line for each part of it."
import functools, json, math, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.torch_core import TensorCategory, TensorImage, params
from fastai.vision.data import ImageDataLoaders
from matplotlib.axes import Axes
from matplotlib.legend import Legend
from matplotlib.text import Text
from PIL import Image
from scipy.stats import binom
from torch.utils.data import DataLoader as TorchLoader, TensorDataset

import discloss.runs as runs
from discloss.bodies import Body, bodies, lenetpp, small_body
from discloss.compare import _announce, _incomplete, _worst, choose_arch, compare, estimate
from discloss.comparison import Comparison, load_comparison, load_outputs, save_outputs
from discloss.core import DiscLoss
from discloss.data import ImageTensors, image_dls
from discloss.losses.center import CenterLoss
from discloss.losses.cross_entropy import CrossEntropy
from discloss.report import Findings, report_html
from discloss.runs import choose_threads, default_arch, default_lr, guessing, loss_learner, run_loss, threads, trouble
from discloss.statistics import better
from discloss.store import append_result, read_results

quick = dict(n_train=128, epochs=1, seeds=1, show=False)

class Spy(Callback):
    "What a run is trained with"
    seen = []
    def before_fit(self):
        self.note = dict(lr=self.opt.hypers[-1]['lr'], wd=self.opt.hypers[0]['wd'], epochs=self.n_epoch, bs=self.dls.train.bs,
                         weights=[p.detach().clone() for p in params(self.learn.model[0])], loss=self.loss_func, lrs=[], targ=[])
        Spy.seen.append(self.note)
    def before_batch(self):
        if self.training: self.note['targ'].append(self.y.clone())
    def after_batch(self):
        if self.training: self.note['lrs'].append(self.opt.hypers[-1]['lr'])
    def after_fit(self):
        self.note['model'] = self.learn.model

@pytest.fixture
def spied():
    "Compare, and return what each run was trained with"
    def _spied(losses='crossentropy', **kwargs):
        Spy.seen = []
        cmp = compare(losses, cbs=lambda loss: Spy(), **{**quick, **kwargs})
        return Spy.seen, cmp
    return _spied

# ---- the rules

def test_epochs_lr_wd_bs_are_used(spied):
    (s,), _ = spied(epochs=3, lr=3e-3, wd=0.123, bs=32)
    assert s['epochs'] == 3 and s['bs'] == 32 and s['wd'] == 0.123
    assert len(s['targ']) == 3*4 and max(s['lrs']) == pytest.approx(3e-3, rel=.02)

def test_lr_and_wd_of_a_loss_win(spied):
    losses = ['crossentropy(lr=0.002, wd=0.3)', 'center(lam=0.1, wd=[0,0.2])', CenterLoss()]
    seen, cmp = spied(losses, lr=[.01,.02], wd=.1)
    assert cmp.labels == ['crossentropy(lr=0.002, wd=0.3)', *(f'center(lam=0.1, wd={d}), lr={r}' for d in (0.,.2) for r in (.01,.02)),
                          'center, lr=0.01', 'center, lr=0.02']
    assert [s['wd'] for s in seen] == [.3, 0, 0, .2, .2, .1, .1]
    assert [r['config']['wd'] for r in cmp.results] == [s['wd'] for s in seen]
    assert [r['config']['lr'] for r in cmp.results] == [.002, .01, .02, .01, .02, .01, .02]

def test_the_same_setting_is_the_same_run(tmp_path):
    "However it is written; the result of the other text is used"
    for losses,more in ('crossentropy', dict(lr=.02, wd=.3)), ('crossentropy(lr=0.02, wd=0.3)', {}), ('crossentropy(wd=0.3)', dict(lr=.02)):
        cmp = compare(losses, out=tmp_path, **quick, **more)
        assert cmp.labels == [losses]
    assert len(read_results(tmp_path/'results.jsonl')) == 1

def test_default_weight_decay_is_fastais(spied):
    (s,), _ = spied()
    assert s['wd'] == 0.01

def test_n_feats_and_arch_are_used(spied):
    (s,), _ = spied(n_feats=5, arch='lenetpp')
    assert s['model'][0].n_feats == 5 and len(s['weights']) == len(list(lenetpp().parameters()))

def test_all_losses_start_alike_and_see_the_same_batches(spied):
    "Also the loss whose head draws random numbers, and whatever was drawn before"
    seen, _ = spied('crossentropy,center,pedcc,circlepair', seeds=2)
    for runs_of_seed in seen[:4], seen[4:]:
        first = runs_of_seed[0]
        for s in runs_of_seed[1:]:
            assert all(torch.equal(a, b) for a,b in zip(s['weights'], first['weights']))
            assert all(torch.equal(a, b) for a,b in zip(s['targ'], first['targ']))

def test_seeds_differ_in_weights_and_batches(spied):
    (a, b), _ = spied(seeds=[3,4])
    assert not torch.equal(a['weights'][0], b['weights'][0]) and not torch.equal(a['targ'][0], b['targ'][0])

def test_seeds_are_those_asked_for(spied):
    (a, b), cmp = spied(seeds=[7,1])
    again, _ = spied(seeds=[1])
    assert [r['config']['seed'] for r in cmp.results] == [7,1] and torch.equal(b['weights'][0], again[0]['weights'][0])

def test_each_run_has_its_own_loss(spied):
    seen, cmp = spied('crossentropy,center(lam=0.1)')
    assert [type(s['loss']) for s in seen] == [CrossEntropy, CenterLoss] and seen[1]['loss'].lam == 0.1
    assert [r['config']['hparams'].get('lam') for r in cmp.results] == [None, 0.1]

def moved(dls, part):
    "The labels of one part are wrong, all of them"
    ds = dls.loaders[part].dataset
    ds.y = (ds.y+1) % 10
    return dls

@pytest.fixture(scope='module')
def trained():
    "Results by which part has wrong labels; None: none has"
    def result(part):
        dls = image_dls('digits')
        if part is not None: moved(dls, part)
        return run_loss(CrossEntropy(), dls, epochs=3)
    return {part: result(part) for part in (None,1,2)}

def test_test_numbers_come_from_the_test_set(trained):
    row, said = trained[2]
    assert row['test']['accuracy'] < 0.1 < 0.8 < row['valid']['accuracy'] and row['test']['loss'] > 2
    assert row['test']['ncm_accuracy'] < 0.1  # Means come from the training images

def test_validation_numbers_come_from_the_validation_set(trained):
    row, _ = trained[1]
    assert row['valid']['accuracy'] < 0.1 < 0.8 < row['test']['accuracy'] and row['test'] == trained[None][0]['test']

def test_validation_comes_after_each_epoch_and_the_last_counts(trained):
    row, _ = trained[None]
    assert len(row['epochs']) == 3 and row['valid'] == row['epochs'][-1] != row['epochs'][0]

def test_the_last_epoch_counts_not_the_best(spied):
    class Spoil(Callback):
        "The network forgets everything before the last validation"
        def after_train(self):
            if self.epoch == 2: [torch.nn.init.zeros_(p) for p in self.learn.model.parameters()]
    cmp = compare('crossentropy', cbs=lambda loss: Spoil(), **{**quick, 'epochs': 3, 'n_train': None})
    row, = cmp.results
    assert max(e['accuracy'] for e in row['epochs']) > .8 and row['valid']['accuracy'] < .2 and row['test']['accuracy'] < .2

def test_what_is_kept_is_the_test_set_in_order(trained):
    _, said = trained[None]
    dls = image_dls('digits')
    y = dls.test.dataset.y.cpu().numpy()
    assert (said['targ'] == y).all() and said['feats'].shape == (len(y), 64)
    assert (said['pred'] == y).mean() == pytest.approx(trained[None][0]['test']['accuracy'])
    assert (said['conf'] >= said['prob']).all() and ((said['conf'] == said['prob']) == (said['pred'] == y)).mean() > .999

def test_the_test_sees_no_augmentation(monkeypatch):
    "Neither the test images nor the training images from which class means come"
    seen = []
    def watch(model, dl, *args):
        x, y = zip(*[(b[0], b[1]) for b in dl])
        seen.append(torch.cat(x).clone())
        return real(model, dl, *args)
    real = runs.get_features
    monkeypatch.setattr(runs, 'get_features', watch)
    for pad in 0,2: run_loss(CrossEntropy(), image_dls('digits', n_train=128, pad=pad), epochs=1)
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3]) and len(seen[1]) == 128

@pytest.mark.parametrize('part', ['test', 'validation'])
@pytest.mark.parametrize('how', [dict(shuffle=True), dict(bs=64, drop_last=True), dict(bs=400, drop_last=True)], ids=str)
def test_all_test_images_are_tested_in_order(part, how):
    "However their loader is made"
    dls = image_dls('digits', n_train=128, n_eval=150)
    if part == 'validation': dls.loaders = dls.loaders[:2]
    dls.loaders[-1] = dls.loaders[-1].new(**how)
    dl, what = runs.test_loader(dls)
    assert what == part and torch.equal(torch.cat([y for _,y in dl]), dls.loaders[-1].dataset.y)

def test_a_test_set_is_compared_by_image():
    dls = image_dls('digits', n_train=128, n_eval=150)
    dls.loaders[2] = dls.loaders[2].new(shuffle=True)
    cmp = compare('crossentropy,center', dls, epochs=1, seeds=2, show=False)
    said = [o['targ'] for v in cmp.outputs.values() for o in v]
    assert len(said) == 4 and all((targ == dls.loaders[2].dataset.y.numpy()).all() for targ in said)

def row(label, seed, acc, wrong=None, **test):
    config = dict(data='made up', n=[1,1,1], arch='none', n_feats=None, epochs=1, bs=1, lr=.1, seed=seed)
    return dict(key=f'{label}{seed}', label=label, config=config, versions={}, device='cpu', seconds=1., epochs=[dict(accuracy=acc)], trouble=wrong,
                test=dict(accuracy=acc, **test), valid=dict(accuracy=acc))
def made(**scores): return Comparison([row(k, i, v) for k,vs in scores.items() for i,v in enumerate(vs)])

def test_runs_on_other_images_are_not_compared_by_image():
    "Nor are the images named that they all get wrong"
    cmp = made(a=[.9,.9,.9], b=[.8,.8,.8])
    targ, feats = np.arange(400) % 2, np.zeros((400,2))
    for r in cmp.results: cmp._outputs[r['key']] = dict(targ=targ, pred=1-targ, feats=feats)
    assert cmp.by_image and len(Findings(cmp).mistakes()) == 24
    cmp._outputs['b1'] = dict(targ=1-targ, pred=targ, feats=feats)
    assert not cmp.by_image and not Findings(cmp).mistakes() and _worst([*cmp._outputs.values()], None) is None

def test_star_needs_every_other_loss():
    lead, good, bad = [.95,.962,.97], [.94,.95,.96], [.5,.5,.5]
    assert made(a=lead, b=good, c=bad).starred() == ['a']
    assert made(a=lead, b=lead, c=bad).starred() == [] # Better than c alone
    assert '*' in made(a=lead, b=good, c=bad).table()['test accuracy']['a'] and '*' not in made(a=lead, b=lead, c=bad).table().to_string()

def test_the_star_is_explained_where_there_is_one():
    lead, good = [.95,.962,.97], [.94,.95,.96]
    assert '* better' in made(a=lead, b=good).summary()
    assert '* better' not in made(a=lead, b=lead).summary()

def test_one_is_no_plural():
    one = made(a=[.9]).summary()
    assert '1 epoch, batch' in one and 'seed 0' in one and 'seeds 0' not in one
    assert 'each number is one run' in one and '±' not in one
    assert '±' in made(a=[.9,.91]).summary()

def test_star_needs_three_seeds_and_more_than_noise():
    assert not better([.99,.99], [.1,.1]) and made(a=[.99,.99], b=[.1,.1]).starred() == [] and made(a=[.99,.5,.9], b=[.9,.6,.85]).starred() == []

def test_star_is_paired_by_seed():
    shift = np.array([0, .2, -.2])
    assert made(a=.5+shift+[.011,.010,.012], b=.5+shift).starred() == ['a']
    assert not better(.5+shift+.01, .5+shift[::-1]+.0)

def test_star_knows_that_less_loss_is_better():
    cmp = Comparison([row(k, i, .5, loss=l*(1+i/100)) for k,l in (('a',.1),('b',.9)) for i in range(3)])
    assert cmp.starred(('test','loss')) == ['a']

def test_what_is_far_below_wins_no_column():
    "Everything at one point is compact"
    pairs = dict(a=[(.95,.2),(.96,.21),(.95,.19)], b=[(.94,.4),(.95,.43),(.94,.41)], c=[(.5,.001),(.52,.0011),(.51,.0012)])
    cmp = Comparison([row(k, i, acc, variance_ratio=v) for k,vs in pairs.items() for i,(acc,v) in enumerate(vs)])
    assert cmp.starred(('test','variance_ratio')) == ['a'] and cmp.starred(('test','intra')) == []

def test_mean_and_sample_deviation():
    assert made(a=[.90,.92,.97]).table()['test accuracy']['a'].startswith(f'0.9300 ± {np.std([.90,.92,.97], ddof=1):.4f}')

def test_what_did_not_learn_wins_nothing_and_is_marked():
    cmp = Comparison([*(row('a', i, .99, 'a diverged: try a smaller learning rate' if i == 1 else None) for i in range(3)), *(row(k, i, v*(1+i/50)) for k,v in (('b',.5),('c',.4)) for i in range(3))])
    assert cmp.starred() == ['b'] and 'a (did not learn)' in cmp.table().index and 'a diverged' in cmp.summary()

def test_a_loss_may_make_its_logits_itself():
    cmp = compare('cosface(sample=0.5)', **quick)
    accuracy, = cmp.values('cosface(sample=0.5)', 'test', 'accuracy')
    assert accuracy > 0 and len(cmp.results[0]['epochs']) == 1

def test_a_rate_that_diverges_is_told(capsys):
    cmp = compare('center', lr=1e9, **quick)
    assert 'diverged' in cmp.troubles['center'] and 'smaller learning rate' in cmp.summary()
    cmp.plot(), cmp.table()

@pytest.mark.parametrize('arch', bodies)
def test_defaults_learn(arch):
    "Each body with its default rate, on images of its kind"
    size, n = dict(small_body=(None, 600), lenetpp=(28, 600), resnet9=(16, 400), resnet18_cifar=(16, 300))[arch]
    epochs = 6 if arch == 'lenetpp' else 2 # Two features begin slowly
    result, _ = run_loss(CrossEntropy(), image_dls('digits', bs=20, n_train=n, size=size), arch, epochs=epochs)
    assert result['trouble'] is None and result['test']['accuracy'] > .3

def test_every_known_set_has_a_default_that_is_tested():
    assert set(default_arch.values()) <= set(bodies) and {a: default_lr(a) for a in bodies} == runs.default_lrs
    assert default_lr(functools.partial(lenetpp, n_feats=3)) == default_lr('lenetpp') == 2e-3

def test_no_star_where_no_other_loss_learned():
    cmp = Comparison([*(row('a', i, .1, 'a did not learn', variance_ratio=.1) for i in range(3)), *(row('b', i, .5, variance_ratio=.4) for i in range(3))])
    assert cmp.starred() == cmp.starred(('test','variance_ratio')) == []

def test_learning_is_more_than_luck():
    "Less than five of 1,000 runs that guess seem to learn"
    targ = torch.arange(200) % 10
    p, luck = guessing(targ, 10)
    lucky = binom.ppf(.995, len(targ), p)/len(targ)
    assert trouble('center', False, lucky, (p,luck), .01) and not trouble('center', False, lucky+.02, (p,luck), .01)

def test_what_is_advised_is_what_may_help():
    "Where nothing was learned the rate may be too small; what a search found is not advised again"
    few, wild = trouble('a', False, .1, (.1,.03), .01), trouble('a', True, 0., (0,0), .01)
    assert 'more epochs' in few and 'smaller' not in few and 'find' in few and 'smaller learning rate than 0.01' in wild
    found = trouble('a', False, .1, (.1,.03), 3.311e-4, found=True)
    assert '0.000331, which the search found' in found and "'find'" not in found

# ---- what it costs

def sizes(n_train, n_test):
    "Loaders of so many images in batches of 10"
    class Loader(list):
        dataset = property(lambda self: range(10*len(self)))
        def new(self, **kwargs): return self
    loaders = [Loader(range(n//10)) for n in (n_train, n_test, n_test)]
    return SimpleNamespace(c=10, device='cpu', train=loaders[0], valid=loaders[1], loaders=loaders)

def test_estimate_counts_all_that_is_done():
    dls = sizes(1000, 200)
    assert estimate(dls, 3, (1., .5)) == 3*(100*1 + 20*.5) + (20+100)*.5
    assert estimate(dls, 3, (1., .5), search=100) == estimate(dls, 3, (1., .5)) + 100

def test_what_is_said_to_be_shorter_is_shorter(capsys):
    def said(dls):
        _announce(dls, 'lenetpp', 2, 6, 1000., 1)
        return capsys.readouterr().out
    large, small = said(sizes(3000, 2000)), said(sizes(100, 1000))
    assert '6 runs of 2 epochs after 1 for the head alone on 3,000 images' in large
    assert 'n_train=300 ' in large and 'n_eval=1000' in large
    assert 'n_train' not in small and 'n_eval' not in small and 'fewer epochs or seeds' in small
    assert 'only 20 training steps' in small and 'training steps' not in large

def test_the_work_of_all_inputs_is_counted():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2,4), nn.Linear(3,4)
        def forward(self, x, z): return self.a(x)+self.b(z)
    assert runs.multiply_adds(Both(), torch.zeros(5,2), torch.zeros(5,3)) == 5*4*(2+3)

# ---- the data

def test_a_folder_is_what_the_loaders_take_for_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path))
    for name in 'cifar10', 'photos': (tmp_path/name).mkdir()
    assert choose_arch('photos') == choose_arch('~/photos') == choose_arch(Path('cifar10')) == ('resnet18', True)
    assert choose_arch('cifar10') == ('resnet9', False) and choose_arch('') == choose_arch('~/none') == ('small_body', False)

def test_loaders_are_normalized_for_each_network():
    "And stay as they are; one of them was made from another"
    def loader(): return TfmdDL([(TensorImage(torch.ones(3,4,4)), TensorCategory(0))]*4, bs=2, num_workers=0)
    valid = loader()
    dls = DataLoaders(loader(), valid, valid.new())
    def first(dls): return [dl.one_batch()[0][0,:,0,0].tolist() for dl in dls.loaders]
    for arch in 'resnet18', 'vit_tiny_patch16_224', 'resnet18':
        mean, std = map(torch.tensor, runs.arch_stats(arch))
        found = runs.normalize_for(dls, arch)
        for v in first(found): assert v == pytest.approx(((1-mean)/std).tolist())
        assert runs.normalize_for(found, 'vit_tiny_patch16_224') is found and first(dls) == [[1,1,1]]*3
        assert found.train.dataset is dls.train.dataset

def vectors(y=None, cls=TfmdDL, **kwargs):
    "Loaders of 40 vectors in two classes"
    ds = TensorDataset(torch.randn(40, 6), torch.arange(40) % 2 if y is None else y)
    dls = DataLoaders(*(cls(ds, batch_size=8, num_workers=0, **kwargs) for _ in range(3)))
    dls.c = 2
    return dls
def on_vectors(n_in): return Body(nn.Linear(n_in, 3), n_feats=3)

def test_what_are_no_images_is_compared_too():
    cmp = compare('crossentropy,center', vectors(), on_vectors, epochs=1, seeds=2, show=False)
    assert cmp.by_image and cmp.worst is None and 'crossentropy' in report_html(cmp)

@pytest.mark.parametrize('channels', [1, 2, 3, 4])
def test_images_of_any_channels_are_shown(channels):
    from discloss.compare import _pixels
    shown = _pixels(torch.rand(5, channels, 8, 6))
    assert shown.shape == (5,8,6,3) and (channels > 2 or (shown == shown[...,:1]).all())

def test_names_of_images_cost_nothing():
    from discloss.compare import _ids
    class Counted(ImageTensors):
        def __getitem__(self, i): raise AssertionError('an image was made')
    x, y = torch.zeros(3,1,4,4, dtype=torch.uint8), torch.tensor([0,1,0])
    assert _ids(Counted(x, y, ['a','b']), [2,0]) == ['#2','#0']
    assert _ids(Counted(x, y, ['a','b'], files=['p','q','r']), [2,0]) == ['r','p']

# ---- the picture

def pictured(losses, vocab, seeds=3, failed=()):
    "A comparison with features of classes with these names"
    rng, targ = np.random.default_rng(0), np.tile(np.arange(len(vocab)), 6).astype(np.int32)
    means, rows, said = 5*rng.normal(size=(len(vocab), 8)), [], {}
    for i,k in enumerate(losses):
        for s in range(seeds):
            bad = f'{k} diverged' if k in failed else None
            rows.append(row(k, s, None if bad else .9+.01*i+.001*s, bad, variance_ratio=None if bad else .1+.01*i))
            feats = (means[targ]+rng.normal(size=(len(targ), 8))).astype(np.float16)
            if not bad: said[f'{k}{s}'] = dict(targ=targ, feats=feats)
    return Comparison(rows, said, list(vocab))

def boxes_of(fig):
    "Where each text is that stands beside an axis, above a panel, or in a legend"
    fig.draw_without_rendering()
    frame, found = fig.bbox.extents, []
    for ax in fig.findobj(Axes):
        if not ax.axison: continue
        box = ax.get_window_extent()
        assert min(box.width, box.height) > 1.2*fig.dpi, 'a panel is too small'
        marks = [t.label1 for a in (ax.xaxis,ax.yaxis) for t in a.get_major_ticks() if a.get_view_interval()[0] <= t.get_loc() <= a.get_view_interval()[1]]
        found += [t for t in (*marks, ax.title, ax.xaxis.label, ax.yaxis.label) if t.get_text()]
    for legend in fig.findobj(Legend): found += legend.get_texts()
    boxes = [(t.get_text(), t.get_window_extent().extents) for t in found]
    for text,b in boxes: assert frame[0] <= b[0] and frame[1] <= b[1] and b[2] <= frame[2] and b[3] <= frame[3], f'{text!r} leaves the picture'
    return boxes

long = [f'{a} {b}' for b in ('Grasshopper Warbler','Shearwater (Mediterranean)','Scissor-tailed Hummingbird') for a in ('Lesser','Great_Crested','Black-throated','Red-necked','White-winged')]
pictures = {'two classes': (['crossentropy','center'], ['cat','dog']), 'long names': (['crossentropy','arcface(scale=30.0, margin=0.3)','center(lam=0.001, alpha=0.5), lr=0.001'], [f'{n} {i}' for i in range(2) for n in long]),
            'a hundred classes': (['crossentropy','center'], [f'{n} {i}' for i in range(7) for n in long][:100]), 'one loss': (['center'], list('abc')),
            'fourteen losses': ([f'loss{i}(lam={i})' for i in range(13)]+['crossentropy'], ['yes','no'])}

@pytest.mark.parametrize('case', pictures)
def test_nothing_in_the_picture_covers_anything(case):
    fig = pictured(*pictures[case]).plot()
    boxes = boxes_of(fig)
    for i,(s,a) in enumerate(boxes):
        for t,b in boxes[:i]:
            assert min(a[2],b[2])-max(a[0],b[0]) < 1 or min(a[3],b[3])-max(a[1],b[1]) < 1, f'{s!r} and {t!r} overlap'

def texts_of(fig): return [t.get_text() for t in fig.findobj(Text)]

def test_the_picture_has_the_best_losses_and_names_the_rest():
    losses, vocab = pictures['fourteen losses']
    texts = texts_of(pictured(losses, vocab, failed=['loss3(lam=3)']).plot())
    titles = [t for t in texts if t in losses]
    assert titles[:2] == ['crossentropy','loss12(lam=12)'] # The best panels come first
    assert 'features not shown: loss0(lam=0), loss3(lam=3)' in texts and 'did not learn: loss3(lam=3)' in texts

def test_a_picture_of_one_feature():
    cmp = compare('crossentropy', n_feats=1, **quick)
    feats, _ = cmp.feats['crossentropy']
    assert feats.shape[1] == 2 and not feats[:,1].any()
    assert texts_of(cmp.plot())

def test_a_picture_of_nothing_that_learned():
    texts = texts_of(pictured(['center','crossentropy'], ['cat','dog'], failed=['center','crossentropy']).plot())
    assert texts.count('diverged') == 4 # Both losses, in both panels of scores

# ---- the key: change a part, expect a new run

class OwnLoss(CenterLoss):
    def loss(self, logits, feats, centers, targ): return super().loss(logits=logits, feats=feats, centers=centers, targ=targ)*1.
class OwnLossEdited(CenterLoss):
    def loss(self, logits, feats, centers, targ): return super().loss(logits=logits, feats=feats, centers=centers, targ=targ)*2.
OwnLossEdited.__name__ = OwnLossEdited.__qualname__ = 'OwnLoss'

class Own(Callback):
    def __init__(self, value): self.value = value

def pixels(change):
    dls = image_dls('digits', n_train=128)
    for i,dl in enumerate(dls): change(i, dl.dataset)
    return dls
def noise(i, ds): ds.x[1:] = 255-ds.x[1:]
def one_pixel(i, ds): ds.x[3,0,0,0] += i == 0
def shifted(i, ds): ds.x = ds.x.roll(1, -1) if i == 0 else ds.x
def rolled(i, ds): ds.x = ds.x.roll(1, 0) if i == 2 else ds.x
def mirrored(i, ds): ds.x = ds.x.flip(-1)
def transposed(i, ds): ds.x = ds.x.transpose(-1, -2)
def label(i, ds): ds.y[0] = (ds.y[0]+1) % 10 if i == 2 else ds.y[0]
def wide(n): return lambda n_in: small_body(n_in, width=n)

base = dict(losses='center', data='digits', **quick)
parts = {
    'loss': dict(losses='crossentropy'), 'hyper-parameter': dict(losses='center(lam=0.1)'), 'code of the loss': dict(losses=[OwnLoss()]), 'edited code of the loss': dict(losses=[OwnLossEdited()]),
    'epochs': dict(epochs=2), 'lr': dict(lr=1e-3), 'wd': dict(wd=0.5), 'bs': dict(bs=32), 'its own lr': dict(losses='center(lr=0.002)'), 'its own wd': dict(losses='center(wd=0.3)'), 'seed': dict(seeds=[5]), 'n_feats': dict(n_feats=8),
    'arch': dict(arch='lenetpp'), 'a function as arch': dict(arch=wide(8)), 'another function of its name': dict(arch=wide(16)), 'a partial': dict(arch=functools.partial(small_body, width=8)),
    'another partial': dict(arch=functools.partial(small_body, width=16)), 'n_train': dict(n_train=120), 'valid_pct': dict(valid_pct=.3), 'size': dict(size=16), 'channels': dict(channels=3),
    'augmentation': dict(pad=1), 'flip': dict(flip=True), 'stats': dict(stats=([.5],[.9])),
    'a callback': dict(cbs=lambda loss: Own(1)), 'its attribute': dict(cbs=lambda loss: Own(2)), 'a tuple as attribute': dict(cbs=lambda loss: Own((1,2))), 'another tuple': dict(cbs=lambda loss: Own((1,3))),
    'nested attribute': dict(cbs=lambda loss: Own([{'a': torch.zeros(2)}])), 'other nested attribute': dict(cbs=lambda loss: Own([{'a': torch.ones(2)}])),
    **{f'images: {f.__name__}': dict(data=functools.partial(pixels, f)) for f in (noise, one_pixel, shifted, rolled, mirrored, transposed, label)}}

def done(tmp, change, **more):
    "Lines of results after a comparison"
    args = {**base, **change, **more}
    if callable(args['data']): args = {k: v for k,v in args.items() if k != 'n_train'} | dict(data=args['data']())
    compare(out=tmp, **args)
    return len((tmp/'results.jsonl').read_text().splitlines())

@pytest.fixture(scope='module')
def keys(tmp_path_factory):
    "All changes in one folder: how many results there are after each, and after each once more"
    tmp, counts = tmp_path_factory.mktemp('keys'), {}
    instant = runs.run_loss
    def fake(loss, dls, **kwargs): # The key is made before the run; the run itself is not needed
        e = dict(accuracy=.5, train_loss=1., valid_loss=1.)
        return dict(valid=e, test=dict(accuracy=.5), epochs=[e]*kwargs['epochs'], seconds=1., lr=1., trouble=None, parameters=1), None
    import discloss.compare
    module = sys.modules['discloss.compare']
    real, module.run_loss = module.run_loss, fake
    try:
        before = done(tmp, {})
        for part,change in parts.items():
            after = done(tmp, change)
            counts[part] = after-before, done(tmp, change)-after
            before = after
        counts['nothing'] = 1, done(tmp, {})-before
    finally: module.run_loss = real
    return counts

@pytest.mark.parametrize('part', [*parts, 'nothing'])
def test_key(part, keys):
    new, again = keys[part]
    assert new == 1, f'{part} is not in the key'
    assert again == 0, f'with the same {part} the run was done again'

def test_key_holds_the_version(tmp_path):
    import discloss.compare
    module = sys.modules['discloss.compare']
    compare('crossentropy', out=tmp_path, **quick)
    old, module.__version__ = module.__version__, '99'
    try: cmp = compare('crossentropy', out=tmp_path, **quick)
    finally: module.__version__ = old
    assert len(read_results(tmp_path/'results.jsonl')) == 2

class Activated(DiscLoss):
    def loss(self, logits, targ): return F.cross_entropy(self.act(logits), targ, reduction='none')

@pytest.mark.parametrize('name, values', dict(act=(nn.LeakyReLU(.1), nn.LeakyReLU(.2)), _k=(1, 2)).items())
def test_the_key_holds_all_that_was_given_to_a_loss(name, values):
    from discloss.compare import _loss_config
    def key(value, used=False):
        loss = Activated()
        setattr(loss, name, value)
        if used: loss._seen.add('a shape')
        return _loss_config(loss)
    assert key(values[0]) == key(values[0], used=True) != key(values[1])

def test_what_cannot_be_described_is_never_reused(tmp_path):
    for n in 1,2:
        compare('crossentropy', out=tmp_path, cbs=lambda loss: Own(i for i in 'ab'), **quick)
        assert len(read_results(tmp_path/'results.jsonl')) == n

def own_pictures(folder, **kwargs):
    "Loaders of 16 pictures named in a table"
    rows = [(f'{i}.png', 'ab'[i%2]) for i in range(16)]
    for name,_ in rows:
        noise = np.random.default_rng(len(name)).integers(0, 255, (8,8,3), dtype=np.uint8)
        Image.fromarray(noise).save(folder/name)
    df = pd.DataFrame(rows, columns=['file','label']).sample(frac=1, random_state=0)
    how = dict(fn_col='file', label_col='label', bs=4, seed=0, num_workers=0)
    return ImageDataLoaders.from_df(df, folder, **{**how, **kwargs})

def test_worst_images_of_a_table_have_names(tmp_path):
    dls = own_pictures(tmp_path, valid_pct=0.5)
    cmp = compare('crossentropy', dls, 'small_body', epochs=1, seeds=1, show=False)
    names = dls.valid_ds.items.file.tolist()
    assert [*cmp.worst['ids']] == [names[i] for i in cmp.worst['index']]

def test_what_would_stop_a_run_stops_before_it(tmp_path, monkeypatch):
    import discloss.compare
    monkeypatch.setattr(sys.modules['discloss.compare'], 'run_loss', None)
    def said(losses='center', dls='digits', error=ValueError, **kwargs):
        with pytest.raises(error) as e: compare(losses, dls, epochs=1, seeds=1, **kwargs)
        return str(e.value)
    dls = own_pictures(tmp_path, valid_pct=0.)
    assert 'validation loader has no batch: 0 samples' in said(dls=dls, arch='small_body')
    dls = own_pictures(tmp_path, valid_pct=0.5, bs=64)
    assert '8 samples make none of 64' in said(dls=dls, arch='small_body')
    dls = image_dls('digits', n_train=128)
    dls.test.dataset.y[3] = 17
    assert 'test labels must be in 0..9, got 17' in said(dls=dls)
    dls.loaders[2] = dls.test_dl([dls.valid_ds.x[0]]*20)
    assert 'the test images have no labels' in said(dls=dls)
    assert 'got torch.utils.data' in said(dls=vectors(cls=TorchLoader), arch=on_vectors, error=TypeError)
    dls = vectors()
    del dls.c
    assert 'set dls.c' in said(dls=dls, arch=on_vectors)
    assert "got 'none'" in said([CenterLoss(reduction='none')])
    assert 'needs a new one, got Linear' in said(error=TypeError, arch=torch.nn.Linear(2,2))
    assert 'got 3 for center' in said(error=TypeError, cbs=lambda loss: 3)

def test_the_key_holds_modules_behind_modules(tmp_path, run):
    "What a user's function reaches through other files of the user's"
    (tmp_path/'pack').mkdir()
    (tmp_path/'pack/__init__.py').write_text('')
    (tmp_path/'front.py').write_text('import pack.deep, back')
    (tmp_path/'use.py').write_text('import front\ndef f(x): return front.back.g(x)')
    code = "import sys; sys.path.insert(0, '.'); import use; "
    code += 'from discloss.store import run_key; print(run_key(use.f))'
    found = set()
    for deep,back in (1,1), (1,1), (2,1), (2,2):
        (tmp_path/'pack/deep.py').write_text(f'k = {deep}')
        (tmp_path/'back.py').write_text(f'def g(x): return {back}')
        env = dict(PYTHONDONTWRITEBYTECODE='1')
        found.add(run(code, cwd=tmp_path, env=env).strip())
    assert len(found) == 3

def test_another_process_finds_the_same_key(tmp_path, run):
    code = f"""
from functools import partial
from discloss.bodies import small_body
from discloss.compare import compare
compare('center', arch=partial(small_body, width=8), n_train=128, epochs=1, seeds=1, show=False, out={str(tmp_path)!r})"""
    run(code), run(code)
    assert len((tmp_path/'results.jsonl').read_text().splitlines()) == 1

# ---- the store

def test_a_run_that_a_callback_stops_is_found_again(tmp_path, capsys):
    def stop(loss): return EarlyStoppingCallback(monitor='accuracy', patience=1, min_delta=.9)
    for _ in range(2): cmp = compare('crossentropy', cbs=stop, out=tmp_path, **{**quick, 'epochs': 5, 'show': True})
    said = capsys.readouterr().out
    assert len(cmp.results[0]['epochs']) == 2 and '1 of 1 runs' in said and 'passed over' not in said
    row, file = json.loads((tmp_path/'results.jsonl').read_text()), tmp_path/'results.jsonl'
    for n in 0, 6:
        file.write_text(json.dumps({**row, 'epochs': n*row['epochs'][:1]})+'\n')
        assert _incomplete(json.loads(file.read_text()))

def test_features_of_any_size_are_kept(tmp_path):
    feats = torch.tensor([[1e5,-1e9],[1.,torch.inf],[0.,2.]])
    said = runs.outputs(feats, torch.eye(3), torch.arange(3))
    save_outputs(tmp_path/'a.npz', said)
    again = load_outputs(tmp_path/'a.npz')
    assert again is not None and all((again[k] == said[k]).all() for k in said)
    assert again['feats'].tolist() == [[65504,-65504],[1,65504],[0,2]]

def test_two_processes_share_the_work(tmp_path):
    "Each run is done once, and both end with the same table"
    args = [sys.executable, '-c', 'from discloss.command import main; main()', '--epochs', '2', '--seeds', '3', '--n-train', '200', '--out', 'o']
    procs = [subprocess.Popen(args, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [p.communicate(timeout=300) for p in procs]
    assert [p.returncode for p in procs] == [0,0,0], [e for _,e in said]
    rows = [json.loads(l) for l in (tmp_path/'o'/'results.jsonl').read_text().splitlines()]
    assert len(rows) == 9 and len({r['key'] for r in rows}) == 9
    tables = {next(l for l in out.splitlines() if l.startswith('center ')) for out,_ in said}
    assert len(tables) == 1
    assert sorted(p.suffix for p in (tmp_path/'o'/'runs').iterdir()) == ['.npz']*9 and not list((tmp_path/'o').glob('*part*'))

def test_lines_that_are_no_results_are_named(tmp_path, capsys):
    args = dict(losses='crossentropy', out=tmp_path, **{**quick, 'show': True})
    compare(**args)
    row = json.loads((tmp_path/'results.jsonl').read_text())
    (tmp_path/'results.jsonl').write_text(json.dumps({**row, 'test': {}}) + '\nnonsense\n')
    capsys.readouterr()
    compare(**args)
    said = capsys.readouterr().out
    assert f"{tmp_path/'results.jsonl'}, line 1: test has no accuracy" in said and 'line 2: no result' in said

@pytest.mark.parametrize('line', [b'x'*99+b'\n', b'{"key": 1, "value": [1, 2, 3]}\n', b'9'*(2**20), b'{"key": "', b'[[[[[[[[[[', b'{"key": {' ], ids=['lines', 'objects', 'digits', 'no end', 'brackets', 'nested'])
def test_garbage_is_passed_over_quickly(line, tmp_path):
    file = tmp_path/'results.jsonl'
    with open(file, 'wb') as f:
        for _ in range(20): f.write(line*max(1, 10**6//len(line)))
    append_result(file, dict(key='a'))
    start, bad = time.process_time(), []
    assert list(read_results(file, bad=bad)) == ['a'] and bad
    assert time.process_time()-start < 5 # 20 MB

def test_nothing_of_an_earlier_comparison_is_overwritten(tmp_path, run):
    code = "from discloss.command import main\nmain([{}'--epochs', '1', '--seeds', '1', '--n-train', '128', '--out', 'o'])"
    run(code.format("'--losses', 'crossentropy', "), cwd=tmp_path)
    first = {p: p.read_bytes() for p in (tmp_path/'o').iterdir() if p.is_file() and p.name != 'results.jsonl'}
    told = run(code.format(''), cwd=tmp_path)
    where = Path('o/comparison-2')
    assert f'o holds another comparison, so this one goes to {where}' in told and f'writing the report in {where} ...' in told
    assert first and all(p.read_bytes() == b for p,b in first.items()) and (tmp_path/'o'/'comparison-2'/'table.md').is_file()
    run(code.format(''), cwd=tmp_path)
    assert not (tmp_path/'o'/'comparison-3').exists()
    assert load_comparison(tmp_path/'o').labels == ['crossentropy'] and len(load_comparison(tmp_path/'o'/'comparison-2').labels) == 3

# ---- threads

@pytest.mark.parametrize('text', ['{}', '[]', '{"runs": [{}], "vocab": [], "results": ".", "command": ""}', 'x'])
def test_a_comparison_that_is_not_whole_is_named(text, tmp_path):
    (tmp_path/'comparison.json').write_text(text)
    with pytest.raises(ValueError, match='comparison.json is not whole'): load_comparison(tmp_path)

def test_small_networks_get_one_thread(monkeypatch, spied):
    assert choose_threads(3e7, 8, 0) == 1 and [choose_threads(1e11, 8, b) for b in (0, 3, 20)] == [8, 5, 1]
    before = torch.get_num_threads()
    with threads(1): assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
