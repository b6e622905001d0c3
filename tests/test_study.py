"What the study asks of its data."
import torch

from discloss import study

def test_frozen_features_are_of_as_many_images_as_the_tier_says(tmp_path, monkeypatch):
    asked = {}
    class Loaders: vocab = ['a', 'b']
    def image_dls(name, **kwargs):
        asked.update(kwargs)
        return Loaders()
    def features(dls): return [(torch.randn(8, 3), torch.arange(8) % 2) for _ in range(3)]
    monkeypatch.setattr(study, 'image_dls', image_dls)
    monkeypatch.setattr(study, 'frozen_features', features)
    dls = study.frozen_loaders('none', tmp_path, n_train=5, n_eval=7)
    assert (asked['n_train'], asked['n_eval']) == (5, 7)
    assert dls.c == 2
