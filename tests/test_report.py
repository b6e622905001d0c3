"The report: made-up comparisons of every kind give a page that holds what they say, loads nothing, and runs no text as code."
import base64, json, math, re, shutil, subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from discloss.comparison import Comparison, _curve
from discloss.report import *
from discloss.statistics import against

nasty = '<img src=x onerror=alert(1)> & "quoted" | $x_1$ \'</script><script>document.title="owned"</script>'

class MadeUp(Comparison):
    outputs = feats = None # By loss, whatever was stored

def made_up(n_classes=4, losses=('crossentropy','center','arcface'), seeds=5, n=200, vocab=None, gains={}, broken=(), outputs=True, feats=True,
            worst=True, test_set='test', epochs=3):
    "A comparison with known accuracies: `.9`, and what `gains` adds"
    rng = np.random.default_rng(0)
    targ = rng.permutation(np.arange(n) % n_classes)
    hard = rng.random(n)
    rows, outs, fs = [], {}, {}
    for l in losses:
        outs[l] = []
        for s in range(seeds):
            right = hard + .01*rng.normal(size=n) < .9+gains.get(l, 0.)
            pred = np.where(right, targ, (targ+1) % n_classes) if l not in broken else np.zeros(n, int)
            acc, bad = float((pred == targ).mean()), l in broken
            config = dict(data='photos', n=[600,100,n], arch='resnet34', n_feats=None, epochs=epochs, bs=64, lr=1e-3, wd=None, seed=s, hparams=dict(scale=30.), test_set=test_set)
            rows.append(dict(key=f'{l}-{s}', label=l, config=config, versions=dict(discloss='0.1.0', torch='2.14'), device='cpu, 1 threads', finished='2026-01-31T12:00:00Z',
                             seconds=12.5, parameters=1000, epochs=[dict(train_loss=None if bad else 1., accuracy=acc)]*epochs, valid=dict(accuracy=acc),
                             trouble='its loss is not finite: try --lr 0.001' if bad else None,
                             test=dict(accuracy=acc, loss=None if bad else .3+.01*rng.random(), ece=.02, ncm_accuracy=acc, variance_ratio=None if bad else .1+.01*rng.random(), intra=10.)))
            outs[l].append(dict(targ=targ.astype(np.int32), pred=pred.astype(np.int32)))
        fs[l] = torch.randn(n, 5), torch.as_tensor(targ)
    images = dict(index=np.argsort(-hard)[:6], images=rng.integers(0, 255, (6,8,8,3)).astype(np.uint8), ids=np.array([f'cats/{i}.jpg' for i in range(6)]))
    res = MadeUp(rows, vocab=vocab, worst=images if worst else None, command='discloss_compare --data photos')
    res.outputs = outs if outputs else {l: [] for l in losses}
    res.feats = fs if feats else {}
    return res

class Page(HTMLParser):
    "Tags, attributes and text of a page"
    void = {'meta','img','br','link','input','hr','!doctype'}
    def __init__(self, html):
        super().__init__()
        self.tags, self.attrs, self.texts, self.open = [], [], [], []
        self.feed(html)
        self.close()
        self.text = ' '.join(' '.join(self.texts).split())
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag); self.attrs += [(tag,*a) for a in attrs]
        if tag not in self.void: self.open.append(tag)
    def handle_startendtag(self, tag, attrs): self.tags.append(tag); self.attrs += [(tag,*a) for a in attrs]
    def handle_endtag(self, tag): assert self.open.pop() == tag, tag
    def handle_data(self, data):
        if self.open and self.open[-1] not in ('style','script'): self.texts.append(data)

def check(html):
    "A page that is whole, and stands alone"
    page = Page(html)
    assert not page.open
    for tag,name,value in page.attrs:
        assert not name.startswith('on'), (tag, name)
        if name in ('src','href','xlink:href'): assert value.startswith(('data:','#')), value[:80]
    assert 'nan' not in page.text.lower().split() and 'None' not in page.text.split()
    return page

cases = dict(two_classes=dict(n_classes=2), hundred_classes=dict(n_classes=100, n=1000, losses=('crossentropy','center')), one_seed=dict(seeds=1), two_seeds=dict(seeds=2),
             one_loss=dict(losses=('center',)), one_loss_one_seed=dict(losses=('center',), seeds=1), diverged=dict(broken=('arcface',)), reference_diverged=dict(broken=('crossentropy',)),
             all_diverged=dict(broken=('crossentropy','center','arcface')), no_outputs=dict(outputs=False), no_features=dict(feats=False), no_images=dict(worst=False),
             bare=dict(outputs=False, feats=False, worst=False), one_epoch=dict(epochs=1), no_reference=dict(losses=('center','arcface')),
             eighteen=dict(losses=tuple(f'loss{i}(lam={i}, alpha=0.1)' for i in range(18)), seeds=2), names=dict(vocab=[nasty,'a'*80,'','ü 狗']))

def test_runs_of_different_lengths_have_curves():
    "As a callback leaves them that stops runs early"
    cmp = made_up(losses=('crossentropy','center'), seeds=2)
    for r,n in zip(cmp.results, (1,3,2,1)): r['epochs'] = n*r['epochs'][:1]
    for i,r in enumerate(cmp.results): r['epochs'] = [dict(accuracy=.5+.1*i+.01*j) for j,_ in enumerate(r['epochs'])]
    assert _curve(cmp, 'crossentropy') == pytest.approx(np.array([[.5,.5,.5],[.6,.61,.62]]))
    page = check(report_html(cmp))
    assert ('svg','aria-label','Learning curves of each loss') in page.attrs
    assert 'diverged' not in page.text

@pytest.mark.parametrize('case', cases)
def test_every_kind_of_comparison_has_a_page(case, tmp_path):
    cmp = made_up(**cases[case])
    html, csv = write_report(cmp, tmp_path/'out')
    page = check(html.read_text(encoding='utf-8'))
    labels = {r['label'] for r in cmp.results}
    assert all(l in page.text for l in labels)
    assert 'discloss_compare --data photos' in page.text and '0.1.0' in page.text and 'resnet34' in page.text
    runs = pd.read_csv(csv)
    assert len(runs) == len(cmp.results) and set(runs.label) == labels and 'test.accuracy' in runs

def test_first_sentence_and_winner():
    page = check(report_html(made_up(gains=dict(center=.05))))
    assert re.search(r'center is 5\.\d points better than cross-entropy, more than the noise of five seeds\.', page.text)
    assert 'test images' in page.text and '★' in page.text

def test_what_is_in_the_file_runs_nowhere():
    cmp = made_up(n_classes=2, vocab=[nasty, 'b'], losses=(nasty, 'crossentropy'))
    cmp.worst['ids'][:] = nasty[:20]
    cmp.command = nasty
    for r in cmp.results: r['device'] = nasty; r['config']['data'] = nasty; r['trouble'] = nasty
    page = check(report_html(cmp))
    data = sum(o == ('script','type','application/json') for o in page.attrs)
    assert page.tags.count('script') == data+1 # names and matrices as data, and the page's own
    assert not any(tag == 'img' and name == 'onerror' for tag,name,_ in page.attrs)
    assert 'owned' in page.text # as text

def luminance(c):
    c = np.array([int(c[i:i+2], 16) for i in (1,3,5)])/255
    return np.where(c <= .04045, c/12.92, ((c+.055)/1.055)**2.4) @ [.2126,.7152,.0722]

@pytest.mark.parametrize('n_classes', [3,30])
def test_colours_can_be_seen_on_both_grounds(n_classes):
    html = report_html(made_up(n_classes, n=300, seeds=2))
    svg = ''.join(re.findall(r'<svg.*?</svg>', html, flags=re.S))
    used = set(re.findall(r'(?:fill|stroke)(?:: |=")(#[0-9a-f]{6})', svg)) - {'#ffffff'} # what stands on a badge
    assert len(used) >= 3
    for c in used:
        for ground in ('#ffffff','#16181c'):
            a, b = sorted((luminance(c), luminance(ground)))
            assert (b+.05)/(a+.05) > 3, (c, ground)

def test_confusion_and_accuracy_by_class_are_those_of_the_runs():
    cmp = made_up(3, seeds=2)
    f = Findings(cmp)
    c = f.confusion('center')
    want = sum(np.array([[((o['targ'] == i) & (o['pred'] == j)).sum() for j in range(3)] for i in range(3)]) for o in cmp.outputs['center'])
    np.testing.assert_allclose(c, want)
    page = check(report_html(cmp))
    assert all(f'{100*want[i,i]/want[i].sum():.1f}' in page.text for i in range(3))

def test_images_that_most_runs_get_wrong():
    cmp = made_up()
    found = Findings(cmp).mistakes()
    preds = np.stack([o['pred'] for v in cmp.outputs.values() for o in v])
    for m in found:
        assert m['wrong'] == (preds[:,m['index']] != cmp.outputs['center'][0]['targ'][m['index']]).sum() > 0
        assert m['taken'] != m['true']
    assert found[0]['image'].shape == (8,8,3)
    cmp.worst = None
    ids = Findings(cmp).mistakes()
    assert ids[0]['image'] is None and ids[0]['id'] == f"#{ids[0]['index']}"
    assert [m['wrong'] for m in ids] == sorted((m['wrong'] for m in ids), reverse=True)

def test_lost_runs_leave_the_accuracies_to_speak():
    cmp = made_up(gains=dict(center=.05))
    whole = Findings(cmp)
    assert whole.by_image
    del cmp.outputs['center'][1]
    part = Findings(cmp)
    assert not part.by_image and part.confusion('center').sum() == 4*200
    assert part.table.difference['center'] == pytest.approx(whole.table.difference['center'])

def test_a_loss_that_did_not_learn_is_named_and_wins_nothing():
    cmp = made_up(broken=('arcface',))
    for r in cmp.results:
        if r['label'] == 'arcface': r['test']['variance_ratio'] = 1e-6
    f = Findings(cmp)
    assert f.table.status['arcface'] == 'failed' and 'arcface' not in f.winners().values()
    page = check(report_html(cmp))
    assert 'arcface did not learn in 5 of 5 runs: its loss is not finite: try --lr 0.001' in page.text
    curves, scores = re.findall(r'(?:Validation accuracy after each epoch|Test accuracy of each run)\.(.*?)</figcaption>', report_html(cmp))
    assert curves == scores == ' Without arcface: did not learn.'

@pytest.mark.parametrize('said', ['arcface diverged: try less', 'arcface did not learn, diverged: try less'])
def test_what_went_wrong_is_said_once(said):
    cmp = made_up(broken=('arcface',))
    for r in cmp.results:
        if r['trouble']: r['trouble'] = said
    assert Findings(cmp).failed['arcface'] == 'did not learn in 5 of 5 runs: diverged: try less'

def test_no_test_set_is_said(): assert 'There was no test set' in check(report_html(made_up(test_set='validation'))).text

def sentences(status, seeds=5, **kwargs):
    table = pd.DataFrame({'mean': [.95]+[.95+d for _,d in status.values()], 'seeds': seeds, 'difference': [math.nan]+[d for _,d in status.values()],
                          'status': ['reference']+[s for s,_ in status.values()]}, index=['crossentropy', *status])
    return headline(table, **kwargs)

@pytest.mark.parametrize('status,first', [
    (dict(center=('better',.008)), 'center is 0.8 points better than cross-entropy, more than the noise of five seeds.'),
    (dict(center=('better',.008), arcface=('better',.01)), 'arcface (1.0 points) and center (0.8 points) are better than cross-entropy by more than the noise of five seeds.'),
    (dict(center=('equivalent',.001), arcface=('equivalent',0.)), 'No difference: every loss is equivalent to cross-entropy within 0.3 points.'),
    (dict(center=('worse',-.1)), 'No loss is as good as cross-entropy.'),
    (dict(center=('worse',-.1), arcface=('not decided',.01)), 'No loss is surely better than cross-entropy.'),
    (dict(center=('failed',-.8)), 'Cross-entropy is right for 95.0% of the test images, on average over five seeds.')])
def test_headlines(status, first): assert sentences(status)[0] == first

def test_headline_of_one_seed():
    first, second = sentences(dict(center=('not decided',.01)), seeds=1)
    assert first == 'center is right most often, for 96.0% of the test images.' and second == 'One seed cannot tell a difference from noise; run at least three.'

def test_all_that_tie_are_named():
    tied = dict(center=('not decided',.01), sigma2r=('not decided',.01))
    assert sentences(tied, seeds=1)[0] == 'center and sigma2r are right most often, for 96.0% of the test images.'
    same = dict(center=('not decided',0.), sigma2r=('not decided',0.))
    assert sentences(same, seeds=2)[0] == 'Cross-entropy, center and sigma2r are right equally often, for 95.0% of the test images.'

def test_terminal_and_page_have_the_same_verdicts():
    cmp = made_up(losses=('crossentropy','center','arcface','nllr'), gains=dict(center=.05, nllr=-.05), broken=('arcface',))
    page, said = Findings(cmp).table, cmp.compared()
    assert said.verdict.to_dict() == page.verdict[page.status != 'reference'].to_dict()
    assert said.verdict.to_dict() == dict(center='better', nllr='worse', arcface='did not learn in 5 of 5 runs')
    low, high = said['95% interval']['center'].replace('−', '-').split(' to ')
    gap = float(said['difference to crossentropy']['center'])
    assert float(low) < gap < float(high) and gap == pytest.approx(100*page.difference['center'], abs=.005)
    for text in repr(cmp), cmp._repr_markdown_(): assert all(v in text for v in said.verdict)

def test_one_seed_has_no_verdict_and_says_so():
    one = made_up(seeds=1)
    assert 'one seed gives no verdict' in repr(one) and 'interval' not in repr(one)
    assert 'one seed' not in repr(made_up(seeds=2)) and 'at least 3 seeds needed' in repr(made_up(seeds=2))
    alone = repr(made_up(losses=('center',), seeds=1))
    assert 'verdict' not in alone

def test_runs_csv_is_in_the_page(tmp_path):
    html, csv = write_report(made_up(), tmp_path)
    inside = re.search(r'data:text/csv;charset=utf-8;base64,([\w+/=]+)', html.read_text())[1]
    assert base64.b64decode(inside).decode() == csv.read_text()

def test_names_of_folders_and_images_need_not_be_text(tmp_path):
    cmp = made_up(seeds=2, n=40)
    for r in cmp.results: r['config']['data'] = 'caf\udce9'
    cmp.worst['ids'] = np.array([f'caf\udce9/{i}.jpg' for i in range(6)])
    write_report(cmp, tmp_path, 'discloss_compare --data caf\udce9')
    assert 'caf\\udce9' in (tmp_path/'report.html').read_text(encoding='utf-8')
    assert 'caf\\udce9' in (tmp_path/'runs.csv').read_text(encoding='utf-8')

def test_nothing_to_report():
    with pytest.raises(ValueError, match='at least one finished run'): report_html(SimpleNamespace(results=[]))

browser = shutil.which('chromium') or shutil.which('google-chrome')

def seen(html, probe, tmp_path, width=500):
    "What a script finds in a page"
    text = html.read_text().replace('<head>', '<head><script>const errors=[]; onerror=e=>errors.push(String(e))</script>', 1).replace('</body>', probe+'</body>')
    (tmp_path/'probe.html').write_text(text)
    args = ['--headless','--no-sandbox','--disable-gpu','--disable-quic','--no-first-run','--disable-background-networking','--disable-component-update','--disable-sync',
            f'--user-data-dir={tmp_path/"profile"}',f'--window-size={width},900','--dump-dom', (tmp_path/'probe.html').as_uri()]
    out = subprocess.run([browser, *args], capture_output=True, text=True, timeout=120).stdout
    return json.loads(re.search(r'GOT(.*?)END', out)[1].replace('&lt;','<').replace('&gt;','>').replace('&amp;','&'))

@pytest.mark.skipif(browser is None, reason='no Chromium')
def test_the_table_of_results_fits_a_screen(tmp_path):
    html, _ = write_report(made_up(losses=('crossentropy','center','sigma2r'), gains=dict(center=.05)), tmp_path)
    probe = """<script>
    const box=document.querySelector('#results .wide'), got={room:box.clientWidth, need:box.scrollWidth};
    document.body.innerHTML=''; document.body.append('GOT'+JSON.stringify(got)+'END');</script>"""
    got = seen(html, probe, tmp_path, width=1400)
    assert got['need'] <= got['room'] > 1000

@pytest.mark.skipif(browser is None, reason='no Chromium')
def test_the_page_in_a_browser(tmp_path):
    "Sorting, the legend and the matrix work; nothing is wider than a phone; no error"
    losses = 'crossentropy','center','arcface(scale=30.0,margin=0.3,straight=True)'
    html, _ = write_report(made_up(vocab=['a','b',nasty,'d'], losses=losses, gains=dict(center=.05)), tmp_path)
    probe = '''<script>
    const got={errors}, table=document.querySelector('table.sort'), first=()=>table.tBodies[0].rows[0].cells[0].textContent.trim();
    const head=i=>table.tHead.querySelectorAll('button')[i];
    head(1).click(); got.down=first(); head(1).click(); got.up=first(); got.sorted=head(1).parentNode.getAttribute('aria-sort');
    head(0).click(); got.names=first();
    document.querySelectorAll('.classes button')[2].click(); got.hit=document.querySelectorAll('.feats .hit').length; got.dim=document.querySelector('.feats').classList.contains('on');
    const m=document.querySelector('.matrix'); m.scrollIntoView(); const r=m.querySelector('image').getBoundingClientRect(), at=k=>({clientX:r.left+.125*r.width,clientY:r.top+(k+.5)/4*r.height});
    const touch=k=>{m.querySelector('svg').dispatchEvent(new MouseEvent('click',at(k))); return m.querySelector('.read').textContent}; got.read=touch(0); got.wrong=touch(3);
    const right=o=>o.getBoundingClientRect().right; got.inside=[...document.querySelectorAll('.name span')].every(o=>right(o)<=right(o.closest('th')));
    got.letters=Math.min(...[...document.querySelectorAll('.name span')].map(o=>o.getBoundingClientRect().width));
    got.wide=document.documentElement.scrollWidth<=innerWidth; got.title=document.title;
    document.body.innerHTML=''; document.body.append('GOT'+JSON.stringify(got)+'END');</script>'''
    got = seen(html, probe, tmp_path)
    assert got['errors'] == [] and got['title'] == 'discloss: three losses on photos'
    assert got['inside'] and got['letters'] > 40 # A name fits into its cell, and is no column of letters
    assert got['down'] == 'center' and got['up'] != 'center' and got['sorted'] == 'ascending' and got['names'] == 'crossentropy'
    assert got['hit'] == 9 and got['dim'] # points, badge and its text in three panels
    assert got['read'].startswith('a recognised: ') and got['wrong'].startswith('d taken for a: ') and got['wide']

def test_the_conditions_name_each_weight_decay():
    cmp = made_up()
    decays = dict(crossentropy=None, center=.3, arcface=0.)
    for r in cmp.results: r['config']['wd'] = decays[r['label']]
    assert '<dt>weight decay</dt><dd>0.01, 0.3, 0.0</dd>' in report_html(cmp)

def test_the_star_is_explained_where_there_is_one():
    from fastcore.xml import to_xml
    from discloss.report import _method
    f = SimpleNamespace(by_image=True, margin=.003)
    path = ('test', 'accuracy')
    assert '★' in to_xml(_method(f, {path: 'center'})) and '★' not in to_xml(_method(f, {path: None}))
