"Make the pages anew that show results, after results/study or results/claims.jsonl have grown."
import os, re, runpy, sys, warnings
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean

root = Path(__file__).resolve().parent.parent
nbs = root/'nbs'
readers = ['24_study', '27_evidence', 'index', 'studies/20_reality_check', 'studies/22_claims',
           'tutorials/70_choose_a_loss', 'studies/10_all_losses']
takes_minutes = re.compile(r'^#\|\s*(slow|cuda)', flags=re.M)
not_run = re.compile(fr'{takes_minutes.pattern}|^#\|\s*eval:\s*false|nbdev_export\(\)', flags=re.M)
box = re.compile(r'#\| echo: false\nin_short\((.*)\)')

def run_quick_cells(path):
    "Execute a page; cells that take minutes keep what they showed. How many of these show nothing?"
    nb = nbformat.read(path, as_version=4)
    client = NotebookClient(nb, timeout=600, resources={'metadata': {'path': str(path.parent)}})
    # A backend of the shell would keep figures from the page
    env = {k: v for k,v in os.environ.items() if k != 'MPLBACKEND'}
    with client.setup_kernel(env=env):
        for i,c in enumerate(nb.cells):
            if c.cell_type == 'code' and not not_run.search(c.source): client.execute_cell(c, i)
    nbformat.write(nb, path)
    slow = [c for c in nb.cells if c.cell_type == 'code' and takes_minutes.search(c.source)]
    return sum(not c.outputs for c in slow)

def box_text(cell):
    "What the box on top of a chapter has to say; None for a cell that makes no box"
    from discloss.evidence import in_short
    found = box.fullmatch(cell.source) if cell.cell_type == 'code' else None
    return found and in_short(*(n.strip(" '\"") for n in found[1].split(','))).data

def fill_boxes(path):
    "Compute the box on top of a chapter; is there one?"
    nb = nbformat.read(path, as_version=4)
    texts = [(c, text) for c in nb.cells if (text := box_text(c))]
    for c,text in texts:
        c.outputs = [nbformat.v4.new_output('execute_result', {'text/markdown': text},
                                            execution_count=c.execution_count)]
    if texts: nbformat.write(nb, path)
    return bool(texts)

if __name__ == '__main__':
    os.chdir(root)
    sys.path.insert(0, str(root))
    os.environ['PYTHONPATH'] = str(root)
    warnings.filterwarnings('ignore')
    for path in (nbs/f'{name}.ipynb' for name in readers):
        empty = run_quick_cells(path)
        nbdev_clean(str(path))
        note = f': run all of it, {empty} of its slow cells show nothing' if empty else ''
        print(f'{path.relative_to(root)}{note}', flush=True)
    for path in sorted(nbs.rglob('*.ipynb')):
        if fill_boxes(path):
            nbdev_clean(str(path))
            print(path.relative_to(root), flush=True)
    runpy.run_path(str(root/'.ci'/'readme.py'), run_name='__main__')
