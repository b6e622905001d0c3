"`core`, `heads` and every module of `losses` import torch only, in a fresh process."
from pathlib import Path

import discloss

def modules():
    folder = Path(discloss.__file__).parent
    return ['core', 'heads', *(f'losses.{f.stem}' for f in sorted((folder/'losses').glob('*.py')) if f.stem != '__init__')]

def test_torch_only(run):
    out = run(f"""
import importlib, sys
for name in {modules()}:
    importlib.import_module('discloss.' + name)
    heavy = [m for m in ('fastai', 'pandas', 'matplotlib', 'sklearn', 'scipy', 'torchvision') if m in sys.modules]
    if heavy: print(name, heavy)
""", env=dict(PYTHONPATH=str(Path(discloss.__file__).parent.parent)))
    assert out == '', out
