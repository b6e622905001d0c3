"""Home-made models: every way we know in which a last linear layer is not the output.
Each takes 8 inputs; `zoo[name]` gives the model, and what with_head should do."""
import collections, threading, warnings

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

# Name -> (function that makes the model, what should happen, arguments of with_head)
zoo = {}

def takes(layer, /, **kwargs):
    "The head goes into this layer"
    return lambda f: zoo.__setitem__(f.__name__, (f, ('layer', layer), kwargs)) or f

def says(sentence, /, **kwargs):
    "with_head, or the first training step, raises an error with these words"
    return lambda f: zoo.__setitem__(f.__name__, (f, ('says', sentence), kwargs)) or f

class Net(nn.Module):
    "A trunk, a classifier, and a function that says how they are joined"
    def __init__(self, join=None, **parts):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 6), nn.ReLU())
        self.fc = nn.Linear(6, 3)
        for k,v in parts.items(): setattr(self, k, v)
        self.join = join or (lambda m, x: m.fc(m.trunk(x)))
    def forward(self, x): return self.join(self, x)

# ---- where the classifier is

@takes('4')
def sequential():
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))

@takes('1.0.1')
def nested_sequential():
    return nn.Sequential(nn.Linear(8, 6), nn.Sequential(nn.Sequential(nn.ReLU(), nn.Linear(6, 3))))

@takes('')
def a_linear_layer_alone(): return nn.Linear(8, 3)

@takes('fc')
def projection_declared_after_the_classifier():
    return Net(lambda m, x: m.fc(m.late(m.trunk(x))), late=nn.Linear(6, 6))

@takes('fc')
def unused_layer_declared_last(): return Net(other=nn.Linear(6, 3))

@takes('parts.classifier')
def in_a_module_dict():
    parts = nn.ModuleDict(dict(classifier=nn.Linear(6, 3), other=nn.Linear(6, 3)))
    return Net(lambda m, x: m.parts['classifier'](m.trunk(x)), parts=parts)

@takes('parts.0')
def in_a_module_list():
    parts = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 6)])
    return Net(lambda m, x: m.parts[0](m.parts[1](m.trunk(x))), parts=parts)

@takes('fc')
def under_two_names():
    net = Net(lambda m, x: m.head(m.trunk(x)))
    net.head = net.fc
    return net

@takes('fc')
def in_two_containers():
    net = Net(lambda m, x: m.net(x))
    net.net = nn.Sequential(net.trunk, net.fc)
    return net

@takes('fc')
def identity_after_it(): return Net(lambda m, x: m.end(m.fc(m.trunk(x))), end=nn.Identity())

@takes('fc')
def two_inputs():
    class Two(Net):
        def forward(self, x, meta=None): return self.fc(self.trunk(x if meta is None else x + meta))
    return Two()

@takes('fc')
def layers_used_twice():
    return Net(lambda m, x: m.fc(m.shared(m.shared(m.trunk(x)))), shared=nn.Linear(6, 6))

@takes('fc')
def weights_tied():
    net = Net(other=nn.Linear(6, 3))
    net.other.weight = net.fc.weight
    return net

@takes('fc')
def asserts_its_input():
    def join(m, x):
        if x.shape[1] != 8 or x.sum().isnan(): raise ValueError('bad input')
        return m.fc(m.trunk(x))
    return Net(join)

@takes('fc', x=True)
def branches_with_a_batch():
    return Net(lambda m, x: m.fc(m.trunk(x)) if x.sum() > 0 else m.fc(m.trunk(-x)))

@takes('fc')
def returns_more_only_when_asked():
    class More(Net):
        def forward(self, x, feats=False):
            f = self.trunk(x)
            return (self.fc(f), f) if feats else self.fc(f)
    return More()

@takes('fc')
def activation_checkpointing_inside():
    from torch.utils.checkpoint import checkpoint
    return Net(lambda m, x: m.fc(checkpoint(m.trunk, x, use_reentrant=False)))

# ---- which kind of layer it is

class Scaled(nn.Linear):
    def forward(self, x): return 2*super().forward(x)

@takes('fc')
def subclass_of_linear(): return Net(fc=Scaled(6, 3))

@takes('fc')
def spectral_norm_old(): return Net(fc=spectral_norm(nn.Linear(6, 3)))

@takes('fc')
def weight_norm_after_a_batch():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        net = Net(fc=weight_norm(nn.Linear(6, 3)))
    net(torch.ones(2, 8))
    return net

@takes('fc')
def weight_norm_parametrized(): return Net(fc=parametrizations.weight_norm(nn.Linear(6, 3)))

@takes('fc')
def orthogonal(): return Net(fc=parametrizations.orthogonal(nn.Linear(6, 3)))

@takes('fc')
def pruned(): return Net(fc=prune.random_unstructured(nn.Linear(6, 3), 'weight', amount=0.5))

@takes('fc')
def frozen_classifier(): return Net(fc=nn.Linear(6, 3).requires_grad_(False))

@says('LazyLinear.*run one batch')
def lazy_linear(): return Net(fc=nn.LazyLinear(3))

@takes('fc')
def lazy_linear_after_a_batch():
    net = Net(fc=nn.LazyLinear(3))
    net(torch.ones(2, 8))
    return net

@says("no nn.Linear to replace.*Conv2d.*n_feats")
def convolution_as_classifier():
    layers = nn.Unflatten(1, (2,2,2)), nn.Conv2d(2, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers)

@says("not that of a linear layer, but of flatten.*n_feats")
def convolution_after_linear_layers():
    def join(m, x): return m.end(m.up(m.trunk(x))).flatten(1)
    return Net(join, up=nn.Unflatten(1, (6,1,1)), end=nn.Conv2d(6, 3, 1))

@says("not that of a linear layer, but of linear")
def functional():
    return Net(lambda m, x: F.linear(m.trunk(x), m.table), table=nn.Parameter(torch.randn(3, 6)))

@says("not that of a linear layer, but of matmul")
def matrix_product():
    return Net(lambda m, x: m.trunk(x) @ m.table, table=nn.Parameter(torch.randn(6, 3)))

@says("not that of a linear layer, but of 'end' .Bilinear")
def bilinear(): return Net(lambda m, x: m.end(m.trunk(x), m.trunk(x)), end=nn.Bilinear(6, 6, 3))

@says("no nn.Linear to replace.*quantized")
def quantized():
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return torch.ao.quantization.quantize_dynamic(net, {nn.Linear})

class LoRA(nn.Module):
    def __init__(self):
        super().__init__()
        self.base,self.a,self.b = nn.Linear(6, 3),nn.Linear(6, 2),nn.Linear(2, 3)
    def forward(self, x): return self.base(x) + self.b(self.a(x))

@says("comes from 2 classifiers, .'fc.base', 'fc.b'.*layer=")
def low_rank_adapter(): return Net(fc=LoRA())

@says("how many features 'fc' .LoRA. takes.*in_features", layer='fc')
def low_rank_adapter_named(): return Net(fc=LoRA())

# ---- what is done with the logits

@says("but of log_softmax, after 'fc'.*return them as they are")
def log_softmax(): return Net(lambda m, x: F.log_softmax(m.fc(m.trunk(x)), dim=1))

@says("but of '3' .Softmax., after '2'")
def softmax_layer():
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3), nn.Softmax(1))

@says("but of squeeze, after 'fc'")
def squeeze(): return Net(lambda m, x: m.fc(m.trunk(x)[:,None]).squeeze(1))

@says("but of truediv, after 'fc'")
def temperature(): return Net(lambda m, x: m.fc(m.trunk(x))/2)

@says("but of float, after 'fc'")
def to_float(): return Net(lambda m, x: m.fc(m.trunk(x)).float())

@says("but of view, after 'fc'")
def view(): return Net(lambda m, x: m.fc(m.trunk(x)).view(-1, 3))

@says("but of mean, after 'fc'")
def mean_over_patches(): return Net(lambda m, x: m.fc(m.trunk(x)[:,None]).mean(1))

@says("but of 'drop' .Dropout., after 'fc'")
def dropout_after_it(): return Net(lambda m, x: m.drop(m.fc(m.trunk(x))), drop=nn.Dropout())

@says("but of 'norm' .BatchNorm1d., after 'fc'.*n_feats")
def batch_norm_after_it(): return Net(lambda m, x: m.norm(m.fc(m.trunk(x))), norm=nn.BatchNorm1d(3))

@says("but of normalize, after 'fc'.*n_feats")
def normalized_embedding(): return Net(lambda m, x: F.normalize(m.fc(m.trunk(x))))

@says("does something with it.*return what its classifier gives")
def log_softmax_that_cannot_be_traced():
    def join(m, x):
        logits = m.fc(m.trunk(x))
        return F.log_softmax(logits, dim=1) if x.sum() > 0 else -logits
    return Net(join)

@says(r"not that of a linear layer .*'fc'. ran.*return its logits", x=True)
def log_softmax_with_a_batch(): return log_softmax_that_cannot_be_traced()

@says("does something with it.*return what its classifier gives", layer='fc')
def changed_logits_in_training_only():
    return Net(lambda m, x: m.fc(m.trunk(x)) + 0 if m.training else m.fc(m.trunk(x)).softmax(1))

@takes('fc', layer='fc')
def softmax_in_evaluation_only():
    return Net(lambda m, x: m.fc(m.trunk(x)) if m.training else m.fc(m.trunk(x)).softmax(1))

# ---- what comes out

class Pair(collections.namedtuple('Pair', 'logits feats')): pass

@says("returns dict, not one tensor")
def returns_a_dict(): return Net(lambda m, x: dict(logits=m.fc(m.trunk(x))))

@says("returns list, not one tensor")
def returns_a_list(): return Net(lambda m, x: [m.fc(m.trunk(x))])

@says("returns tuple, not one tensor")
def returns_logits_and_features(): return Net(lambda m, x: (m.fc(m.trunk(x)), m.trunk(x)))

@says("returns Pair, not one tensor")
def returns_a_namedtuple(): return Net(lambda m, x: Pair(m.fc(m.trunk(x)), m.trunk(x)))

@says("returns NoneType, not one tensor")
def returns_nothing(): return Net(lambda m, x: None)

@says("returns tuple, not one tensor")
def coarse_and_fine():
    return Net(lambda m, x: (m.fc(m.trunk(x)), m.coarse(m.trunk(x))), coarse=nn.Linear(6, 2))

@says("in training Net returns 2 outputs.*second or auxiliary classifier")
def auxiliary_classifier_in_training():
    def join(m, x):
        feats = m.trunk(x)
        return (m.fc(feats), m.aux(feats)) if m.training else m.fc(feats)
    return Net(join, aux=nn.Linear(6, 3))

@says("does not come from the head.*layer=")
def another_classifier_in_training():
    def join(m, x): return m.aux(m.trunk(x)) if m.training else m.fc(m.trunk(x))
    return Net(join, aux=nn.Linear(6, 3))

@says("comes from 2 classifiers, .'fc', 'other'.")
def two_classifiers_averaged():
    return Net(lambda m, x: (m.fc(m.trunk(x)) + m.other(m.trunk(x)))/2, other=nn.Linear(6, 3))

@says("comes from 2 classifiers")
def ensemble():
    class Ensemble(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleList([Net(), Net()])
        def forward(self, x): return torch.stack([n(x) for n in self.nets]).mean(0)
    return Ensemble()

@says("but of add, after 'fc'")
def classifier_used_twice(): return Net(lambda m, x: m.fc(m.trunk(x)) + m.fc(m.trunk(-x)))

@says("dict.*does something with it")
def classifier_used_for_a_look():
    return Net(lambda m, x: m.fc(m.trunk(x + 0*m.fc(m.trunk(x)).sum())))

@says("does not come from the head.*nn.ModuleList")
def classifier_in_a_plain_list_too():
    net = Net(lambda m, x: m.layers[-1](m.trunk(x)))
    net.layers = [net.fc]
    return net

# ---- bodies

@says("'2', a linear layer with 64 outputs.*model.n_feats = 64")
def embedder_after_a_trunk(): return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 64))

@says("but of '1' .ReLU., after '0'.*n_feats")
def body(): return nn.Sequential(nn.Linear(8, 6), nn.ReLU())

@says("but of getitem.*n_feats")
def body_of_patches(): return Net(lambda m, x: m.trunk(x)[:,None][:,0], fc=nn.Identity())

@says("but of 'trunk.1' .ReLU., after 'trunk.0'.*n_feats")
def classifier_is_identity(): return Net(fc=nn.Identity())

@takes('1')
def body_with_n_feats():
    net = Net(fc=nn.Identity())
    net.n_feats = 6
    return net

# ---- wrapped, compiled, scripted, of other dtypes and places

@takes('module.fc')
def data_parallel(): return nn.DataParallel(Net())

@takes('module.fc')
def moving_average(): return torch.optim.swa_utils.AveragedModel(Net())

@takes('_orig_mod.fc')
def compiled(): return torch.compile(Net(), backend='eager')

@takes('fc')
def compiled_in_place():
    net = Net()
    net.compile(backend='eager')
    return net

class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk,self.fc = nn.Linear(8, 6),nn.Linear(6, 3)
    def forward(self, x): return self.fc(self.trunk(x).relu())

@says("TorchScript.*before")
def scripted(): return torch.jit.script(Plain())

@says("TorchScript.*before")
def jit_traced(): return torch.jit.trace(Plain(), torch.ones(2, 8))

@takes('fc')
def scripted_trunk(): return Net(trunk=torch.jit.script(nn.Sequential(nn.Linear(8, 6), nn.ReLU())))

@takes('fc')
def fx_graph(): return torch.fx.symbolic_trace(Plain())

@says("no nn.Linear to replace.*torch.export")
def exported_program(): return torch.export.export(Plain(), (torch.ones(2, 8),)).module()

@takes('fc')
def float64(): return Net().double()

@takes('fc')
def bfloat16(): return Net().bfloat16()

@takes('fc')
def float16(): return Net().half()

@takes('fc')
def on_meta():
    with torch.device('meta'): return Net()

@takes('fc')
def keeps_its_features():
    def join(m, x):
        m.feats = m.trunk(x)
        return m.fc(m.feats)
    net = Net(join)
    net(torch.ones(2, 8))
    return net

@says("cannot be copied.*cannot pickle")
def holds_a_lock(): return Net(lock=threading.Lock())

@takes('fc')
def hooked():
    net = Net()
    net.fc.register_forward_hook(lambda m, args, out: None)
    return net

@takes('fc')
def in_two_dtypes(): return Net(lambda m, x: m.fc(m.trunk(x).double()), fc=nn.Linear(6, 3).double())

@takes('fc')
def shared_memory_of_a_batch():
    net = Net()
    net.register_buffer('last', net.trunk(torch.ones(2, 8)))
    return net

# ---- models of libraries, without their weights

torchvision_names = '''alexnet vgg11 vgg11_bn squeezenet1_0 densenet121 inception_v3
    googlenet shufflenet_v2_x0_5 mobilenet_v2 mobilenet_v3_small resnet18
    resnext50_32x4d wide_resnet50_2 mnasnet0_5 efficientnet_b0 regnet_y_400mf vit_b_16
    swin_t convnext_tiny maxvit_t'''.split()

timm_names = '''test_resnet test_vit test_efficientnet test_convnext test_byobnet
    resnet10t vit_tiny_patch16_224 deit_tiny_distilled_patch16_224 pit_ti_distilled_224
    levit_128s efficientformer_l1 efficientformerv2_s0 efficientnet_b0
    mobilenetv3_small_050 regnetx_002 densenet121 dla34 ghostnet_050 hardcorenas_a
    convnext_atto swin_tiny_patch4_window7_224 mixer_s32_224 gmlp_ti16_224 resmlp_12_224
    poolformer_s12 edgenext_xx_small cait_xxs24_224 coat_tiny convit_tiny
    crossvit_tiny_240 tnt_s_patch16_224 xcit_nano_12_p16_224 twins_pcpvt_small pvt_v2_b0
    mobilevit_xxs repvgg_a0 rexnet_100 selecsls42 inception_v3 eva02_tiny_patch14_224
    focalnet_tiny_srf fastvit_t8 hgnet_tiny hrnet_w18_small lambda_resnet26t
    maxvit_rmlp_pico_rw_256 nextvit_small repghostnet_050 res2net50_14w_8s sequencer2d_s
    skresnet18 starnet_s1 tiny_vit_5m_224 visformer_tiny'''.split()

def of_torchvision(name):
    from torchvision.models import get_model
    return get_model(name, weights=None)

def of_timm(name, **kwargs):
    import timm
    return timm.create_model(name, **kwargs)

small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=1000)
transformers_configs = dict(
    ViT=dict(small, intermediate_size=64),
    DeiT=dict(small, intermediate_size=64),
    Dinov2=small,
    Beit=dict(small, intermediate_size=64),
    ConvNext=dict(hidden_sizes=[8,16,32,64], depths=[1,1,1,1], num_labels=1000),
    Swin=dict(embed_dim=24, depths=[1,1], num_heads=[2,2], num_labels=1000),
    ResNet=dict(embedding_size=8, hidden_sizes=[8,16], depths=[1,1], layer_type='basic',
                num_labels=1000),
    MobileNetV2=dict(depth_multiplier=0.35, num_labels=1000))

def of_transformers(name):
    import transformers
    kind, _, rest = name.partition(' ')
    config = getattr(transformers, f'{kind}Config')(**transformers_configs[kind])
    return getattr(transformers, f'{kind}ForImageClassification{rest}')(config)

def of_fastai(name):
    from fastai.vision.models import xresnet
    return getattr(xresnet, name)()

class Library:
    "The models of one library: their names, and how one is made"
    def __init__(self, make, names): self.make,self.names = make,names

libraries = dict(
    torchvision=Library(of_torchvision, torchvision_names),
    timm=Library(of_timm, timm_names),
    transformers=Library(of_transformers, [*transformers_configs, 'DeiT WithTeacher']),
    fastai=Library(of_fastai, ['xresnet18', 'xresnet34_deep', 'xse_resnet18', 'xresnext18']))

distilled = '''deit_tiny_distilled_patch16_224 pit_ti_distilled_224 levit_128s efficientformer_l1
    efficientformerv2_s0'''.split()

# Models with a second classifier, or without a linear one, and a part of the sentence that they get
refused = {
    'torchvision squeezenet1_0': "no nn.Linear to replace.*'classifier.1', Conv2d.*n_feats = 512",
    'torchvision inception_v3': 'second or auxiliary classifier.*aux_logits=False',
    'torchvision googlenet': 'second or auxiliary classifier.*aux_logits=False',
    'timm dla34': "no nn.Linear to replace.*'fc', Conv2d.*n_feats = 512",
    'timm eva02_tiny_patch14_224': 'no classifier, so it is a body.*n_feats = model.num_features',
    'timm crossvit_tiny_240': 'cannot tell where the output.*layer=',
    **{f'timm {k}': "comes from 2 classifiers.*n_feats = model.num_features" for k in distilled},
    'transformers DeiT WithTeacher': 'cannot tell where the output.*layer='}

any_size = '''efficientnet regnet resn densenet mobilenet mnasnet vgg shufflenet squeezenet
    dla ghost hardcore repvgg rexnet'''.split()

def images(model, library, name):
    "Two images of the size that a model takes, small where any size will do"
    size = getattr(model, 'default_cfg', {}).get('input_size', (3,224,224))
    if any(k in name for k in any_size) or library == 'fastai': size = 3,64,64
    if name == 'inception_v3': size = 3,299,299
    return torch.randn(2, *size)

def batch(model):
    "Four rows of eight inputs, on the device and in the dtype of a home-made model"
    p = next(iter(model.parameters()), torch.zeros(1))
    return torch.randn(4, 8).to(p.device, p.dtype)

def one_step(model, inputs, loss, n_out=3, **kwargs):
    "Train a model with a loss's head one step; gives the model, the layer, the gradient's norm"
    from discloss.core import find_head, with_head
    if kwargs.get('x'): kwargs['x'] = inputs
    model = with_head(model, loss, n_out, **kwargs).train()
    head = find_head(model)
    layer = next(k for k,m in model.named_modules() if m is head)
    if inputs.is_meta: return model, layer, float('nan')
    loss(model(inputs), torch.arange(len(inputs)) % n_out).backward()
    return model, layer, head.fc.weight.grad.norm().item()
