"Make README.md from nbs/index.ipynb, with its figures in index_files/, without Quarto."
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent

def _table(html):
    "An HTML table as Markdown"
    rows = [re.findall(r'<t[hd]>(.*?)</t[hd]>', r, flags=re.S) for r in re.findall(r'<tr>(.*?)</tr>', html, flags=re.S)]
    rows.insert(1, ['---']*len(rows[0]))
    return '\n'.join('| ' + ' | '.join(c.strip() for c in r) + ' |' for r in rows)

def readme(nb_path=root/'nbs'/'index.ipynb'):
    "The text of README.md, and the figures it shows as a dict of path -> bytes"
    nb = nbformat.read(nb_path, as_version=4)
    nb.cells = [c for c in nb.cells if not re.match(r'#\|\s*hide\b', c.source)]
    nb.metadata.language_info = {'name': 'python'}
    alts = re.findall(r'^#\|\s*fig-alt:\s*(.*)', '\n'.join(c.source for c in nb.cells), flags=re.M)
    for c in nb.cells:
        if c.cell_type != 'code': continue
        if re.match(r'#\|\s*echo:\s*false', c.source): c.source = ''
        for o in c.outputs: # A table or a figure, without its plain-text double
            data = o.get('data', {})
            if '<table' in data.get('text/html', ''): data['text/markdown'] = _table(data['text/html'])
            kind = next((k for k in ('text/markdown','image/png','text/plain') if k in data), None)
            if kind: o['data'] = {kind: data[kind]}
        c.outputs = [o for o in c.outputs if '<IPython.core' not in str(o.get('data'))] # Style sheets of progress bars
    text, res = MarkdownExporter().from_notebook_node(nb, resources={'unique_key': 'index', 'output_files_dir': 'index_files'})
    text = re.sub(r'```python\n\s*```\n', '', text)
    text = re.sub(r'\]\((?!https?:|index_files/)([^)\s]+\.(?:ipynb|qmd|png))\)', r'](nbs/\1)', text)
    for alt in alts: text = text.replace('![png](', f'![{alt}](', 1) # Each figure of this page has one
    text = re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'
    return '<!-- Made from nbs/index.ipynb by .ci/readme.py: edit the notebook, not this file. -->\n\n' + text, res['outputs']

if __name__ == '__main__':
    text, figures = readme()
    for f in (root/'index_files').glob('*'): f.unlink()
    for name, data in figures.items():
        (root/name).parent.mkdir(exist_ok=True)
        (root/name).write_bytes(data)
    (root/'README.md').write_text(text, encoding='utf-8')
    print(f'README.md: {len(text.splitlines())} lines, {len(figures)} figure(s)')
