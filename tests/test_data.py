"Folders as people have them, pictures of every kind, files that are damaged, batches of chosen classes, fingerprints, and image sets from `DISCLOSS_DATA`."
import operator, os, random, re, shutil, socket, struct, sys, unicodedata, warnings, zipfile, zlib
from collections import Counter, defaultdict
from enum import Enum
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from fastai.vision.all import (CategoryBlock, DataBlock, DataLoaders, ImageBlock,
    ImageDataLoaders, Learner, MultiCategoryBlock, PILImage, PILImageBW, RandomResizedCrop, RandomSplitter,
    Resize, TensorImage, Transform, accuracy, aug_transforms, get_image_files, parent_label,
    set_seed)
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset
from torchvision.transforms import InterpolationMode, v2

from discloss.bodies import resnet9, small_body
from discloss.core import with_head
from discloss.data import (ClassBalancedSampler, ImageTensors, class_balanced, data_root,
    fingerprint, folder_items, image_dls, labels_of, load_arrays, to_pixels)
from discloss.losses.center import CenterLoss

def picture(i=0, side=8, mode='RGB'):
    "Noise, another one for each number"
    noise = np.random.default_rng(i).integers(0, 255, (side,side,3), np.uint8)
    return Image.fromarray(noise).convert(mode)

def make(root, *folders, n=4, ending='png'):
    "`n` pictures, all different, in each of some folders"
    for folder in folders:
        (root/folder).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            seed = sum(map(ord, folder))*100 + i
            picture(seed).save(root/folder/f'{i}.{ending}')
    return root

def read(root, **kwargs):
    "What a folder holds: split -> class -> number; and the warning"
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        items = folder_items(root, **kwargs)
    assert len(w) <= 1
    counts = {s: dict(Counter(c for _,c in o)) for s,o in items.items()}
    return counts, str(w[0].message) if w else ''

def refusal(f, *args, **kwargs):
    with pytest.raises((ValueError,TypeError,FileNotFoundError)) as e: f(*args, **kwargs)
    assert 'delet' not in str(e.value)
    return str(e.value)

two = dict(cat=4, dog=4)

# ---- names of splits

@pytest.mark.parametrize('train, valid, test', [
    ('train', 'valid', 'test'), ('Training', 'Validation', 'Testing'), ('TRAIN', 'VAL', 'TEST'),
    ('Train', 'dev', 'Test'), ('training_set', 'validation_set', 'test_set'),
    ('seg_train', 'seg_val', 'seg_test'), ('train-images', 'val-images', 'test-images'),
    ('trainset', 'validate', 'holdout'), ('train data', 'dev data', 'hold-out'),
    ('train2017', 'val2017', 'test2017'), ('TrainingSet', 'ValidationSet', 'TestSet'),
    ('training', 'validation', 'evaluation'), ('train', 'valid', 'test1')])
def test_split_names(tmp_path, train, valid, test):
    for s in train, valid, test: make(tmp_path, f'{s}/cat', f'{s}/dog')
    assert read(tmp_path) == (dict(train=two, valid=two, test=two), '')

@pytest.mark.parametrize('folders', [
    ['trains', 'tests'], ['contest', 'latest'], ['valley', 'vale'], ['0', '1', '10'],
    ['träin', 'test-cases'], ['t-shirt', 'dev board'], ['evalanche', 'set']])
def test_names_that_are_no_splits(tmp_path, folders):
    assert read(make(tmp_path, *folders))[0] == dict(train={f: 4 for f in folders})

def test_some_splits(tmp_path):
    make(tmp_path, 'train/cat', 'train/dog', 'validation/cat', 'validation/dog')
    assert read(tmp_path) == (dict(train=two, valid=two), '')
    dls = image_dls(tmp_path, bs=2, size=8)
    assert len(dls.valid_ds) == 8 and len(dls.train_ds)+len(dls.test.dataset) == 8

def test_only_train(tmp_path):
    assert read(make(tmp_path, 'train/cat', 'train/dog')) == (dict(train=two), '')

def test_two_validation_sets(tmp_path):
    make(tmp_path, 'train/cat', 'train/dog', 'val/cat', 'val/dog', 'valid/cat', 'valid/dog')
    assert "['val', 'valid']" in refusal(folder_items, tmp_path)
    splits = dict(train='train', valid='val', test='valid')
    assert read(tmp_path, splits=splits)[0] == dict(train=two, valid=two, test=two)

def test_no_training_set(tmp_path):
    make(tmp_path, 'test/cat', 'test/dog', 'val/cat', 'val/dog')
    assert 'no folder to train on' in refusal(folder_items, tmp_path)

def test_a_split_beside_classes(tmp_path):
    make(tmp_path, 'cat', 'dog', 'test/cat', 'test/dog')
    assert read(tmp_path) == (dict(train=two, test=two), '')

def test_something_beside_splits(tmp_path):
    make(tmp_path, 'train/cat', 'train/dog', 'test/cat', 'test/dog', 'extra', 'noisy/cat')
    items, says = read(tmp_path)
    assert items == dict(train=two, test=two)
    assert 'extra (4 pictures, not a split, not used)' in says and 'noisy (4 pictures' in says

# ---- a split name that may be a class

def test_class_called_train(tmp_path):
    make(tmp_path, 'bus', 'car', 'train')
    assert read(tmp_path) == (dict(train=dict(bus=4, car=4, train=4)), '')

def test_class_called_test(tmp_path):
    make(tmp_path, 'cat', 'dog', 'test')
    assert "['test'] beside cat; dog" in refusal(folder_items, tmp_path)
    classes = read(tmp_path, splits=dict(train='.'))
    assert classes == (dict(train=dict(cat=4, dog=4, test=4)), '')
    items, says = read(tmp_path, splits=dict(train='.', test='test'))
    assert items == dict(train=two) and '4 pictures in test' in says

def test_flat_splits(tmp_path):
    make(tmp_path, 'train', 'test')
    assert 'no folder for each class' in refusal(folder_items, tmp_path)

def test_flat_train(tmp_path):
    assert 'no folder for each class' in refusal(folder_items, make(tmp_path, 'train'))
    assert 'no folder for each class' in refusal(folder_items, make(tmp_path/'b', '.'))

@pytest.mark.parametrize('test', ['test', 'test/test', 'test/unknown', 'test/images'])
def test_unlabelled_test(tmp_path, test):
    make(tmp_path, 'train/cat', 'train/dog', test)
    items, says = read(tmp_path)
    assert items == dict(train=two)
    assert '4 pictures in test' in says and 'dls.test_dl(files)' in says

def test_unlabelled_validation(tmp_path):
    items, says = read(make(tmp_path, 'train/cat', 'train/dog', 'val', 'test/cat'))
    assert items == dict(train=two, test=dict(cat=4))
    assert 'no valid set' in says and 'test has no pictures of dog' in says

def test_numbers_as_classes(tmp_path):
    make(tmp_path, 'train/0', 'train/1', 'test/0', 'test/1')
    assert read(tmp_path)[0]['test'] == {'0': 4, '1': 4}
    assert "['2']" in refusal(folder_items, make(tmp_path, 'test/2'))

def test_strange_class(tmp_path):
    make(tmp_path, 'train/cat', 'train/dog', 'test/cat', 'test/cow')
    assert "does not have: ['cow']" in refusal(folder_items, tmp_path)

# ---- depth

@pytest.mark.parametrize('top', ['data', 'a/b/c', 'dataset/dataset', 'training data'])
def test_one_level_deeper(tmp_path, top):
    make(tmp_path, *(f'{top}/{s}/{c}' for s in ('train','test') for c in two))
    assert read(tmp_path) == (dict(train=two, test=two), '')

def test_classes_one_level_deeper(tmp_path):
    assert read(make(tmp_path, 'pets/cat', 'pets/dog')) == (dict(train=two), '')

def test_doubled_split_folders(tmp_path):
    make(tmp_path, *(f'seg_{s}/seg_{s}/{c}' for s in ('train','test') for c in two))
    assert read(tmp_path) == (dict(train=two, test=two), '')

def test_images_beside_labels(tmp_path):
    make(tmp_path, *(f'images/{s}/{c}' for s in ('train','val') for c in two))
    (tmp_path/'labels'/'train').mkdir(parents=True)
    (tmp_path/'labels'/'train'/'0.txt').write_text('0')
    assert read(tmp_path)[0] == dict(train=two, valid=two)

def test_nested_classes(tmp_path):
    make(tmp_path, 'cat/2019', 'cat/2020/may', 'dog/old')
    assert read(tmp_path) == (dict(train=dict(cat=8, dog=4)), '')

@pytest.mark.parametrize('folders', [
    ['partA/cat', 'partA/dog', 'partB/cat', 'partB/dog'], # Splits with names of their own
    ['color/a', 'color/b', 'grey/a', 'grey/b', 'cut/a'],
    ['images/a', 'images/b', 'masks/a', 'masks/b'],
    ['2019/train', '2019/test', '2020/train', '2020/test'],
    ['cat/train', 'cat/test', 'dog/train', 'dog/test'], # Splits inside of classes
    ['bottle/train/good', 'bottle/test/bad', 'nut/train/good', 'nut/test/flip']])
def test_looks_like_splits(tmp_path, folders):
    says = refusal(folder_items, make(tmp_path, *folders))
    assert 'splits=dict(' in says
    names = sorted({f.split('/')[0] for f in folders})
    assert sorted(read(tmp_path, splits=dict(train='.'))[0]['train']) == names

def test_one_folder_in_each_class(tmp_path):
    "As Tiny ImageNet has them: train/n01/images, and val/images without classes"
    make(tmp_path, 'train/cat/images', 'train/dog/images', 'val/images')
    items, says = read(tmp_path)
    assert items == dict(train=two) and '4 pictures in val' in says
    make(tmp_path/'b', 'cat/images', 'dog/images')
    assert read(tmp_path/'b') == (dict(train=two), '')

@pytest.mark.parametrize('copy', ['train/train', 'train/old', 'train/cat/dog'])
def test_classes_inside_of_a_class(tmp_path, copy):
    "A second copy of the classes is no class, and a class is not read as another one"
    inside = [f'{copy}/{c}' for c in two] if copy.count('/') == 1 else [copy]
    make(tmp_path, 'train/cat', 'train/dog', 'test/cat', 'test/dog', *inside)
    says = refusal(folder_items, tmp_path)
    assert 'second copy' in says and 'splits=dict(' in says
    assert read(tmp_path, splits=dict(train='train'))[0]

def test_doubled_class_folders(tmp_path):
    make(tmp_path, 'cat/cat', 'dog/dog')
    assert read(tmp_path) == (dict(train=two), '')

def test_pictures_outside(tmp_path):
    make(tmp_path, '.', 'cat', 'dog', 'cat/more', n=3)
    items, says = read(tmp_path)
    assert items == dict(train=dict(cat=6, dog=3)) and '3 pictures in' in says
    make(tmp_path/'b', '.', 'data/cat', 'data/dog')
    assert '4 pictures outside of data' in read(tmp_path/'b')[1]

@pytest.mark.parametrize('splits', [dict(test='a'), dict(train='x'), dict(train='a', tset='b'), dict()])
def test_bad_splits(tmp_path, splits):
    assert 'splits must name folders' in refusal(folder_items, make(tmp_path, 'a/c', 'b/c'), splits=splits)

# ---- what is passed over

def test_models_folder(tmp_path):
    make(tmp_path, 'cat', 'dog')
    (tmp_path/'models').mkdir()
    (tmp_path/'models'/'best.pth').write_bytes(b'weights')
    items, says = read(tmp_path)
    assert items == dict(train=two) and 'models (no pictures)' in says
    with pytest.warns(UserWarning, match='models'): dls = image_dls(tmp_path, bs=2, size=8)
    assert dls.vocab == ['cat', 'dog'] and (tmp_path/'models'/'best.pth').exists()

def test_empty_class_and_split(tmp_path):
    make(tmp_path, 'train/cat', 'train/dog')
    for d in 'train/cow', 'valid', 'test/cat': (tmp_path/d).mkdir(parents=True)
    items, says = read(tmp_path)
    assert items == dict(train=two)
    assert all(f'{d} (no pictures)' in says for d in ('train/cow', 'valid', 'test'))

def test_many_empty_classes_are_counted(tmp_path):
    make(tmp_path, 'cat', 'dog')
    for i in range(300): (tmp_path/f'class{i:03}').mkdir()
    (tmp_path/'cat'/'notes.txt').write_text('x')
    items, says = read(tmp_path)
    assert items == dict(train=two) and len(says) < 300
    assert '300 folders without pictures (class000; class001; class002; and 297 more)' in says
    assert '1 file that is no picture (not used: .txt)' in says

@pytest.mark.parametrize('name, file', [('discloss_out', 'tune_center.png'), ('a', 'results.jsonl'), ('a', 'tune.journal')])
def test_results_beside_classes(tmp_path, name, file):
    "A command whose data are the current folder writes into it"
    make(tmp_path, 'cat', 'dog', f'{name}/comparison-2', name)
    (tmp_path/name/file).write_bytes(b'')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert {c for _,c in folder_items(tmp_path)['train']} == {'cat','dog'}

def test_hidden(tmp_path):
    make(tmp_path, 'cat', 'dog', '.git', '__MACOSX/cat', '.ipynb_checkpoints', 'cat/@eaDir')
    for name in '.DS_Store', '._0.png', 'Thumbs.db': (tmp_path/'cat'/name).write_bytes(b'x')
    assert read(tmp_path) == (dict(train=two), '')

def test_endings(tmp_path):
    make(tmp_path, 'cat', ending='JPG')
    make(tmp_path, 'dog', ending='JPeG')
    (tmp_path/'dog'/'list.csv').write_text('a,b')
    (tmp_path/'dog'/'scan.dcm').write_bytes(b'x')
    items, says = read(tmp_path)
    assert items == dict(train=two) and '2 files that are no pictures (not used: .csv; .dcm)' in says

def test_no_pictures(tmp_path):
    (tmp_path/'a').mkdir()
    assert 'no images' in refusal(folder_items, tmp_path)
    (tmp_path/'a'/'1.dcm').write_bytes(b'x')
    assert '.dcm' in refusal(folder_items, tmp_path)

def test_one_class(tmp_path):
    assert "two or more, found ['cat']" in refusal(image_dls, make(tmp_path, 'cat'))

# ---- links

def test_loops(tmp_path):
    make(tmp_path, 'cat', 'dog', n=12)
    for name,target in dict(up='..', self='.', far='../dog', root='/').items():
        (tmp_path/'cat'/name).symlink_to(target)
    (tmp_path/'dog'/'back').symlink_to('../cat')
    items, says = read(tmp_path)
    assert items == dict(train=dict(cat=12, dog=12)) and says.count('a link to a folder') == 5
    with pytest.warns(UserWarning): dls = image_dls(tmp_path, bs=2, size=8)
    sets = [{o.numpy().tobytes() for o in dl.dataset.x} for dl in dls]
    assert len(set.union(*sets)) == 24 == sum(map(len, sets))

def test_linked_folders(tmp_path):
    make(tmp_path/'store', 'x', 'y')
    (tmp_path/'root').mkdir()
    (tmp_path/'root'/'cat').symlink_to(tmp_path/'store'/'x')
    (tmp_path/'root'/'dog').symlink_to(tmp_path/'store'/'y')
    assert read(tmp_path/'root') == (dict(train=two), '')
    (tmp_path/'whole').symlink_to(tmp_path/'root')
    assert read(tmp_path/'whole') == (dict(train=two), '')

@pytest.mark.parametrize('link', [os.symlink, os.link])
def test_linked_files(tmp_path, link):
    make(tmp_path, 'train/cat', 'train/dog', 'test/cat', 'test/dog')
    link(tmp_path/'train/cat/0.png', tmp_path/'test/cat/again.png')
    link(tmp_path/'train/dog/0.png', tmp_path/'train/dog/again.png')
    items, says = read(tmp_path)
    assert items == dict(train=dict(cat=3, dog=4), test=dict(cat=5, dog=4))
    assert '2 links to pictures' in says
    link(tmp_path/'train/cat/1.png', tmp_path/'train/dog/cat.png')
    assert 'in two classes' in refusal(folder_items, tmp_path)

def test_copies(tmp_path):
    make(tmp_path, 'cat', 'dog')
    (tmp_path/'cat'/'copy.png').write_bytes((tmp_path/'cat'/'0.png').read_bytes())
    with pytest.warns(UserWarning, match='1 duplicate of another'): image_dls(tmp_path, bs=2, size=8)

def test_broken_link(tmp_path):
    make(tmp_path, 'cat', 'dog')
    (tmp_path/'cat'/'gone.png').symlink_to('nowhere.png')
    assert 'gone.png is a link that leads nowhere' in refusal(image_dls, tmp_path, bs=2)

# ---- names

def test_names(tmp_path):
    names = ['big cat', "d'or", 'Größe', '猫', 'a,b', 'T-shirt', 'x' * 100, '%s', '[1]']
    dls = image_dls(make(tmp_path, *names, n=3), bs=2, size=8)
    assert list(dls.vocab) == sorted(names)

@pytest.mark.skipif(os.name == 'nt' or sys.platform == 'darwin', reason='names of files are text there')
def test_names_that_are_no_text(tmp_path):
    for name in b'caf\xe9', b'caf\xe8':
        folder = Path(os.fsdecode(os.fsencode(tmp_path)+b'/'+name))
        folder.mkdir()
        for i in range(4): picture(i + 10*name[-1]).save(folder/f'{i}.png')
    assert list(image_dls(tmp_path, bs=2, size=8).vocab) == ['caf\\xe8', 'caf\\xe9']

def test_one_name_in_two_forms(tmp_path):
    for form,part in dict(NFC='train', NFD='test').items():
        make(tmp_path, f"{part}/{unicodedata.normalize(form, 'é')}", f'{part}/a')
    items, _ = read(tmp_path)
    assert items['train'] == items['test'] == {'a': 4, 'é': 4}

def test_a_set_wins_over_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(make(tmp_path, 'digits/cat', 'digits/dog'))
    assert image_dls('digits').c == 10 and image_dls('./digits', bs=2, size=8).c == 2

def test_no_name_is_not_the_current_folder(tmp_path, monkeypatch):
    "As of a variable of the shell that is not set"
    monkeypatch.chdir(make(tmp_path, 'cat', 'dog'))
    assert "unknown image set ''" in refusal(image_dls, '')
    assert image_dls('.', bs=2, size=8).c == 2

def test_paths(tmp_path, monkeypatch):
    make(tmp_path, 'pets/cat', 'pets/dog')
    monkeypatch.setenv('HOME', str(tmp_path))
    assert image_dls('~/pets', bs=2, size=8).name == 'pets'
    assert 'there is no folder' in refusal(image_dls, tmp_path/'none')
    assert 'there is no folder' in refusal(image_dls, 'no/where')
    (tmp_path/'a.zip').write_bytes(b'x')
    assert 'unpack an archive' in refusal(image_dls, tmp_path/'a.zip')
    good = {k: v[:60] for k,v in load_arrays('digits')[0].items()}
    np.savez(tmp_path/'mine.npz', **good)
    assert image_dls(tmp_path/'mine.npz', bs=8).name == 'mine'

# ---- splits and sizes

@pytest.mark.parametrize('n', [1, 2])
def test_too_few_pictures(tmp_path, n):
    make(make(tmp_path, 'cat', n=20), 'dog', n=n)
    says = refusal(image_dls, tmp_path, bs=2)
    assert f'dog ({n})' in says and 'at least 3' in says and 'add images' in says

def test_enough_pictures(tmp_path):
    make(make(tmp_path, 'cat', n=20), 'dog', n=3)
    assert image_dls(tmp_path, bs=2, size=8).train_ds.y.bincount().min() >= 1

def test_n_eval():
    dls = image_dls(n_eval=100)
    assert [len(dl.dataset) for dl in dls] == [1149, 100, 100]
    assert dls.valid_ds.y.bincount().min() >= 9
    assert torch.equal(dls.train_ds.x, image_dls().train_ds.x)
    assert [len(dl.dataset) for dl in image_dls(n_eval=3)] == [1149, 3, 3]
    assert 'n_eval' in refusal(image_dls, n_eval=0)

# ---- kinds of pictures

grey_ramp = np.array([[0,32896,65535]]*2, np.uint16)

@pytest.mark.parametrize('ending', ['png', 'tif', 'pgm'])
def test_16_bits(tmp_path, ending):
    Image.fromarray(grey_ramp).save(tmp_path/f'x.{ending}')
    assert to_pixels(tmp_path/f'x.{ending}', 1)[0,0].tolist() == [0,128,255]
    assert to_pixels(tmp_path/f'x.{ending}', 3)[:,0,1].tolist() == [128]*3

def test_16_bits_in_memory():
    assert to_pixels(Image.fromarray(grey_ramp), 1)[0,0].tolist() == [0,128,255]
    assert to_pixels(Image.fromarray(grey_ramp.astype('>u2')), 1)[0,0].tolist() == [0,128,255]

@pytest.mark.parametrize('mode', ['I', 'F'])
def test_32_bits(tmp_path, mode):
    picture(mode='L').convert(mode).save(tmp_path/'x.tif')
    says = refusal(to_pixels, tmp_path/'x.tif')
    assert 'x.tif' in says and f'mode {mode}' in says

def test_x_rays(tmp_path):
    for i in range(20):
        (tmp_path/'ab'[i%2]).mkdir(exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 2**(16 if i < 20 else 12), (8,8), np.uint16)
        Image.fromarray(noise).save(tmp_path/'ab'[i%2]/f'{i}.png')
    dls = image_dls(tmp_path, bs=4, size=8, channels=1, pad=0, flip=False)
    x = dls.one_batch()[0]
    assert 0.5 < x.std() < 1.5 and x.abs().max() < 4

def test_12_bits(tmp_path):
    for i in range(20):
        (tmp_path/'ab'[i%2]).mkdir(exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 4096, (8,8), np.uint16)
        Image.fromarray(noise).save(tmp_path/'ab'[i%2]/f'{i}.png')
    with pytest.warns(UserWarning, match='10 or 12 bits'): image_dls(tmp_path, bs=4, size=8)

def test_no_variance(tmp_path):
    for i in range(20):
        (tmp_path/'ab'[i%2]).mkdir(exist_ok=True)
        Image.new('RGB', (8+i,8), (i,2*i,255)).save(tmp_path/'ab'[i%2]/f'{i}.png')
    says = refusal(image_dls, tmp_path, bs=4, size=8)
    assert 'channel 2' in says and '255 everywhere' in says
    image_dls(tmp_path, bs=4, size=8, stats=([.5]*3, [.25]*3))

@pytest.mark.parametrize('mode, ending', [('1','png'), ('L','png'), ('P','gif'), ('P','png'),
    ('RGB','bmp'), ('RGB','webp'), ('CMYK','jpg'), ('CMYK','tif'), ('YCbCr','jpg'), ('L','jpg')])
def test_modes(tmp_path, mode, ending):
    im = Image.new('RGB', (8,8), 'white')
    im.paste('black', (0,0,4,8))
    im.convert(mode).save(tmp_path/f'x.{ending}')
    x = to_pixels(tmp_path/f'x.{ending}').float()
    assert x.shape == (3,8,8) and (x[:,:,:3] < 30).all() and (x[:,:,5:] > 225).all()

@pytest.mark.parametrize('channels', [1,3])
def test_lab(tmp_path, channels):
    Image.new('LAB', (8,8), (128,128,128)).save(tmp_path/'x.tif') # L at half, a and b at 0
    assert Image.open(tmp_path/'x.tif').mode == 'LAB'
    x = to_pixels(tmp_path/'x.tif', channels).float()
    assert x.shape == (channels,8,8) and (x-119).abs().max() < 4 # sRGB of L* = 50

@pytest.mark.parametrize('mode, ending', [('RGBA','png'), ('LA','png'), ('RGBA','webp'), ('PA','tif')])
def test_transparency(tmp_path, mode, ending):
    ink = Image.new('RGBA', (8,8), (0,0,0,0))
    ink.paste((0,0,0,255), (0,0,4,8))
    ink.convert(mode if mode != 'PA' else 'LA').save(tmp_path/f'x.{ending}', **({'lossless': True} if ending == 'webp' else {}))
    assert to_pixels(tmp_path/f'x.{ending}')[0,0].tolist() == [0]*4+[255]*4

@pytest.mark.parametrize('ending', ['png', 'gif'])
def test_transparent_palette(tmp_path, ending):
    im = Image.new('P', (8,8), 0)
    im.putpalette([0,0,0, 255,0,0])
    im.paste(1, (4,0,8,8))
    im.save(tmp_path/f'x.{ending}', transparency=0)
    assert to_pixels(tmp_path/f'x.{ending}')[:,0,[0,7]].T.tolist() == [[255]*3, [255,0,0]]

@pytest.mark.parametrize('ending', ['gif', 'webp', 'tif', 'png'])
def test_several_frames(tmp_path, ending):
    frames = [Image.new('RGB', (8,8), c) for c in ('red', 'blue')]
    kwargs = {'lossless': True} if ending == 'webp' else {}
    frames[0].save(tmp_path/f'x.{ending}', save_all=True, append_images=frames[1:], **kwargs)
    assert to_pixels(tmp_path/f'x.{ending}')[:,0,0].tolist()[0] > 250

@pytest.mark.parametrize('ending', ['png', 'jpg', 'webp', 'tif'])
@pytest.mark.parametrize('turn', range(1,9))
def test_orientation(tmp_path, ending, turn):
    upright = Image.new('L', (16,32), 255)
    upright.paste(0, (0,0,8,8))
    T = Image.Transpose
    back = {1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM,
            5: T.TRANSPOSE, 6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}[turn]
    exif = Image.Exif()
    exif[0x0112] = turn
    stored = upright if back is None else upright.transpose(back)
    stored.save(tmp_path/f'x.{ending}', exif=exif)
    x = to_pixels(tmp_path/f'x.{ending}', 1)
    assert x.shape == (1,32,16) and x[0,:8,:8].float().mean() < 20 and x[0,9:].float().mean() > 235
    if ending != 'tif': # Pillow 13 turns a TIFF wrongly that is opened by its path
        assert torch.equal(to_pixels(Image.open(tmp_path/f'x.{ending}'), 1), x)
    assert to_pixels(tmp_path/f'x.{ending}', 1, (16,8))[0,1,1] < 20

def test_orientation_without_sense(tmp_path):
    for i,value in enumerate((0, 9, 255)):
        exif = Image.Exif()
        exif[0x0112] = value
        picture().save(tmp_path/f'{i}.png', exif=exif)
        assert torch.equal(to_pixels(tmp_path/f'{i}.png'), to_pixels(picture()))

def test_large_photograph(tmp_path):
    "A JPEG is decoded small, and looks as if it had been decoded whole"
    soft = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6,8,3), np.uint8)).resize((2000,1500), Image.BICUBIC)
    soft.save(tmp_path/'x.jpg', quality=95)
    small = to_pixels(tmp_path/'x.jpg', size=(64,64)).float()
    whole = to_pixels(Image.open(tmp_path/'x.jpg'), size=(64,64)).float()
    assert (small-whole).abs().max() < 8

def test_memory_of_photographs(tmp_path, run):
    "Beside the images themselves, and three times one chunk as doubles, little is held"
    out = run('''
import resource, torch
from discloss.data import channel_stats
x = torch.randint(0, 256, (300,3,224,224), dtype=torch.uint8)
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
channel_stats(x)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-base)//1024)
''')
    assert int(out) < 320

# ---- damage

formats = dict(png={}, jpg={}, webp={}, gif={}, bmp={}, tif={}, ico={'sizes': [(32,32)]}, ppm={}, tga={}, jp2={}, dib={}, pcx={})

@pytest.mark.parametrize('ending', formats)
def test_damaged_files(tmp_path, ending):
    "Cut at any place, or with bytes overwritten, a file gives an image or one error that names it"
    f = tmp_path/f'x.{ending}'
    picture(side=32).save(f, **formats[ending])
    good, rng, refused = f.read_bytes(), random.Random(0), 0
    for i in range(60):
        bad = bytearray(good)
        if i % 2: bad = bad[:rng.randrange(len(bad))]
        else:
            for _ in range(20): bad[rng.randrange(min(len(bad), 200))] = rng.randrange(256)
        f.write_bytes(bad)
        try: to_pixels(f, size=(16,16))
        except ValueError as e:
            assert f'x.{ending} ' in str(e)
            refused += 1
    assert refused > 10

def test_all_bad_pictures(tmp_path):
    make(tmp_path, 'cat', 'dog', n=20)
    for i in range(14): (tmp_path/'cat'/f'bad{i:02}.jpg').write_bytes(b'' if i < 7 else b'<html>')
    (tmp_path/'dog'/'0.png').write_bytes((tmp_path/'dog'/'0.png').read_bytes()[:100])
    says = refusal(image_dls, tmp_path, bs=4, size=8)
    assert '15 of 54 images' in says and says.count('.jpg') == 10 and 'and 5 more' in says
    assert 'is empty' in says and 'not an image' in says and 'skip_bad=True' in says
    with pytest.warns(UserWarning, match='15 pictures that cannot be used'):
        dls = image_dls(tmp_path, bs=4, size=8, skip_bad=True)
    assert sum(len(dl.dataset) for dl in dls) == 39

def test_all_pictures_of_a_class_bad(tmp_path):
    make(tmp_path, 'cat', 'dog', n=20)
    for f in (tmp_path/'dog').iterdir(): f.write_bytes(b'x')
    assert 'dog' in refusal(image_dls, tmp_path, bs=4, size=8, skip_bad=True)

def test_truncated_jpeg(tmp_path):
    picture(side=64).save(tmp_path/'x.jpg')
    (tmp_path/'x.jpg').write_bytes((tmp_path/'x.jpg').read_bytes()[:-500])
    assert 'x.jpg is damaged' in refusal(to_pixels, tmp_path/'x.jpg')

def png_of_zeros(path, side):
    "A small file of a huge image, written without the memory for it"
    def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind+data))
    z = zlib.compressobj(9)
    rows = b''.join(z.compress(bytes(1+side)) for _ in range(side)) + z.flush()
    head = struct.pack('>IIBBBBB', side, side, 8, 0, 0, 0, 0)
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', rows) + chunk(b'IEND', b''))

def test_many_bombs(tmp_path, run):
    "Small files of large images are refused, or read one by one"
    for side,name in (10000, 'huge'), (5500, 'large'):
        (tmp_path/name).mkdir()
        png_of_zeros(tmp_path/name/'0.png', side)
        for i in range(1,4): os.link(tmp_path/name/'0.png', tmp_path/name/f'{i}.png')
    out = run(f'''
import resource, glob
from discloss.data import _read_all
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try: _read_all(sorted(glob.glob({str(tmp_path)!r}+'/huge/*.png')), 3, (64,64))
except ValueError as e: print(e)
x, bad = _read_all(sorted(glob.glob({str(tmp_path)!r}+'/large/*.png')), 3, (64,64))
print(x.shape, int(x.max()), bad)
print('MB', (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-base)//1024)
''')
    assert '4 of 4 images' in out and '10000 x 10000' in out
    assert 'torch.Size([4, 3, 64, 64]) 0 {}' in out
    assert int(out.split('MB')[1]) < 300 # One image takes 30 MB, four at once with their copies would take 480

def test_npz_bomb(tmp_path):
    f = tmp_path/'x.npz'
    with zipfile.ZipFile(f, 'w', zipfile.ZIP_DEFLATED, compresslevel=9) as z:
        for k in 'x_train', 'x_test':
            with z.open(f'{k}.npy', 'w', force_zip64=True) as o:
                np.lib.format.write_array_header_1_0(o, dict(descr='|u1', fortran_order=False, shape=(300,1000,1000)))
                for _ in range(300): o.write(bytes(10**6))
        for k in 'y_train', 'y_test':
            with z.open(f'{k}.npy', 'w') as o: np.lib.format.write_array(o, np.zeros(300, int))
    assert f.stat().st_size < 2e6
    says = refusal(load_arrays, 'x', tmp_path)
    assert 'x.npz' in says and 'unpack to 600,' in says

def test_npz_that_compresses_well(tmp_path):
    good = {k: v[:60] for k,v in load_arrays('digits')[0].items()}
    x = np.zeros((20000,28,28), np.uint8)
    x[:,::2] = 255
    np.savez_compressed(tmp_path/'x.npz', **{**good, 'x_train': x, 'y_train': np.zeros(20000, int)})
    assert len(load_arrays('x', tmp_path)[0]['x_train']) == 20000

def mnist(root, n=20, **damage):
    "MNIST's four files with few images; `damage` changes bytes of one"
    raw = root/'MNIST'/'raw'
    raw.mkdir(parents=True)
    for p in 'train', 't10k':
        images = struct.pack('>IIII', 2051, n, 28, 28) + bytes(range(256))*(n*28*28//256+1)
        labels = struct.pack('>II', 2049, n) + bytes(i%10 for i in range(n))
        for k,data in dict(images=images[:16+n*784], labels=labels).items():
            data = damage.get(f'{p}_{k}', lambda b: b)(data)
            if data is not None: (raw/f"{p}-{k}-idx{3 if k == 'images' else 1}-ubyte").write_bytes(data)
    return root

def test_whole_mnist(tmp_path):
    arrays, _ = load_arrays('mnist', mnist(tmp_path))
    assert arrays['x_train'].shape == (20,28,28) and arrays['y_test'].max() == 9

@pytest.mark.parametrize('damage', [
    dict(train_images=lambda b: b[:-100]), dict(t10k_labels=lambda b: b[:-3]),
    dict(train_images=lambda b: b''), dict(train_labels=lambda b: b'<html>'),
    dict(train_images=lambda b: b'\0'*16+b[16:]), dict(train_images=lambda b: b[:6]),
    dict(train_labels=lambda b: b[:4]+struct.pack('>I', 7)+b[8:15]), # Fewer labels than images
    dict(train_labels=lambda b: b[:8]+bytes([77]*20)), dict(train_images=lambda b: b+b'more')])
def test_damaged_mnist(tmp_path, damage):
    says = refusal(load_arrays, 'mnist', mnist(tmp_path, **damage))
    assert 'mnist' in says and 'whole copy' in says and 'not in' not in says

# ---- labels

def test_test_dl_labels():
    dls = image_dls()
    x = dls.test.dataset.x
    for y in '3', 3, np.int64(3), torch.tensor(3), np.array(3):
        assert dls.test_dl([(x[0],y)], with_labels=True).dataset.y.tolist() == [3]
    for y in 10, -1, 'three': assert str(y) in refusal(dls.test_dl, [(x[0],y)], with_labels=True)
    for y in 2.5, None, [1,2], ['a','b'], torch.ones(10):
        assert 'one label' in refusal(dls.test_dl, [(x[0],y)], with_labels=True)
    assert 'pairs' in refusal(dls.test_dl, [x[0], x[1]], with_labels=True)
    assert 'at least one image' in refusal(dls.test_dl, [])

def test_test_dl_items(tmp_path):
    dls = image_dls()
    make(tmp_path, 'a', 'b')
    files = get_image_files(tmp_path)
    for items,n in (files, 8), (tmp_path, 8), (str(files[0]), 1), (files[0], 1), (picture(), 1), (dls.test.dataset.x[:3], 3):
        dl = dls.test_dl(items)
        assert len(dl.dataset) == n and len(dl.one_batch()) == 1
    (tmp_path/'a'/'x.png').write_bytes(b'x')
    (tmp_path/'a'/'y.png').write_bytes(b'x')
    assert '2 of 10 images' in refusal(dls.test_dl, tmp_path)

def test_predictions_without_labels():
    dls = image_dls(n_train=100, bs=50)
    loss = CenterLoss()
    learn = Learner(dls, with_head(small_body(), loss, dls.c), loss_func=loss)
    with learn.no_bar(): preds, targ = learn.get_preds(dl=dls.test_dl(dls.test.dataset.x[:7]))
    assert preds.shape == (7,10) and targ is None

@pytest.mark.parametrize('o, n', [
    (np.zeros((9,7,3), np.uint8), 1), (np.zeros((9,7,1), np.uint8), 1), (np.zeros((9,7), np.uint8), 1),
    (np.zeros((3,9,7), np.uint8), 3), (np.zeros((2,9,7,3), np.uint8), 2), (torch.zeros(9,7).byte(), 1),
    (torch.zeros(1,9,7).byte(), 1), (torch.zeros(4,9,7).byte(), 4), (torch.zeros(2,3,9,7).byte(), 2)])
def test_one_image_or_many(o, n):
    assert len(image_dls().test_dl(o).dataset) == n

def test_three_channels_or_three_images():
    assert 'give [x] for one, list(x) for three' in refusal(image_dls().test_dl, torch.zeros(3,9,7).byte())

def test_other_classes(tmp_path):
    dls = image_dls()
    make(tmp_path, 'Å', 'ß', '5')
    assert "vocab='own'" in refusal(dls.test_dl, tmp_path, with_labels=True)
    dl = dls.test_dl(tmp_path, with_labels=True, vocab='own')
    assert list(dl.dataset.vocab) == ['5', 'Å', 'ß'] and dl.dataset.y.bincount().tolist() == [4,4,4]
    assert dl.one_batch()[0].shape[1:] == (1,8,8)
    pairs = [(picture(i), c) for i,c in enumerate('xyzz')]
    dl = dls.test_dl(pairs, with_labels=True, vocab=['z','y','x'])
    assert dl.dataset.y.tolist() == [2,1,0,0]

def test_soft_and_several_labels():
    x = torch.zeros(4,1,8,8, dtype=torch.uint8)
    _, soft = v2.MixUp(num_classes=3)(torch.rand(4,1,8,8), torch.tensor([0,1,2,0]))
    assert 'MixUp' in refusal(ImageTensors, x, soft, list('abc'))
    assert 'several labels' in refusal(ImageTensors, x, [[0],[1,2],[0],[1]], list('abc'))
    for y in torch.rand(4), torch.tensor([True]*4): assert 'class index' in refusal(ImageTensors, x, y, list('ab'))

def test_labels_in_arrays(tmp_path):
    good = {k: v[:60] for k,v in load_arrays('digits')[0].items()}
    np.savez(tmp_path/'x.npz', **{**good, 'y_train': np.eye(60)[:, :10].astype(int)})
    assert 'one label an image' in refusal(load_arrays, 'x', tmp_path)

# ---- labels of any loader

@pytest.fixture(scope='module')
def pets(tmp_path_factory):
    root = tmp_path_factory.mktemp('pets')
    for i,c in enumerate(('cat','cow','dog')): make(root, c, n=4+4*i)
    return root

def block(blocks=(ImageBlock,CategoryBlock), get_y=parent_label, **kwargs):
    return DataBlock(blocks, get_items=get_image_files, get_y=get_y, splitter=RandomSplitter(seed=0), **kwargs)

def test_labels_of_fastai(pets, monkeypatch):
    dls = block().dataloaders(pets, bs=4)
    want = [dls.vocab.o2i[parent_label(f)] for f in dls.train_ds.items]
    folder = ImageDataLoaders.from_folder(pets, valid_pct=0.2, bs=4)
    monkeypatch.setattr(Image, 'open', None) # No image is opened
    assert labels_of(dls).tolist() == labels_of(dls.train).tolist() == labels_of(dls.train_ds).tolist() == want
    assert len(labels_of(dls.valid)) == len(dls.valid_ds)
    assert labels_of(folder).bincount().sum() == 20
    assert labels_of(image_dls()).bincount().tolist() == image_dls().train_ds.y.bincount().tolist()

def test_labels_of_torch(pets):
    folder = torchvision.datasets.ImageFolder(pets, target_transform=lambda y: 2-y)
    assert labels_of(DataLoader(folder)).bincount().tolist() == [12,8,4]
    assert labels_of(Subset(folder, [0,23])).tolist() == [2,0]
    assert len(labels_of(ConcatDataset([folder, folder]))) == 48
    assert labels_of(TensorDataset(torch.rand(3,2), torch.tensor([[0],[2],[1]]))).tolist() == [0,2,1]
    assert labels_of([(picture(), 1), (picture(), 0)]).tolist() == [1,0]

def test_no_class_labels(pets):
    assert 'MixUp' in refusal(labels_of, block((ImageBlock,MultiCategoryBlock), lambda f: [parent_label(f)]).dataloaders(pets, bs=4))
    assert 'no labels' in refusal(labels_of, TensorDataset(torch.rand(3)))
    assert 'no labels' in refusal(labels_of, image_dls().test_dl([picture()]))
    assert '0 targets' in refusal(labels_of, block((ImageBlock,), None).dataloaders(pets, bs=4))
    assert '2 targets' in refusal(labels_of, block((ImageBlock,CategoryBlock,CategoryBlock), [parent_label,parent_label], n_inp=1).dataloaders(pets, bs=4))
    assert 'length' in refusal(labels_of, iter([]))

# ---- balanced batches

def test_sampler_is_exact():
    labels = torch.tensor([0]*50 + [1]*7 + [2]*20 + [3]*3 + [4]*20)
    s = ClassBalancedSampler(labels, classes=3, per_class=4, seed=1)
    epoch = list(s)
    assert len(epoch) == len(s) == 8
    for b in epoch:
        counts = Counter(labels[b].tolist())
        assert len(counts) == 3 and set(counts.values()) == {4}
        assert len(set(b)) == 12 if 3 not in counts else len(set(b)) == 11 # Class 3 has three samples
    assert list(s) != epoch and list(ClassBalancedSampler(labels, 3, 4, seed=1)) == epoch
    s.set_epoch(0)
    assert list(s) == epoch

def test_sampler_is_fair():
    "All classes come equally often, and all samples of a class"
    labels = torch.arange(60)%6
    s = ClassBalancedSampler(labels, 2, 5)
    drawn = Counter(i for _ in range(10) for b in s for i in b)
    assert len(drawn) == 60 and set(Counter(labels[list(drawn.elements())].tolist()).values()) == {100}
    assert min(drawn.values()) >= 6 and max(drawn.values()) <= 14

def test_sampler_with_few_classes():
    s = ClassBalancedSampler([0]*30+[1]*30, classes=4, per_class=3)
    for b in s: assert Counter(i//30 for i in b) == {0: 6, 1: 6} and len(set(b)) == 12
    assert len(list(ClassBalancedSampler([0,0,1], 2, 4))) == 1

def test_sampler_in_processes():
    labels = torch.arange(200)%10
    whole = list(ClassBalancedSampler(labels, 5, 2, seed=3))
    parts = [list(ClassBalancedSampler(labels, 5, 2, 3, num_replicas=2, rank=r)) for r in (0,1)]
    assert parts[0] == whole[::2] and parts[1] == whole[1::2] and len(parts[0]) == 10

def test_sampler_in_torch():
    x, y = torch.rand(40,2), torch.arange(40)%4
    dl = DataLoader(TensorDataset(x,y), batch_sampler=ClassBalancedSampler(y, 2, 4))
    for _,yb in dl: assert sorted(Counter(yb.tolist()).values()) == [4,4]
    assert len(dl) == 5

def test_sampler_refuses():
    for kwargs,word in (dict(per_class=1), 'per_class'), (dict(classes=0), 'classes'), (dict(rank=2, num_replicas=2), 'rank'), (dict(labels=[]), 'at least one'), (dict(labels=[.5]), 'class index'):
        assert word in refusal(ClassBalancedSampler, **{**dict(labels=[0,1], classes=2, per_class=2), **kwargs})

@pytest.mark.parametrize('kind', ['tensors', 'block', 'folder', 'items', 'torch'])
def test_class_balanced(pets, kind):
    if kind == 'tensors': dls = image_dls(bs=8)
    if kind == 'block': dls = block(item_tfms=Resize(8), batch_tfms=aug_transforms()).dataloaders(pets, bs=8, num_workers=0)
    if kind == 'folder': dls = ImageDataLoaders.from_folder(pets, valid_pct=0.2, bs=8, num_workers=0)
    if kind == 'items': dls = DataLoaders.from_dsets([(i, i%3) for i in range(40)], [(0,0)], bs=8)
    if kind == 'torch': dls = DataLoaders.from_dsets(TensorDataset(torch.rand(40,2), torch.arange(40)%3), [(0,0)], bs=8)
    bal = class_balanced(dls)
    for b in bal.train: assert sorted(Counter(b[-1].tolist()).values()) == [4,4]
    assert len(bal.train) == len(dls.train) and bal.valid is dls.valid
    one = class_balanced(dls.train, per_class=2).one_batch()[-1]
    assert set(Counter(one.tolist()).values()) <= {2,4}

def test_class_balanced_is_seeded():
    dls = class_balanced(image_dls(), 8)
    def first():
        dls.train.rng = random.Random(1)
        return dls.one_batch()[1].tolist()
    assert first() == first()

def test_class_balanced_refuses():
    dls = image_dls()
    assert 'divide the batch size' in refusal(class_balanced, dls, 5)
    assert 'divide the batch size' in refusal(class_balanced, dls, 1)
    assert 'batch_sampler' in refusal(class_balanced, DataLoader(dls.train_ds))
    assert '1149 samples, got 3' in refusal(class_balanced, dls, labels=[0,1,2])

# ---- fingerprints

def test_fingerprint_sees_everything():
    def changed(f):
        dls = image_dls(n_train=300, n_eval=100, pad=1)
        dls = f(dls) or dls
        return fingerprint(dls)
    def pixel(i, at): return lambda d: d[i].dataset.x.view(-1)[at].add_(1) and None
    def set_x(f): return lambda d: setattr(d.train_ds, 'x', f(d.train_ds.x))
    same = changed(lambda d: None)
    assert len(same) == 32 and changed(lambda d: None) == same
    ways = dict(
        first=pixel(0,0), middle=pixel(0,9999), last=pixel(0,-1), valid=pixel(1,77), test=pixel(2,-1),
        shift=set_x(lambda x: x.roll(1,-1)), mirror=set_x(lambda x: x.flip(-1)), transpose=set_x(lambda x: x.mT.contiguous()),
        order=set_x(lambda x: x.roll(1,0)), label=lambda d: d.train_ds.y[5].add_(1) and None,
        swap=lambda d: setattr(d, 'loaders', [d[0], d[2], d[1]]),
        names=lambda d: setattr(d.train_ds, 'vocab', ImageTensors(d[0].dataset.x, None, list('abcdefghij')).vocab),
        stats=lambda d: image_dls(n_train=300, n_eval=100, pad=1, stats=([.5],[.5])),
        pad=lambda d: image_dls(n_train=300, n_eval=100, pad=2), flip=lambda d: image_dls(n_train=300, n_eval=100, pad=1, flip=True),
        seed=lambda d: image_dls(n_train=300, n_eval=100, pad=1, seed=1), bs=lambda d: image_dls(n_train=300, n_eval=100, pad=1, bs=32),
        channels=lambda d: image_dls(n_train=300, n_eval=100, pad=1, channels=3), size=lambda d: image_dls(n_train=300, n_eval=100, pad=1, size=9),
        balanced=lambda d: class_balanced(d), balanced_8=lambda d: class_balanced(d, 8))
    prints = {k: changed(f) for k,f in ways.items()}
    assert len({same, *prints.values()}) == len(ways)+1, prints

def test_fingerprint_sees_channels():
    rgb = image_dls(channels=3, bs=8)
    before = fingerprint(rgb)
    rgb.train_ds.x[:,0] = 255-rgb.train_ds.x[:,0]
    middle = fingerprint(rgb)
    rgb.train_ds.x = rgb.train_ds.x.flip(1)
    assert len({before, middle, fingerprint(rgb)}) == 3

def test_fingerprint_stays(pets, run):
    "The same after training, in another process, and for a copied folder"
    dls = class_balanced(block(item_tfms=Resize(8), batch_tfms=aug_transforms()).dataloaders(pets, bs=8, num_workers=0))
    before = fingerprint(dls)
    for _ in dls.train: pass
    assert fingerprint(dls) == before
    code = 'from discloss.data import *; print(fingerprint(class_balanced(image_dls(pad=1, flip=True))))'
    here = fingerprint(class_balanced(image_dls(pad=1, flip=True)))
    assert run(code, env=dict(PYTHONHASHSEED='1')).strip() == here

def test_fingerprint_of_files(pets, tmp_path):
    copy = tmp_path/'copy'
    shutil.copytree(pets, copy)
    def of(root, **kwargs): return fingerprint(ImageDataLoaders.from_folder(root, valid_pct=0.2, seed=0, bs=4, **kwargs))
    before = of(pets)
    assert of(copy) == before
    assert len({before, of(pets, item_tfms=Resize(8)), of(pets, item_tfms=Resize(9)), of(pets, batch_tfms=aug_transforms()), of(pets, batch_tfms=aug_transforms(max_rotate=20))}) == 5
    f = copy/'cat'/'0.png'
    picture(999).save(f)
    assert of(copy) != before
    (copy/'dog'/'0.png').rename(copy/'cow'/'9.png')
    assert of(copy) not in (before, of(pets))

def test_fingerprint_of_torch(pets):
    def of(**kwargs): return fingerprint([DataLoader(torchvision.datasets.ImageFolder(pets, **kwargs))])
    assert of() == of() and of() != of(transform=v2.Resize(9)) != of(transform=v2.Resize(8))
    x, y = torch.rand(9,2), torch.arange(9)
    a, b = ([DataLoader(TensorDataset(x+d, y))] for d in (0, .1))
    assert fingerprint(a) == fingerprint(a) != fingerprint(b)

_factor = 1

def _times(x): return x*_factor

def test_fingerprint_sees_what_own_code_does(pets, monkeypatch):
    "A transform's code, what it was made with under any name, and what it uses"
    def own(k):
        class Own(Transform):
            def __init__(self, k): self._held = k
            def encodes(self, x:TensorImage): return x*self._held
        return Own(k)
    def other(k):
        class Own(Transform):
            def __init__(self, k): self._held = k
            def encodes(self, x:TensorImage): return x+self._held
        return Own(k)
    def of(*tfms):
        loaders = block(item_tfms=Resize(8), batch_tfms=list(tfms)).dataloaders(pets, bs=8)
        loaders.one_batch()
        return fingerprint(loaders)
    before = of(_times)
    assert before == of(_times) and of(own(2)) == of(own(2))
    monkeypatch.setitem(globals(), '_factor', 3)
    others = of(_times), of(lambda x: x+1), of(lambda x: x+2), of(own(2)), of(own(3)), of(other(2))
    cached = of(lru_cache(lambda x: x+1)), of(lru_cache(lambda x: x+2))
    assert len({before, *others, *cached}) == 9

class _Turned:
    "An object whose method is a transform, and which holds it"
    def __init__(self, k): self.k, self.way = k, self.turn
    def turn(self, x): return x*self.k

class _Side(Enum): left, right = 1, 2

changed_things = dict(
    class_of_a_method=lambda k: (PILImage,PILImageBW)[k].create,
    owner_of_a_method=lambda k: _Turned(k).turn,
    owner_of_a_method_in_c=lambda k: {'a': k}.get,
    enum=lambda k: list(InterpolationMode)[k],
    own_enum=lambda k: list(_Side)[k],
    range=lambda k: range(k),
    slice=lambda k: slice(k),
    bytearray=lambda k: bytearray([k]),
    long_pattern=lambda k: re.compile('a'*300+str(k)),
    device=lambda k: torch.device(('cpu','meta')[k]),
    memory_format=lambda k: (torch.contiguous_format,torch.channels_last)[k],
    itemgetter=lambda k: operator.itemgetter(k),
    sequential=lambda k: torch.nn.Sequential(v2.Resize(8+k)),
    table=lambda k: partial(len, pd.DataFrame(dict(a=[k]))),
    default=lambda k: defaultdict((list,dict)[k]))

@pytest.mark.parametrize('kind', changed_things)
def test_fingerprint_sees(kind):
    def of(k): return fingerprint([DataLoader([(0., 0)], collate_fn=partial(id, changed_things[kind](k)))])
    assert of(0) == of(0) != of(1)

def test_fingerprint_sees_the_class_of_pictures(pets):
    def of(x): return fingerprint(DataBlock((ImageBlock(x), CategoryBlock), get_items=get_image_files, get_y=parent_label,
        splitter=RandomSplitter(seed=0), item_tfms=Resize(8)).dataloaders(pets, bs=4))
    assert of(PILImage) == of(PILImage) != of(PILImageBW)

def test_fingerprint_stays_while_generators_draw():
    rng = np.random.default_rng(0)
    loaders = [DataLoader([(0., 0)], collate_fn=partial(id, rng))]
    before = fingerprint(loaders)
    rng.random()
    assert fingerprint(loaders) == before

def test_fingerprint_sees_how_loaders_draw(pets):
    x, n = block(item_tfms=Resize(8)), len(list(pets.rglob('*.png')))
    def of(weights): return fingerprint(x.weighted_dataloaders(pets, weights, bs=4))
    assert of(np.ones(n)) == of(np.ones(n)) != of(np.arange(1, n+1))
    ds = torchvision.datasets.ImageFolder(pets)
    a, b = ([DataLoader(ds, collate_fn=lambda o, k=k: k)] for k in (1,2))
    assert fingerprint(a) == fingerprint(a) != fingerprint(b)

def test_fingerprint_of_random_items_stays(pets):
    "Augmentation inside of a data set is no other data set"
    ds = torchvision.datasets.ImageFolder(pets, v2.Compose([v2.RandomCrop(6), v2.PILToTensor()]))
    a, b = ([DataLoader(Subset(ds, range(i, 9)))] for i in (0,1))
    state = torch.get_rng_state()
    assert fingerprint(a) == fingerprint(a) != fingerprint(b)
    assert torch.equal(state, torch.get_rng_state())

def test_fingerprint_of_a_table(pets):
    files = sorted(pets.rglob('*.png'))
    rows = [(f.relative_to(pets).as_posix(), f.parent.name) for f in files]
    df = pd.DataFrame(rows, columns=['file', 'label'])
    def of(df): return fingerprint(ImageDataLoaders.from_df(
        df, pets, fn_col='file', label_col='label', item_tfms=RandomResizedCrop(8), bs=4, seed=0))
    assert of(df) == of(df) != of(df.assign(label=df.label[::-1].values))

# ---- real sets

def have(*files): return any((data_root()/f).exists() for f in files)

@pytest.mark.skipif(not have('mnist.npz', 'MNIST/raw/train-images-idx3-ubyte'), reason='DISCLOSS_DATA has no MNIST')
def test_mnist():
    set_seed(0)
    dls = image_dls('mnist', bs=64, n_train=3000)
    assert [len(dl.dataset) for dl in dls] == [3000, 6000, 10000] and tuple(dls.one_batch()[0].shape) == (64,1,28,28)
    learn = Learner(dls, with_head(small_body(), CenterLoss(), dls.c), loss_func=CenterLoss(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(3, 1e-2)
        assert learn.validate()[1] > 0.9

@pytest.mark.skipif(not have('cifar10.npz', 'cifar-10-batches-py'), reason='DISCLOSS_DATA has no CIFAR-10')
def test_cifar10():
    set_seed(0)
    dls = image_dls('cifar10', bs=64, n_train=1500)
    assert len(dls.test.dataset) == 10000 and dls.vocab[3] == 'cat' and tuple(dls.one_batch()[0].shape) == (64,3,32,32)
    learn = Learner(dls, with_head(resnet9(width=16), CenterLoss(), dls.c), loss_func=CenterLoss(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(2, 1e-2)
        dls.valid.n = 500
        assert learn.validate()[1] > 0.2

# ---- names of files

def test_each_picture_knows_its_file(tmp_path):
    "Also where a picture that cannot be read was left out"
    root = make(tmp_path, 'train/cat', 'train/dog', 'test/cat', 'test/dog', n=6)
    (root/'test'/'cat'/'0.png').write_bytes(b'no picture')
    with pytest.warns(UserWarning, match='cannot be used'):
        dls = image_dls(root, bs=4, size=8, device='cpu', skip_bad=True)
    for dl in dls.loaders:
        ds = dl.dataset
        assert len(ds.files) == len(ds)
        for x,y,file in zip(ds.x, ds.y, ds.files):
            assert Path(file).parent.name == dls.vocab[int(y)]
            assert torch.equal(x, torch.from_numpy(np.array(Image.open(root/file))).permute(2,0,1))

@pytest.mark.parametrize('size', [8.5, (8,8.5), 'x', (8,8,8), 0, -3, (4,0)])
def test_a_size_that_is_no_size(size):
    says = refusal(to_pixels, Image.new('L', (8,8)), 1, size)
    assert 'size must be a whole number' in says and repr(size) in says

def test_one_number_is_the_size_of_both_sides():
    im = Image.new('L', (9,7))
    assert to_pixels(im, 1, 5).shape == to_pixels(im, 1, (5,5)).shape == (1,5,5)
    assert to_pixels(im, 1, np.int64(5)).shape == (1,5,5)

def with_specials(folder):
    "A pipe and a socket, called like pictures"
    os.mkfifo(folder/'pipe.png')
    with socket.socket(socket.AF_UNIX) as s: s.bind(str(folder/'socket.jpg'))
    return folder/'pipe.png', folder/'socket.jpg'

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='Windows has no such files')
@pytest.mark.timeout(60)
def test_pipes_and_sockets_are_no_pictures(tmp_path, monkeypatch):
    for c in 'ab':
        (tmp_path/c).mkdir()
        for i in range(10): Image.new('L', (8,8), 20*i).save(tmp_path/c/f'{i}.png')
    monkeypatch.chdir(tmp_path/'a') # The path of a socket must be short
    specials = with_specials(Path('.'))
    (tmp_path/'b'/'link.png').symlink_to((tmp_path/'a'/'pipe.png').resolve())
    dls = image_dls(tmp_path, size=8, bs=4)
    assert sum(len(dl.dataset) for dl in dls.loaders) == 20
    for special in [*specials, tmp_path/'b'/'link.png']: assert 'is no regular file' in refusal(to_pixels, special)

def test_a_class_that_looks_like_the_folder_of_classes(tmp_path):
    make(tmp_path, 'images/cat', 'images/dog', 'labels/x')
    items, says = read(tmp_path)
    assert items == dict(train=dict(images=8, labels=4)) and 'folders cat; dog' in says
