"Scale and margin that are left to the numbers of features and classes."
import math

import numpy as np
import pytest
import torch
import torch.nn as nn

from discloss.core import with_head
from discloss.losses.arcface import ArcFaceLoss
from discloss.losses.circle import CircleLoss
from discloss.losses.cosface import CosFaceLoss
from discloss.losses.gsoftmax import adacos_scale, auto_scale, widest_angle
from discloss.losses.normface import NormFaceLoss

def degrees(d, c): return math.degrees(widest_angle(d, c))

def test_widest_angle_is_exact_where_it_is_known():
    for d in 1, 2, 3, 8, 64:
        for c in range(2, d+2): assert degrees(d, c) == pytest.approx(math.degrees(math.acos(-1/(c-1))))
    for d in 3, 8, 64: assert degrees(d, d+2) == degrees(d, 2*d) == 90
    for c in 3, 10, 100: assert degrees(2, c) == pytest.approx(360/c)
    assert degrees(1, 3) == 0

@pytest.mark.parametrize('d, c, known', [
    (3, 7, 77.87), (3, 8, 74.86), (3, 12, 63.43), (3, 24, 43.69), (4, 24, 60), (8, 240, 60), (5, 40, 60), (16, 4320, 60)])
def test_widest_angle_is_near_known_packings(d, c, known):
    assert degrees(d, c) == pytest.approx(known, rel=0.13)
    if d == 3: assert degrees(d, c) == pytest.approx(known, rel=0.07)

@pytest.mark.parametrize('d', [3, 4, 5, 8, 16, 64, 512])
def test_widest_angle_falls_without_jumps(d):
    angles = np.array([degrees(d, c) for c in [*range(2*d, 2*d+60), 10**4, 10**6]])
    assert (np.diff(angles) < 0).all()
    assert np.diff(angles[:60]).min() > -8
    assert degrees(d, 2*d+1) > 82

@pytest.mark.parametrize('loss', [CosFaceLoss(scale='auto'), CosFaceLoss(margin='auto'), ArcFaceLoss(scale='auto'),
                                  ArcFaceLoss(margin='auto'), NormFaceLoss(scale='auto'), CosFaceLoss('auto', 'auto')])
@pytest.mark.parametrize('n_out', [0, 1])
def test_one_class_is_refused_in_words(loss, n_out):
    with pytest.raises(ValueError, match=f'at least 2 classes, got {n_out}'): with_head(nn.Linear(5, 3), loss, n_out)

def test_the_functions_refuse_too_few_classes():
    for f, n in ((auto_scale, 1), (adacos_scale, 2), (lambda n: widest_angle(3, n), 1)):
        with pytest.raises(ValueError, match=f'n_out must be at least {n+1} classes, got {n}'): f(n)

autos = CosFaceLoss(margin='auto'), ArcFaceLoss(margin='auto')

@pytest.mark.parametrize('chunked', [False, True])
@pytest.mark.parametrize('other', [ArcFaceLoss, CosFaceLoss, CircleLoss, NormFaceLoss])
@pytest.mark.parametrize('auto', autos)
def test_a_margin_of_another_kind_is_not_taken(auto, other, chunked):
    x, y = torch.randn(6, 3), torch.arange(6) % 5
    head = auto.head(3, 5)
    head.chunked = chunked
    assert auto(head(x), y).isfinite()
    fixed = other(scale=30.)
    assert fixed(head(x), y) == fixed({k: v for k,v in head(x).items() if k not in ('margin','angle')}, y)
    if other is type(auto) or not hasattr(fixed, 'auto_margin'): return
    with pytest.raises(ValueError, match="margin='auto' needs the head of this loss"): other(margin='auto')(head(x), y)
