"The claims page: its measures against scikit-learn and numpy, its verdicts on made-up runs, its command."
import dataclasses, math, re, subprocess, sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import mutual_info_score

from discloss import claims as c
from discloss.evidence import tier_table
from discloss.runs import loss_learner
from discloss.specs import parse_loss
from discloss.statistics import interval
from discloss.store import append_result, read_results
from discloss.study import digits_fold, entries, tiers
from conftest import root

faster = 'cross-entropy, rate × 5/3'
text = 'more accurate than cross-entropy with its rate raised by 5/3'

def rows(tmp_path, experiment, arms):
    "A file of made-up runs: arm -> numbers by seed"
    for arm,runs in arms.items():
        for seed,numbers in enumerate(runs):
            row = dict(key=c.key_of(experiment, arm, seed), experiment=experiment, arm=arm, seed=seed, numbers=numbers)
            append_result(tmp_path/'claims.jsonl', row)
    return tmp_path/'claims.jsonl'

def verdict(path, paper, text):
    table = c.claims_table(path)
    return table[(table.paper == paper) & (table.claim == text)].verdict.item()

def test_of(paper, start):
    return next(o.test for o in c.claims if o.paper == paper and o.text.startswith(start))

test_of.__test__ = False

@pytest.mark.parametrize('shift, expected', [
    (0.05, 'confirmed'), (-0.05, 'contradicted'), (0., 'not decided')])
def test_verdict_of_a_difference(tmp_path, shift, expected):
    noise = np.random.default_rng(0).normal(0, .002, (2, 10))
    arms = {'CRL': [dict(accuracy=.9+shift+e) for e in noise[0]], faster: [dict(accuracy=.9+e) for e in noise[1]]}
    path = rows(tmp_path, 'rate', arms)
    assert verdict(path, 'CRL (2019)', text) == expected
    assert verdict(path, 'CRL (2019)', 'fast convergence') == 'not run yet'

@pytest.mark.parametrize('value, expected', [(1e-13, 'confirmed'), (1., 'contradicted')])
def test_verdict_of_a_range(tmp_path, value, expected):
    path = rows(tmp_path, 'variants', {'softmax': [dict(error=value*(1+.01*i)) for i in range(10)]})
    assert verdict(path, 'SO-softmax (2022)', 'plain softmax is a case of the generalised formula') == expected

@pytest.mark.parametrize('gap, expected', [(0., 'confirmed'), (.05, 'contradicted')])
def test_verdict_of_equality(tmp_path, gap, expected):
    noise = np.random.default_rng(0).normal(0, .0005, (3, 10))
    names = 'center, λ=0.03, α=0.05', 'center, λ=0.03', 'center, λ=0.03, α=1'
    arms = {k: [dict(accuracy=.9+gap*i+e) for e in noise[i]] for i,k in enumerate(names)}
    path = rows(tmp_path, 'digits', arms)
    test = test_of('Center loss (2016)', 'accuracy does not depend much on α')
    assert test(c.read_runs(path)).verdict == expected

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
    assert verdict(path, 'CRL (2019)', text) == 'not decided'

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
    assert found['single'] == 1 and found['served'] == 1
    assert found['bits'] == pytest.approx(entropy, abs=.05) # less what shuffled labels give

def test_sphere_is_monotone_and_bounded():
    u = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    psi = c.sphere(u)
    assert (psi.diff() >= -1e-9).all() and psi[-1] == 1 and psi[0] == pytest.approx(-7)
    top = u > math.cos(math.pi/4) # cos 4θ = 8c⁴-8c²+1
    assert torch.allclose(psi[top], (8*u**4-8*u**2+1)[top])

@pytest.mark.parametrize('own', [True, False])
def test_attack_raises_its_loss_and_moves_nothing(own):
    dls = digits_fold(0)
    for spec in 'lgm', 'center', 'arcface':
        learn = loss_learner(parse_loss(spec), dls)
        x, y = (o.as_subclass(torch.Tensor) for o in dls.test.one_batch())
        before = {k: v.clone() for k,v in learn.model.state_dict().items()}
        odd = c.attacked(learn, x, y, .05, own)
        assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
        assert (odd-x).abs().max() == pytest.approx(.05, abs=1e-5)
        loss, model = learn.loss_func.eval(), learn.model.eval()
        with c.training_head(model), torch.no_grad():
            outs = [dict(model(o)) for o in (x, odd)]
        with torch.enable_grad(): plain, raised = (loss(o, y) for o in outs)
        with torch.no_grad(): logits = [model(o) for o in (x, odd)]
        if not own: plain, raised = (torch.nn.functional.cross_entropy(z, y) for z in logits)
        assert raised > plain

def test_leaving_a_class_out():
    dls, odd = c.without_class(0, 3)
    assert dls.c == 9 and '3' not in [str(v) for v in dls.vocab]
    assert len(odd) + sum(len(dl.dataset) for dl in dls.loaders) == 1797

def test_command_goes_on_where_it_stopped(tmp_path, capsys):
    file = tmp_path/'claims.jsonl'
    c.main(['variants', '--out', str(file)])
    assert len(read_results(file)) == len(list(c.plan(['variants']))) == 20
    capsys.readouterr()
    c.main(['variants', '--out', str(file)])
    assert capsys.readouterr().out == '20 of 20 runs are there\n'
    with pytest.raises(SystemExit): c.main(['variant', '--out', str(file)])

def studied(tmp_path, accuracies, folds=5, seeds=4, n=200, **changes):
    "Made-up runs of the digits tier: entry -> mean accuracy"
    (tmp_path/'study').mkdir(exist_ok=True)
    rng, t = np.random.default_rng(0), tiers['digits']
    setting = dict(epochs=t.epochs, trials=t.trials, tries=t.tries) | changes
    for label,accuracy in accuracies.items():
        for run in range(folds*seeds):
            right = rng.random(n) < accuracy
            where = dict(key=f'{label} {run} {changes}', label=label, fold=run%folds, seed=run//folds)
            said = dict(right=np.packbits(right).tobytes().hex(), n=[0,0,n], seconds=1., setting=setting)
            row = where | said | dict(test=dict(accuracy=right.mean()))
            append_result(tmp_path/'study'/'digits.jsonl', row)

def against_crossentropy(name='accuracy'):
    return [o.test for o in c.claims if isinstance(o.test, c.Versus) and o.test.experiment == 'study digits'
            and o.test.b == 'crossentropy' and o.test.name == name]

def assert_same_intervals(path, table, tests):
    runs = c.read_runs(path)
    for t in tests:
        row = table.loc[t.a]
        assert interval(t.difference(runs)[0]) == pytest.approx((row.low, row.high), abs=1e-12), t.a
        said = re.search(r'\((\S+) to (\S+)\)', t(runs).numbers.replace('−', '-'))
        step = 10.**-len(said[1].partition('.')[2]) # As many digits as the interval supports
        assert [float(o) for o in said.groups()] == pytest.approx(
            [100*row.low, 100*row.high], abs=step/2+1e-9), t.a

def test_claims_and_tables_have_the_same_intervals():
    tests = against_crossentropy()
    assert len({t.a for t in tests}) > 7
    results = root/'results'
    assert_same_intervals(results/'claims.jsonl', tier_table('digits', results/'study'), tests)

def test_claims_and_tables_have_the_same_words():
    runs, results = c.read_runs(root/'results'/'claims.jsonl'), root/'results'
    tests = {t for t in (o.test for o in c.claims) if isinstance(t, c.Versus) and t.tuned and t.name == 'accuracy'}
    tables = {t.experiment: tier_table(t.experiment.removeprefix('study '), results/'study') for t in tests}
    assert len(tests) > 7
    for t in tests:
        if t.a not in tables[t.experiment].index: continue
        assert t.difference(runs)[1] == pytest.approx(tables[t.experiment].p[t.a], rel=1e-9), t

def test_intervals_are_the_same_where_runs_diverged_or_are_out_of_date(tmp_path):
    studied(tmp_path, dict(pod=.1, crossentropy=.1), epochs=1)
    studied(tmp_path, dict(crossentropy=.95, pod=.97, pedcc=.97, cc=.96))
    file = tmp_path/'study'/'digits.jsonl'
    row = list(read_results(file).values())[-1]
    append_result(file, row | dict(right='', test={})) # It diverged
    tests = [t for t in against_crossentropy() if t.a in ('pod','pedcc','cc')]
    assert_same_intervals(tmp_path/'claims.jsonl', tier_table('digits', tmp_path/'study'), tests)

def test_runs_of_the_study_are_read(tmp_path):
    studied(tmp_path, dict(pod=.98, pedcc=.93))
    assert verdict(tmp_path/'claims.jsonl', 'POD (2021)', 'always better than PEDCC-Loss') == 'confirmed'
    studied(tmp_path, dict(pod=.93, pedcc=.98))
    assert verdict(tmp_path/'claims.jsonl', 'POD (2021)', 'always better than PEDCC-Loss') == 'contradicted'

def test_other_numbers_of_the_study_keep_the_correction(tmp_path):
    studied(tmp_path, dict(cc=.96, crossentropy=.95))
    runs = c.read_runs(tmp_path/'claims.jsonl')
    for k,o in enumerate([o for arm in runs['study digits'].values() for o in arm.values()]): o['variance_ratio'] = k%7
    t = next(t for t in against_crossentropy('variance_ratio') if t.a == 'cc')
    (d, _), ratio = t.difference(runs), c.studies['study digits'].ratio
    assert d.rest == pytest.approx(ratio*d.var) and d.rest > 0

def test_another_budget_is_another_run():
    e = c.experiments['tail']
    same = c.key_of('tail', 'PEDCC', 0)
    assert c.key_of('tail', 'PEDCC', 0) == same
    changed = partial(e.run.func, **{**e.run.keywords, 'epochs': 41})
    c.experiments['tail'] = dataclasses.replace(e, run=changed)
    try: assert c.key_of('tail', 'PEDCC', 0) != same
    finally: c.experiments['tail'] = e

def test_a_key_is_the_same_for_the_command_and_for_an_import():
    "The functions of `python -m` belong to another module"
    script = "import sys, runpy; sys.argv = ['x', 'variants', '--minutes', '0', '--out', 'no.jsonl']\n"
    script += "g = runpy.run_module('discloss.claims', run_name='__main__', alter_sys=True)\n"
    script += "print(g['key_of']('tail', 'PEDCC', 0), g['key_of']('rate', 'CRL', 3))"
    out = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True).stdout
    assert out.split()[-2:] == [c.key_of('tail', 'PEDCC', 0), c.key_of('rate', 'CRL', 3)]

def test_more_seeds_leave_keys_as_they_are():
    e, before = c.experiments['few'], [c.key_of(*p) for p in c.plan(['few'])]
    c.experiments['few'] = dataclasses.replace(e, seeds=e.seeds+1)
    try: after = [c.key_of(*p) for p in c.plan(['few'])]
    finally: c.experiments['few'] = e
    assert after[:len(before)] == before and len(set(after)) == len(after) > len(before)

def test_results_have_the_keys_of_this_version():
    "Else the command would run everything again"
    known = {c.key_of(*p) for p in c.plan(c.experiments)}
    assert set(read_results(root/'results'/'claims.jsonl')) <= known

# A finished plan, no spread, diverged runs, rows of other versions

def of_crl(tmp_path, ours, theirs):
    path = rows(tmp_path, 'rate', {'CRL': ours, faster: theirs})
    return c.Versus('rate', 'CRL', faster)(c.read_runs(path))

def accuracies(n, mean, spread=.001): return [dict(accuracy=mean+spread*math.cos(mean*1e4+i)) for i in range(n)]

def test_no_verdict_before_the_plan_is_done(tmp_path):
    found = of_crl(tmp_path, accuracies(5, .95), accuracies(10, .9))
    assert found.p < .05 and found.verdict == 'not decided' and '5 of 10 runs each' in found.how
    found = of_crl(tmp_path, accuracies(10, .95), accuracies(10, .9))
    assert found.p < .05 and found.verdict is None and '10 runs each' in found.how and ' of 10' not in found.how

def test_no_verdict_before_the_plan_of_a_range_or_equality_is_done(tmp_path):
    path = rows(tmp_path, 'digits', {'LDMAT': [dict(accuracy=.9, inter=1.4+.01*i, intra=.3) for i in range(9)],
                                     'SO-softmax': accuracies(9, .9), 'SO-softmax, their m and λ': accuracies(10, .9)})
    runs = c.read_runs(path)
    equal = c.Equal('digits', ('SO-softmax', 'SO-softmax, their m and λ'))(runs)
    assert equal.verdict == 'not decided' and '9 of 10 runs' in equal.how
    alone = test_of('LDMAT (2024)', 'imposes a fixed distance')(runs)
    assert alone.verdict == 'not decided' and '9 of 10 runs' in alone.how and alone.numbers.startswith('1.4')

def test_the_study_has_a_plan_too(tmp_path):
    studied(tmp_path, dict(pod=.98, pedcc=.93), seeds=3)
    assert verdict(tmp_path/'claims.jsonl', 'POD (2021)', 'always better than PEDCC-Loss') == 'not decided'

def test_no_spread_does_not_make_few_runs_sure(monkeypatch, tmp_path):
    "Three times the same scores have a p-value of 0.25"
    for name in 'rate', 'digits':
        monkeypatch.setitem(c.experiments, name, dataclasses.replace(c.experiments[name], seeds=3))
    same = lambda v: [dict(accuracy=v, inter=v, intra=0.)]*3
    found = of_crl(tmp_path, same(.9), same(.88))
    assert found.p == .25
    arms = {'SO-softmax': same(.9), 'SO-softmax, their m and λ': same(.88), 'L-GM': same(.9), 'LDMAT': same(2.)}
    runs = c.read_runs(rows(tmp_path, 'digits', arms))
    def equal(a, b): return c.Equal('digits', (a, b))(runs).verdict
    assert equal('SO-softmax', 'SO-softmax, their m and λ') == equal('SO-softmax', 'L-GM') == 'not decided'
    for low,high in (1., 3.), (5., 9.), (-math.inf, 1.), (1., math.inf):
        assert c.Alone('digits', 'LDMAT', 'inter', low, high, 'x')(runs).verdict == 'not decided'

def test_no_spread_in_many_runs_is_sure(tmp_path):
    found = of_crl(tmp_path, [dict(accuracy=.9)]*10, [dict(accuracy=.88)]*10)
    assert found.p < .05 and found.agrees
    arms = {'SO-softmax': [dict(accuracy=.9)]*10, 'L-GM': [dict(accuracy=.9)]*10, 'CosFace': [dict(accuracy=.8)]*10}
    runs = c.read_runs(rows(tmp_path, 'digits', arms))
    assert c.Equal('digits', ('SO-softmax', 'L-GM'))(runs).verdict == 'confirmed'
    assert c.Equal('digits', ('SO-softmax', 'CosFace'))(runs).verdict == 'contradicted'

def test_an_interval_without_ends_can_be_shown(monkeypatch, tmp_path):
    monkeypatch.setattr(c, 'interval', lambda d: (-math.inf, math.inf))
    found = of_crl(tmp_path, [dict(accuracy=.9)]*3, [dict(accuracy=.88)]*3)
    assert found.numbers == '90.000% against 88.000%: +2.000 points'
    arms = {'SO-softmax': [dict(accuracy=.9, inter=2.)]*3, 'L-GM': [dict(accuracy=.9)]*3}
    runs = c.read_runs(rows(tmp_path, 'digits', arms))
    assert c.Equal('digits', ('SO-softmax', 'L-GM'))(runs).numbers
    assert c.Alone('digits', 'SO-softmax', 'inter', 1., 3., 'x')(runs).numbers == '2.000'

def test_equality_holds_for_every_pair(tmp_path):
    "A third arm that varies much is not equal to the others, though its mean lies between theirs"
    arms = {'center, λ=0.003': accuracies(10, .9, .0001), 'center, λ=0.03': accuracies(10, .9001, .05),
            'center, λ=0.3': accuracies(10, .9002, .0001)}
    runs = c.read_runs(rows(tmp_path, 'digits', arms))
    assert test_of('Center loss (2016)', 'accuracy does not depend much on λ')(runs).verdict == 'not decided'

def test_margins_are_those_of_the_data():
    assert {o.test.margin for o in c.claims if isinstance(o.test, c.Equal)} == {tiers['digits'].margin}

def test_diverged_runs_without_tuning_give_no_verdict(tmp_path):
    bad, good = dict(accuracy=0.), [dict(accuracy=.1+.01*i, loss=9.) for i in range(6)]
    found = of_crl(tmp_path, [*good, *[bad]*4], accuracies(10, .98))
    assert found.verdict == 'not tested' and math.isnan(found.p)
    assert found.numbers.startswith('4 of 10 runs of *CRL* diverged; the others: 12.')
    found = of_crl(tmp_path, [bad]*10, accuracies(10, .98))
    assert found.verdict == 'not tested' and found.numbers == '10 of 10 runs of *CRL* diverged'

def test_runs_of_other_versions_and_budgets_are_left_out(tmp_path):
    path = rows(tmp_path, 'rate', {'CRL': accuracies(10, .98)})
    right = c.values(c.read_runs(path), 'rate', 'CRL', 'accuracy')
    for k in range(5): append_result(path, dict(key=f'other {k}', experiment='rate', arm='CRL', seed=k, numbers=dict(accuracy=.1)))
    append_result(path, dict(key='no experiment'))
    append_result(path, dict(key=c.key_of('rate', 'NLLR', 0), experiment='rate', arm='NLLR', seed=0)) # No numbers
    assert c.values(c.read_runs(path), 'rate', 'CRL', 'accuracy').equals(right)
    mine, left_out = c.planned_rows(path)
    assert len(mine) == 10 and left_out == 7
    assert len(c.claims_table(path)) == len(c.claims)

@pytest.mark.parametrize('numbers', [{}, dict(accuracy=.9, inter=None, intra=None, recalls=None, raw_falls=None),
                                     dict(accuracy=.9, recalls=[None]*10), dict(accuracy=0.)])
def test_numbers_that_are_missing_stop_nothing(tmp_path, numbers):
    path = rows(tmp_path, 'digits', {'LDMAT': [numbers]*10})
    path = rows(tmp_path, 'tail', {arm: [numbers]*10 for arm in c.experiments['tail'].arms})
    runs = c.read_runs(path)
    for name in c.derived: assert len(c.values(runs, 'digits', 'LDMAT', name)) == 0
    c.claims_table(path)

def test_two_commands_share_the_runs(monkeypatch, tmp_path):
    "What another process has begun is not begun again"
    out = tmp_path/'claims.jsonl'
    keys = [c.key_of(*p) for p in c.plan(['variants'])]
    with c.claim(f'{out}.{keys[0]}.lock') as ours:
        assert ours
        c.main(['variants', '--out', str(out)])
    assert set(read_results(out)) == set(keys[1:])
    c.main(['variants', '--out', str(out)])
    assert set(read_results(out)) == set(keys) and not list(tmp_path.glob('*.lock'))

def test_pod_without_its_schedule_keeps_delta():
    dls = digits_fold(0)
    dls.train = dls.train.new(dataset=dls.train.dataset, bs=1024)
    for schedule,moved in (False, False), (True, True):
        learn, _ = c.train(parse_loss('pod'), dls, 0, epochs=2, schedule=schedule)
        head = c.find_head(learn.model)
        assert (head.delta.item() != pytest.approx(head.delta0)) == moved

def test_every_tested_row_says_data_and_runs():
    runs = c.read_runs(root/'results'/'claims.jsonl')
    for o in c.claims:
        if isinstance(o.test, c.Untested): continue
        assert re.match(r'.+, (\d+ of )?\d+ runs? (each|of \*.+\*)\. [A-Z]', o.test(runs).how), o.text

def test_claims_without_a_test_come_last():
    for paper in {o.paper for o in c.claims}:
        untested = [isinstance(o.test, c.Untested) for o in c.claims if o.paper == paper]
        assert untested == sorted(untested)
