"Figures: what they show, that it can be read on light and dark ground, and what they say of data that do not fit"
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb
from matplotlib.text import Text

import discloss.plot as module
from discloss.plot import (class_colors, class_means, class_styles, fit_ticks, ink, loss_style, mean_distances, plot_axes, plot_confusion,
                           plot_curves, plot_distances, plot_features, plot_reliability, plot_scores, plot_style)

def data(n=3, k=20, d=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    targ = torch.arange(n*k) % n
    return 4*torch.randn(n,d, generator=g)[targ] + 0.3*torch.randn(n*k,d, generator=g), targ

def texts(fig): return [t.get_text() for t in fig.findobj(Text) if t.get_text()]
def legend(fig): return [t.get_text() for f in (fig, *fig.subfigs) for leg in f.legends for t in leg.get_texts()]
def box(o): return o.get_window_extent()

# Light and dark

def luminance(c):
    c = np.array(to_rgb(c))
    return np.where(c <= .04045, c/12.92, ((c+.055)/1.055)**2.4) @ [.2126,.7152,.0722]
def contrast(a, b):
    a,b = sorted((luminance(a), luminance(b)))
    return (b+.05)/(a+.05)

def test_contrast_to_white_and_dark():
    for ground in 'white','#222222':
        assert contrast(ink, ground) > 3.9
        assert min(contrast(c, ground) for c in class_colors) >= 3

def test_thin_lines_on_dark_pages():
    "The site draws figures brighter on its dark pages"
    css = (Path(__file__).parents[1]/'nbs'/'styles.css').read_text(encoding='utf-8')
    more = float(re.search(r'body\.quarto-dark .* img .*brightness\((.*?)\)', css)[1])
    brighter = [tuple(np.clip(np.array(to_rgb(c))*more, 0, 1)) for c in (ink, *class_colors)]
    assert min(contrast(c, '#222222') for c in brighter) > 3.8

def test_class_styles_differ():
    assert len({s['marker'] for s in class_styles(10)}) == len({s['color'] for s in class_styles(10)}) == 10
    assert len({(s['color'], s['marker']) for s in class_styles(100)}) == 100
    with pytest.raises(ValueError, match='at least 1 class, got 0'): class_styles(0)

def test_losses_keep_their_look():
    first = loss_style('a loss of this test')
    assert loss_style('another of this test') != first == loss_style('a loss of this test')
    assert loss_style('Cross-Entropy') == loss_style('ce') and loss_style('ce')['color'] == ink

figures = {
    'features': lambda: plot_features({'center': data(), 'other': data(d=5)}, ['a long name','b','c']),
    'distances': lambda: plot_distances({'center': data()}),
    'curves': lambda: plot_curves({'center': [[.1,.2]], 'crossentropy': [[.1,.3]]}, title='t'),
    'scores': lambda: plot_scores({'center': [.1,.2], 'crossentropy': [.3]}, ref='center'),
    'confusion': lambda: plot_confusion([[3,1],[0,4]], ['a','b']),
    'reliability': lambda: plot_reliability((torch.tensor([1,1]), torch.tensor([.2,.8]), torch.tensor([0.,1.]))),
}
@pytest.mark.parametrize('name', figures)
def test_readable_on_every_ground_and_settings_come_back(name):
    before = dict(plt.rcParams)
    with plt.style.context('dark_background'): fig = figures[name]()
    assert dict(plt.rcParams) == before and not plt.get_fignums()
    fig.png()
    assert fig.get_facecolor()[3] == 0 and all(ax.get_facecolor()[3] == 0 for ax in fig.axes)
    for t in fig.findobj(Text):
        if not t.get_text(): continue
        on_color = t.get_weight() == 'bold' and to_hex(t.get_color()) == '#ffffff' # In a badge or a cell
        assert on_color or to_hex(t.get_color()) == ink, t

def test_two_pixels_a_point():
    fig,_ = plot_axes(figsize=(4,2))
    content,size = fig._repr_mimebundle_()
    import base64, io
    from PIL import Image
    im = Image.open(io.BytesIO(base64.b64decode(content['image/png'])))
    assert im.mode == 'RGBA' and np.array(im)[0,0,3] == 0
    assert im.width/2 == pytest.approx(4*72, abs=20) and size['image/png']['width'] == im.width*2//3

def test_jupyter_shows_all_pixels(monkeypatch):
    "The inline backend has a drawing of its own for every Figure, with fewer pixels"
    from IPython.core.formatters import DisplayFormatter
    from matplotlib.figure import Figure
    shown, formatter = [], DisplayFormatter()
    monkeypatch.setattr('IPython.display.display', lambda content, **kwargs: shown.append(content))
    formatter.formatters['image/png'].for_type(Figure, lambda fig: b'fewer')
    fig,_ = plot_axes()
    assert formatter.format(fig) == ({}, {})
    assert shown == [fig._repr_mimebundle_()[0]]

def test_text_made_outside_of_the_style():
    fig,ax = plot_axes()
    ax.plot([0,1], label='costs $5 or $6')
    leg = ax.legend()
    fig.png()
    assert to_hex(leg.get_texts()[0].get_color()) == ink and not leg.get_frame_on()
    assert not leg.get_texts()[0].get_parse_math()

# Ticks, names and places

def test_ticks_do_not_touch():
    fig,axs = plot_axes(1, 3, figsize=(7,2))
    for ax,(lo,hi) in zip(axs, ((0.116640,0.116649), (0,1e7), (0.97,0.98))):
        ax.set_xlim(lo, hi)
        fit_ticks(ax)
    fig.draw_without_rendering()
    for ax in axs:
        boxes = sorted((box(t.label1).extents[[0,2]].tolist() for t in ax.xaxis.get_major_ticks()
                        if ax.get_xlim()[0] <= t.get_loc() <= ax.get_xlim()[1]))
        assert len(boxes) >= 1 and all(b[0] > a[1] for a,b in zip(boxes, boxes[1:]))

def test_a_long_legend_leaves_room():
    fig = plot_curves({'a very long name of a loss with many(hyper=0.1, p=2)': [[.1,.2],[np.nan,.1]]})
    fig.draw_without_rendering()
    assert box(fig.axes[0]).width > 1.5*fig.dpi

def test_numbers_at_the_right_leave_room():
    fig = plot_scores({'a very long name of a loss with many(hyper=0.1, parameters=2)': [.1,.2,np.nan], 'b': [.1,.3,.2]}, fmt='.9f')
    fig.draw_without_rendering()
    assert box(fig.axes[0]).width > 1.5*fig.dpi

@pytest.mark.parametrize('n', [2,12,30,100])
def test_names_stand_beside_the_points(n):
    names = [f'a rather long class name {i}' for i in range(n)]
    fig = plot_features({'center': data(n), 'arcface': data(n, seed=1)}, names)
    fig.draw_without_rendering()
    said = legend(fig)
    assert [o.split('  ')[-1] for o in said] == names
    holder, = (f for f in fig.subfigs if f.legends)
    assert not any(box(holder.legends[0]).overlaps(ax.bbox) for ax in fig.axes)
    bounds = fig.bbox.extents
    inner = box(holder.legends[0]).extents
    assert (inner[:2] >= bounds[:2]-1).all() and (inner[2:] <= bounds[2:]+1).all() # Nothing is cut

def test_short_names_stand_in_the_badges():
    fig = plot_features({'center': data(10)})
    assert not legend(fig) and {str(i) for i in range(10)} <= {t.get_text() for t in fig.axes[0].texts}

def test_badges_do_not_overlap():
    at = np.random.default_rng(0).normal(size=(40,2))*30 + 200
    pos = module._apart(at, np.full(2, 16.), np.array([0.,0.,400.,400.]))
    gap = np.abs(pos[:,None]-pos).max(-1) + 100*np.eye(40)
    assert gap.min() >= 16-1e-6 and pos.min() >= 8 and pos.max() <= 392

def test_a_badge_that_would_hide_its_class_stands_beside_it():
    at = np.array([[100.,100.],[300.,100.]])
    moved = module._beside(at, np.array([2.,50.]), 20)
    assert moved.tolist() == [[80,100],[300,100]] # Outward; the wide class keeps its badge

# What is drawn

def test_features_are_all_drawn_at_their_place():
    feats,targ = data()
    ax = plot_features({'center': (feats,targ)}, names=False).axes[0]
    drawn = np.concatenate([c.get_offsets() for c in ax.collections])
    assert np.array(sorted(drawn.tolist())) == pytest.approx(np.array(sorted(feats.double().tolist())))

def test_wide_features_are_projected_on_the_principal_plane():
    feats,targ = data(d=6)
    x = feats.double()-feats.double().mean(0)
    ax = plot_features({'center': (feats,targ)}, names=False).axes[0]
    drawn = np.concatenate([c.get_offsets() for c in ax.collections])
    values = torch.linalg.svdvals(x)
    assert np.square(np.asarray(drawn)).sum(0).tolist() == pytest.approx(values[:2].square().tolist())
    share = values.square()/values.square().sum()
    assert ax.get_xlabel() == f'PC 1 ({share[0]:.0%} of variance)'

def test_sorted_by_score_and_the_left_out_are_named():
    panels = {k: data() for k in 'abcd'}
    fig = plot_features(panels, scores=dict(a=.1, b=.9, c=np.nan, d=.5), max_panels=2)
    assert [ax.get_title() for ax in fig.axes] == ['b','d']
    assert 'not shown: a, c' in texts(fig) and 'accuracy 0.900' in texts(fig)

def test_shared_limits():
    panels = {'small': data(), 'large': (10*data()[0], data()[1])}
    own,shared = plot_features(panels).axes,plot_features(panels, share=True).axes
    assert own[0].get_xlim() != own[1].get_xlim() and shared[0].get_xlim() == shared[1].get_xlim()
    assert shared[0].get_ylim() == shared[1].get_ylim()

def test_points_far_out_do_not_stretch_shared_limits():
    feats,targ = data(k=300)
    far = feats.clone()
    far[:2] *= 50
    shared = plot_features({'far': (far,targ), 'near': (feats,targ)}, share=True)
    alone, = plot_features({'near': (feats,targ)}).axes
    first,second = shared.axes
    width = np.ptp(alone.get_xlim())
    assert np.ptp(first.get_xlim()) < 1.5*width
    assert '2 at the rim' in [t.get_text() for t in first.texts]
    drawn = np.concatenate([c.get_offsets() for c in first.collections])
    assert (np.abs(drawn) <= np.abs(np.array([first.get_xlim(), first.get_ylim()])).max() + 1e-9).all()

@pytest.mark.parametrize('place', [(0,0),(-1,-1)])
@pytest.mark.parametrize('value', [np.nan,np.inf])
def test_a_diverged_run_is_said_to_be_so_everywhere(place, value):
    feats,targ = data()
    feats = feats.clone()
    feats[place] = value
    for fig in plot_features({'pod': (feats,targ), 'center': data()}), plot_distances({'pod': (feats,targ), 'center': data()}):
        assert [t.get_text() for t in fig.axes[0].texts] == ['diverged'] and 'diverged' not in [t.get_text() for t in fig.axes[1].texts]
    curve = np.full((2,3), .5)
    curve[place] = value
    assert 'pod (1 of 2 seeds diverged)' in texts(plot_curves({'pod': curve}))
    assert 'pod (diverged)' in texts(plot_curves({'pod': curve[[place[0]]], 'center': [[.1,.2,.3]]}))
    assert 'diverged' in texts(plot_scores({'pod': [value], 'center': [.5]}))

def test_a_loss_with_a_diverged_seed_is_below_those_without():
    fig = plot_scores({'pod': [.99,np.nan], 'center': [.5,.6], 'arcface': [.7,.8], 'crl': [np.nan]*2})
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ['arcface','center','pod','crl']
    assert '0.990, 1 of 2 seeds diverged' in texts(fig)
    fig = plot_scores({'b': [.2], 'a': [.1]}, more=False)
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ['a','b']

def test_curves_and_bands():
    curves = {'center': np.array([[.1,.5,.9],[.3,.5,.7]]), 'crossentropy': np.array([[.2,.9,.95]])}
    fig = plot_curves(curves)
    ax = fig.axes[0]
    assert ax.lines[0].get_ydata().tolist() == pytest.approx([.2,.5,.8]) and ax.lines[0].get_xdata().tolist() == [1,2,3]
    band = ax.collections[0].get_datalim(ax.transData)
    assert (band.y0, band.y1) == pytest.approx((.1,.9))
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ['crossentropy','center']

def test_scores_in_numbers():
    v = [.91,.93,.98]
    fig = plot_scores({'center': v})
    assert f'{np.mean(v):.3f} ± {np.std(v, ddof=1):.3f}' in texts(fig)
    assert fig.axes[0].collections[0].get_offsets()[:,0].tolist() == pytest.approx(v)

def test_mean_distances_by_loops():
    feats,targ = data(d=4)
    means = class_means(feats, targ)[0]
    own,other = mean_distances(feats, targ)
    cos,cos_other = mean_distances(feats, targ, 'cosine', chunk=7)
    for i,(x,j) in enumerate(zip(feats, targ)):
        d = (means-x).norm(dim=1)
        c = torch.cosine_similarity(means, x[None])
        rest = [k for k in range(3) if k != j]
        assert own[i] == pytest.approx(d[j].item(), abs=1e-4) and other[i] == pytest.approx(d[rest].min().item(), abs=1e-4)
        assert cos[i] == pytest.approx(c[j].item(), abs=1e-5) and cos_other[i] == pytest.approx(c[rest].max().item(), abs=1e-5)

def test_share_nearer_to_another_mean():
    feats,targ = torch.tensor([[0.,0.],[1.,0.],[9.,0.],[10.,0.],[0.,1.]]), torch.tensor([0,0,1,1,1]) # The last lies with the others
    assert '20.0% nearer to another mean' in texts(plot_distances({'a': (feats,targ)}))

def test_share_nearer_by_the_cosine():
    feats,targ = torch.tensor([[1.,0.],[2.,.1],[0.,1.],[.1,2.],[3.,0.]]), torch.tensor([0,0,1,1,1])
    assert '20.0% nearer to another mean' in texts(plot_distances({'a': (feats,targ)}, 'cosine'))

def test_confusion_shades_and_numbers():
    fig = plot_confusion([[8,2],[0,0]], ['x','y'])
    shades = fig.axes[0].images[0].get_array()
    assert shades[0,0,3] == 0.8 and shades[0,1,3] == pytest.approx(.6*.2**.5) and shades[1,0,3] == 0
    assert sorted(t.get_text() for t in fig.axes[0].texts) == ['2','8']
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ['x','y']

def test_reliability_says_the_calibration_error():
    n,conf,acc = torch.tensor([0,30,10]), torch.tensor([np.nan,.5,.9]), torch.tensor([np.nan,.6,.7])
    assert 'calibration error 0.125' in texts(plot_reliability((n,conf,acc)))

# Data that do not fit, and data that are unusual

feats,targ = data()
bad = {
    'no panel': (lambda: plot_features({}), ValueError, 'got an empty one'),
    'no dict': (lambda: plot_features((feats,targ)), TypeError, 'must be a dict'),
    'no pair': (lambda: plot_features({'a': feats}), ValueError, r"panels\['a'\] must be a pair"),
    'unequal lengths': (lambda: plot_features({'a': (feats,targ[:-1])}), ValueError, r"panels\['a'\]: targets must have shape"),
    'one feature': (lambda: plot_features({'a': (feats[:,:1],targ)}), ValueError, '2 or more'),
    'labels beyond vocab': (lambda: plot_features({'a': (feats,targ)}, vocab='ab'), ValueError, r'in 0..1 \(2 classes\), got 2'),
    'few centers': (lambda: plot_features({'a': (feats,targ)}, centers={'a': feats[:2]}), ValueError, 'one row for each class'),
    'other titles': (lambda: plot_features({'a': (feats,targ)}, centers={'b': feats[:3]}), ValueError, 'titles of panels'),
    'few axes': (lambda: plot_features({'a': (feats,targ)}, axs=plot_axes(1,2)[1]), ValueError, '1 panels need 1 axes, got 2'),
    'one class': (lambda: plot_distances({'a': (feats,targ*0)}), ValueError, 'at least 2 classes'),
    'kind': (lambda: plot_distances({'a': (feats,targ)}, kind='l1'), ValueError, "got 'l1'"),
    'one seed, flat': (lambda: plot_curves({'a': [.5,.6]}), ValueError, 'n_seeds, n_epochs'),
    'unequal epochs': (lambda: plot_curves({'a': [[.5,.6]], 'b': [[.5]]}), ValueError, 'same number of epochs'),
    'ragged': (lambda: plot_curves({'a': [[.5,.6],[.5]]}), ValueError, 'makes no such array'),
    'x': (lambda: plot_curves({'a': [[.5,.6]]}, x=[1,2,3]), ValueError, r'shape \(2,\)'),
    'no scores': (lambda: plot_scores({'a': []}), ValueError, 'none of them 0'),
    'words': (lambda: plot_scores({'a': ['high']}), ValueError, 'must be numbers'),
    'ref': (lambda: plot_scores({'a': [.5]}, ref='b'), ValueError, "got 'b'"),
    'not square': (lambda: plot_confusion([[1,2]]), ValueError, 'must be square'),
    'names': (lambda: plot_confusion([[1,2],[3,4]], 'abc'), ValueError, '2 names, got 3'),
}
@pytest.mark.parametrize('name', bad)
def test_bad_data(name):
    f,error,says = bad[name]
    with pytest.raises(error, match=says): f()

unusual = {'one sample': (feats[:1],targ[:1]), 'collapsed': (torch.ones(5,8),targ[:5]), 'half precision': (feats.bfloat16(),targ),
           'arrays': (feats.numpy(),targ.numpy()), 'a missing class': (feats[targ != 1],targ[targ != 1])}
@pytest.mark.parametrize('name', unusual)
def test_unusual_data_are_drawn(name):
    assert plot_features({'a': unusual[name]}).png()[:4] == b'\x89PNG'
    if name == 'collapsed': plot_distances({'a': unusual[name]}, kind='cosine')

def test_one_seed_one_epoch():
    plot_curves({'center': [[.5]]}).png()
    plot_scores({'center': [.5]}).png()
