"Claims of work, folders, and descriptions of code."
import importlib, pickle, sys
from collections import OrderedDict

import pytest
from torch import nn

from discloss import store
from discloss.store import claim, make_folder, run_key, write_text

@pytest.mark.skipif(store.fcntl is None, reason='the file stays on Windows')
@pytest.mark.parametrize('another', [False, True])
def test_a_claim_whose_file_was_removed_before_the_lock_is_no_claim(another, tmp_path, monkeypatch):
    "Between opening and locking another process ends its work and, if `another`, a third one claims it"
    path, held, calls, lock = tmp_path/'work.lock', [], [], store._lock
    def late(f, wait):
        calls.append(f)
        if len(calls) == 1:
            path.unlink()
            if another:
                held.append(open(path, 'ab'))
                lock(held[0], False)
        return lock(f, wait)
    monkeypatch.setattr(store, '_lock', late)
    with claim(path) as ours:
        assert ours != another
        assert path.exists()
        with claim(path) as again: assert not again
    assert path.exists() == another

def test_a_file_in_the_way_of_a_folder_is_named(tmp_path):
    file = tmp_path/'file'
    file.write_text('x')
    for way in file, file/'more'/'still':
        with pytest.raises(NotADirectoryError, match=f'{way} must be a folder, but a file is in the way'): make_folder(way)
    assert make_folder(tmp_path/'a'/'b').is_dir()

def test_text_may_hold_the_name_of_any_file(tmp_path):
    write_text(tmp_path/'a', 'σ caf\udce9')
    assert (tmp_path/'a').read_text(encoding='utf-8') == 'σ caf\\udce9'

@pytest.fixture
def key(tmp_path, monkeypatch):
    "The key of `f` in a module of one's own, and in a module behind it"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)
    def _key(code, behind=''):
        for name,text in dict(behind=behind, own=code).items():
            (tmp_path/f'{name}.py').write_text(text)
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return run_key(importlib.import_module('own').f)
    yield _key
    for name in 'own','behind': sys.modules.pop(name, None)

described = dict(
    cache='from functools import lru_cache\n@lru_cache\ndef g(): return {}\ndef f(): return g()',
    default_of_a_dict='from collections import defaultdict\nf = defaultdict(lambda: {})',
    own_dict='class D(dict):\n    def __missing__(self, k): return {}\nf = D(a=1)',
    items_of_an_own_list='class D(list):\n    def more(self): pass\nf = D([{}])',
    named_tuple='from collections import namedtuple\nf = namedtuple("P", "x y")(1, {})',
    deque='from collections import deque\nf = deque([{}])',
    cached_property='from functools import cached_property\nclass C:\n    @cached_property\n    def g(self): return {}\nf = C()',
    dispatch='from functools import singledispatch\n@singledispatch\ndef g(x): return 0\n@g.register\ndef _(x:int): return {}\ng(1)\ndef f(x): return g(x)',
    pattern='import re\nf = re.compile("{}")',
    method_in_c='f = dict(a={}).get',
    metaclass='class M(type):\n    def __call__(c): return {}\nclass f(metaclass=M): pass',
    beside_a_lock='from threading import RLock\nclass C: pass\nf = C()\nf.lock, f.k = RLock(), {}',
    value_of_a_module='import behind\nbehind.k = {}\ndef f(): return behind.k')

@pytest.mark.parametrize('kind', described)
def test_the_key_sees(kind, key):
    first, again, other = (key(described[kind].format(v), 'k = 0') for v in (1, 1, 2))
    assert first == again != other

def test_the_key_sees_the_order_of_layers_and_the_kind_of_keys():
    def layers(names):
        made = dict(a=nn.ReLU(), b=nn.Tanh())
        return nn.Sequential(OrderedDict((k, made[k]) for k in names))
    assert run_key(layers('ab')) == run_key(layers('ab')) != run_key(layers('ba'))
    assert run_key({1: 2}) != run_key({'1': 2})
    assert run_key(dict(a=1, b=2)) == run_key(dict(b=2, a=1))

def test_the_key_sees_what_was_put_into_the_package(monkeypatch):
    from discloss import heads
    from discloss.losses.center import CenterLoss
    for owner,name in (CenterLoss, 'loss'), (CenterLoss, 'head'), (heads, 'cosine'):
        before = run_key(owner)
        with monkeypatch.context() as m:
            m.setattr(owner, name, lambda *args: args)
            assert run_key(owner) != before
        assert run_key(owner) == before

def test_what_refuses_to_be_pickled_cannot_be_described():
    class Closed:
        def __reduce__(self): raise pickle.PicklingError('no')
    with pytest.raises(TypeError, match='Closed does not tell what it is'): run_key(Closed())
