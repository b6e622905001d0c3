"With this folder on PYTHONPATH, every global seed is higher by SEED_SHIFT: assertions that hang on one draw of random numbers show themselves."
import os

shift = int(os.environ.get('SEED_SHIFT', 0))
if shift:
    import random
    import numpy as np, torch

    def shifted(f):
        def _f(seed=None, *args, **kwargs): return f(seed+shift if isinstance(seed, int) else seed, *args, **kwargs)
        return _f

    for module,name in (torch, 'manual_seed'), (np.random, 'seed'), (random, 'seed'):
        f = getattr(module, name)
        setattr(module, name, shifted(f))
        f(shift)
