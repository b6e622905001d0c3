"The script that makes pages anew, on small notebooks whose outputs were cleared."
import runpy

import nbformat
import pytest
from conftest import root
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

refresh = runpy.run_path(str(root/'.ci'/'refresh.py'), run_name='refresh')

figure = """import matplotlib.pyplot as plt
plt.plot([1,2]);"""

def page(folder, *cells):
    path = folder/'page.ipynb'
    nbformat.write(new_notebook(cells=list(cells)), path)
    return path

def shown(path):
    "What each code cell shows: a kind of output for each"
    cells = nbformat.read(path, as_version=4).cells
    return [[k for o in c.outputs for k in o.get('data', {'text': o.get('text')})] for c in cells if c.cell_type == 'code']

def test_quick_cells_are_run_and_slow_ones_keep_their_output(tmp_path, monkeypatch):
    monkeypatch.setenv('MPLBACKEND', 'agg') # As a shell may have it
    kept = [new_output('stream', text='hours ago')]
    path = page(tmp_path, new_markdown_cell('# Page'), new_code_cell('k = 2'), new_code_cell('k+1'), new_code_cell(figure),
                new_code_cell('#| slow\nk/0', outputs=kept), new_code_cell('#|cuda\nk/0'), new_code_cell('#| eval: false\nk/0'),
                new_code_cell('import nbdev; nbdev.nbdev_export()'))
    assert refresh['run_quick_cells'](path) == 1
    assert shown(path) == [[], ['text/plain'], ['image/png', 'text/plain'], ['text'], [], [], []]

def test_a_page_that_fails_stays_as_it_was(tmp_path):
    path = page(tmp_path, new_code_cell('1'), new_code_cell('1/0'))
    before = path.read_bytes()
    with pytest.raises(Exception, match='ZeroDivisionError'): refresh['run_quick_cells'](path)
    assert path.read_bytes() == before

def test_boxes_are_filled_and_nothing_else(tmp_path):
    box = "#| echo: false\nin_short('center')"
    path = page(tmp_path, new_code_cell('1/0'), new_code_cell(box), new_code_cell(f'{box}.data'))
    assert refresh['fill_boxes'](path)
    assert shown(path) == [[], ['text/markdown'], []]
    assert '**Verdict.**' in nbformat.read(path, as_version=4).cells[1].outputs[0].data['text/markdown']
    without = page(tmp_path, new_code_cell('1/0'))
    before = without.read_bytes()
    assert not refresh['fill_boxes'](without) and without.read_bytes() == before

def test_pages_that_show_results_are_there():
    for name in refresh['readers']: assert (refresh['nbs']/f'{name}.ipynb').is_file(), name
