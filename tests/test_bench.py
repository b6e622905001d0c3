"The commands of measurements refuse what they cannot do before they begin."
import pytest

from discloss import bench, claims

@pytest.mark.parametrize('args,said', [
    (['nix'], 'unknown losses nix: known are arcface'),
    (['center', '--rounds', '0'], 'rounds must be at least 2, got 0')])
def test_bench_refuses(args, said):
    with pytest.raises(SystemExit, match=said): bench.main(args)

@pytest.mark.parametrize('size', ['--classes', '--batch', '--features'])
@pytest.mark.parametrize('value', ['0', '1', '-5', 'x', '2.5'])
def test_bench_sizes(size, value, capsys):
    with pytest.raises(SystemExit): bench.main(['center', size, value])
    assert f'must be a whole number of at least 2, got {value}' in capsys.readouterr().err

@pytest.mark.parametrize('minutes', ['-1', 'nan', 'ten'])
def test_minutes_of_claims(minutes, capsys):
    with pytest.raises(SystemExit): claims.main(['--minutes', minutes])
    assert f'must be a number of at least 0, got {minutes}' in capsys.readouterr().err

def test_claims_say_how_many_runs_are_there_and_that_they_were_stopped(monkeypatch, capsys, tmp_path):
    def run(*args): raise KeyboardInterrupt
    monkeypatch.setattr(claims, 'one_row', run)
    out = tmp_path/'claims.jsonl'
    with pytest.raises(SystemExit, match='stopped; finished runs are kept in'):
        claims.main(['rate', '--out', str(out)])
    n = len(list(claims.plan(['rate'])))
    assert f'0 of {n} runs are there' in capsys.readouterr().out
    claims.main(['rate', '--minutes', '0', '--out', str(out)])
    assert f'0 of {n} runs are there' in capsys.readouterr().out
