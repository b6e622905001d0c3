"What the study asks of its data."
import dataclasses, importlib, json
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.channelslast import ChannelsLast

from discloss import study
from discloss.bodies import resnet9, small_body
from discloss import __version__
from discloss.callbacks import PODSchedule
from discloss.data import image_dls
from discloss.evidence import (as_markdown, column_winners, cost, in_words, missing, results_folder,
                               study_rows, tier_table)
from discloss.losses.center import CenterLoss
from discloss.store import append_result

def test_frozen_features_are_of_as_many_images_as_the_tier_says(tmp_path, monkeypatch):
    asked = {}
    class Loaders: vocab = ['a', 'b']
    def image_dls(name, **kwargs):
        asked.update(kwargs)
        return Loaders()
    def features(dls): return [(torch.randn(8, 3), torch.arange(8) % 2) for _ in range(3)]
    monkeypatch.setattr(study, 'image_dls', image_dls)
    monkeypatch.setattr(study, 'frozen_features', features)
    dls = study.frozen_loaders('none', tmp_path, n_train=5, n_eval=7)
    assert (asked['n_train'], asked['n_eval']) == (5, 7)
    assert dls.c == 2

def key(tier, tmp_path, **changes):
    "The key of the first run of a tier with something changed"
    study.tiers['changed'] = dataclasses.replace(study.tiers[tier], **changes)
    study._loaders.cache_clear()
    study._data_key.cache_clear()
    try: return study._key('changed', 'center', 0, 0, tmp_path)
    finally: del study.tiers['changed']

def fewer(fold, out): return study.kept(study.digits_fold(fold), [5]*10)
def one_pixel(fold, out):
    dls = study.digits_fold(fold)
    dls.test.dataset.x[0,0,0,0] += 1
    return dls

changes = dict(arch=dict(arch=partial(small_body, width=8)), epochs=dict(epochs=3), trials=dict(trials=1),
               tries=dict(tries=5), images=dict(loaders=fewer),
               callbacks=dict(cbs=(ChannelsLast,)), pixel=dict(loaders=one_pixel))

@pytest.mark.parametrize('tier, laid', [('digits', torch.contiguous_format), ('cifar10', torch.channels_last)])
def test_a_network_is_laid_out_as_its_tier_says_in_the_search_and_in_the_run(tier, laid, monkeypatch):
    entry, dls, seen = study.entries()['pod'], image_dls('digits', n_train=40, n_eval=20, bs=20), []
    t = dataclasses.replace(study.tiers[tier], loaders=None, arch=partial(resnet9, width=2), epochs=1, trials=1,
                            tries=1)
    def look(self):
        seen.append(next(p for p in self.learn.model.parameters() if p.ndim == 4 and p.shape[1] > 1))
    monkeypatch.setattr(PODSchedule, 'after_fit', look, raising=False) # The entry's own callback is there too
    loss, lr, wd = study._setting(t, entry, dls, None)
    study._one_run(t, entry, loss, dls, None, lr, wd, 0)
    assert len(seen) == 2
    assert all(w.is_contiguous(memory_format=laid) for w in seen)

@pytest.mark.parametrize('change', changes)
def test_what_a_tier_is_decides_the_key_of_its_runs(change, tmp_path):
    same = key('digits', tmp_path)
    assert key('digits', tmp_path) == same
    assert key('digits', tmp_path, **changes[change]) != same

def test_what_is_searched_decides_the_key_of_its_runs(tmp_path, monkeypatch):
    same = key('digits', tmp_path)
    known = CenterLoss.hypers
    wider = dataclasses.replace(known['lam'], search=(1e-5, 1.))
    monkeypatch.setattr(CenterLoss, 'hypers', dict(known, lam=wider))
    other_range = key('digits', tmp_path)
    monkeypatch.setattr(CenterLoss, 'hypers', known)
    assert key('digits', tmp_path) == same != other_range
    fewer = dict(study.entries(), center=study.Entry(CenterLoss, ('lam',)))
    monkeypatch.setattr(study, 'entries', lambda: fewer)
    assert key('digits', tmp_path) != same

def test_a_line_of_another_kind_stops_no_study(tmp_path, monkeypatch, capsys):
    (tmp_path/'digits.jsonl').write_text('{"key": "a"}\n{"key": "b", "setting": null}\n')
    monkeypatch.setattr(study, 'run_one', lambda *args: None)
    study.run_study(['digits'], tmp_path)
    assert 'digits: 0 of 380 runs are there' in capsys.readouterr().out

def test_a_torn_reading_is_passed_over(tmp_path):
    file = tmp_path/'bench.jsonl'
    row = ('{"loss": "center", "batch": 256, "features": 512, "dtype": "float32", "mode": "eager", '
           '"step": "head and loss", "classes": 1000, "relative": 1.25, "device": "cpu"}')
    file.write_text(row + '\n\n{"loss": "cen', encoding='utf-8')
    assert '1.25 times' in cost('center', file)
    assert cost('crossentropy', file) == 'The costs of all other losses are relative to cross-entropy.'

def test_a_tier_without_runs_has_the_columns_of_one_with_runs(tmp_path):
    empty = tier_table('digits', tmp_path)
    assert list(empty.columns) == list(tier_table('characters').columns)
    assert as_markdown(empty).startswith('| loss |')
    assert in_words(empty) == ''

@pytest.mark.parametrize('name', ['label','fold','seed','setting','n','right','test','seconds'])
def test_a_run_that_lacks_something_is_named(name, tmp_path):
    line = (results_folder()/'characters.jsonl').read_text(encoding='utf-8').splitlines()[3]
    row = json.loads(line)
    del row[name]
    (tmp_path/'characters.jsonl').write_text(json.dumps(row)+'\n')
    with pytest.raises(ValueError, match=f'characters.jsonl: a run has no {name}'):
        study_rows('characters', tmp_path)

@pytest.mark.parametrize('right', ['00', 'xyz', 5])
def test_answers_that_were_cut_are_named(right, tmp_path):
    line = (results_folder()/'characters.jsonl').read_text(encoding='utf-8').splitlines()[3]
    row = dict(json.loads(line), right=right)
    (tmp_path/'characters.jsonl').write_text(json.dumps(row)+'\n')
    with pytest.raises(ValueError, match='must be 62 hexadecimal digits'):
        study_rows('characters', tmp_path)

def test_tiers_share_the_minutes_evenly(monkeypatch, capsys, tmp_path):
    clock, done = [0.], []
    monkeypatch.setattr(study.time, 'monotonic', lambda: clock[0])
    def run(tier, label, fold, seed, out):
        done.append(tier)
        clock[0] += 60
    monkeypatch.setattr(study, 'run_one', run)
    study.main(['gpu', '--minutes', '20', '--out', str(tmp_path)])
    counts = [done.count(t) for t in study.gpu_tiers]
    assert all(4 <= n <= 5 for n in counts) and sum(counts) <= 25
    assert 'mnist_lenetpp: 0 of 21 runs are there' in capsys.readouterr().out

def test_a_study_that_is_stopped_says_so_in_a_sentence(monkeypatch, tmp_path):
    def run(*args): raise KeyboardInterrupt
    monkeypatch.setattr(study, 'run_one', run)
    with pytest.raises(SystemExit, match='stopped; finished runs and trials are kept in'):
        study.main(['digits', '--out', str(tmp_path)])

def test_time_that_a_finished_tier_leaves_goes_to_the_rest(monkeypatch, tmp_path):
    clock, done = [0.], []
    monkeypatch.setattr(study.time, 'monotonic', lambda: clock[0])
    def run(tier, label, fold, seed, out):
        done.append(tier)
        clock[0] += 0 if tier == 'mnist_lenetpp' else 60
    monkeypatch.setattr(study, 'run_one', run)
    study.run_study(['mnist_lenetpp', 'cifar10_resnet9'], tmp_path, minutes=20)
    assert done.count('mnist_lenetpp') == 42 and done.count('cifar10_resnet9') == 21

@pytest.mark.parametrize('minutes', ['-1', 'nan', 'inf', 'ten'])
def test_minutes_that_are_none(minutes, capsys):
    with pytest.raises(SystemExit): study.main(['gpu', '--minutes', minutes])
    assert 'minutes' in capsys.readouterr().err

@pytest.mark.parametrize('tier', study.gpu_tiers)
def test_networks_of_the_gpu_tiers_fit_their_images(tier):
    channels, size = (1, 28) if tier.startswith('mnist') else (3, 32)
    body = study.tiers[tier].arch(n_in=channels)
    assert body.eval()(torch.zeros(2, channels, size, size)).shape == (2, body.n_feats)

@pytest.mark.parametrize('tier', study.gpu_tiers)
def test_heads_of_the_gpu_tiers_fit_their_networks(tier):
    t = study.tiers[tier]
    body = t.arch(n_in=1 if tier.startswith('mnist') else 3)
    for label in t.only: study.entries()[label].make().head(body.n_feats, t.classes)

@pytest.fixture
def features(tmp_path, monkeypatch):
    "Frozen loaders of random features; calls are counted"
    calls = []
    class Loaders: vocab = ['a', 'b']
    def image_dls(name, n_train, n_eval, **kwargs): return Loaders(), n_train, n_eval
    def made(dls):
        calls.append(1)
        return [(torch.randn(n or 20, 3), torch.arange(n or 20) % 2) for n in (dls[1], dls[2], dls[2])]
    class Pair(tuple): vocab = Loaders.vocab
    monkeypatch.setattr(study, 'image_dls', lambda *args, **kwargs: Pair(image_dls(*args, **kwargs)))
    monkeypatch.setattr(study, 'frozen_features', made)
    def load(**sizes): return [len(dl.dataset) for dl in study.frozen_loaders('none', tmp_path, **sizes).loaders]
    load.calls = calls
    return load

@pytest.mark.parametrize('keep', [0, 20, 0.5, 0.999])
def test_damaged_features_are_made_anew(features, tmp_path, keep):
    features(n_train=8, n_eval=6)
    file, = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:keep if keep > 1 else int(keep*len(whole))])
    assert features(n_train=8, n_eval=6) == features(n_train=8, n_eval=6) == [8, 6, 6]
    assert len(features.calls) == 2
    assert [f.name for f in tmp_path.iterdir()] == [file.name]

def test_features_of_other_sizes_are_others(features):
    assert features(n_train=8, n_eval=6) == [8, 6, 6]
    assert features(n_train=10, n_eval=6) == [10, 6, 6]
    assert features(n_train=8) == [8, 20, 20]
    assert features() == [20, 20, 20]
    assert features(n_train=8, n_eval=6) == [8, 6, 6]
    assert len(features.calls) == 4

@pytest.mark.parametrize('text', ['a/b', '1/2/3', '1', '3/2', '0/2', '1/0', '-1/2', '1.5/2', '', '/'])
def test_a_part_that_cannot_be_is_refused_in_words(text, capsys):
    with pytest.raises(SystemExit): study.main(['digits', f'--shard={text}'])
    assert 'must be i/n with i in 1..n, such as 1/2' in capsys.readouterr().err

def test_a_part_is_read(): assert study._shard('2/3') == study._shard(' 2 / 3 ') == (2, 3)

@pytest.mark.parametrize('command', ['study', 'claims'])
def test_a_file_where_a_folder_must_be_is_named(command, tmp_path, capsys):
    main = importlib.import_module(f'discloss.{command}').main
    file = tmp_path/'file'
    file.write_text('x')
    args = ['digits', f'--out={file}'] if command == 'study' else [f'--out={file}/claims.jsonl']
    with pytest.raises(SystemExit): main(args)
    assert f'--out: {file} must be a folder, but a file is in the way' in capsys.readouterr().err

def test_claims_go_into_a_file(tmp_path, capsys):
    from discloss.claims import main
    with pytest.raises(SystemExit): main([f'--out={tmp_path}'])
    assert 'is a folder, a file is wanted' in capsys.readouterr().err

def made_up(folder, accuracies, n=400, version=__version__):
    "Rows of the digits tier: label -> share of right answers"
    folder.mkdir(exist_ok=True)
    rng, t = np.random.default_rng(0), study.tiers['digits']
    setting = dict(epochs=t.epochs, trials=t.trials, tries=t.tries)
    for label,accuracy in accuracies.items():
        for fold in range(5):
            right = np.packbits(rng.random(n) < accuracy).tobytes().hex()
            row = dict(key=f'{label} {fold} {version}', label=label, fold=fold, seed=0, right=right,
                       n=[0,0,n], seconds=1., setting=setting, versions=dict(discloss=version),
                       test=dict(accuracy=accuracy, variance_ratio=.1))
            append_result(folder/'digits.jsonl', row)
    return tier_table('digits', folder)

def test_far_below_is_measured_from_cross_entropy(tmp_path):
    table = made_up(tmp_path, dict(crossentropy=.80, center=.95, pod=.76, cc=.40))
    assert table.kept.to_dict() == dict(crossentropy=True, center=True, pod=True, cc=False)
    assert table.word['cc'] == 'far below'
    assert np.isnan(table.compact['cc'])
    assert np.isfinite(table.compact['pod'])

def test_losses_of_other_packages_have_a_table_of_their_own(tmp_path):
    made_up(tmp_path, dict(crossentropy=.9, center=.9, supcon=.9))
    assert list(tier_table('digits', tmp_path).index) == ['crossentropy', 'center']
    assert list(tier_table('digits', tmp_path, only=['supcon']).index) == ['crossentropy', 'supcon']

def test_only_planned_runs_are_counted(tmp_path):
    made_up(tmp_path, dict(crossentropy=.9, gone=.9))
    assert missing('digits', tmp_path).startswith('5 of 380 runs')
    assert study._todo('digits', tmp_path).startswith('digits: 5 of 380 runs')

def test_rows_of_this_version_count_wherever_they_stand(tmp_path):
    made_up(tmp_path, dict(crossentropy=.9))
    table = made_up(tmp_path, dict(crossentropy=.5), version='0.0.1')
    assert table['mean']['crossentropy'] > .8

def test_a_winner_beats_all_others_by_more_than_the_noise(tmp_path):
    made_up(tmp_path, dict(crossentropy=.80, center=.95, pod=.80))
    assert column_winners('digits', tmp_path)['accuracy'] == 'center'
    made_up(tmp_path/'near', dict(crossentropy=.80, center=.805, pod=.80))
    assert column_winners('digits', tmp_path/'near')['accuracy'] is None
