"The claims page: its measures against scikit-learn and numpy, its verdicts on made-up runs, its command."
import dataclasses, math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import mutual_info_score

from discloss import claims as c
from discloss.runs import loss_learner
from discloss.specs import parse_loss
from discloss.store import append_result, read_results
from discloss.study import digits_fold, entries
from conftest import root

faster = 'cross-entropy, rate × 5/3'
text = 'more accurate than cross-entropy with its rate raised by 5/3'

def rows(tmp_path, experiment, arms):
    "A file of made-up runs: arm -> numbers by seed"
    for arm,runs in arms.items():
        for seed,numbers in enumerate(runs):
            row = dict(key=f'{experiment} {arm} {seed}', experiment=experiment, arm=arm, seed=seed, numbers=numbers)
            append_result(tmp_path/'claims.jsonl', row)
    return tmp_path/'claims.jsonl'

def verdict(path, paper, text):
    table = c.claims_table(path)
    return table[(table.paper == paper) & (table.claim == text)].verdict.item()

@pytest.mark.parametrize('shift, expected', [
    (0.05, 'confirmed here'), (-0.05, 'contradicted'), (0., 'not confirmed')])
def test_verdict_of_a_difference(tmp_path, shift, expected):
    noise = np.random.default_rng(0).normal(0, .002, (2, 10))
    arms = {'CRL': [dict(accuracy=.9+shift+e) for e in noise[0]], faster: [dict(accuracy=.9+e) for e in noise[1]]}
    path = rows(tmp_path, 'rate', arms)
    assert verdict(path, 'CRL (2019)', text) == expected
    assert verdict(path, 'CRL (2019)', 'fast convergence') == 'not run yet'

@pytest.mark.parametrize('value, expected', [(1e-13, 'confirmed here'), (1., 'contradicted')])
def test_verdict_of_a_range(tmp_path, value, expected):
    path = rows(tmp_path, 'variants', {'softmax': [dict(error=value*(1+.01*i)) for i in range(5)]})
    assert verdict(path, 'SO-softmax (2022)', 'plain softmax is a case of the generalised formula') == expected

@pytest.mark.parametrize('gap, expected', [(0., 'confirmed here'), (.05, 'contradicted')])
def test_verdict_of_equality(tmp_path, gap, expected):
    noise = np.random.default_rng(0).normal(0, .001, (3, 10))
    names = 'center, α=0.05', 'center', 'center, α=1'
    arms = {k: [dict(accuracy=.9+gap*i+e) for e in noise[i]] for i,k in enumerate(names)}
    path = rows(tmp_path, 'digits', arms)
    assert verdict(path, 'Center loss (2016)', 'accuracy does not depend much on α') == expected

def test_many_tests_of_one_paper_are_corrected(tmp_path):
    "A p-value just below 0.05 decides alone, and not among others"
    d = np.array([1., -1, 1, 1, -1, 1, 1, -1, 1, 1])
    d = (d-d.mean())/d.std(ddof=1)
    few = d + 2.3*math.sqrt(1/10+c.experiments['rate'].ratio)
    arms = {faster: [dict(accuracy=.9) for _ in d], 'CRL': [dict(accuracy=.9+.01*e) for e in few],
            'cross-entropy': [dict(accuracy=.9+.01*e+.01*(-1)**i) for i,e in enumerate(few)]}
    path = rows(tmp_path, 'rate', arms)
    found = c.Versus('rate', 'CRL', faster)(c.read_runs(path))
    assert .04 < found.p < .05
    assert verdict(path, 'CRL (2019)', text) == 'not confirmed'

def test_claims_name_what_exists():
    for claim in c.claims:
        assert (root/'nbs'/claim.page).is_file(), claim.page
        t = claim.test
        arms = [t.a, t.b] if isinstance(t, c.Versus) else list(getattr(t, 'arms', [])) or [getattr(t, 'arm', None)]
        if not any(arms): continue
        known = entries() if t.experiment in c.studies else c.experiments[t.experiment].arms
        for arm in arms: assert arm in known, (claim.text, arm)

def test_losses_of_all_arms_can_be_made():
    for name,e in c.experiments.items():
        if name == 'variants': continue
        for arm in e.arms.values(): parse_loss(arm if isinstance(arm, str) else arm[0])

def test_bits_and_explained_variance():
    gen = torch.Generator().manual_seed(0)
    targ = torch.randint(4, (300,), generator=gen)
    a = torch.randn(300, 3, generator=gen) + targ[:,None]*torch.tensor([0., .5, 2.])
    on = (a > a.mean(0)).double()
    for k,found in enumerate(c.bits(on, targ, 4).tolist()):
        assert found == pytest.approx(mutual_info_score(targ, on[:,k])/math.log(2), abs=1e-9)
    frame = pd.DataFrame(a.double().numpy())
    share = frame.groupby(targ.numpy()).transform('mean').var(ddof=0)/frame.var(ddof=0)
    assert np.allclose(c.explained(a, targ), share)

def test_a_channel_of_one_class():
    targ = torch.arange(10).repeat(30)
    found = c.relations(torch.nn.functional.one_hot(targ, 10).float(), targ, 10, seed=0)
    entropy = -(.1*math.log2(.1) + .9*math.log2(.9))
    assert found['single'] == 1 and found['served'] == 1 and found['p'] < .01
    assert found['bits'] == pytest.approx(entropy, abs=.05) # less what shuffled labels give

def test_sphere_is_monotone_and_bounded():
    u = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    psi = c.sphere(u)
    assert (psi.diff() >= -1e-9).all() and psi[-1] == 1 and psi[0] == pytest.approx(-7)
    top = u > math.cos(math.pi/4) # cos 4θ = 8c⁴-8c²+1
    assert torch.allclose(psi[top], (8*u**4-8*u**2+1)[top])

def test_attack_raises_the_loss_and_moves_nothing():
    dls = digits_fold(0)
    for spec in 'lgm', 'center', 'arcface':
        learn = loss_learner(parse_loss(spec), dls)
        x, y = dls.test.one_batch()
        before = {k: v.clone() for k,v in learn.model.state_dict().items()}
        odd = c.attacked(learn, x, y, .05)
        assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
        assert (odd-x).abs().max() == pytest.approx(.05, abs=1e-5)
        loss, model = learn.loss_func.eval(), learn.model.eval()
        with c.training_head(model), torch.no_grad():
            outs = [dict(model(o)) for o in (x, odd)]
        with torch.enable_grad(): plain, raised = (loss(o, y) for o in outs)
        assert raised > plain

def test_leaving_a_class_out():
    dls, odd = c.without_class(0, 3)
    assert dls.c == 9 and '3' not in [str(v) for v in dls.vocab]
    assert len(odd) + sum(len(dl.dataset) for dl in dls.loaders) == 1797

def test_command_goes_on_where_it_stopped(tmp_path, capsys):
    file = tmp_path/'claims.jsonl'
    c.main(['variants', '--out', str(file)])
    assert len(read_results(file)) == len(list(c.plan(['variants']))) == 10
    capsys.readouterr()
    c.main(['variants', '--out', str(file)])
    assert not capsys.readouterr().out
    with pytest.raises(SystemExit): c.main(['variant', '--out', str(file)])

def test_runs_of_the_study_are_read(tmp_path):
    (tmp_path/'study').mkdir()
    for run in range(10):
        for label,accuracy in {'pod': .98, 'pedcc': .97}.items():
            where = dict(key=f'{label}{run}', label=label, fold=run%5, seed=run//5)
            append_result(tmp_path/'study'/'digits.jsonl', where | dict(test=dict(accuracy=accuracy)))
    assert verdict(tmp_path/'claims.jsonl', 'POD (2021)', 'always better than PEDCC-Loss') == 'confirmed here'

def test_another_budget_is_another_run():
    e = c.experiments['tail']
    same = c.key_of('tail', 'PEDCC', 0)
    assert c.key_of('tail', 'PEDCC', 0) == same
    changed = partial(e.run.func, **{**e.run.keywords, 'epochs': 41})
    c.experiments['tail'] = dataclasses.replace(e, run=changed)
    try: assert c.key_of('tail', 'PEDCC', 0) != same
    finally: c.experiments['tail'] = e
