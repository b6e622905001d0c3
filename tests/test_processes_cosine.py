"Circle loss of pairs over two and three processes equals that of one on all samples; the class level needs no communication."
import os, tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from discloss.core import communication
from discloss.losses.arcface import ArcFaceLoss
from discloss.losses.circle import CirclePairLoss, circle_pair_loss

n_in,n_out = 6,5

def samples():
    "23 samples: no number of processes here divides them evenly; class 4 occurs once"
    gen = torch.Generator().manual_seed(0)
    feats = torch.randn(23, n_in, generator=gen, dtype=torch.float64)
    return feats, torch.cat([torch.arange(22) % 4, torch.tensor([4])])

def head_for(loss):
    torch.manual_seed(1)
    return loss.head(n_in, n_out).double().train()

def value_and_grads(loss, feats, targ, share=1.):
    "Value, and gradients of features and weights; share is this process's part of all samples"
    head, x = head_for(loss), feats.clone().requires_grad_()
    value = loss(head(x), targ)
    (value*share).backward()
    return value.detach(), x.grad, [p.grad for p in head.parameters()]

def work(rank, world, folder, name):
    dist.init_process_group('gloo', init_method=f'file://{folder}/{name}', rank=rank, world_size=world)
    feats, targ = samples()
    # The first process has the most samples, the last the fewest
    mine = torch.arange(23) if world == 1 else torch.tensor_split(torch.arange(23), [12, 19][:world-1])[rank]
    out = {}
    for key,loss in losses().items():
        value, dx, dw = value_and_grads(loss, feats[mine], targ[mine], share=len(mine)/23)
        total = value*len(mine)/23
        dist.all_reduce(total)
        for g in dw: dist.all_reduce(g)
        out[key] = total, dx, dw
    with communication(False): out['alone'] = circle_pair_loss(feats[mine], targ[mine])
    with torch.no_grad(): # Nothing is sent without gradients, so one process may do this alone
        if rank == 0: circle_pair_loss(feats[mine], targ[mine])
    torch.save((mine, out), f'{folder}/{name}-{rank}.pt')
    dist.destroy_process_group()

def losses(): return dict(pairs=CirclePairLoss(lam=0.5, scale=10.), classes=ArcFaceLoss())

@pytest.mark.parametrize('world', [2, 3])
def test_as_one_process(world):
    feats, targ = samples()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (world, folder, f'of{world}'), nprocs=world)
        parts = [torch.load(f'{folder}/of{world}-{r}.pt') for r in range(world)]
    assert sorted(torch.cat([mine for mine,_ in parts]).tolist()) == list(range(23))
    for key,loss in losses().items():
        value, dx, dw = value_and_grads(loss, feats, targ)
        for mine,out in parts:
            total, part_dx, part_dw = out[key]
            assert torch.allclose(total, value, rtol=1e-12)
            assert torch.allclose(part_dx, dx[mine], rtol=1e-10, atol=1e-14)
            for a,b in zip(part_dw, dw): assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)
    for mine,out in parts: assert torch.allclose(out['alone'], circle_pair_loss(feats[mine], targ[mine]), rtol=1e-12)

def test_pairs_of_other_processes_count():
    "A process that has one sample of each class has no positive of its own"
    feats, targ = samples()
    alone = circle_pair_loss(feats[:4], targ[:4])
    assert alone == 0 and circle_pair_loss(feats, targ) > 0
