"Losses that compare or count the samples of all processes: parts of a batch in several processes give what one process gives on the whole."
import copy, os, socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from discloss.core import communication
from discloss.losses.cc import CCLoss
from discloss.losses.center import CenterLoss
from discloss.losses.ldmat import LDMATLoss
from discloss.losses.lgm import LGMLoss
from discloss.losses.pedcc import PEDCCLoss
from discloss.losses.pod import PODLoss
from discloss.losses.sigma2r import Sigma2RLoss
from discloss.metric import AnyPML
from discloss.losses.soft_nn import SoftNNLoss

losses = {
    'center': CenterLoss(lam=0.5),
    'center, learned': CenterLoss(lam=0.5, learned=True),
    'sigma2r': Sigma2RLoss(lam=0.5, slope=3.),
    'ldmat': LDMATLoss(slack=0.2),
    'ldmat, balanced': LDMATLoss(slack=0.2, squared=True, balance=True),
    'pedcc': PEDCCLoss(),
    'pedcc, root': PEDCCLoss(root=2.),
    'pod': PODLoss(corr_reduction='sum', lam=5.),
    'pod, scores': PODLoss(norm_source='score'),
    'lgm': LGMLoss(covariance='isotropic'),
    'supcon': AnyPML('SupConLoss'),
    'supcon, weights': AnyPML('SupConLoss', weight=[1.,2.,3.,4.]),
    'proxyanchor': AnyPML('ProxyAnchorLoss', ce=0.),
    'triplet': AnyPML('TripletMarginLoss', 'BatchHardMiner'),
    'cc': CCLoss(lam=0.5),
    'cc, hinge': CCLoss(mode='hinge', margin=0.2),
    'cc, as FA-Loss': CCLoss(lam=4., mode='ratio', squared=True, eps=0.01, sums=True, rescale=True),
    'soft nn': SoftNNLoss(lam=0.5),
    'soft nn, entangling': SoftNNLoss(lam=-0.5, metric='cosine', relative=False),
}
n_in, n_out = 6, 4

def batch():
    gen = torch.Generator().manual_seed(0)
    return torch.randn(12, n_in, generator=gen), torch.arange(12) % n_out

def step(loss, x, y):
    "One step of a linear model with the loss's head: losses, gradients of their sum, and what the buffers became"
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(n_in, n_in), loss.head(n_in, n_out)).double()
    for p in model[1].parameters(): p.data += 0.1*torch.randn_like(p)
    loss = copy.deepcopy(loss)
    loss.reduction = 'none'
    values = loss(model(x.double()), y)
    values.sum().backward()
    grads = {k: p.grad for k,p in model.named_parameters() if p.grad is not None}
    return dict(values=values.detach(), grads=grads, buffers={k: b.clone() for k,b in model.named_buffers()})

@torch.no_grad()
def logged(loss, x, y):
    "The training loss without gradients"
    return loss(loss.head(n_in, n_out)(x), y)

def joined(rank):
    "DistributedDataParallel on uneven numbers of batches, for all losses that sum over processes"
    x, y, found = *batch(), {}
    for name in 'center', 'sigma2r', 'ldmat', 'pod':
        torch.manual_seed(0)
        loss = copy.deepcopy(losses[name])
        model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(n_in, n_in), loss.head(n_in, n_out)))
        opt, before = torch.optim.SGD(model.parameters(), 0.1), copy.deepcopy(model.state_dict())
        with communication(False), model.join():
            for _ in range(1+rank):
                opt.zero_grad()
                loss(model(x), y).mean().backward()
                opt.step()
        found[name] = next(model.parameters()).detach()
        assert not torch.equal(found[name], before['module.0.weight'])
    return dict(weights=found)

def worker(rank, sizes, port, queue):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR='localhost', MASTER_PORT=str(port))
    dist.init_process_group('gloo', rank=rank, world_size=len(sizes))
    x, y = (t.split(sizes)[rank] for t in batch())
    found = {}
    for name,loss in losses.items():
        found[name] = step(loss, x, y)
        for g in found[name]['grads'].values(): dist.all_reduce(g)
    with communication(False): found['alone'] = step(losses['ldmat'], x, y)
    first = dist.new_group([0])
    if rank == 0: # A group that the others are not in, and a line for a log: nobody is waited for
        with communication(first): found['group'] = step(losses['ldmat'], x, y)
        for loss in losses.values(): logged(loss, x, y)
    found['joined'] = joined(rank)
    queue.put((rank, {k: pickled(v) for k,v in found.items()}))
    dist.barrier()
    dist.destroy_process_group()

def pickled(res): return {k: {n: t.numpy() for n,t in v.items()} if isinstance(v, dict) else v.numpy() for k,v in res.items()}

def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]

def several(sizes):
    "What each process found, in the order of their ranks"
    ctx = mp.get_context('spawn')
    queue, port = ctx.Queue(), free_port()
    workers = [ctx.Process(target=worker, args=(r, sizes, port, queue)) for r in range(len(sizes))]
    for w in workers: w.start()
    try: return [res for _,res in sorted((queue.get(timeout=120) for _ in sizes), key=lambda o: o[0])]
    finally:
        for w in workers:
            w.join(10)
            w.kill()

@pytest.fixture(scope='module', params=[(6,6), (7,3,2)], ids=str)
def parts(request): return request.param, several(request.param)

@pytest.mark.parametrize('name', losses)
def test_parts_are_the_whole(parts, name):
    sizes, found = parts
    found = [f[name] for f in found]
    whole = pickled(step(losses[name], *batch()))
    values = torch.cat([torch.from_numpy(f['values']) for f in found])
    assert torch.allclose(values, torch.from_numpy(whole['values']), rtol=1e-9)
    for f in found:
        for k,b in whole['buffers'].items():
            assert torch.allclose(torch.from_numpy(f['buffers'][k]), torch.from_numpy(b), rtol=1e-9, atol=1e-12), k
        assert set(f['grads']) == set(whole['grads'])
        for k,g in whole['grads'].items():
            assert torch.allclose(torch.from_numpy(f['grads'][k]), torch.from_numpy(g), rtol=1e-8, atol=1e-12), k

def test_communication_off_compares_own_samples(parts):
    sizes, found = parts
    for f,x,y in zip(found, *(t.split(sizes) for t in batch())):
        assert torch.allclose(torch.from_numpy(f['alone']['values']), step(losses['ldmat'], x, y)['values'], rtol=1e-9)

def test_a_group_keeps_to_its_samples(parts):
    sizes, found = parts
    x, y = (t.split(sizes)[0] for t in batch())
    assert torch.allclose(torch.from_numpy(found[0]['group']['values']), step(losses['ldmat'], x, y)['values'], rtol=1e-9)

def test_uneven_numbers_of_batches_end_with_the_same_weights(parts):
    "Inside communication(False), DDP's join works as for any loss"
    sizes, found = parts
    for name in 'center', 'sigma2r', 'ldmat', 'pod':
        weights = [torch.from_numpy(f['joined']['weights'][name]) for f in found]
        assert weights[0].isfinite().all()
        assert all(torch.equal(weights[0], w) for w in weights)
