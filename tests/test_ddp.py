"A step of two processes equals the step of one, for every loss; where a loss compares samples of one process only, the processes still stay the same."
import json, os, subprocess, sys

import pytest
import torch

from discloss.compare import all_losses

STEP = """
import json, os, sys
import torch, torch.nn as nn, torch.distributed as dist
from discloss.compare import all_losses
from discloss.core import with_head

rank, world = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
if world > 1: dist.init_process_group('gloo', init_method='file://' + os.environ['MEET'], rank=rank, world_size=world)
gen = torch.Generator().manual_seed(0)
x, y = torch.randn(16, 6, generator=gen), torch.arange(16) % 4
out = {}
for name, cls in all_losses().items():
    loss = cls()
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6,5), nn.ReLU())
    body.n_feats = 5
    model = with_head(body, loss, 4)
    state = model
    if world > 1: model = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        opt.zero_grad()
        loss(model(x[rank::world]), y[rank::world]).backward()
        opt.step()
    out[name] = {k: v.tolist() for k,v in state.state_dict().items()}
json.dump(out, open(os.environ['OUT'].format(rank), 'w'))
if world > 1: dist.barrier(); dist.destroy_process_group()
"""

@pytest.fixture(scope='module')
def states(tmp_path_factory):
    "The state after three steps on the same sixteen samples, by one process and by two"
    tmp = tmp_path_factory.mktemp('ddp')
    for world in 1, 2:
        env = lambda rank: {**os.environ, 'RANK': str(rank), 'WORLD_SIZE': str(world), 'MEET': str(tmp/'meet'), 'OUT': str(tmp/f'{world}-{{}}.json'), 'OMP_NUM_THREADS': '1'}
        procs = [subprocess.Popen([sys.executable, '-W', 'ignore', '-c', STEP], env=env(r), stderr=subprocess.PIPE, text=True) for r in range(world)]
        for p in procs:
            _, err = p.communicate(timeout=300)
            assert p.returncode == 0, err[-3000:]
    return [json.loads((tmp/f).read_text()) for f in ('1-0.json','2-0.json','2-1.json')]

@pytest.mark.parametrize('name', all_losses())
def test_two_processes(states, name):
    alone, first, second = ({k: torch.tensor(v) for k,v in s[name].items()} for s in states)
    for k in alone:
        assert torch.allclose(first[k], second[k], atol=1e-6), f'{k} differs between the two processes'
        if not all_losses()[name].pairs: assert torch.allclose(alone[k], first[k], atol=1e-5), f'{k} differs from that of one process'
