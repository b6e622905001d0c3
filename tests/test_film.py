"FeatureFilm: what it records, that it leaves training as it was, and what it puts on a page"
import base64, json, re

import numpy as np
import pytest
import torch
import torch.nn as nn
from fastai.vision.all import Datasets, Learner, load_learner, set_seed

from discloss.callbacks import FeatureFilm, Film
from discloss.core import with_head
from discloss.geometry import get_features
from discloss.losses.center import CenterLoss

def learner(cbs=None, d=2, n_valid=30, path=None):
    set_seed(0)
    y = torch.arange(60+n_valid) % 3
    x = torch.randn(len(y), 8) + 2*torch.randn(3,8)[y]
    tfms = [[x.__getitem__],[y.__getitem__]]
    dls = Datasets(list(range(len(y))), tfms, splits=[range(60), range(60, len(y))]).dataloaders(bs=10, num_workers=0, device='cpu')
    body = nn.Sequential(nn.Linear(8,16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16,d))
    body.n_feats = d
    learn = Learner(dls, with_head(body, CenterLoss(), 3), loss_func=CenterLoss(), cbs=cbs, path=path)
    learn.remove_cbs([o for o in learn.cbs if type(o).__name__ == 'ProgressCallback'])
    learn.logger = lambda *_: None
    return learn

def test_first_and_last_frame_and_times():
    learn,film = learner(),FeatureFilm(n=25, moments=7)
    start = get_features(learn, learn.dls.valid)[0][:25]
    learn.fit(2, 1e-2, cbs=film)
    assert torch.equal(film.frames[0], start)
    feats,_,targ = get_features(learn, learn.dls.valid)
    assert torch.equal(film.frames[-1], feats[:25]) and film.targ.tolist() == targ[:25].tolist()
    assert len(film.frames) == 7 and film.times[0] == 0 and film.times[-1] == 2 and film.times == sorted(film.times)

def test_training_goes_on_as_without_it():
    plain,watched = learner(),learner(FeatureFilm(moments=10))
    for learn in plain,watched:
        set_seed(3)
        learn.fit(2, 1e-2)
    for a,b in zip(plain.model.state_dict().values(), watched.model.state_dict().values()): assert torch.equal(a, b)

def test_two_fits_are_one_film_and_lr_find_is_none():
    learn = learner(FeatureFilm(moments=4))
    learn.fit(1)
    n = len(learn.feature_film.frames)
    learn.lr_find(num_it=20, show_plot=False)
    learn.validate()
    learn.get_preds()
    assert len(learn.feature_film.frames) == n
    learn.fit(1)
    assert len(learn.feature_film.frames) == 2*n and learn.feature_film.times[-1] == 2

def test_wide_features_lie_in_the_plane_of_the_last_frame():
    film = FeatureFilm(moments=5)
    learner(d=5).fit(1, 1e-2, cbs=film)
    flat,last = film.flat(),film.frames[-1].double()
    assert flat.shape == (5,30,2)
    values = torch.linalg.svdvals(last-last.mean(0))[:2]
    assert np.square(flat[-1]).sum(0) == pytest.approx(values.square().numpy(), rel=1e-6)

def unpack(html): return json.loads(re.search(r'data = (\{.*?\}), colors', html, re.S)[1].replace('<\\/', '</'))

def test_page_holds_the_points():
    film = FeatureFilm(moments=5)
    learner().fit(1, 1e-2, cbs=film)
    html = Film({'a <b> "c"': film}).html()
    panel = unpack(html)['panels'][0]
    assert panel['title'] == 'a <b> "c"' and 'alt="Features of a &lt;b&gt;' in html
    xy = np.frombuffer(base64.b64decode(panel['xy']), '<i2').reshape(5,30,2).astype(float) - panel['zero']
    true = film.flat()
    scale = (xy*true).sum()/(true*true).sum()
    assert np.abs(xy/scale-true).max() < 1e-3*np.abs(true).max()
    assert panel['targ'] == film.targ.tolist() and panel['times'] == pytest.approx(film.times, abs=1e-3)
    assert len(html) < 300_000 and film._repr_png_()[:4] == b'\x89PNG' and 'http' not in html

def test_a_name_cannot_end_the_script():
    film = FeatureFilm(moments=2)
    learner().fit(1, cbs=film)
    assert Film({'</script><b>': film}).html().count('</script>') == 1

def test_divergence_is_said():
    film = FeatureFilm(moments=6)
    learner().fit(1, 1e-2, cbs=film)
    film.frames[-1] = film.frames[-1]*torch.nan
    film.frames[-2] = film.frames[-2].clone()
    film.frames[-2][-1,-1] = torch.inf # One value of the last column
    panel = unpack(film._repr_html_())['panels'][0]
    assert panel['title'] == 'features (diverged)' and len(panel['times']) == 4

def test_export_keeps_the_film(tmp_path):
    learn = learner(FeatureFilm(moments=3), path=tmp_path)
    learn.fit(1)
    learn.export('m.pkl')
    assert len(load_learner(tmp_path/'m.pkl').feature_film.frames) == 3
    learn.feature_film.film().save(tmp_path/'film.html')
    assert (tmp_path/'film.html').read_text().startswith('<!doctype html>')

def test_errors():
    with pytest.raises(ValueError, match='at least 2'): FeatureFilm(n=1)
    with pytest.raises(ValueError, match='no frame yet'): Film({'a': FeatureFilm()})
    with pytest.raises(TypeError, match='dict of title'): Film(FeatureFilm())
    assert FeatureFilm()._repr_html_() is None
