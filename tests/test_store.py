"Claims of work, and folders."
import pytest

from discloss import store
from discloss.store import claim, make_folder

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
