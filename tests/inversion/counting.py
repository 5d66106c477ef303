"Counting operations: a measure of cost without a clock."

from torch.utils._python_dispatch import TorchDispatchMode


class Counter(TorchDispatchMode):
    "Counts the operations that are dispatched inside its `with` block."

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))
