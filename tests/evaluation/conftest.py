"What the tests of evaluation share: embeddings with and without ties, and slow loops over them."

import pytest
import torch


def make_problem(seed, queries=23, gallery=57, classes=4, dim=5, ties=False, negative=False):
    "Embeddings with integer entries (exact scores): many ties among few values, none among many."
    make = torch.Generator().manual_seed(seed)
    top = 2 if ties else 10**3
    q, g = (
        torch.randint(-top, top + 1, (n, dim), generator=make).float() for n in (queries, gallery)
    )
    if negative:
        q, g = q.abs() + 1, -g.abs() - 1  # every score below zero
    yq, yg = (torch.randint(0, classes, (n,), generator=make) for n in (queries, gallery))
    return q, g, yq, yg


@pytest.fixture
def problem():
    "A function: queries, gallery and the labels of both."
    return make_problem
