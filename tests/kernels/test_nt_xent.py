"""nt_xent: against a loop in plain Python, against itself at float64, its gradients, its options and its errors."""

from __future__ import annotations

import math

import pytest
import torch
from support.contrastive_cases import assert_native_is_close, facts, options, pair, results, rows
from torch import Tensor
from torch.nn import functional

from ubp_fast.kernels.backends import BackendUnavailable
from ubp_fast.kernels.nt_xent import NTXentLoss, nt_xent
from ubp_fast.kernels.nt_xent.api import NEGATIVES

BACKENDS = pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", torch.float64), ("native", torch.float32)], ids=["reference", "native"]
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = [0, 1, 2, 3, 63, 64, 65, 127, 131]
WIDTHS = [1, 59, 64, 100]
TEMPERATURES = [1.0, 0.1, 0.02, 0.01, 0.005]
FORMS = pytest.mark.parametrize("negatives", NEGATIVES)


def by_hand(
    left, right, temperature=0.1, negatives="cross", weight=None, valid=None, ids=None, normalize=True
) -> float:
    """The definition, one number at a time."""
    count = len(left)

    def unit(vector: list[float]) -> list[float]:
        length = math.sqrt(math.fsum(x * x for x in vector))
        return [x / length for x in vector] if normalize and length > 0 else vector

    sides = [[unit(row) for row in side.tolist()] for side in (left, right)]
    valid = [True] * count if valid is None else valid.tolist()
    weight = [1.0] * count if weight is None else weight.tolist()
    ids = list(range(count)) if ids is None else ids.tolist()
    total = mass = 0.0
    for side in (0,) if negatives == "cross" else (0, 1):
        for i in range(count):
            if not valid[i]:
                continue
            candidates = [(1 - side, j) for j in range(count)]
            if negatives == "simclr":
                candidates += [(side, j) for j in range(count) if j != i]
            kept = [(s, j) for s, j in candidates if (j == i) or (valid[j] and ids[j] != ids[i])]
            query = sides[side][i]
            scores = [math.fsum(a * b for a, b in zip(query, sides[s][j], strict=True)) / temperature for s, j in kept]
            own = math.fsum(a * b for a, b in zip(query, sides[1 - side][i], strict=True)) / temperature
            top = max(scores)
            total += weight[i] * (top + math.log(math.fsum(math.exp(score - top) for score in scores)) - own)
            mass += weight[i]
    return total / mass if mass else 0.0


@FORMS
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("used", [(), ("weight",), ("valid",), ("ids",), ("weight", "valid", "ids")], ids="-".join)
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_equals_the_definition(count: int, used: tuple[str, ...], normalize: bool, negatives: str) -> None:
    left, right = pair(count, 5)
    chosen = {name: value for name, value in options(count).items() if name in used}
    arguments = {"temperature": 0.3, "negatives": negatives, "normalize": normalize, **chosen}
    assert float(nt_xent(left, right, **arguments)) == pytest.approx(by_hand(left, right, **arguments), abs=1e-12)


def test_default_is_cross_entropy_of_the_similarity_matrix() -> None:
    left, right = pair(65, 59)
    similarity = functional.normalize(left) @ functional.normalize(right).T / 0.1
    torch.testing.assert_close(nt_xent(left, right), functional.cross_entropy(similarity, torch.arange(65)))


@FORMS
@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(normalize: bool, negatives: str) -> None:
    left, right = pair(6, 4)
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    chosen = options(6)
    chosen["valid"][:3] = True

    def loss(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
        return nt_xent(a, b, temperature=t, negatives=negatives, normalize=normalize, **chosen)

    assert torch.autograd.gradcheck(loss, (left.requires_grad_(), right.requires_grad_(), temperature))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_gradient_for_some_inputs_only(wanted: tuple[int, ...]) -> None:
    left, right = pair(7, 5)
    full = [left.clone(), right.clone(), torch.tensor([0.2], dtype=torch.float64)]
    part = [tensor.clone() for tensor in full]
    for tensor in full:
        tensor.requires_grad_()
    for index in wanted:
        part[index].requires_grad_()
    for a, b, t in (full, part):
        nt_xent(a, b, temperature=t, negatives="symmetric").mul(3).backward()
    for index, (a, b) in enumerate(zip(full, part, strict=True)):
        assert (b.grad is not None) == (index in wanted)
        if index in wanted:
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("count", "width"), [(n, WIDTHS[i % 4]) for i, n in enumerate(ROWS)])
def test_shapes(count: int, width: int, dtype: torch.dtype, negatives: str) -> None:
    left, right = pair(count, width, dtype)
    assert_native_is_close(left, right, 0.1, f"N={count} E={width} {negatives}", negatives=negatives, **options(count))


@FORMS
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_float32_stays_close_at_every_temperature(temperature: float, negatives: str) -> None:
    left, right = pair(65, 64, torch.float32)
    exact = results(left, right, temperature, torch.float64, backend="reference", negatives=negatives)
    found = results(left, right, temperature, torch.float32, backend="reference", negatives=negatives)
    for mine, truth in zip(found, exact, strict=True):
        # A similarity of 1 / temperature is rounded to eps / temperature; that error is what the exponential sees.
        bound = 16 * torch.finfo(torch.float32).eps / temperature * truth.abs().max()
        assert (mine.double() - truth).abs().max() <= bound


def test_gradient_is_accurate_when_the_loss_is_near_zero() -> None:
    """Orthogonal clients, left = right: the loss is exp(-1 / temperature) (N - 1), which 1 - p cannot represent."""
    left = torch.eye(8)
    a = left.clone().requires_grad_()
    tau = torch.tensor(0.02, requires_grad=True)
    loss = nt_xent(a, left, temperature=tau)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(7 * math.exp(-50), rel=1e-4)
    off_diagonal = a.grad[0, 1:]
    torch.testing.assert_close(off_diagonal, torch.full((7,), math.exp(-50) / 0.02 / 8), rtol=1e-4, atol=0)
    assert float(tau.grad) == pytest.approx(7 * math.exp(-50) * 50 / 0.02, rel=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identical_unrelated_and_opposite_rows_stay_finite(dtype: torch.dtype) -> None:
    base = rows(9, 16, 5, dtype)
    for other, expected in ((base, None), (-base, None), (base[:1].expand(9, 16), math.log(9))):
        left = (base if expected is None else other).clone().requires_grad_()
        loss = nt_xent(left, other, temperature=0.005)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(left.grad).all()
        if expected is not None:
            assert float(loss.detach()) == pytest.approx(expected, rel=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_normalised_loss_ignores_the_length_of_rows(scale: float, dtype: torch.dtype) -> None:
    left, right = pair(17, 100, torch.float64)
    plain = nt_xent(left.to(dtype), right.to(dtype))
    scaled = nt_xent((left * scale).clamp(-6e4, 6e4).to(dtype), (right * scale).to(dtype))
    torch.testing.assert_close(scaled, plain, rtol=40 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_finite_whose_sum_is_not(dtype: torch.dtype) -> None:
    left, right = (part.abs() for part in pair(17, 100, torch.float64))
    scale = torch.finfo(dtype).max / (2 * left.max())
    left, right, large = left.to(dtype), right.to(dtype), (left * scale).to(dtype)
    torch.testing.assert_close(nt_xent(large, right), nt_xent(left, right), rtol=40 * torch.finfo(dtype).eps, atol=0)


@FORMS
@BACKENDS
def test_zero_rows_stay_zero_and_get_no_gradient(backend: str, dtype: torch.dtype, negatives: str) -> None:
    left, right = pair(5, 8, dtype)
    left[1] = 0
    right[1] = 0
    right[3] = 0
    loss = nt_xent(left.requires_grad_(), right.requires_grad_(), negatives=negatives, backend=backend)
    assert float(loss.detach()) == pytest.approx(by_hand(left, right, 0.1, negatives), rel=4 * torch.finfo(dtype).eps)
    loss.backward()
    assert not left.grad[1].any()
    assert not right.grad[[1, 3]].any()
    assert left.grad[0].any()


@FORMS
@BACKENDS
@pytest.mark.parametrize("nothing", ["valid", "weight", "rows"])
def test_nothing_to_learn_from_is_zero(nothing: str, backend: str, dtype: torch.dtype, negatives: str) -> None:
    left, right = pair(0 if nothing == "rows" else 4, 3, dtype)
    chosen: dict = {"negatives": negatives, "backend": backend} | {
        "valid": {"valid": torch.zeros(4, dtype=torch.bool)},
        "weight": {"weight": torch.zeros(4)},
        "rows": {},
    }[nothing]
    tau = torch.tensor(0.1, requires_grad=True)
    loss = nt_xent(left.requires_grad_(), right.requires_grad_(), temperature=tau, **chosen)
    loss.backward()
    assert float(loss.detach()) == 0
    assert not left.grad.any()
    assert not right.grad.any()
    assert not tau.grad.any()


@FORMS
@BACKENDS
def test_rows_that_are_not_valid_are_as_good_as_absent(backend: str, dtype: torch.dtype, negatives: str) -> None:
    left, right = pair(9, 6, dtype)
    chosen = options(9)
    chosen["valid"] = torch.tensor([True, False, True, True, False, True, True, True, False])
    keep = chosen["valid"]
    inside = {name: value[keep] for name, value in chosen.items()}
    left[1], right[4], chosen["weight"][8] = float("nan"), float("inf"), -1.0
    a, b = left.requires_grad_(), right.requires_grad_()
    few_a, few_b = (tensor.detach()[keep].requires_grad_() for tensor in (a, b))
    loss = nt_xent(a, b, negatives=negatives, backend=backend, **chosen)
    few = nt_xent(few_a, few_b, negatives=negatives, backend=backend, **inside)
    torch.testing.assert_close(loss, few)
    loss.backward()
    few.backward()
    torch.testing.assert_close(a.grad[keep], few_a.grad)
    torch.testing.assert_close(b.grad[keep], few_b.grad)
    assert not a.grad[~keep].any()
    assert not b.grad[~keep].any()


@FORMS
def test_order_of_the_rows_does_not_matter(negatives: str) -> None:
    left, right = pair(33, 12)
    chosen = options(33)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(4))
    shuffled = {name: value[order] for name, value in chosen.items()}
    torch.testing.assert_close(
        nt_xent(left, right, negatives=negatives, **chosen),
        nt_xent(left[order], right[order], negatives=negatives, **shuffled),
    )


def test_symmetric_is_the_mean_of_both_directions_and_of_equal_weights() -> None:
    left, right = pair(21, 10)
    both = nt_xent(left, right, negatives="symmetric")
    torch.testing.assert_close(both, (nt_xent(left, right) + nt_xent(right, left)) / 2)
    equal = torch.full((21,), 1e-30)
    torch.testing.assert_close(both, nt_xent(left, right, negatives="symmetric", weight=equal))


def test_rows_of_one_client_are_no_negatives_of_each_other() -> None:
    left, right = (side.repeat(2, 1) for side in pair(6, 7))
    ids = torch.arange(6).repeat(2)
    for negatives in NEGATIVES:
        assert float(nt_xent(left, right, negatives=negatives, ids=ids)) < float(
            nt_xent(left, right, negatives=negatives)
        )
        assert float(nt_xent(left, right, negatives=negatives, ids=torch.full_like(ids, 2**62))) == 0


def test_non_contiguous_rows() -> None:
    left, right = pair(16, 12)
    views = left.T.contiguous().T, torch.cat((right, right), dim=1)[:, :12]
    torch.testing.assert_close(nt_xent(*views), nt_xent(left, right))


@FORMS
@pytest.mark.parametrize("used", [(), ("weight", "valid", "ids")], ids=["plain", "options"])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_opcheck(used: tuple[str, ...], negatives: str, backend: str) -> None:
    left, right = pair(5, 4, torch.float32)
    chosen = [value if name in used else None for name, value in options(5).items()]
    tau = torch.tensor(0.2, requires_grad=True)
    arguments = (left.requires_grad_(), right.requires_grad_(), None, tau, negatives, *facts(*chosen), True, backend)
    torch.library.opcheck(torch.ops.ubp_fast.nt_xent.default, arguments)
    row_losses = torch.ops.ubp_fast.nt_xent(*arguments)
    detached = tuple(value.detach() if isinstance(value, Tensor) else value for value in arguments)
    torch.library.opcheck(
        torch.ops.ubp_fast.nt_xent_backward.default, (torch.ones_like(row_losses), row_losses.detach(), *detached)
    )


@FORMS
@pytest.mark.parametrize("learned", [True, False], ids=["learned", "fixed"])
def test_compiles_as_one_graph(learned: bool, negatives: str) -> None:
    chosen = options(9)
    outcome = []
    module = NTXentLoss(0.3, negatives, learn_temperature=learned)
    for run in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        left, right = (tensor.requires_grad_() for tensor in pair(9, 6, torch.float32))
        module.zero_grad()
        loss = run(left, right, **chosen)
        loss.backward()
        outcome.append([loss, left.grad, right.grad, *(parameter.grad.clone() for parameter in module.parameters())])
    torch.testing.assert_close(outcome[0], outcome[1], rtol=0, atol=0)


def test_module_learns_its_temperature() -> None:
    module = NTXentLoss(0.5, learn_temperature=True)
    left, right = pair(8, 6, torch.float32)
    module(left, right).backward()
    assert float(module.temperature.detach()) == pytest.approx(0.5)
    assert module.log_temperature is not None
    assert module.log_temperature.grad.item() != 0
    assert "learned" in repr(module)
    assert not list(NTXentLoss(0.5).parameters())


GOOD = torch.ones(3, 4)
WRONG = [
    ({"left": torch.ones(4)}, ValueError, r"left must have shape \[N, E\], got \[4\]"),
    ({"right": torch.ones(3, 5)}, ValueError, r"right must have shape \[N, E\] = \[3, 4\] like left, got \[3, 5\]"),
    ({"left": torch.ones(3, 0), "right": torch.ones(3, 0)}, ValueError, "width E in 1..2048, got 0"),
    ({"left": torch.ones(1, 2049), "right": torch.ones(1, 2049)}, ValueError, "width E in 1..2048, got 2049"),
    ({"left": GOOD.int()}, TypeError, "left must be float32"),
    ({"right": GOOD.double()}, TypeError, "right must have the dtype of left"),
    ({"negatives": "all"}, ValueError, "negatives must be one of .* got 'all'"),
    ({"temperature": 0.0}, ValueError, "temperature must be finite and > 0, got 0.0"),
    ({"temperature": -1}, ValueError, "temperature must be finite and > 0, got -1"),
    ({"temperature": float("nan")}, ValueError, "temperature must be finite and > 0, got nan"),
    ({"temperature": float("inf")}, ValueError, "temperature must be finite and > 0, got inf"),
    ({"temperature": torch.tensor(-0.5)}, ValueError, "temperature must be finite and > 0, got -0.5"),
    ({"temperature": torch.ones(2)}, ValueError, r"one element, got shape \[2\]"),
    ({"temperature": torch.tensor(1)}, ValueError, "floating tensor with one element"),
    (
        {"weight": torch.tensor([1.0, -2.0, 1.0])},
        ValueError,
        r"weight must be finite and >= 0, got -2 in row 1 \(1 rows\)",
    ),
    ({"weight": torch.tensor([1.0, 1.0, math.nan])}, ValueError, "weight must be finite and >= 0, got nan in row 2"),
    ({"weight": torch.ones(2)}, ValueError, r"weight must have shape \[N\] = \[3\], got \[2\]"),
    ({"weight": torch.ones(3, dtype=torch.int64)}, TypeError, "weight must be floating"),
    ({"weight": torch.ones(3, requires_grad=True)}, ValueError, "weight must not require a gradient"),
    ({"valid": torch.ones(3)}, TypeError, "valid must be bool"),
    ({"ids": torch.ones(3)}, TypeError, "ids must be integers"),
    (
        {"left": torch.tensor([[1.0], [math.nan]]), "right": torch.ones(2, 1)},
        ValueError,
        "left must be finite .* row 1",
    ),
    (
        {"left": torch.ones(2, 1), "right": torch.tensor([[math.inf], [1.0]])},
        ValueError,
        "right must be finite .* row 0",
    ),
    (
        {"left": torch.ones(1000, 128), "right": torch.ones(1000, 128).index_fill(0, torch.tensor([997]), math.nan)},
        ValueError,
        "right must be finite .* row 997",
    ),
    ({"left": GOOD.double(), "right": GOOD.double(), "backend": "native"}, BackendUnavailable, "float64"),
    ({"backend": "triton"}, BackendUnavailable, "triton"),
    ({"backend": "numpy"}, ValueError, "numpy"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[message[:40] for *_, message in WRONG])
def test_bad_arguments(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"left": GOOD, "right": GOOD, **change}
    with pytest.raises(error, match=message):
        nt_xent(arguments.pop("left"), arguments.pop("right"), **arguments)


def test_module_rejects_a_temperature_that_is_not_positive() -> None:
    with pytest.raises(ValueError, match="temperature must be finite and > 0, got 0"):
        NTXentLoss(0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch.compile itself imports
def test_the_temperature_may_be_an_input_of_a_graph() -> None:
    left, right = pair(7, 4)
    compiled = torch.compile(nt_xent, fullgraph=True, dynamic=True, backend="eager")
    for temperature in (0.3, 0.7):
        torch.testing.assert_close(
            compiled(left, right, temperature=temperature), nt_xent(left, right, temperature=temperature)
        )
