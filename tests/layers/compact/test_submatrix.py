"""Rows and columns of a matrix, and the way back."""

from __future__ import annotations

import pytest
import torch

from torchdrop.layers.compact.submatrix import cut


@pytest.mark.parametrize("rows", [None, 0, 5, 700])
@pytest.mark.parametrize("columns", [None, 0, 5])
def test_a_cut_is_indexing_and_its_gradient_lies_in_zeros(rows: int | None, columns: int | None) -> None:
    matrix = torch.randn(900, 30, requires_grad=True)
    kept = [None if n is None else torch.randperm(size)[:n].sort()[0] for n, size in ((rows, 900), (columns, 30))]
    out, expected = cut(matrix, *kept), matrix
    expected = expected if kept[0] is None else expected[kept[0]]
    expected = expected if kept[1] is None else expected[:, kept[1]]
    assert torch.equal(out, expected)
    g = torch.randn(out.shape)
    assert torch.equal(*(torch.autograd.grad(y, matrix, g)[0] for y in (out, expected)))


def test_a_cut_of_nothing_is_the_matrix_itself() -> None:
    matrix = torch.randn(3, 4)
    assert cut(matrix, None, None) is matrix


def test_derivatives_of_a_cut() -> None:
    matrix = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    kept = torch.tensor([0, 2])
    for rows, columns in ((kept, torch.tensor([1, 2, 4])), (None, kept), (kept, None)):
        assert torch.autograd.gradcheck(lambda m, r=rows, c=columns: cut(m, r, c).sin(), (matrix,))
        assert torch.autograd.gradgradcheck(lambda m, r=rows, c=columns: cut(m, r, c).sin(), (matrix,))
