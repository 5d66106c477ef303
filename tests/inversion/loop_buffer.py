"The first replay buffer, one pair after the other: the oracle of the one in large operations."

import torch

from dfsbir.core.types import PairBatch


def as_bytes(images):
    return (images.clamp(0, 1) * 255).round().byte()


class LoopBuffer:
    "A new pair takes the place of the oldest pair of the class that has most at that moment."

    def __init__(self, capacity, seed=0):
        self.capacity = capacity
        self.random = torch.Generator().manual_seed(seed)
        self.pairs, self.age, self.added = None, torch.empty(0, dtype=torch.long), 0

    def __len__(self):
        return len(self.age)

    def add(self, batch):
        batch = batch.map(torch.clone)
        batch.photo, batch.sketch = as_bytes(batch.photo), as_bytes(batch.sketch)
        self.pairs = batch[:0] if self.pairs is None else self.pairs
        free = self.capacity - len(self)
        self.pairs = PairBatch.cat([self.pairs, batch[:free]])
        self.age = torch.cat([self.age, self.added + torch.arange(len(batch[:free]))])
        for i in range(free, len(batch)):
            largest = torch.bincount(self.pairs.label).argmax()
            last = torch.iinfo(torch.long).max
            place = torch.where(self.pairs.label == largest, self.age, last).argmin()
            for k, v in vars(self.pairs).items():
                if v is not None:
                    v[place] = getattr(batch, k)[i]
            self.age[place] = self.added + i
        self.added += len(batch)

    def sample(self, n):
        batch = self.pairs[torch.randint(len(self), (n,), generator=self.random)]
        batch.photo, batch.sketch = batch.photo.float() / 255, batch.sketch.float() / 255
        return batch
