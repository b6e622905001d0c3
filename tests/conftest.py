"What several tests share: the environment of child processes."
import os, subprocess, sys
from pathlib import Path

import pytest

# Before torch is imported, here and in child processes: two threads that wait for each other are slower than one where tests share few cores
os.environ.setdefault('OMP_NUM_THREADS', '1')

root = Path(__file__).resolve().parent.parent

def pytest_configure(config): config.addinivalue_line('markers', 'timeout: seconds a test may take (pytest-timeout)')

@pytest.fixture
def run(tmp_path):
    "Run Python code in a new process in an empty folder, and return its standard output"
    def _run(code, env=None, python=sys.executable, cwd=tmp_path):
        res = subprocess.run([str(python), '-W', 'ignore', '-c', code], cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True)
        assert res.returncode == 0, res.stderr[-3000:]
        return res.stdout
    return _run
