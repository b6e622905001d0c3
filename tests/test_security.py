"Files that come from elsewhere are read without executing code, and nothing that stands in data chooses where files are written."
import ast, json, pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import root
from test_bad_input import refusal, tree
from test_matrix import learner, loaders, state

from discloss.compare import compare
from discloss.specs import parse_losses
from discloss.data import ImageTensors, image_dls, load_arrays
from discloss.losses.center import CenterLoss

def calls(path):
    "Every call in a file: the name with its dots, and the keyword arguments that are plain values"
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}, node

def test_no_code_is_read():
    "No call in the package unpickles, evaluates or imports what a file says"
    files = sorted((root/'discloss').rglob('*.py'))
    assert len(files) > 15
    for path in files:
        for name, kwargs, node in calls(path):
            where = f'{path.name}: {ast.unparse(node)}'
            assert name not in ('eval', 'exec', 'compile', '__import__', 'os.system', 'pickle.load', 'marshal.loads', 'yaml.load', 'joblib.load', 'load_learner', 'torch.hub.load'), where
            if name == 'torch.load': assert kwargs.get('weights_only') is True, where
            if name == 'np.load': assert kwargs.get('allow_pickle') is False, where
            if name.startswith('subprocess.'): assert 'shell' not in kwargs, where
            if name == 'pickle.loads': assert ast.unparse(node.args[0]).startswith('pickle.dumps('), where # Only what was pickled in the same line

class Touch:
    "Unpickled, it makes a file"
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)

@pytest.fixture
def mark(tmp_path):
    path = tmp_path/'executed'
    pickle.loads(pickle.dumps(Touch(path)))
    assert path.exists() # It would work
    path.unlink()
    return path

def test_pickles_in_data(tmp_path, mark):
    good, _ = load_arrays('digits')
    np.savez(tmp_path/'x.npz', **{**{k: v[:60] for k,v in good.items()}, 'x_train': np.array([Touch(mark)], dtype=object)})
    refusal(lambda: image_dls('x', root=tmp_path), 'x.npz', 'allow_pickle=False')
    (tmp_path/'y.npz').write_bytes(pickle.dumps(Touch(mark)))
    refusal(lambda: image_dls('y', root=tmp_path), 'y.npz')
    assert not mark.exists()

def test_pickles_in_results(tmp_path, mark):
    args = dict(losses='crossentropy', n_train=100, bs=50, epochs=1, seeds=1, show=False, out=tmp_path/'out')
    compare(**args)
    file, = (tmp_path/'out'/'runs').iterdir()
    np.savez(file, feats=np.array([Touch(mark)], dtype=object), **{k: np.zeros(1, int) for k in ('targ','pred','conf','prob')})
    assert not compare(**args).feats
    file.write_bytes(pickle.dumps(Touch(mark)))
    assert not compare(**args).feats and not mark.exists()

def test_pickles_in_models(tmp_path, mark):
    "fastai's `load` reads weights only, and a bad file leaves the model as it was"
    learn = learner(CenterLoss(), tmp_path)
    before = state(learn.model)
    good = Path(learn.save('good')).read_bytes()
    for name,write in dict(pickle=lambda f: torch.save(Touch(mark), f), torn=lambda f: f.write_bytes(good[:len(good)//2]), noise=lambda f: f.write_bytes(bytes(range(256)))).items():
        write(tmp_path/'models'/f'{name}.pth')
        with pytest.raises(Exception): learn.load(name)
        assert not mark.exists() and all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items()), name

def test_specs_are_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for spec in ('center(lam=open("executed","w"))', 'center(lam=__import__("os").mkdir("executed"))', 'center(lam=[open("executed","w") for _ in "a"][0])', 'open("executed","w")',
                 'center.__class__', 'center(**{"lam": open("executed","w")})', '(lambda: open("executed","w"))()'):
        refusal(lambda: parse_losses(spec))
    assert not list(tmp_path.iterdir())

strange = ['../../evil', '/etc/evil', 'a/b', '..', 'T-shirt/top', 'CON', '%s{0}', '|x|', '$^{', 'new\nline']

def test_names_are_not_paths(tmp_path):
    "Class names, names of data and of losses, and keys in results: whatever they are, files are written into the output folder, under names of their own"
    base, out = image_dls('digits', n_train=100, bs=50), tmp_path/'a'/'b'/'out'
    for dl in base: dl.dataset.vocab = ImageTensors(dl.dataset.x, dl.dataset.y, strange).vocab
    base.name = '../../evil'
    out.mkdir(parents=True)
    (out/'results.jsonl').write_text(json.dumps(dict(key='../../../evil', label='../evil', config={}, epochs=[])) + '\n')
    cmp = compare({'../../evil': CenterLoss(), 'a/b|c\nd': CenterLoss(lam=0.1)}, base, epochs=1, seeds=1, show=False, out=out)
    cmp.plot()
    table = cmp._repr_markdown_().split('\n\n')[0].splitlines()
    assert len(table) == 4 and len({row.replace('\\|', '').count('|') for row in table}) == 1
    assert [p.name for p in tmp_path.iterdir()] == ['a'] and [p.name for p in (tmp_path/'a'/'b').iterdir()] == ['out']
    names = [p for p in tree(out) if p not in ('results.jsonl', 'runs')]
    assert len(names) == 2 and all(p.startswith('runs/') and p[5:-4].isalnum() for p in names)

def test_learner_with_strange_class_names(tmp_path):
    "Saving, exporting and predicting write nothing under the name of a class"
    dls = loaders()
    for dl in dls: dl.dataset.vocab = ImageTensors(dl.dataset.x, dl.dataset.y, strange).vocab
    learn = learner(CenterLoss(), tmp_path, dls=dls)
    learn.fit(1)
    assert learn.predict(dls.valid_ds[0][0])[0] in strange
    learn.save('m')
    learn.export('l.pkl')
    assert sorted(tree(tmp_path)) == ['l.pkl', 'models', 'models/m.pth']

def test_load_learner_is_named():
    "The one way that does execute code stands in the docs, with its risk"
    text = (root/'nbs'/'studies'/'70_robustness.ipynb').read_text(encoding='utf-8')
    assert 'load_learner' in text and 'executes' in text
