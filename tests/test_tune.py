"A search that is cut off goes on as if it had not been: nothing is lost, nothing is tried twice."
import dataclasses, re, time
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from discloss import tune as module
from discloss.bodies import small_body
from discloss.command import main, tune_main
from discloss.core import Choice, DiscLoss, Number
from discloss.data import image_dls
from discloss.losses.center import CenterLoss
from discloss.losses.cosface import CosFaceLoss
from discloss.losses.cross_entropy import CrossEntropy
from discloss.metric import AnyPML, FocalLoss, LogitAdjustedLoss, references
from discloss.runs import arch_name
from discloss.specs import all_losses, loss_label, parse_entries
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
        how = dict(arch=partial(small_body, width=4), out=tmp_path, show=False)
        return tune('center', dls, n, **{**how, **kwargs})
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

def wider_body(n_in=1, n_feats=8): return small_body(n_in, n_feats, width=5)

@pytest.mark.parametrize('change', ['package', 'network'])
def test_a_search_with_other_code_is_another_search(change, search, monkeypatch):
    search(2)
    search(2)
    assert len(search.calls) == 2
    arch = partial(small_body, width=4)
    if change == 'package': monkeypatch.setattr('discloss.compare.__version__', '9.9.9')
    else:
        wider_body.__name__ = arch_name(arch)
        arch = wider_body
    assert len(search(2, arch=arch).trials) == 2
    assert len(search.calls) == 4

def test_one_is_no_plural(search):
    assert '1 epoch, 1 trial of 1 seed' in search(1, epochs=1).conditions

def test_a_search_starts_without_a_scale_that_is_left_to_the_classes():
    loss = CosFaceLoss(scale='auto')
    assert 'scale' not in _defaults(loss, search_space(loss))

# What cannot be searched is refused before work

@pytest.mark.parametrize('wrong, says', [
    (dict(n_trials=0), 'n_trials must be a whole number, at least 1, got 0'),
    (dict(n_trials=-1), 'n_trials must be'), (dict(seeds=0), 'seeds must be'), (dict(seeds=[0,1]), 'seeds must be'),
    (dict(epochs=0), 'epochs must be'), (dict(epochs=-1), 'epochs must be'), (dict(n_threads=0), 'threads must be'), (dict(n_feats=0), 'n_feats must be'),
    (dict(lr=0), 'lr must be positive'), (dict(lr='find'), 'lr must be positive, rates around it'),
    (dict(names='lam'), "names must be a list of names, got 'lam'"),
    (dict(loss=torch.nn.CrossEntropyLoss()), r'loss must be a name or an instance of DiscLoss, got CrossEntropyLoss\(\)'),
    (dict(loss=CenterLoss), 'loss must be a name or an instance of DiscLoss'),
    (dict(storage='nonsense'), "storage must be a URL that Optuna can open, .*'nonsense'"),
    (dict(storage='nosuch:///x'), 'storage must be a URL'), (dict(out=__file__), 'must be a folder'),
    (dict(out=__file__+'/more'), 'must be a folder')])
def test_one_clear_error_for_a_wrong_budget(wrong, says, digits, monkeypatch):
    monkeypatch.setattr(module, '_score', None) # No trial begins
    with pytest.raises((ValueError, TypeError, OSError), match=says):
        tune(**{**dict(loss='center', data=digits, n_trials=1, show=False), **wrong})

@pytest.fixture(scope='module')
def digits(): return image_dls('digits', n_train=40, n_eval=20, bs=20)

def own(g, value=None):
    "A loss of one's own with one hyper-parameter"
    class Own(DiscLoss):
        hypers = dict(g=g)
        def __init__(self, g=value):
            super().__init__()
            self.set_hparams(g=g)
        def loss(self, logits, targ): return F.cross_entropy(logits, targ, reduction='none')
    return Own()

def test_a_hyper_parameter_called_lr_has_no_place(digits):
    class Own(DiscLoss):
        hypers = dict(lr=Number(0, search=(.5, 2.)))
        def __init__(self, lr=1.):
            super().__init__()
            self.set_hparams(lr=lr)
    with pytest.raises(ValueError, match=r"needs another name for \['lr'\]"): tune(Own(), digits)

# Choices

choices = dict(tuples=((1,2),(3,4)), functions=(torch.relu,torch.tanh), alike=(None,'None',1,'1'), words=('a','b'))

@pytest.mark.parametrize('journal', [False, True])
@pytest.mark.parametrize('kind', choices)
def test_choices_need_not_be_json(kind, journal, digits, tmp_path, monkeypatch):
    values, tried = choices[kind], []
    def score(optuna, trial, loss, *args):
        tried.append(loss.g)
        return 1. if loss.g == values[-1] else 0.
    monkeypatch.setattr(module, '_score', score)
    for _ in range(2):
        loss = own(Choice(values, search=True), values[0])
        found = tune(loss, digits, 30, show=False, out=tmp_path if journal else None)
    assert len(tried) == (30 if journal else 60)
    assert tried[0] is values[0] or tried[0] == values[0]
    assert {(type(v), v) for v in tried} == {(type(v), v) for v in values}
    assert (type(found.loss.g), found.loss.g) == (type(values[-1]), values[-1])

# Names that a text sets stay fixed

@pytest.mark.parametrize('loss, names, searched', [
    ('center(alpha=0.1)', None, {'lam'}), ('center', None, {'lam','alpha'}), ('center(lam=0.1,alpha=0.1)', None, set()),
    (CenterLoss(alpha=0.1), None, {'lam','alpha'}), ('center(alpha=0.1)', ['alpha'], {'alpha'})])
def test_what_the_text_sets_stays_fixed(loss, names, searched, digits, monkeypatch):
    monkeypatch.setattr(module, '_score', lambda *args: 1.)
    found = tune(loss, digits, 2, names, show=False)
    assert set(found.space) == searched
    if 'alpha' not in searched and loss != 'center': assert found.loss.alpha == 0.1

@pytest.mark.parametrize('loss, names, searched', [
    ('crossentropy', None, set()), (CrossEntropy(), None, set()), ('labelsmoothing', None, {'label_smoothing'}), ('Label-Smoothing', (), set()),
    ('labelsmoothing(label_smoothing=0.2)', None, set()), (CrossEntropy(0.1), None, {'label_smoothing'}), ('crossentropy', ['label_smoothing'], {'label_smoothing'})])
def test_plain_cross_entropy_has_no_label_smoothing(loss, names, searched, digits, monkeypatch):
    monkeypatch.setattr(module, '_score', lambda *args: 1.)
    found = tune(loss, digits, 3, names, show=False)
    assert set(found.space) == searched
    if not searched and loss == 'crossentropy': assert found.loss.label_smoothing == 0

def test_the_sentence_counts_what_was_done(search):
    search(8)
    assert '8 trials of 1 seed' in search(2).conditions

# The line

lines = [CenterLoss(alpha=.07), CrossEntropy(label_smoothing=.1), CrossEntropy(weight=[1.]*9+[9.]), CosFaceLoss('auto', 'auto'),
         CosFaceLoss(reduction='sum'), LogitAdjustedLoss(torch.arange(1, 11)), AnyPML('TripletMarginLoss'),
         AnyPML('TripletMarginLoss', options=dict(margin=0.1234)), *(make() for make in references.values()),
         *(cls() for cls in all_losses().values())]

@pytest.mark.parametrize('loss', lines, ids=loss_label)
@pytest.mark.parametrize('names', [None, ()])
def test_the_line_makes_the_loss(loss, names, digits, monkeypatch):
    monkeypatch.setattr(module, '_score', lambda *args: 1.)
    found = tune(loss, digits, 2, names, show=False)
    code, _, fit = found.line().partition('; learn.')
    assert fit == f'fit_one_cycle(10, {found.lr:.3g}, wd={found.wd:.3g})'
    known = dict(AnyPML=AnyPML, FocalLoss=FocalLoss, LogitAdjustedLoss=LogitAdjustedLoss)
    made = eval(code, known | {type(loss).__name__: type(loss)})
    for k,v in found.loss.hparams.items():
        if isinstance(v, float): assert made.hparams[k] == pytest.approx(v, rel=6e-3)
        else: assert made.hparams[k] == v

losses = [CrossEntropy(weight=[1.]*9+[9.]), CosFaceLoss('auto'), CosFaceLoss(reduction='sum'), *(cls() for cls in all_losses().values())]

@pytest.mark.parametrize('loss', losses, ids=loss_label)
def test_the_spec_makes_the_loss(loss, digits, monkeypatch):
    monkeypatch.setattr(module, '_score', lambda *args: 1.)
    found = tune(loss, digits, 2, show=False)
    ((made, fit),) = parse_entries(found.spec()).values()
    assert fit == pytest.approx(dict(lr=found.lr, wd=found.wd), rel=6e-3)
    for k,v in found.loss.hparams.items():
        if isinstance(v, float): assert made.hparams[k] == pytest.approx(v, rel=6e-3)
        elif torch.is_tensor(v): assert made.hparams[k].equal(v)
        else: assert made.hparams[k] == v

def test_the_line_leaves_out_defaults(digits, monkeypatch):
    monkeypatch.setattr(module, '_score', lambda *args: 1.)
    def line(loss): return tune(loss, digits, 1, (), show=False).line().partition('; learn')[0]
    assert line(CenterLoss()) == 'CenterLoss()'
    assert line(CenterLoss(alpha=.07)) == 'CenterLoss(alpha=0.07)'
    assert line(AnyPML('TripletMarginLoss')) == "AnyPML(pml='TripletMarginLoss')"

# The journal

@pytest.mark.parametrize('cut', [1, 9, 15])
def test_a_torn_journal_goes_on(search, tmp_path, cut):
    search(3)
    journal = tmp_path/'tune.journal'
    journal.write_bytes(journal.read_bytes()[:-cut])
    for n in (4, 5): assert len(search(n).trials) == n

@pytest.mark.parametrize('full', range(1, 12))
def test_a_full_disk_is_named_and_the_search_goes_on(search, monkeypatch, full):
    from optuna.storages.journal import JournalFileBackend as Backend
    write, calls = Backend.append_logs, []
    def append(self, logs):
        calls.append(logs)
        if full <= len(calls) < full+5: raise OSError(28, 'No space left on device')
        write(self, logs)
    monkeypatch.setattr(Backend, 'append_logs', append)
    with pytest.raises(OSError, match='No space left'): search(2)
    calls += [None]*5
    assert len(search(2, alone=True).trials) == 2

def test_a_damaged_journal_is_named(search, tmp_path):
    (tmp_path/'tune.journal').write_bytes(b'\x00\xff\n{}\n')
    with pytest.raises(ValueError, match='tune.journal is damaged, or no journal of trials'): search(1)

def test_loaders_are_taken_as_they_are(search):
    with pytest.raises(ValueError, match='n_train, size cannot be given with DataLoaders'): search(1, n_train=20, size=8)

def test_a_lock_file_that_was_left_stops_nobody(search, tmp_path, monkeypatch):
    (tmp_path/'tune.journal.lock').write_text('')
    def sleep(seconds): raise AssertionError('it waits')
    monkeypatch.setattr(time, 'sleep', sleep)
    search(2)

# The picture

def check_numbers(ax):
    ax.figure.canvas.draw()
    low, high = ax.get_xlim()
    shown = [t for t in ax.get_xticklabels(which='both') if t.get_text() and low <= t.get_position()[0] <= high]
    boxes = sorted((t.get_window_extent() for t in shown), key=lambda b: b.x0)
    assert 2 <= len(boxes) <= 5, (ax.get_xlabel(), low, high)
    assert all(a.x1+2 < b.x0 for a,b in zip(boxes, boxes[1:])), (ax.get_xlabel(), low, high)
    assert not any('$' in t.get_text() for t in shown)

@pytest.mark.parametrize('loss, n', [('center', 1), ('center', 12), ('sosoftmax', 8), ('cosface', 12), ('sigma2r', 6)])
def test_the_numbers_below_an_axis_do_not_touch(loss, n, digits, monkeypatch):
    monkeypatch.setattr(module, '_score', lambda optuna, trial, *args: trial.params['lr'])
    fig = tune(loss, digits, n, show=False).plot()
    for ax in fig.axes: check_numbers(ax)

def test_every_logarithmic_axis_has_a_few_numbers():
    rng = np.random.default_rng(0)
    for low,ratio in zip(10**rng.uniform(-5, 0, 60), 10**rng.uniform(.05, 3.5, 60)):
        fig, ax = plt.subplots(figsize=(2.6, 2.6), layout='constrained')
        ax.plot([low, low*ratio], [0, 1])
        module._few_ticks(ax)
        check_numbers(ax)
        plt.close(fig)

# Trained weights

def test_weights_are_fine_tuned_as_in_a_comparison(tmp_path, digits):
    torch.save(small_body(n_in=1, width=4).state_dict(), tmp_path/'a.pth')
    how = dict(arch=partial(small_body, width=4), epochs=1, show=False, out=tmp_path)
    tuned, plain = tune('center', digits, 1, (), weights=tmp_path/'a.pth', **how), tune('center', digits, 1, (), **how)
    assert 'learn.fine_tune(1, 0.002, wd=0.01)' in tuned.line() and 'learn.fit_one_cycle(1, 0.01, wd=0.01)' in plain.line()
    assert tuned.key != plain.key

# The command

def test_the_command_says_what_it_found_before_it_draws(tmp_path, monkeypatch, capsys):
    def draw(self): raise OSError('no room')
    monkeypatch.setattr(module, '_score', lambda *args: 1.)
    monkeypatch.setattr(module.Tuned, 'plot', draw)
    out = tmp_path/'new'/'folder'
    args = ['center', '--n-trials', '1', '--n_train', '100', '--out', str(out), '--storage', f'sqlite:///{tmp_path}/a.db']
    with pytest.raises(SystemExit, match='discloss_tune: no room'): tune_main(args)
    assert 'validation accuracy 1.0000: CenterLoss(' in capsys.readouterr().out
    monkeypatch.undo()
    tune_main(args)
    assert len(list(out.glob('tune_center_*.png'))) == 1

@pytest.mark.parametrize('option, used', [([], 1), (['--threads', '2'], 2)])
def test_threads_suit_a_small_network_or_are_chosen(option, used, tmp_path, monkeypatch):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    seen, before = [], torch.get_num_threads()
    monkeypatch.setattr(module, '_score', lambda *args: seen.append(torch.get_num_threads()) or 1.)
    torch.set_num_threads(2)
    try: tune_main(['crossentropy', '--n_trials', '1', '--n_train', '100', '--out', str(tmp_path), *option])
    finally: torch.set_num_threads(before)
    assert seen == [used]

def test_the_command_counts_on_and_keeps_the_pictures_of_other_searches(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, '_score', lambda *args: 1.)
    def said(*args):
        tune_main(['crossentropy', '--n_train', '100', '--out', str(tmp_path), *args])
        return capsys.readouterr().out
    first, more, other = said('--n_trials', '2'), said('--n_trials', '3'), said('--n_trials', '1', '--bs', '10')
    assert 'trial 1 of 2' in first and 'trial 2 of 2' in first
    assert '2 of 3 trials are there already' in more and 'trial 3 of 3' in more and 'trial 1' not in more
    assert "for discloss_compare: --losses 'crossentropy(lr=0.01, wd=0.01)'" in other
    pictures = [re.search(r'written: (.*)', o)[1] for o in (first, more, other)]
    assert pictures[0] == pictures[1] != pictures[2]
    assert len(list(tmp_path.glob('tune_*.png'))) == 2

def test_a_terminal_sees_a_bar(search, monkeypatch, capsys):
    monkeypatch.setattr('sys.stdout.isatty', lambda: True, raising=False)
    search(2)
    capsys.readouterr()
    search(3, show=True)
    said = capsys.readouterr().out
    assert '2 of 3 trials are there already' in said and 'center: trial 3 of 3, best' in said

@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for c in 'ab':
        (tmp_path/'pictures'/c).mkdir(parents=True)
        for i in range(24): Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)).save(tmp_path/'pictures'/c/f'{i}.png')
    return tmp_path/'pictures'

@pytest.mark.parametrize('call, first', [(tune_main, ['cosface', '--n_trials', '1']), (main, ['--losses', 'cosface', '--seeds', '1'])])
def test_advice_can_be_followed_in_both_commands(call, first, pictures, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr('warnings.filters', [])
    args = [*first, '--data', str(pictures), '--arch', 'small_body', '--epochs', '1', '--size', '16', '--out', str(tmp_path/'out')]
    with pytest.raises(SystemExit, match=r'give --bs \d+') as e: call(args)
    args += ['--bs', re.search(r'give --bs (\d+)', str(e.value))[1]]
    (pictures/'a'/'3.png').write_bytes(b'broken')
    with pytest.raises(SystemExit, match='with --skip_bad'): call(args)
    call([*args, '--skip-bad'])
    said = capfd.readouterr()
    assert 'note: ' in said.err and '3.png is not an image' in said.err
    assert 'written: ' in said.out

@pytest.mark.parametrize('args, says', [
    (['center(reduction=none)'], "reduction must be 'mean' or 'sum'"), (['pedcc', '--n_feats', '2'], 'at least 9 features'),
    (['center', '--arch', 'vit_b_16'], 'vit_b_16 does not work on images of shape (3, 8, 8)'), (['center', '--weights', 'none.pth'], "no file of weights 'none.pth'")])
def test_what_cannot_train_is_named_before_the_search(args, says, tmp_path):
    with pytest.raises(SystemExit, match=re.escape(says)): tune_main([*args, '--n_train', '100', '--out', str(tmp_path)])

@pytest.mark.parametrize('args, says', [
    (['arcfase'], "did you mean 'arcface'"), (['center', '--bsize', '3'], "did you mean '--size'"), (['center', '--n-trials', '0'], 'at least 1'),
    (['center(lr=0.1)'], 'lr of a loss is said in a comparison only'), (['center', '--data', 'cifra10'], "did you mean 'cifar10'"),
    (['center', '--arch', 'resnet_34'], "did you mean 'resnet34'"), ([], 'required: loss'), (['center', '--lr', 'find'], 'lr')])
def test_a_typo_is_answered(args, says, monkeypatch):
    monkeypatch.setattr(module, 'tune', None)
    with pytest.raises(SystemExit, match=re.escape(says)): tune_main(args)
