"""In which order a tier has tensors brought back before they are asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ullage.offload import Stats
from ullage.runtime import Site, Tier


class Ticket:
    def __init__(self, store: Store, source: Tensor) -> None:
        self.store, self.data, self.name = store, source.clone(), int(source[0])
        self.nbytes = source.numel()

    def prefetch(self) -> None:
        self.store.said.append(self.name)

    def get(self, late: Callable[[], None] | None = None) -> Tensor:
        self.store.said.append(f"get {self.name}")
        return self.data.clone()

    def recover(self) -> Tensor:
        raise NotImplementedError

    def drop(self) -> None:
        pass


class Store:
    """Says what it is asked for; tensors are told apart by their first byte."""

    get_blocks, resident_bytes, staging_bytes = True, 0, 0
    stats = Stats()

    def __init__(self) -> None:
        self.said: list[int | str] = []

    def takes(self, device: torch.device) -> bool:
        return True

    def put(self, source: Tensor | torch.UntypedStorage) -> Ticket:
        assert isinstance(source, Tensor)
        return Ticket(self, source)

    def poll(self) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...

    def wait_until_resident_at_most(self, nbytes: int) -> bool:
        return True


class Sent:
    """Tensors that sites have sent, as `{"a": 3, "b": 2}`: 0 to 2 from a, then 3 and 4 from b."""

    def __init__(self, units: dict[str, int]) -> None:
        self.store = Store()
        self.tier = Tier(self.store)
        self.sites = {name: Site(name, tier=self.tier) for name in units}
        self.aways = []
        for name, n in units.items():
            self.more(name, n)

    def more(self, name: str, n: int) -> None:
        for _ in range(n):
            x = torch.full((4096,), len(self.aways), dtype=torch.uint8)
            away = self.tier.pack(x, self.sites[name])
            assert away is not None
            self.aways.append(away)

    def ask(self, *numbers: int) -> list[int | str]:
        """What the store heard since."""
        self.store.said.clear()
        for n in numbers:
            assert int(self.aways[n].tensor()[0]) == n
        return list(self.store.said)


def test_what_left_last_comes_first() -> None:
    sent = Sent({"a": 2, "b": 2})
    assert sent.ask(3) == [2, 1, 0, "get 3"]
    assert sent.ask(2, 1, 0) == ["get 2", "get 1", "get 0"]


def test_inside_a_unit_the_order_may_be_another_one() -> None:
    """Its replay asks for what its forward made first; the rest of the unit comes before what other units sent."""
    sent = Sent({"a": 2, "b": 4})
    assert sent.ask(3) == [5, 4, 2, 1, 0, "get 3"]
    assert sent.ask(5, 4, 2, 1, 0) == ["get 5", "get 4", "get 2", "get 1", "get 0"]


def test_another_graph_is_left_alone() -> None:
    """Two forwards, then the backward of the first: what the second sent is not asked for in it."""
    sent = Sent({"a": 2, "b": 1})
    sent.more("a", 2)
    sent.more("b", 1)
    assert sent.ask(2) == [1, 0, "get 2"]
    assert sent.ask(1, 0) == ["get 1", "get 0"]
    sent.aways[:3] = [None] * 3  # type: ignore[list-item]
    assert sent.ask(5) == [4, 3, "get 5"]


def test_a_graph_that_stays_does_not_come_with_the_next() -> None:
    """Its tensors would fill the read-ahead, and nobody would take them."""
    sent = Sent({"a": 2, "b": 1})
    sent.ask(2, 1, 0)
    sent.more("a", 2)
    sent.more("b", 1)
    assert sent.ask(5) == [4, 3, "get 5"]


def test_numbers_are_used_again() -> None:
    sent = Sent({"a": 3})
    sent.ask(2, 1, 0)
    sent.more("a", 2)
    sent.aways.clear()  # a graph that is thrown away, and the one before
    sent.more("a", 3)
    assert sent.ask(2) == [1, 0, "get 2"]


def test_a_graph_that_is_kept_is_asked_for_again() -> None:
    sent = Sent({"a": 3})
    again = [1, 0, "get 2", "get 1", "get 0"]
    assert sent.ask(2, 1, 0) == again == sent.ask(2, 1, 0)


def test_several_views_of_one_storage_ask_once() -> None:
    sent = Sent({"a": 2})
    x = torch.full((4096,), 2, dtype=torch.uint8)
    views = [sent.tier.pack(v, sent.sites["a"]) for v in (x, x[8:])]
    assert [v.tensor().numel() for v in views if v is not None] == [4096, 4088]
    assert sent.store.said == [1, 0, "get 2"]


def test_a_store_that_does_not_block_is_asked_for_what_is_needed_first() -> None:
    sent = Sent({"a": 3})
    sent.store.get_blocks = False
    assert sent.ask(2) == ["get 2", 1, 0]


@pytest.mark.parametrize("n", [65, 70, 100])
def test_no_more_than_64_ahead(n: int) -> None:
    sent = Sent({"a": n})
    assert sent.ask(n - 1) == [*range(n - 2, max(n - 66, -1), -1), f"get {n - 1}"]
    assert sent.ask(n - 2) == ([n - 66] if n > 65 else []) + [f"get {n - 2}"]
