"Each trainer in its own library: the page on trainers, its tabs one by one, and what a page need not show."
import json, re, warnings
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch.utils.data import TensorDataset

from discloss.bodies import small_body
from discloss.core import find_head, training_head, with_head
from discloss.losses.arcface import ArcFaceLoss
from discloss.specs import all_losses

root = Path(__file__).parent.parent
page = root/'nbs'/'tutorials'/'20_any_trainer.ipynb'
needs = dict(Lightning='lightning', accelerate='accelerate', **{'Hugging Face': 'transformers'}, fastai='transformers')

def tabs():
    "Code of the page before the tabs, and of each tab"
    code, name = {'': ''}, ''
    for cell in json.loads(page.read_text(encoding='utf-8'))['cells']:
        text = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            tab = re.match('### (.*)', text)
            if tab: name = tab[1]
            if text.startswith(':::') and name: break
        elif 'chdir' not in text: code[name] = code.get(name, '') + text + '\n'
    return code

@pytest.mark.parametrize('tab', [k for k in tabs() if k])
def test_tab(tab, tmp_path, monkeypatch):
    "A tab runs by itself; what it trained, resumed and exported knows the digits"
    if tab in needs: pytest.importorskip(needs[tab])
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names, code = {}, tabs()
    exec(code[''] + code[tab], names)
    x, y = names['valid_ds'].tensors
    model = names['model'] if tab != 'fastai' and tab != 'Lightning' else None
    if tab == 'fastai': model = names['load_learner']('digits.pkl').model
    if tab == 'fastai': x = (x - x.mean())/x.std()
    if tab == 'Lightning': model = names['classifier'].model
    model.eval()
    with torch.no_grad(): out = model(x)
    logits = out['logits'] if isinstance(out, dict) else out
    acc = (logits.argmax(1) == y).float().mean().item()
    assert acc > 0.8, acc

def vit():
    from transformers import ViTConfig, ViTForImageClassification
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=3, hidden_size=8, num_hidden_layers=1,
                                               num_attention_heads=1, intermediate_size=8, hidden_dropout_prob=0., attention_probs_dropout_prob=0.))

def test_accumulation_of_hugging_face(tmp_path):
    "With accumulation over two batches a step is that of one batch of both"
    pytest.importorskip('transformers')
    from transformers import Trainer, TrainingArguments
    loss = ArcFaceLoss()
    names, code = dict(loss=loss, torch=torch), tabs()['Hugging Face']
    exec(code[code.index('def mean_over_step'):code.index('def new_trainer')], names)
    ds = TensorDataset(torch.randn(8,1,8,8), torch.arange(8) % 3)
    states = []
    for bs,steps in (8,1), (4,2):
        args = TrainingArguments(str(tmp_path), max_steps=1, learning_rate=0.1, optim='sgd', lr_scheduler_type='constant', max_grad_norm=0., use_cpu=True, report_to='none',
                                 disable_tqdm=True, save_strategy='no', per_device_train_batch_size=bs, gradient_accumulation_steps=steps)
        trainer = Trainer(with_head(vit(), loss, 3), args, train_dataset=ds, data_collator=names['as_inputs'], compute_loss_func=names['mean_over_step'])
        before = {k: v.clone() for k,v in trainer.model.state_dict().items()}
        trainer.train()
        assert any(not torch.equal(v, before[k]) for k,v in trainer.model.state_dict().items())
        states.append(trainer.model.state_dict())
    for k,v in states[0].items(): assert torch.allclose(v, states[1][k], atol=1e-5), k
