"What the tutorials say of classes that training did not see, computed by scikit-learn too."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.torch_core import set_seed
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from sklearn.neighbors import KNeighborsClassifier

from discloss.bodies import small_body
from discloss.data import ImageTensors, data_root, image_dls
from discloss.evaluate import evaluate
from discloss.learner import fit
from discloss.losses.arcface import ArcFaceLoss
from discloss.study import character_loaders, tensor_loaders

def digit_loaders(n_seen=6):
    whole = image_dls('digits', device='cpu')
    sets = [(dl.dataset.x, dl.dataset.y) for dl in whole.loaders]
    x, y = (torch.cat(o) for o in zip(*sets))
    seen = [(x[y < n_seen], y[y < n_seen]) for x,y in sets]
    return tensor_loaders(seen, whole.vocab[:n_seen]), (x[y >= n_seen], y[y >= n_seen])

@pytest.fixture(scope='module')
def found():
    "An evaluation with unseen classes: characters where they are, else digits; cosine similarities of the unseen"
    there = (data_root()/'omniglot_small').is_dir()
    dls, (x, y) = character_loaders() if there else digit_loaders()
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:600]
    unseen = dls.valid.new(ImageTensors(x[some], y[some], [str(i) for i in range(int(y.max())+1)], 1))
    set_seed(0)
    learn = fit(dls, small_body(width=8), ArcFaceLoss(), epochs=1)
    e = evaluate(learn, dls.test, train=False, unseen=unseen, unknown=unseen)
    feats, targ = e.unseen
    u = F.normalize(feats.double()).numpy()
    return e, u @ u.T, targ.numpy()

def test_retrieval(found):
    e, sim, y = found
    ours, alone = e.embedding('unseen'), np.bincount(y)[y] == 1
    np.fill_diagonal(sim := sim.copy(), -2)
    first = y[sim.argmax(1)] == y
    assert abs(ours['recall@1'] - first[~alone].mean()) < 1e-9
    one_out = KNeighborsClassifier(2, metric='precomputed').fit(1-found[1].clip(-1, 1), y)
    neighbours = one_out.kneighbors(return_distance=False)[:,0] # Without arguments a sample is not its own neighbour
    assert abs(ours['recall@1'] - (y[neighbours] == y)[~alone].mean()) < 1e-9
    others = ~np.eye(len(y), dtype=bool)
    ap = [average_precision_score(y[o] == y[i], sim[i,o]) for i,o in enumerate(others) if not alone[i]]
    assert abs(ours['mAP'] - np.mean(ap)) < 1e-6

def test_verification(found):
    e, sim, y = found
    i, j = np.triu_indices(len(y), 1)
    far, tar, _ = roc_curve(y[i] == y[j], sim[i,j], drop_intermediate=False)
    at = np.argmin(abs(far-(1-tar)))
    assert abs(e.embedding('unseen')['equal error rate'] - (far[at]+1-tar[at])/2) < 1e-3
    assert abs(e.pairs('unseen').auroc - roc_auc_score(y[i] == y[j], sim[i,j])) < 1e-5

def test_unknown(found):
    e = found[0]
    known, unknown = (F.softmax(o.double(), 1).amax(1).numpy() for o in (e.logits, e.unknown_inputs[1]))
    auroc = roc_auc_score([1]*len(known)+[0]*len(unknown), np.concatenate([known, unknown]))
    assert abs(e.unknown.AUROC['max softmax'] - auroc) < 1e-9
