"Real image sets from files, where `DISCLOSS_DATA` has them."
import pytest
from fastai.vision.all import Learner, accuracy, set_seed

from discloss.bodies import resnet9, small_body
from discloss.core import with_head
from discloss.data import data_root, image_dls
from discloss.losses.center import CenterLoss

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
