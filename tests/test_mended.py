"Values that were once wrong."
import pytest
import torch

from discloss.evidence import cost
from discloss.losses.circle import CircleLoss
from discloss.losses.cosface import CosFaceLoss
from discloss.losses.cross_entropy import CrossEntropy
from discloss.losses.pedcc import simplex
from discloss.losses.pod import norm_adaptive_cosine_loss
from discloss.tune import _defaults, search_space

def test_pod_does_not_reward_features_of_zero():
    zero, targ, centroids = torch.zeros(1, 6), torch.tensor([0]), simplex(4, 6).float()
    for delta in 0., 1e-3: assert norm_adaptive_cosine_loss(zero, targ, centroids, delta).item() == pytest.approx(1)

def test_a_curve_of_a_mixin_counts():
    class Straight:
        def others(self, u): return u
    class Mixed(Straight, CircleLoss): pass
    class Written(CircleLoss):
        def others(self, u): return u
    torch.manual_seed(0)
    head, targ = CircleLoss().head(5, 4), torch.arange(8) % 4
    out = head(torch.randn(8, 5))
    assert torch.equal(Mixed()(out, targ), Written()(out, targ))
    assert not torch.allclose(Mixed()(out, targ), CircleLoss()(out, targ))

def test_a_search_starts_without_a_scale_that_is_left_to_the_classes():
    loss = CosFaceLoss(scale='auto')
    assert 'scale' not in _defaults(loss, search_space(loss))

def test_class_weights_are_no_dict():
    with pytest.raises(TypeError, match='in the order of the classes'): CrossEntropy(weight={0: 5., 1: 1.})

def test_a_torn_reading_is_passed_over(tmp_path):
    file = tmp_path/'bench.jsonl'
    row = ('{"loss": "center", "batch": 256, "features": 512, "dtype": "float32", "mode": "eager", '
           '"step": "head and loss", "classes": 1000, "relative": 1.25, "device": "cpu"}')
    file.write_text(row + '\n\n{"loss": "cen', encoding='utf-8')
    assert '1.25 times' in cost('center', file)
