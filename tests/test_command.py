"The command line: help, and a comparison that survives being killed. Its errors are in test_bad_input.py."
import io, json, os, signal, subprocess, sys, time, warnings
from pathlib import Path

import numpy as np
from PIL import Image

command = [sys.executable, '-c', 'from discloss.command import main; main()']

def call(*args, cwd, **kwargs):
    return subprocess.run(command + list(args), cwd=cwd, capture_output=True, text=True, env={**os.environ, 'PYTHONWARNINGS': 'ignore'}, **kwargs)

def table(folder): return (folder/'table.md').read_text().split('\n\n')[0]

def test_help(tmp_path):
    text = ' '.join(call('--help', cwd=tmp_path).stdout.split())
    for option, default in dict(losses='crossentropy,center,sigma2r', data='digits', epochs='10', seeds='5', bs='64', out='discloss_out').items():
        assert f'--{option}' in text and f'(default: {default})' in text, option
    assert 'not done again' in text

def test_a_terminal_need_not_know_all_signs(monkeypatch):
    from discloss.specs import print_anything
    terminal = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
    for out in terminal, io.StringIO():
        monkeypatch.setattr(sys, 'stdout', out)
        print_anything()
        print('σ²R', flush=True)
    assert terminal.buffer.getvalue().split() == [rb'\u03c3\xb2R']

def test_a_folder_at_home_is_no_typo(tmp_path, monkeypatch):
    from discloss.command import _check
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path/'mnist2').mkdir()
    _check('~/mnist2', None, None, False)

def test_killed_and_started_again(tmp_path):
    "kill -9 in the middle: finished runs are kept to the byte, the rest is done, and the table is that of an undisturbed run"
    args = ['--epochs', '3', '--seeds', '3', '--n-train', '500', '--out']
    whole = call(*args, 'whole', cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    proc = subprocess.Popen(command + args + ['killed'], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    results, start = tmp_path/'killed'/'results.jsonl', time.time()
    while not (results.exists() and results.read_bytes().count(b'\n') >= 2):
        assert proc.poll() is None and time.time()-start < 120
        time.sleep(0.005)
    proc.send_signal(signal.SIGKILL)
    proc.wait()
    kept = results.read_bytes()
    assert 2 <= kept.count(b'\n') < 9
    with open(results, 'ab') as f: f.write(b'{"key": "torn by the ki') # A write that the kill cut off
    again = call(*args, 'killed', cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert results.read_bytes().startswith(kept) and f'{len(kept.splitlines())} of 9 runs are in' in again.stdout
    rows = [json.loads(l) for l in results.read_text().splitlines() if 'torn' not in l]
    assert len(rows) == 9 and len({r['key'] for r in rows}) == 9
    assert table(tmp_path/'killed') == table(tmp_path/'whole')
    assert (tmp_path/'killed'/'comparison.png').stat().st_size > 20_000

def test_result_lines_are_complete(tmp_path):
    res = call('--losses', 'center(lam=0.1)', '--epochs', '2', '--seeds', '1', '--out', 'o', cwd=tmp_path)
    assert res.returncode == 0, res.stderr
    row = json.loads((tmp_path/'o'/'results.jsonl').read_text())
    assert row['label'] == 'center(lam=0.1)' and row['config']['hparams']['lam'] == 0.1 and row['config']['seed'] == 0
    assert {'torch','fastai','discloss','python'} <= set(row['versions']) and row['device'].startswith(('cpu','NVIDIA')) and row['seconds'] > 0
    assert len(row['epochs']) == 2 and {'train_loss','valid_loss','accuracy'} <= set(row['epochs'][0])

def test_what_is_not_used_is_said_whatever_the_filters(tmp_path, capsys):
    from discloss.command import _notes
    from discloss.compare import _load
    for c in 'cat', 'dog':
        (tmp_path/c).mkdir()
        for i in range(10): Image.fromarray(np.random.default_rng(i).integers(0, 255, (8,8,3)).astype('uint8')).save(tmp_path/c/f'{i}.png')
    (tmp_path/'cow').mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with _notes(): _load(str(tmp_path), 'small_body', False, 4, 'cpu', dict(size=8))
    said = capsys.readouterr().err
    assert said.startswith(f'note: in {tmp_path}: ') and 'cow (no pictures)' in said
