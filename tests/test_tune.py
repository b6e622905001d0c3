"A search that is cut off goes on as if it had not been: nothing is lost, nothing is tried twice."
import dataclasses
from functools import partial

import pytest

from discloss import tune as module
from discloss.bodies import small_body
from discloss.data import image_dls
from discloss.losses.center import CenterLoss
from discloss.losses.cosface import CosFaceLoss
from discloss.tune import _defaults, search_space, tune

@pytest.fixture
def search(tmp_path, monkeypatch):
    "A search without training; `cut` says in which trial it ends, and how"
    dls, calls = image_dls('digits', n_train=40, n_eval=20, bs=20), []
    def score(optuna, trial, loss, *args):
        calls.append(dict(trial.params))
        if len(calls) == search.cut: raise search.error
        return 1 - abs(trial.params['lr'] - 0.004)
    monkeypatch.setattr(module, '_score', score)
    def search(n=6, **kwargs):
        return tune('center', dls, n, arch=partial(small_body, width=4), out=tmp_path, show=False, **kwargs)
    search.calls, search.cut, search.error = calls, None, KeyboardInterrupt()
    return search

def settings(search): return [tuple(sorted(c.items())) for c in search.calls]

@pytest.mark.parametrize('cut', [1, 3])
@pytest.mark.parametrize('error', [KeyboardInterrupt, SystemExit])
def test_a_search_that_was_cut_off_goes_on(search, cut, error):
    "SystemExit leaves a trial as a kill does: it seems to run"
    search.cut, search.error = cut, error()
    with pytest.raises(error): search()
    found = search(alone=True)
    tried = settings(search)
    assert len(tried) == 7
    assert tried[cut] == tried[cut-1]
    assert len(set(tried)) == 6
    assert len(found.trials) == 6
    assert 0.01 in found.trials.lr.values # The setting as it stands is among them

def test_what_seems_to_run_may_be_another_machine_s(search):
    search.cut, search.error = 3, SystemExit()
    with pytest.raises(SystemExit): search()
    search()
    assert len(search.calls) == 7
    assert settings(search).count(settings(search)[2]) == 1

def test_a_search_that_ended_does_nothing_more(search):
    search()
    search()
    assert len(search.calls) == 6
    assert len(set(settings(search))) == 6

def test_a_search_in_pieces_is_the_search_at_once(search, tmp_path, monkeypatch):
    whole = search(12).trials
    for n in (2, 5): search(n, epochs=9)
    search.cut = len(search.calls)+1
    with pytest.raises(KeyboardInterrupt): search(12, epochs=9)
    search.cut = None
    again = search(12, epochs=9, alone=True).trials
    assert len(set(settings(search)[-13:])) == 12
    assert again[['lr','wd']].iloc[:10].equals(whole[['lr','wd']].iloc[:10])

def test_a_search_of_other_ranges_is_another_search(search, monkeypatch):
    search()
    known = CenterLoss.hypers
    wider = dataclasses.replace(known['lam'], search=(1e-5, 1.))
    monkeypatch.setattr(CenterLoss, 'hypers', dict(known, lam=wider))
    assert len(search().trials) == 6
    assert len(search.calls) == 12

def test_one_is_no_plural(search):
    assert '1 epoch, 1 trial of 1 seed' in search(1, epochs=1).conditions

def test_a_search_starts_without_a_scale_that_is_left_to_the_classes():
    loss = CosFaceLoss(scale='auto')
    assert 'scale' not in _defaults(loss, search_space(loss))
