"Statistics by simulation and against scipy: what the notebook shows once is tried here over more settings."
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from discloss.statistics import *

def answers(rng, S, N, seed_sd, image_sd):
    "What two equally good losses get right, with noise of seeds and of images"
    seed, image = seed_sd*rng.normal(size=(2,S,1)), image_sd*rng.normal(size=(2,1,N))
    return rng.random((2,S,N)) < .9+seed+image

@pytest.mark.parametrize('S,N,seed_sd,image_sd', [(5,360,.01,.2), (10,200,.003,.1), (3,500,.02,.02), (4,300,0,0)])
def test_interval_of_seeds_and_images_holds_the_truth(S, N, seed_sd, image_sd):
    rng, n = np.random.default_rng(0), 500
    pairs = [answers(rng, S, N, seed_sd, image_sd) for _ in range(n)]
    ends = [interval(paired_images(a, b)) for a,b in pairs]
    held = np.mean([low <= 0 <= high for low,high in ends])
    assert .915 < held < .99, held # 500 draws of 0.95 have a standard deviation of 0.01

def test_interval_of_seeds_is_scipys():
    rng = np.random.default_rng(1)
    for n in (2,3,5,20):
        a, b = rng.normal(size=(2,n))
        d, ref = paired(a, b), stats.ttest_rel(a, b)
        assert p_differs(d) == pytest.approx(ref.pvalue, abs=1e-12)
        assert interval(d, .9) == pytest.approx(tuple(ref.confidence_interval(.9)))

def test_images_equal_the_mean_squares_of_a_two_way_table():
    "The same numbers by loops"
    rng = np.random.default_rng(2)
    a, b = answers(rng, 4, 30, .05, .2)
    x = a.astype(float)-b
    S,N = x.shape
    ms = N*sum((x[s].mean()-x.mean())**2 for s in range(S))/(S-1)
    mi = S*sum((x[:,i].mean()-x.mean())**2 for i in range(N))/(N-1)
    me = sum((x[s,i]-x[s].mean()-x[:,i].mean()+x.mean())**2 for s in range(S) for i in range(N))/((S-1)*(N-1))
    d = paired_images(a, b)
    assert d.se**2 == pytest.approx((ms+max(mi-me, 0))/(S*N))
    assert d.mean == pytest.approx(x.mean())

def test_equality_is_the_ninety_percent_interval_inside_the_margin():
    rng = np.random.default_rng(3)
    seen = set()
    for _ in range(200):
        d = paired(rng.normal(0, .01, 6), rng.normal(0, .01, 6))
        low, high = interval(d, .9)
        inside = -.01 < low and high < .01
        seen.add(inside)
        assert (p_equal(d, .01) < .05) == inside
    assert seen == {True, False}

def test_losses_that_differ_by_the_margin_are_rarely_called_equal():
    rng = np.random.default_rng(4)
    d = rng.normal(.003, .003, (2000,8))
    equal = np.mean([p_equal(paired(x, 0*x), .003) < .05 for x in d])
    assert equal < .07

def test_bootstrap_spreads_as_its_formula_says():
    "Two-level draws: the expectation of their variance is known (Owen 2007)"
    rng = np.random.default_rng(5)
    a, b = answers(rng, 6, 400, .02, .2)
    x = a.astype(float)-b
    S,N = x.shape
    seed, image = x.mean(1)-x.mean(), x.mean(0)-x.mean()
    rest = x-x.mean()-seed[:,None]-image
    want = (seed**2).mean()/S + (image**2).mean()/N + (rest**2).mean()/(S*N)
    assert bootstrap(a, b, n=4000).var() == pytest.approx(want, rel=.1)
    one = bootstrap(x.mean(1), 0*x.mean(1), n=4000)
    assert one.var() == pytest.approx((seed**2).mean()/S, rel=.1)

@pytest.mark.parametrize('p,want', [([.01,.04,.03,.005], [.03,.06,.06,.02]), ([.9,.8], [1,1]), ([], []), ([.01,math.nan,.02], [.02,math.nan,.02])])
def test_holm(p, want): np.testing.assert_allclose(holm(p), want, atol=1e-12)

@pytest.mark.parametrize('h', [.01,.003,.001])
def test_number_of_seeds_is_the_smallest(h):
    var = .004**2
    n = seeds_for(h, var)
    half = [stats.t(k-1).ppf(.975)*math.sqrt(var/k) for k in (n-1,n) if k > 1]
    assert half[-1] <= h and (n == 2 or half[0] > h)

def test_number_of_seeds_finds_the_difference_as_often_as_it_says():
    n, rng = seeds_for(.005, .006**2, power=.8), np.random.default_rng(6)
    p = stats.ttest_1samp(rng.normal(.005, .006, (4000,n)), 0, axis=1).pvalue
    assert .77 < (p < .05).mean() < .86

def test_verdicts_never_contradict_the_intervals():
    rng = np.random.default_rng(7)
    for _ in range(300):
        d = Difference(rng.normal(0, .005), int(rng.integers(3, 12)), rng.uniform(0, .006)**2, rng.choice([0,1e-6]))
        status, text = verdict(d)
        assert status in ('better', 'worse', 'equivalent', 'not decided') and text.startswith(status)
        low, high = interval(d)
        if status == 'better': assert low > 0
        if status == 'worse': assert high < 0
        if status == 'equivalent': assert abs(d.mean) < .003 and 'equivalent within 0.3 points' in text
        if status == 'not decided': assert 'needed' in text and 'about 0' not in text

def test_two_seeds_settle_nothing():
    assert verdict(paired([.9,.91], [.1,.12]))[0] == 'not decided'

def test_runs_that_are_missing_leave_out_their_pair_only():
    table = against(dict(ce={0: .9, 1: .91, 2: .92, 3: .93}, new={1: .95, 2: .97, 3: .98, 7: .1}))
    assert table.difference['new'] == pytest.approx(np.mean([.04,.05,.05]))
    assert table.status['ce'] == 'reference' and table.status['new'] == 'better'

def test_order_of_seeds_and_entries_changes_nothing():
    rng = np.random.default_rng(8)
    scores = {k: dict(enumerate(rng.normal(.9, .01, 6))) for k in ('a','ce','b')}
    turned = {k: dict(reversed(list(scores[k].items()))) for k in reversed(scores)}
    a, b = against(scores), against(turned)
    for col in ('mean','difference','low','high','p','p_equal'):
        np.testing.assert_allclose(a[col].astype(float), b[col].reindex(a.index).astype(float))
    assert (a.verdict == b.verdict.reindex(a.index)).all()

@pytest.mark.parametrize('name', ['crossentropy','CrossEntropyLoss','cross-entropy','CE','softmax'])
def test_reference_is_cross_entropy(name): assert reference(['center', name, 'arcface']) == name

def test_reference_with_a_rate_of_its_own():
    "Label smoothing is no reference where plain cross-entropy is there"
    names = 'crossentropy(label_smoothing=0.1, lr=0.01)', 'center(lr=1e-05)', 'crossentropy(lr=1e-05, wd=0.1)'
    assert reference(names) == names[2]
    assert reference(names[:2]) == names[0]

def test_reference_in_a_sweep(): assert reference(['center', 'crossentropy, lr=0.01', 'crossentropy, lr=0.1']) == 'crossentropy, lr=0.01'

@pytest.mark.parametrize('n', [0, 1])
@pytest.mark.parametrize('runs', [[0, 1, 2], [(f, s) for f in (0, 1) for s in (0, 1)]])
def test_too_few_images_are_named(n, runs):
    with pytest.raises(ValueError, match=f'of at least 2 images, got {n}'):
        against({k: {r: np.ones(n) for r in runs} for k in 'ab'})

def test_no_entry_is_named():
    with pytest.raises(ValueError, match='at least one entry, got none'): against({})

def test_a_single_entry_and_entries_that_failed():
    one = against(dict(center=[.9,.91,.92]))
    assert list(one.status) == ['reference']
    broken = against(dict(ce=[math.nan]*3, center=[.9,.91,.92]))
    assert list(broken.status) == ['reference','not decided'] and broken['mean'].isna()['ce']

def test_degenerate_entries_win_nothing():
    assert not keeps_up(.72, .98, .1) and keeps_up(.95, .98, .1)
    assert not keeps_up(None, .98, .1) and not keeps_up(math.nan, .98, .1)
    compact = dict(a=[.5,.51,.52], collapsed=[.01,.02,.01])
    assert winner(compact, more=False) == 'collapsed'
    assert winner(compact, more=False, among=['a']) is None
    three = dict(a=[.5,.51,.52], b=[.6,.63,.64], collapsed=[.01,.02,.01])
    assert winner(three, more=False, among=['a','b']) == 'a'

def test_ranks_are_friedmans_with_ties():
    rng = np.random.default_rng(9)
    scores = rng.integers(0, 5, (10,4)).astype(float)
    chi = stats.friedmanchisquare(*scores.T).statistic
    F = 9*chi/(10*3-chi)
    assert rank_test(scores).p == pytest.approx(stats.f(3, 27).sf(F))
    assert rank_test(-scores, more=False).mean.equals(rank_test(scores).mean)

def test_equal_entries_and_entries_without_noise_have_ranks():
    same = rank_test(np.ones((5,3)))
    assert same.p == 1 and same.cliques == [[0,1,2]]
    clear = rank_test(np.tile([3.,2,1], (30,1)))
    assert clear.p == 0 and clear.cliques == []

def test_cliques_are_as_large_as_can_be():
    import pandas as pd
    ranks = Ranks(pd.Series(dict(a=1., b=1.8, c=2.5, d=4.)), 10, .01, 1.)
    assert ranks.cliques == [['a','b'],['b','c']]

def test_pictures_are_drawn():
    table = against(dict(ce=[.9,.91,.92], a=[.95,.96,.97], b=[.9,.92,.92]))
    assert math.isinf(table.low['a']) # No spread
    assert np.isfinite(plot_differences(table).axes[0].get_xlim()).all()
    assert [t.get_text() for t in plot_differences(table).axes[0].get_yticklabels()] == ['b','a']
    plot_ranks(rank_test(np.random.default_rng(0).normal(size=(6,7)))).draw_without_rendering()

@pytest.mark.parametrize('form', ['scores', 'answers', 'folds'])
def test_runs_that_both_have_are_compared_as_their_form_asks(form):
    rng = np.random.default_rng(11)
    a, b = answers(rng, 6, 60, .02, .2)
    if form == 'scores': a, b = a.mean(1), b.mean(1)
    names = [(s//2,s%2) if form == 'folds' else s for s in range(6)]
    new, old = (dict(zip(names, o)) for o in (a, b))
    new['only here'], old['only there'] = a[0], b[0]
    folds = [(a[i:i+2], b[i:i+2]) for i in (0,2,4)]
    want = dict(scores=lambda: paired(a, b, .1), answers=lambda: paired_images(a, b), folds=lambda: paired_folds(folds))
    assert paired_runs(new, old, .1) == want[form]()

def fold_answers(rng, F, S, N=120, fold_sd=0.):
    for _ in range(F):
        shift = fold_sd*rng.normal(size=(2,1,1)) + .004*rng.normal(size=(2,S,1))
        yield rng.random((2,S,N)) < .9+shift+.1*rng.normal(size=(2,1,N))

@pytest.mark.parametrize('F,S,fold_sd', [(5,1,0), (5,1,.03), (5,2,.03), (5,4,0), (5,4,.02), (5,4,.03), (3,1,.03), (3,2,.02), (3,4,.03)])
def test_interval_of_folds_holds_the_truth(F, S, fold_sd):
    rng, n = np.random.default_rng(12), 200
    ds = [paired_folds(list(fold_answers(rng, F, S, fold_sd=fold_sd))) for _ in range(n)]
    ends = [interval(d) for d in ds]
    assert np.mean([low <= 0 <= high for low,high in ends]) > .92 # A standard deviation of 0.015
    assert np.mean([p_differs(d) < .05/10 for d in ds]) < .02 # Far out too, as Holm asks

def test_folds_show_a_difference_that_is_large():
    rng = np.random.default_rng(13)
    ds = [paired_folds(list(fold_answers(rng, 5, 4))) for _ in range(200)]
    assert np.mean([interval(d)[0] > -.04 for d in ds]) > .7 # Four points more

def test_more_seeds_in_the_same_folds_are_not_promised_too_much():
    d = Difference(.004, 20, 1e-6, 2.25e-6, 4)
    assert verdict(d, None)[1] == 'not decided: more test images needed'
    assert seeds_for(.01, 1e-4) < seeds_for(.01, 1e-4, df=4)

def test_seeds_of_a_fold_are_one_score():
    rng = np.random.default_rng(14)
    a, b = rng.normal(size=(2,5,4))
    runs = [{(f,s): o[f,s] for f in range(5) for s in range(4)} for o in (a, b)]
    assert paired_runs(*runs, .3) == replace(paired(a.mean(1), b.mean(1), .3), floor=0.)
    alone = [{(0,s): v for s,v in enumerate(o[0])} for o in (a, b)]
    assert paired_runs(*alone) == paired(a[0], b[0])

def over_folds(spreads, seed=0, F=5):
    rng = np.random.default_rng(seed)
    return [replace(paired(s*rng.normal(size=F), np.zeros(F)), floor=0.) for s in spreads]

def test_what_losses_have_in_common_counts_at_most_twice_their_own():
    alike, unlike = over_folds([1.]*12), over_folds(10.**np.arange(-6, 6))
    assert {d.df for d in moderated(alike)} == {12.}
    near = moderated(unlike)
    assert all(4 < d.df < 5 for d in near)
    assert [d.se for d in near[3:]] == pytest.approx([d.se for d in unlike[3:]], rel=.1)

def test_moderated_differences_stay_what_they_are():
    diffs = over_folds([1.]*12)
    new = moderated(diffs)
    assert [d.mean for d in new] == [d.mean for d in diffs]
    assert np.std([d.se for d in new]) < np.std([d.se for d in diffs])
    assert moderated(diffs[:2]) == diffs[:2]
    seeds = [replace(d, floor=None) for d in diffs]
    assert moderated(seeds) == seeds
    still = replace(diffs[0], var=0., rest=0.)
    assert moderated([still, *diffs])[0] == still

def test_noise_inside_the_folds_stays():
    high = [replace(d, floor=9.) for d in over_folds([1.]*12)]
    assert [d.se for d in moderated(high)] == pytest.approx([3.]*12)

def test_equal_losses_over_the_same_folds_are_seldom_called_different():
    rng, alarms = np.random.default_rng(3), 0
    for _ in range(150):
        of_fold = .02*rng.normal(size=(12,5,1,1))
        right = rng.random((12,5,2,120)) < .8+of_fold
        runs = [{(f,s): r[f,s] for f in range(5) for s in range(2)} for r in right]
        table = against(dict(enumerate(runs)), 0, .003)
        alarms += table.status.isin(['better','worse']).any()
    assert alarms/150 < .12

@pytest.mark.parametrize('swap', [False, True])
def test_rounding_is_no_spread_whichever_is_larger(swap):
    a, b = [0.]*3, [.1]*3
    d = paired(b, a) if swap else paired(a, b)
    assert p_differs(d) == .25

@pytest.mark.parametrize('n', range(2, 9))
@pytest.mark.parametrize('level', [.9,.95])
def test_intervals_without_spread_agree_with_the_tests(n, level):
    for mean in (0., .001):
        low, high = interval(Difference(mean, n, 0.), level)
        if level == .9: assert (-.003 < low and high < .003) == (p_equal(Difference(mean, n, 0.), .003) < .05)
        elif mean: assert (low > 0) == (p_differs(Difference(mean, n, 0.)) < .05)

@pytest.mark.parametrize('mean', [0.,.001,.01])
@pytest.mark.parametrize('m', [1,18])
def test_seeds_that_are_promised_without_spread_settle_it(mean, m):
    alpha = .05/m
    text = verdict(Difference(mean, 3, 0.), m=m)[1]
    more = int(text.split('about ')[1].split()[0])
    def settled(n):
        d = Difference(mean, n, 0.)
        return verdict(d, p=p_differs(d)*m, p_eq=p_equal(d, .003)*m)[0] != 'not decided'
    assert settled(3+more) and (more == 1 or not settled(2+more))

def test_ranks_of_few_sets_are_counted():
    assert rank_test([[.9,.8],[.7,.6]]).p == .5
    assert rank_test([[3,2,1]]*3).p == pytest.approx(1/36)
    assert rank_test([[1,1],[2,2]]).p == 1

@pytest.mark.parametrize('n,k', [(2,2), (3,2), (2,3), (3,3), (3,4), (3,8), (5,4), (8,3)])
def test_equal_entries_rarely_differ_in_rank(n, k):
    rng, sims = np.random.default_rng(15), 200
    alarms = np.mean([rank_test(rng.normal(size=(n,k))).p < .05 for _ in range(sims)])
    assert alarms < .09, alarms

def test_runs_with_other_test_images_are_named():
    ce = {(0,0): np.ones(10), (0,1): np.ones(10)}
    with pytest.raises(ValueError, match=r'new against ce, run \(0, 1\).*same test images, got 12 and 10'):
        against(dict(ce=ce, new=ce | {(0,1): np.ones(12)}))
    both = ce | {(0,1): np.ones(12)}
    with pytest.raises(ValueError, match='got 12 and 12, and 10 in run'): winner(dict(ce=both, new=both))

def test_none_is_a_run_without_a_number():
    t = against(dict(ce=[.9,.91,.92,.93], a=[.95,None,.97,.985]))
    assert t.seeds['a'] == 3 and t.status['a'] == 'better'
    assert not better([.9,None,.8], [.8]*3)

def test_means_of_an_entry_are_those_of_the_runs_it_shares():
    t = against(dict(ce={0: .95, 1: .80, 2: .81, 3: .80}, new={1: .85, 2: .87, 3: .86, 9: .2}))
    assert t['mean']['new']-t.ref_mean['new'] == pytest.approx(t.difference['new'])
    assert t.status['new'] == 'better'
    folds = {(f,s): np.arange(10*(f+1)) < 5 for f in range(3) for s in range(2) if (f,s) != (1,1)}
    t = against(dict(ce={k: np.ones(len(v)) for k,v in folds.items()}, new=folds))
    assert t['mean']['new']-t.ref_mean['new'] == pytest.approx(t.difference['new'])

def test_without_a_margin_nothing_is_equal():
    t = against(dict(ce=[.9,.9,.9,.9,.9,.9], a=[.9,.9,.9,.9,.9,.9]), margin=None)
    assert t.status['a'] == 'not decided' and math.isnan(t.p_equal['a'])

def test_overlap_of_folds_takes_away_a_winner():
    runs = dict(a={(f,0): v for f,v in enumerate([.90,.92,.91,.93,.92])}, b={(f,0): .9 for f in range(5)})
    assert winner(runs) == 'a' and winner(runs, ratio=1.) is None

@pytest.mark.parametrize('n_images', [20, 200])
def test_an_interval_of_accuracies_stays_within_what_can_be(n_images):
    "Mean squares that almost cancel left less than one degree of freedom, and ends of 1,000 points"
    rng, widest = np.random.default_rng(0), 0.
    for _ in range(2000):
        a, b = (rng.random((3, n_images)) < 0.7 for _ in range(2))
        d = paired_images(a, b)
        if d.se == 0: continue
        low, high = interval(d)
        widest = max(widest, high-low)
    assert widest < 2
