"What several tests share: the environment of child processes, small learners, and what the page on robustness shows."
import json, os, platform, subprocess, sys
from pathlib import Path

import pytest

# Before torch is imported, here and in child processes: two threads that wait for each other are slower than one where tests share few cores
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('MPLBACKEND', 'agg')

root = Path(__file__).resolve().parent.parent

@pytest.fixture
def run(tmp_path):
    "Run Python code in a new process in an empty folder, and return its standard output"
    def _run(code, env=None, python=sys.executable, cwd=tmp_path):
        res = subprocess.run([str(python), '-W', 'ignore', '-c', code], cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True)
        assert res.returncode == 0, res.stderr[-3000:]
        return res.stdout
    return _run

# Tests say what they found by `record_property`: `cell` (loss, situation), `refused` (the message), `bad` (name, what came), `examples` (loss, number), `error` (loss, case, dtype, number)
found = dict(cells={}, bad={}, examples={}, errors={})

def pytest_addoption(parser):
    parser.addoption('--record', metavar='FILE', help='add what the tests of robustness found to this file, from which nbs/studies/70_robustness.ipynb is made')

def pytest_runtest_logreport(report):
    if report.when != 'call' and not report.failed: return
    props = dict(report.user_properties)
    if 'cell' in props:
        loss, situation = props['cell']
        found['cells'].setdefault(situation, {})[loss] = 'FAILED' if report.failed else props.get('refused', 'pass')
    if report.failed: return
    if 'bad' in props: found['bad'].update([props['bad']])
    for loss,n in props.get('examples', {}).items(): found['examples'][loss] = found['examples'].get(loss, 0)+n
    for loss,cases in props.get('errors', {}).items(): found['errors'].setdefault(loss, {}).update(cases)

def pytest_terminal_summary(terminalreporter, config):
    cells = found['cells']
    if cells:
        losses = sorted({l for row in cells.values() for l in row})
        wide, high = max(map(len, cells)), max(map(len, losses))
        terminalreporter.section('loss x situation: + passes, r refuses in words, F fails, . not tried')
        for i in range(high): terminalreporter.write_line(' '*(wide+1) + ' '.join(l.rjust(high)[i] for l in losses))
        for situation,row in cells.items():
            terminalreporter.write_line(situation.ljust(wide+1) + ' '.join({'pass': '+', 'FAILED': 'F', None: '.'}.get(row.get(l), 'r') for l in losses))
    for what,n in (('bad inputs, each refused in words', len(found['bad'])), ('random examples', sum(found['examples'].values())), ('numbers compared with float64', sum(map(len, found['errors'].values())))):
        if n: terminalreporter.write_line(f'{n} {what}')
    if config.getoption('--record') and not hasattr(config, 'workerinput'): _record(Path(config.getoption('--record')))

def _record(file):
    from discloss.runs import device_name, versions
    from discloss.specs import all_losses
    import torch
    old, losses = json.loads(file.read_text()) if file.exists() else {}, all_losses()
    def known(d): return {k: v for k,v in d.items() if k in losses} # A loss that is no more is dropped
    new = {k: {**old.get(k, {}), **v} for k,v in found.items()}
    new['cells'] = {s: known({**old.get('cells', {}).get(s, {}), **found['cells'].get(s, {})}) for s in new['cells']}
    new |= {k: known(new[k]) for k in ('examples','errors')}
    new |= dict(versions=versions(), device=device_name('cuda' if torch.cuda.is_available() else 'cpu'), system=f'{platform.system()} {platform.machine()}')
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(new, indent=1, ensure_ascii=False) + '\n')
