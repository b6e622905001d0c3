"The pages: checks of the notebooks that need no browser, and of the rendered site in a browser (-m site)."
import ast, functools, http.server, importlib.util, json, os, re, shutil, subprocess, sys, threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import nbformat
import pytest
import yaml
from conftest import root

nbs = root/'nbs'
skipped = {'.ipynb_checkpoints', '_proc'}
notebooks = sorted(p for p in nbs.rglob('*.ipynb') if not set(p.parts) & skipped)
def page_id(path): return str(path.relative_to(nbs))
each_notebook = pytest.mark.parametrize('path', notebooks, ids=page_id)

@functools.lru_cache(None)
def cells(path, kind):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == kind]

def directives(cell): return set(re.findall(r'^#\|\s*([\w-]+)', cell.source, flags=re.M))

# ---------------------------------------------------------------- the configuration

def test_configuration():
    link = nbs/'_quarto.yml'
    assert link.is_symlink() and link.resolve() == root/'_quarto.yml'
    config = yaml.safe_load(link.read_text(encoding='utf-8'))
    assert config['metadata-files'] == ['nbdev.yml', 'sidebar.yml']
    html = config['format']['html']
    files = [html['css'], config['website']['favicon'], *html['filters'], html['theme']['light'][1]]
    for f in files: assert (nbs/f).is_file(), f
    assert list(config['format']) == ['html'], 'one format: a page has no copies'

def test_one_version():
    import discloss
    version = discloss.__version__
    footer = yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))['website']['page-footer']['left']
    citation = yaml.safe_load((root/'CITATION.cff').read_text(encoding='utf-8'))
    changes = re.search(r'^## ([\d.]+)', (root/'CHANGELOG.md').read_text(encoding='utf-8'), flags=re.M)
    assert footer.startswith(f'discloss {version},')
    assert citation['version'] == version
    assert changes[1] == version

def sidebar(part=None):
    "All pages that the sidebar lists"
    if part is None:
        file = (nbs/'sidebar.yml').read_text(encoding='utf-8')
        part = yaml.safe_load(file)['website']['sidebar']['contents']
    for item in part:
        if isinstance(item, str): yield item
        elif 'contents' in item: yield from sidebar(item['contents'])
        else: yield item['href']

def test_sidebar_lists_each_page_once():
    listed = list(sidebar())
    files = [*notebooks, *nbs.rglob('*.qmd')]
    pages = {p.relative_to(nbs).as_posix() for p in files} - {'99_all.ipynb'}
    assert len(listed) == len(set(listed))
    assert set(listed) == pages, 'nbs/sidebar.yml has one line for each page'

# ---------------------------------------------------------------- the notebooks

spec = importlib.util.spec_from_file_location('refresh', root/'.ci'/'refresh.py')
refresh = importlib.util.module_from_spec(spec)
spec.loader.exec_module(refresh)

def boxes():
    "The cells that show verdict and cost of a loss"
    return [(path, cell) for path in notebooks for cell in cells(path, 'code')
            if refresh.box.fullmatch(cell.source)]

def test_there_are_boxes(): assert len(boxes()) >= 16

@pytest.mark.parametrize('path, cell', boxes(), ids=[page_id(p) for p,_ in boxes()])
def test_box_shows_the_newest_results(path, cell):
    "A result that is added later must reach the page"
    shown, = [o.data['text/markdown'] for o in cell.outputs]
    assert shown == refresh.box_text(cell), 'run .ci/refresh.py'

link_text = re.compile(r'\[([^\[\]]*)\]\(([^)\s]+)\)')

@each_notebook
def test_links(path):
    "No backticks in a link's text, where nbdev would link a name twice; files and headings exist"
    for cell in cells(path, 'markdown'):
        text = re.sub(r'^```.*?^```|\$[^$]+\$', '', cell.source, flags=re.M | re.S)
        for words, target in link_text.findall(text):
            assert '`' not in words, f'[{words}]: no backticks in the text of a link'
            if target.startswith(('http:', 'https:', '#', 'mailto:')): continue
            assert (path.parent/urldefrag(target)[0]).exists(), target

@each_notebook
def test_pictures_have_words(path):
    for cell in cells(path, 'markdown'):
        assert not re.search(r'!\[\s*\]\(', cell.source), 'a picture without alternative text'
    for cell in cells(path, 'code'):
        shows = any('image/png' in o.get('data', {}) for o in cell.outputs)
        if shows and 'hide' not in directives(cell):
            assert 'fig-alt' in directives(cell), f'a figure without fig-alt:\n{cell.source[:200]}'

@each_notebook
def test_lines_fit(path):
    "A page shows 88 characters; 100 is the most"
    for cell in cells(path, 'code'):
        if 'hide' in directives(cell): continue
        lines = [l for l in cell.source.splitlines() if not l.startswith('#|')]
        for line in lines: assert len(line) <= 100, line

silent = {'test_eq', 'test_ne', 'test_close', 'test_fail', 'test_is', 'test', 'test_shuffled', 'nbdev_export'}
no_output = {'hide', 'export', 'exporti', 'exports', 'default_exp'}

def shows_nothing(cell):
    "A shown cell that ends in a value, and has no output"
    if cell.outputs or directives(cell) & no_output or cell.source.rstrip().endswith(';'): return False
    body = ast.parse(re.sub(r'^[!%].*', '', cell.source, flags=re.M)).body
    if not body or not isinstance(body[-1], ast.Expr): return False
    value = body[-1].value
    name = value.func.attr if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) else ''
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name): name = value.func.id
    return name not in silent and not name.endswith('_') and not name.startswith(('set', 'assert'))

@each_notebook
def test_cells_have_their_output(path):
    for cell in cells(path, 'code'): assert not shows_nothing(cell), cell.source[-300:]

@each_notebook
def test_no_machine_speaks(path):
    "What programs say to themselves is not on a page"
    for cell in cells(path, 'code'):
        if 'hide' in directives(cell): continue
        assert not [o for o in cell.outputs if o.get('name') == 'stderr'], cell.source[:200]

@each_notebook
def test_no_time_is_typed(path):
    "How long something takes is measured in a cell; a time in prose is that of one machine"
    for cell in cells(path, 'markdown'):
        text = re.sub(r'^(```.*?^```|    .*?$)', '', cell.source, flags=re.M | re.S)
        typed = re.search(r'(\d|one|two|five|ten|some|few) (seconds|minutes|hours)\b', text)
        assert not typed, typed[0]

@each_notebook
def test_p_values_are_not_zero(path):
    "A p-value is below some number, but never 0"
    for cell in cells(path, 'code'):
        for o in cell.outputs:
            for text in (o.get('text', ''), *o.get('data', {}).values()):
                assert not re.search(r'p = 0\.0+(?!\d)', str(text)), cell.source[:200]

@each_notebook
def test_seeds_decide(path):
    "Which of two trained networks has more is decided by a test over seeds, not by a bare comparison"
    for cell in cells(path, 'code'):
        bare = re.search(r'decided\((\w+) > (\w+), no=\1 < \2\)', cell.source)
        assert not bare, f'{bare[0]}: use is_better'

chapters = [p for p in notebooks if p.parent.name == 'losses']

def compares_samples(path):
    return any(re.search(r'^    (separable, *)?pairs *= *(False, *)?True', c.source, flags=re.M)
               for c in cells(path, 'code'))

def test_some_losses_compare_samples(): assert sum(map(compares_samples, chapters)) >= 4

@pytest.mark.parametrize('path', filter(compares_samples, chapters), ids=page_id)
def test_pairs_need_batches(path):
    "The box of a loss that compares samples says who makes batches with several of a class"
    box = next(c.source for c in cells(path, 'markdown') if c.source.startswith('::: {.callout-note'))
    assert 'class_balanced(dls)' in box

def modules():
    import importlib, pkgutil
    import discloss
    names = [m.name for m in pkgutil.walk_packages(discloss.__path__, 'discloss.')]
    return [importlib.import_module(n) for n in names if n not in ('discloss.all', 'discloss._modidx')]

def test_signatures_can_be_shown():
    "nbdev shows each exported function and class; what it cannot read stops the docs"
    from nbdev.showdoc import show_doc
    bad = []
    for module in modules():
        for name in getattr(module, '__all__', []):
            what = getattr(module, name)
            if not callable(what) or what.__module__ != module.__name__: continue
            try: show_doc(what)._repr_markdown_()
            except Exception as e: bad.append(f'{module.__name__}.{name}: {e!r}')
    assert not bad, bad

# ---------------------------------------------------------------- the interactive page

def by_torch(case):
    "Value and gradient of one sample, by the package"
    import torch, torch.nn.functional as F
    from discloss.losses.arcface import arcface_transform
    from discloss.losses.circle import circle_transform
    from discloss.losses.cosface import cosface_transform
    from discloss.losses.gsoftmax import gsoftmax_loss
    from discloss.losses.ldmat import ldmat_loss
    from discloss.losses.sigma2r import sigma2r_loss
    x = torch.tensor([case['x']], dtype=torch.float64, requires_grad=True)
    anchors = torch.tensor(case['anchors'], dtype=torch.float64)
    kind, set_ = case['kind'], case['settings']
    own = torch.zeros(1, dtype=torch.long)
    if kind == 'cosineLoss':
        transform = dict(arcface=arcface_transform, cosface=cosface_transform, circle=circle_transform)
        change = transform.get(set_['transform'])
        if change: change = functools.partial(change, margin=set_['margin'])
        cosine = F.normalize(x) @ F.normalize(anchors).T
        loss = gsoftmax_loss(cosine, own, change, set_['scale'])
    if kind == 'sigma2rLoss': # A second sample, so far away that the mean squared distance is the unit
        d = (x.detach() - anchors[:1]).pow(2).sum()
        far = (2*set_['unit'] - d).clamp_min(0).sqrt()
        feats = torch.cat([x, anchors[:1] + torch.stack([far, far*0])])
        losses = sigma2r_loss(feats, own.expand(2), anchors[:1], set_['slope'], tau=set_['tau'], reduction='none')
        loss = losses[0]
    if kind == 'ldmatLoss':
        targ = torch.tensor([0, 0] + [1]*(len(anchors)-1))
        loss = ldmat_loss(torch.cat([x, anchors]), targ, set_['delta'], set_['slack'], 'none')[0]
    return [loss.item(), *torch.autograd.grad(loss, x)[0][0].tolist()]

def draw_cases(n=200):
    import random
    rng = random.Random(0)
    def vector(): return [rng.uniform(-1.5, 1.5), rng.uniform(-1.5, 1.5)]
    for i in range(n):
        anchors = [vector() for _ in range(3)]
        margin = rng.uniform(0.05, 0.95)
        for name in ('normface', 'cosface', 'arcface', 'circle'):
            settings = dict(transform=name, scale=rng.uniform(1, 40), margin=margin)
            yield dict(kind='cosineLoss', x=vector(), anchors=anchors, settings=settings)
        settings = dict(slope=rng.uniform(0, 10), tau=rng.uniform(0, 3), unit=rng.uniform(4.5, 9))
        x = [c + rng.uniform(-2, 2) for c in anchors[0]]
        yield dict(kind='sigma2rLoss', x=x, anchors=anchors, settings=settings)
        settings = dict(delta=rng.uniform(0.2, 2.5), slack=rng.uniform(0, 0.95))
        yield dict(kind='ldmatLoss', x=vector(), anchors=anchors, settings=settings)

by_node = """
const games = require(process.argv[1]);
const cases = JSON.parse(require('fs').readFileSync(0));
const answer = c => games[c.kind](c.x, c.anchors, c.settings);
console.log(JSON.stringify(cases.map(answer).map(r => [r.value, ...r.grad])));
"""

@pytest.mark.skipif(not shutil.which('node'), reason='needs Node.js on the path')
def test_interactive_page_shows_the_package():
    cases = list(draw_cases())
    command = ['node', '-e', by_node, str(nbs/'interactive.js')]
    res = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, check=True)
    for case, js in zip(cases, json.loads(res.stdout), strict=True):
        assert js == pytest.approx(by_torch(case), rel=1e-7, abs=1e-9), case

# ---------------------------------------------------------------- the site

class Page(HTMLParser):
    "The links, anchors and pictures of a page"
    def __init__(self, file):
        super().__init__()
        self.links, self.ids, self.pictures = [], set(), []
        self.feed(file.read_text(encoding='utf-8'))
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if 'id' in attrs: self.ids.add(attrs['id'])
        if tag == 'a' and attrs.get('href'): self.links.append(attrs['href'])
        if tag == 'img': self.pictures.append(attrs)

def git(*args, cwd): return subprocess.run(['git', *args], cwd=cwd, check=True, capture_output=True, text=True).stdout

def render_with_nbconvert(tree, out):
    "Where Quarto is absent: the notebooks as nbdev processes them, by nbconvert"
    code = 'from nbdev.serve import proc_nbs; proc_nbs(n_workers=0)'
    subprocess.run([sys.executable, '-c', code], cwd=tree, env=environment(tree), check=True)
    from nbconvert import HTMLExporter
    for path in sorted((tree/'_proc').rglob('*.ipynb')):
        name = re.sub(r'^\d+_', '', path.stem) + '.html'
        file = out/path.relative_to(tree/'_proc').parent/name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(HTMLExporter().from_filename(path)[0], encoding='utf-8')

def environment(tree): return {**os.environ, 'PYTHONPATH': str(tree), 'PYTHONWARNINGS': 'ignore'}

quarto = shutil.which('quarto') is not None
rendered = pytest.mark.skipif(not quarto, reason='needs Quarto on the path')

@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "The site: that in DISCLOSS_SITE, or built from a copy of what git knows, which the build must leave as it was"
    if 'DISCLOSS_SITE' in os.environ: return Path(os.environ['DISCLOSS_SITE']).resolve()
    tree = tmp_path_factory.mktemp('tree')
    for name in git('ls-files', '-co', '--exclude-standard', cwd=root).splitlines():
        if not os.path.lexists(root/name): continue
        (tree/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root/name, tree/name, follow_symlinks=False)
    git('init', '-q', cwd=tree)
    git('add', '-A', cwd=tree)
    if not quarto:
        render_with_nbconvert(tree, tree/'_docs')
        return tree/'_docs'
    command = [str(Path(sys.executable).with_name('nbdev_docs')), '--n_workers', '2']
    res = subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True)
    assert res.returncode == 0, (res.stdout + res.stderr)[-3000:]
    changed = git('status', '--porcelain', '--untracked-files=all', cwd=tree).splitlines()
    assert not [l for l in changed if l[1] != ' '], 'building the docs changes the checkout'
    return tree/'_docs'

@pytest.fixture(scope='session')
def pages(site):
    res = {f.relative_to(site).as_posix(): Page(f) for f in sorted(site.rglob('*.html'))}
    assert len(res) > 25
    return res

def html_of(nb): return Path(nb).with_name(re.sub(r'^\d+_', '', Path(nb).stem) + '.html').as_posix()

@pytest.mark.site
def test_a_page_for_each_notebook(pages):
    for nb in sidebar(): assert html_of(nb) in pages, nb

@pytest.mark.site
@rendered
def test_no_dead_links(site, pages):
    for name, page in pages.items():
        here = Path(name).parent
        for link in page.links:
            if re.match(r'[a-z]+:', link): continue
            target, anchor = urldefrag(link)
            file = os.path.normpath(here/unquote(target)) if target else name
            if file == '.': file = 'index.html'
            assert (site/file).exists(), f'{name}: {link}'
            if anchor and file in pages: assert unquote(anchor) in pages[file].ids, f'{name}: {link}'

@pytest.mark.site
@rendered
def test_links_lead_out(pages):
    "To fast.ai, PyTorch and GitHub, and to no page of this site by its full address"
    links = {l for page in pages.values() for l in page.links}
    for host in ('https://docs.fast.ai/', 'https://docs.pytorch.org/', 'https://github.com/'):
        assert any(l.startswith(host) for l in links), host
    assert not [l for l in links if l.startswith('https://discloss.github.io/')]

@pytest.fixture(scope='session')
def browser():
    webdriver = pytest.importorskip('selenium.webdriver')
    names = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
    binary = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which('chromedriver')
    if not binary or not driver: pytest.skip('needs Chromium and chromedriver on the path')
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for a in ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--hide-scrollbars'):
        options.add_argument(a)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    res = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield res
    res.quit()

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@pytest.fixture(scope='session')
def address(site):
    "The site on a port of this machine"
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()

def show(browser, url, width=1400, dark=False):
    "Open a page on a screen of this width, in light or dark"
    size = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
    scheme = [dict(name='prefers-color-scheme', value='dark' if dark else 'light')]
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=scheme))
    mode = 'alternate' if dark else 'default'
    script = f"try {{ localStorage.setItem('quarto-color-scheme', '{mode}') }} catch (e) {{}}"
    old = getattr(browser, 'before_load', None)
    if old: browser.execute_cdp_cmd('Page.removeScriptToEvaluateOnNewDocument', dict(identifier=old))
    new = browser.execute_cdp_cmd('Page.addScriptToEvaluateOnNewDocument', dict(source=script))
    browser.before_load = new['identifier']
    browser.get_log('browser')
    browser.get(url)
    browser.execute_async_script('const done = arguments[0]; document.fonts.ready.then(() => setTimeout(done, 50))')

look = """
const luminance = c => { // Of an rgb() colour, between 0 and 1; null where it is transparent
  const v = c.match(/[\\d.]+/g).map(Number);
  if (v.length > 3 && v[3] < 0.5) return null;
  return (0.2126*v[0] + 0.7152*v[1] + 0.0722*v[2]) / 255;
};
const seen = e => e.offsetParent !== null;
const all = q => [...document.querySelectorAll(q)];
const text = document.querySelector('main').cloneNode(true);
text.querySelectorAll('pre, code, script, style').forEach(e => e.replaceWith('`'));
const resources = performance.getEntriesByType('resource').map(r => r.name);
return {
  width: document.documentElement.scrollWidth,
  marks: (text.textContent.match(/.{0,30}(\\[\\[|\\[`|\\]\\(https?:).{0,40}/g) || []),
  cut: all('div.sourceCode, pre.sourceCode, pre > code.sourceCode').filter(e => seen(e) && e.scrollWidth > e.clientWidth + 1
    && getComputedStyle(e).display !== 'inline').map(e => e.textContent.slice(0, 80)),
  wide: all('main p, main table, main pre, main img, main svg, main canvas, main h1, main h2, main h3').filter(e =>
    seen(e) && e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('table, pre, details:not([open])')
    && getComputedStyle(e.parentElement).overflowX !== 'auto')
    .map(e => e.tagName + ' ' + e.textContent.slice(0, 60)),
  wordless: all('main img').filter(e => !(e.alt || '').trim()).map(e => e.src.slice(-60)),
  missing: all('main img').filter(e => seen(e) && e.complete && !e.naturalWidth).map(e => e.src.slice(-60)),
  unnamed: all('details.code-fold').filter(e => e.querySelector('summary').textContent.trim() === 'Code')
    .map(e => e.querySelector('code').textContent.slice(0, 40)).filter(c => /^(# |from |import )/.test(c)),
  bare: all('main hr').map(e => e.nextElementSibling?.textContent.slice(0, 40)), // nbdev's entry without its source
  foreign: resources.filter(r => !r.startsWith(location.origin)),
  ground: luminance(getComputedStyle(document.body).backgroundColor),
  pills: all('p code, li code').filter(seen).slice(0, 40)
    .map(e => luminance(getComputedStyle(e).backgroundColor)).filter(l => l !== null),
  faint: all('main td, main th, main summary, main figcaption, .breadcrumb-item').filter(seen).slice(0, 300).filter(e => {
    let ground = null; // of the cell, or of what it stands in
    for (let o = e; ground === null && o; o = o.parentElement) ground = luminance(getComputedStyle(o).backgroundColor);
    return Math.abs(luminance(getComputedStyle(e).color) - (ground ?? 1)) < 0.4;
  }).map(e => e.textContent.slice(0, 40)),
  words: all('main p, main li').filter(seen).slice(0, 40).map(e => luminance(getComputedStyle(e).color)),
};
"""

def faults(seen, width, dark, log):
    "What is wrong with a page, by what a browser saw"
    res = {k: seen[k] for k in ('marks', 'cut', 'wide', 'missing', 'wordless', 'unnamed', 'bare', 'foreign', 'faint') if seen[k]}
    if seen['width'] > width: res['page'] = f'{seen["width"]} pixels wide on a screen of {width}'
    if (seen['ground'] < 0.5) != dark: res['ground'] = seen['ground']
    pale = [l for l in seen['words'] if abs(l - seen['ground']) < 0.4]
    if pale: res['pale words'] = pale
    pills = [l for l in seen['pills'] if abs(l - seen['ground']) > 0.35]
    if pills: res['pills'] = pills
    errors = [l['message'] for l in log if l['level'] == 'SEVERE' and 'favicon.ico' not in l['message']]
    if errors: res['console'] = errors
    return res

@pytest.mark.site
@rendered
@pytest.mark.parametrize('width', [1400, 390])
def test_interactive_page_moves(browser, address, width):
    "Each loss, each of its sliders, a drag and a key change both pictures; nothing is said in the console"
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select
    show(browser, address + 'interactive.html', width)
    def one(name): return browser.find_element(By.CSS_SELECTOR, f'[data-play={name}]')
    def pictures():
        return [browser.execute_script('return arguments[0].toDataURL()', one(n)) for n in ('plane', 'curve')]
    seen = [pictures()]
    def changed():
        seen.append(pictures())
        assert seen[-1][0] != seen[-2][0]
        assert seen[-1][1] != seen[-2][1]
        assert 'NaN' not in one('value').text
    names = [o.get_attribute('value') for o in one('loss').find_elements(By.TAG_NAME, 'option')]
    assert names == ['normface', 'cosface', 'arcface', 'circle', 'sigma2r', 'ldmat']
    for name in names:
        Select(one('loss')).select_by_value(name)
        changed()
        for slider in browser.find_elements(By.CSS_SELECTOR, '.play input[type=range]'):
            before = slider.get_attribute('value')
            ActionChains(browser).drag_and_drop_by_offset(slider, 20, 0).perform()
            after = slider.get_attribute('value')
            assert after != before
            assert slider.find_element(By.XPATH, '../output').text == after
            changed()
    text = one('value').text
    ActionChains(browser).drag_and_drop_by_offset(one('plane'), -60, 40).perform()
    changed()
    assert one('value').text != text
    one('plane').send_keys(Keys.ARROW_LEFT)
    changed()
    assert not [l['message'] for l in browser.get_log('browser') if l['level'] == 'SEVERE']

@pytest.mark.site
@rendered
@pytest.mark.parametrize('width', [1400, 390])
def test_film_plays(browser, address, width):
    "The slider, the zoom and the button of the film move its points"
    import time
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    show(browser, address + 'callbacks.html', width)
    film = browser.find_element(By.CSS_SELECTOR, '.discloss-film')
    def one(selector): return film.find_element(By.CSS_SELECTOR, selector)
    def pictures():
        canvases = film.find_elements(By.TAG_NAME, 'canvas')
        return [browser.execute_script('return arguments[0].toDataURL()', c) for c in canvases]
    def changed(before): return [a != b for a,b in zip(before, pictures(), strict=True)]
    slider, end = one('[type=range]'), pictures()
    assert len(end) == 2
    assert one('output').text.startswith('epoch')
    ActionChains(browser).click(slider).perform() # Its middle
    assert 0.4 < float(slider.get_attribute('value')) < 0.6
    assert all(changed(end))
    middle = pictures()
    one('[type=checkbox]').click()
    assert any(changed(middle))
    one('button').click()
    time.sleep(1)
    one('button').click()
    now = float(slider.get_attribute('value'))
    assert now > 0.6
    time.sleep(0.3)
    assert float(slider.get_attribute('value')) == now
    assert not [l['message'] for l in browser.get_log('browser') if l['level'] == 'SEVERE']

bad_page = """<!DOCTYPE html><html><body style="background: white; width: 2000px"><main>
<p style="color: #eee">[[`Loss`](https://a.b) pale and bracketed <code style="background: #111">pill</code></p>
<table style="width: 1900px"><tr><td>wide</td><td style="color: #eee">faint</td></tr></table>
<pre style="width: 90px"><code class="sourceCode" style="display: block; overflow: auto">cut = 'a long line that is cut'</code></pre>
<details class="code-fold"><summary>Code</summary><code># What it tests</code></details>
<img src="absent.png"><hr><h3>bare</h3></main><script>throw new Error('broken')</script></body></html>"""

@pytest.mark.site
def test_faults_are_seen(browser, tmp_path):
    "A page with every fault: each is found"
    (tmp_path/'bad.html').write_text(bad_page)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    show(browser, f'http://127.0.0.1:{server.server_port}/bad.html')
    found = faults(browser.execute_script(look), 1400, False, browser.get_log('browser'))
    server.shutdown()
    wanted = {'marks', 'cut', 'wide', 'missing', 'wordless', 'unnamed', 'bare', 'faint', 'page', 'pale words', 'pills', 'console'}
    assert set(found) == wanted

@pytest.mark.site
@rendered
@pytest.mark.timeout(600)
@pytest.mark.parametrize('dark', [False, True], ids=['light', 'dark'])
@pytest.mark.parametrize('width', [1400, 390])
def test_pages_in_a_browser(browser, address, pages, width, dark):
    bad = {}
    for name in pages:
        show(browser, address + name, width, dark)
        found = faults(browser.execute_script(look), width, dark, browser.get_log('browser'))
        if found: bad[name] = found
    assert not bad, json.dumps(bad, indent=1)[:5000]
