"""A layer in forked data loaders: a program of its own, because other libraries' threads do not survive forks."""

import copy
import sys

import torch

import batchnorm.torch as bnt


class Normalized(torch.utils.data.Dataset):
    """Images that a layer normalizes."""

    def __init__(self, layer, images):
        self.layer, self.images = layer, images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        with torch.no_grad():
            return self.layer(self.images[index : index + 1])[0]


def main(training: bool) -> None:
    torch.manual_seed(0)
    images, layer = torch.randn(6, 3, 300, 300), bnt.BatchNorm2d(3)
    layer(images)  # starts the parent's threads
    layer.train(training)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    expected = torch.stack([Normalized(copy.deepcopy(layer), images)[index] for index in range(6)])
    loader = torch.utils.data.DataLoader(
        Normalized(layer, images), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    loaded = torch.cat(list(loader))
    same = all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    layer(images)  # the parent's threads still work
    print(torch.equal(loaded, expected), same)


if __name__ == "__main__":
    main(sys.argv[1] == "training")
