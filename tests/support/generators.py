"""Random numbers of PyTorch for tests."""

import torch


def seeded(seed: int) -> torch.Generator:
    """A generator of this seed, for tensors on the default device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)
