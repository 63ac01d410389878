"""Degrees of parallelism and the mesh that they make."""

import pytest

from flashtrain.errors import UserError
from flashtrain.parallel.mesh import CONTEXT, DATA, TENSOR, Degrees, build, token_ranks
from tests.distributed import run_distributed


@pytest.mark.parametrize("name", ["tensor", "data", "context"])
def test_degrees_below_one_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"parallel\.{name} is 0; it must be at least 1"):
        Degrees(**{name: 0}).validate()


def _build(rank: int, world: int) -> tuple[list[int], list[int], list[str]]:
    mesh = build(Degrees(tensor=2, data=2), "cpu")
    messages = []
    for degrees in (Degrees(tensor=3), Degrees(data=2), Degrees(tensor=4, data=2)):
        try:
            build(degrees, "cpu")
        except UserError as error:
            messages.append(str(error))
    return mesh[TENSOR].mesh.tolist(), mesh[DATA].mesh.tolist(), messages


def test_ranks_of_one_tensor_group_are_neighbours() -> None:
    for rank, (tensor, data, messages) in enumerate(run_distributed(_build, 4)):
        assert tensor == [rank // 2 * 2, rank // 2 * 2 + 1]
        assert data == [rank % 2, rank % 2 + 2]
        assert messages == [
            "parallel.tensor 3 x parallel.data 1 asks for 3 ranks, but 4 were started",
            "parallel.tensor 1 x parallel.data 2 asks for 2 ranks, but 4 were started",
            "parallel.tensor 4 x parallel.data 2 asks for 8 ranks, but 4 were started",
        ]


def _with_context(rank: int, world: int) -> list[list[int]]:
    plain, mesh = build(Degrees(data=4), "cpu"), build(Degrees(data=2, context=2), "cpu")
    assert plain.mesh_dim_names == (DATA, TENSOR)
    assert token_ranks(plain).mesh.tolist() == plain[DATA].mesh.tolist()
    assert token_ranks(mesh) is token_ranks(mesh)
    return [ranks.mesh.tolist() for ranks in (mesh[DATA], mesh[CONTEXT], token_ranks(mesh))]


def test_ranks_of_one_context_group_are_next_and_see_other_tokens() -> None:
    for rank, found in enumerate(run_distributed(_with_context, 4)):
        assert found == [[rank % 2, rank % 2 + 2], [rank // 2 * 2, rank // 2 * 2 + 1], [0, 1, 2, 3]]
    assert str(Degrees(data=2, context=2)) == "parallel.tensor 1 x parallel.data 2 x parallel.context 2"
