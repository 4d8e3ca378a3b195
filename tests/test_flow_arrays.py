"""Flows accept NumPy arrays and data frames, and return NumPy arrays."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.flows import images, vectors
from numpy.typing import NDArray

from flowtrain.bijections.linear import Affine
from flowtrain.data.base import Samples
from flowtrain.flow import Flow, rows_at_a_time
from flowtrain.utils.errors import DataError, FlowtrainError

Array = NDArray[Any]


@dataclass
class Frame:
    """A data frame with only the attributes that flows need."""

    columns: list[Any]
    values: Array

    def to_numpy(self) -> Array:
        return self.values


class Indexed(Frame):
    """A frame that selects columns by name, like pandas and polars."""

    def __getitem__(self, names: list[Any]) -> "Indexed":
        return Indexed(names, self.values[:, [self.columns.index(name) for name in names]].astype(float))


def trained_on(flow: Flow, columns: tuple[str, ...], label: str | None = None) -> Flow:
    """Gives a flow the record of columns that training would give it."""
    samples = Samples(flow.event_shape, columns=columns, label=label, classes=flow.classes)
    flow.record = SimpleNamespace(samples=samples)  # type: ignore[assignment]
    return flow


def array(n: int = 7, d: int = 2) -> Array:
    return np.random.default_rng(0).normal(size=(n, d))


@pytest.mark.parametrize("name", ["ffjord", "realnvp", "glow", "nsf", "maf"])
def test_array_results_equal_tensor_results(name: str) -> None:
    flow, x = vectors(name), array()
    calls: tuple[Callable[[Any], Any], ...] = (flow.log_prob, flow.inverse, flow.forward, flow)
    for call in calls:
        found, expected = call(x), call(torch.from_numpy(x))
        assert isinstance(found, np.ndarray)
        assert isinstance(expected, torch.Tensor)
        # a tensor has gradients, whose kernels round differently
        np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-13, atol=1e-13)
    assert flow.log_prob(torch.from_numpy(x)).requires_grad


def test_arrays_are_scored_in_chunks_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, n = vectors("realnvp", classes=3), rows_at_a_time((2,))
    x, y = array(n + 5), np.arange(n + 5) % 3
    sizes, inverse = [], flow.bijection.pass_inverse

    def noted(x: torch.Tensor, *rest: Any) -> Any:
        sizes.append((len(x), torch.is_grad_enabled()))
        return inverse(x, *rest)

    monkeypatch.setattr(flow.bijection, "pass_inverse", noted)
    found = flow.log_prob(x, y)
    assert sizes == [(n, False), (5, False)]
    expected = flow.log_prob(torch.from_numpy(x), torch.from_numpy(y)).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_results_have_the_dtype_of_the_flow() -> None:
    flow = Flow((2,), Affine(2)).float()
    for dtype in (
        np.float64,
        np.float32,
        np.float16,
        np.int64,
        np.int8,
        np.uint8,
        np.uint16,
        bool,
        ">f8",
        np.longdouble,
    ):
        x = array().round().clip(0, 1).astype(dtype)
        assert flow.log_prob(x).dtype == flow.inverse(x).dtype == np.float32
        np.testing.assert_allclose(flow.log_prob(x), flow.log_prob(x.astype(np.float32)))
    assert flow.double().log_prob(array().astype(np.float32)).dtype == np.float64


def test_any_memory_layout_is_accepted_without_a_warning() -> None:
    flow, x = vectors("realnvp"), array(8, 2)
    expected = flow.log_prob(x)
    locked = x.copy()
    locked.flags.writeable = False
    wide = np.repeat(x, 2, axis=1)
    others = (locked, np.asfortranarray(x), wide[:, ::2], np.flip(np.flip(x).copy()), x.astype(object), x.tolist())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in others:
            np.testing.assert_array_equal(flow.log_prob(other), expected)
        np.testing.assert_array_equal(flow.log_prob(np.broadcast_to(x[:1], (3, 2))), expected[[0, 0, 0]])
    # the caller's array is not modified and shares no memory with the result
    z = flow.inverse(x)
    z[:] = 0
    np.testing.assert_array_equal(flow.log_prob(x), expected)


def test_empty_arrays_give_empty_results() -> None:
    for name in ("ffjord", "realnvp"):
        flow, empty = vectors(name), np.zeros((0, 2))
        assert flow.log_prob(empty).shape == (0,)
        assert flow.inverse(empty).shape == flow.forward(empty).shape == (0, 2)
    assert vectors("realnvp", classes=3).log_prob(empty, []).shape == (0,)


masked = np.ma.masked_greater(array(), 0.5)
TEXT = np.array([["a", "1"], ["2", "3"]])


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (np.zeros(2), r"x\[None\]"),
        (np.zeros((3, 3)), r"\(3, 3\)"),
        (np.float64(1.0), r"shape \(\)"),
        (np.zeros((3, 2), complex), "complex"),
        (np.array([[1.0, np.nan], [0.0, 1.0]])[[1, 0, 0]], "2 of 3 rows, first in row 1"),
        (np.array([[1.0, np.inf]]), "infinite"),
        (np.array([[1.0, None]], object), "missing"),
        (masked, "masked"),
        (TEXT, "'a'"),
        (TEXT.astype(object), "'a'"),
        (np.zeros((2, 2), "M8[s]"), "datetime"),
        (np.zeros(2, [("a", float), ("b", float)]), "dtype"),
        ([[1.0, 2.0], [3.0]], "equal length"),
        (None, "shape"),
        (np.full((1, 2), 2**64 - 1, np.uint64), "too large"),
    ],
)
def test_invalid_arrays_are_refused(x: Any, said: str) -> None:
    with pytest.raises(FlowtrainError, match=said):
        vectors("realnvp").log_prob(x)


def test_vector_for_a_one_column_flow_is_refused() -> None:
    flow = Flow((1,), Affine(1))
    with pytest.raises(FlowtrainError, match=r"x\[:, None\]"):
        flow.log_prob(np.zeros(5))
    with pytest.raises(FlowtrainError, match=r"z\[None\]"):
        flow.forward(torch.zeros(1))


@pytest.mark.parametrize("kind", [Frame, Indexed])
def test_data_frame_columns_are_selected_by_name(kind: type[Frame]) -> None:
    flow, x = trained_on(vectors("realnvp"), ("a", "b")), array()
    expected = flow.log_prob(x)
    notes = np.array(["some", "text"] * 4)[: len(x)]
    frame = kind(["b", "notes", "a"], np.column_stack([x[:, 1].astype(object), notes, x[:, 0]]))
    np.testing.assert_array_equal(flow.log_prob(frame), expected)
    np.testing.assert_array_equal(flow.inverse(frame), flow.inverse(x))
    for names, said in ((["a", "c"], "'b'"), (["a", "b", "a"], "'a'")):
        with pytest.raises(DataError, match=said):
            flow.log_prob(kind(names, array(7, len(names))))
    # the columns of latents have no names, so the names of the frame are ignored
    np.testing.assert_array_equal(flow.forward(kind(["b", "a"], x)), flow.forward(x))


@pytest.mark.parametrize("columns", [(), ("a", "a")])
def test_data_frame_without_unique_names_is_read_by_position(columns: tuple[str, ...]) -> None:
    flow, x = trained_on(vectors("realnvp"), columns), array()
    np.testing.assert_array_equal(flow.log_prob(Frame([0, 1], x)), flow.log_prob(x))
    with pytest.raises(FlowtrainError, match=r"\(7, 3\)"):
        flow.log_prob(Frame([0, 1, 2], array(7, 3)))


def test_labels_may_be_arrays_lists_or_columns() -> None:
    flow, x, y = trained_on(vectors("realnvp", classes=3), ("a", "b"), "kind"), array(4), [2, 0, 1, 2]
    expected = flow.log_prob(torch.from_numpy(x), torch.tensor(y)).detach()
    frame = Frame(["kind", "b", "a", "other"], np.column_stack([y, x[:, ::-1], np.zeros(4)]))
    labels = (y, np.array(y), np.array(y, np.uint8), np.array(y, float), tuple(y), torch.tensor(y))
    for label in labels:
        np.testing.assert_array_equal(flow.log_prob(x, label), expected)
        assert torch.equal(flow.log_prob(torch.from_numpy(x), label), expected)
    np.testing.assert_array_equal(flow.log_prob(frame), expected)
    np.testing.assert_array_equal(flow.log_prob(frame, "kind"), expected)
    np.testing.assert_array_equal(flow.log_prob(frame, "other"), flow.log_prob(x, 0))
    np.testing.assert_array_equal(flow.log_prob(x, np.int64(1)), flow.log_prob(x, 1))
    assert flow.sample(4, label=y).shape == (4, 2)
    for bad in ([0, 1], [0, 1, 2, 3], [0, 1, 2, 0.5], ["a", "b", "c", "d"], [True] * 4, None, "kind", [[0, 1, 2, 0]]):
        with pytest.raises(FlowtrainError, match=r"label"):
            flow.log_prob(x, bad)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="'age'"):
        flow.log_prob(frame, "age")
    with pytest.raises(FlowtrainError, match="not conditional"):
        vectors("realnvp").log_prob(x, y)


def test_integer_image_arrays_are_dequantized() -> None:
    flow = images("glow")
    x = np.random.default_rng(0).integers(0, 16, (3, 1, 4, 4), dtype=np.uint8)
    torch.manual_seed(0)
    expected = flow.log_prob(torch.from_numpy(x)).detach()
    torch.manual_seed(0)
    np.testing.assert_allclose(flow.log_prob(x), expected, rtol=1e-12)
    with pytest.raises(FlowtrainError, match="0 to 15"):
        flow.log_prob(x + 16)
    with pytest.raises(FlowtrainError, match="shape"):
        flow.log_prob(x[:, 0])
    assert flow.inverse(x).shape == (3, 1, 4, 4)


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_pandas_and_polars_frames_are_accepted(library: str) -> None:
    frames, x = pytest.importorskip(library), array(4)
    flow = trained_on(vectors("realnvp", classes=3), ("a", "b"), "kind")
    frame = frames.DataFrame({"note": list("wxyz"), "kind": [0, 1, 2, 0], "b": x[:, 1], "a": x[:, 0]})
    np.testing.assert_array_equal(flow.log_prob(frame), flow.log_prob(x, [0, 1, 2, 0]))
    np.testing.assert_array_equal(flow.log_prob(frame[["b", "a"]], frame["kind"]), flow.log_prob(x, [0, 1, 2, 0]))
    with pytest.raises(DataError, match="'b'"):
        flow.log_prob(frame[["kind", "a"]])
