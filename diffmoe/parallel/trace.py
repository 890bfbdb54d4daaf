"""Where a rank is: noted by its main thread, told by the watchdog's thread.  Knows nothing of
torch's collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from diffmoe.parallel.step_clock import StepClock


@dataclass
class Trace:
    """A few words and a count that grows with each of them; writing one costs less than a
    microsecond.

    ``waiting`` says that the main thread is inside ``collective``; on a GPU a collective returns at
    once and the thread waits later, so there it only says what was issued last.  ``warm``: the
    first optimizer step is done.
    """

    step: int = 0
    phase: str = "start"
    layer: str = ""
    collective: str = ""
    waiting: bool = False
    warm: bool = False
    count: int = 0

    def __post_init__(self) -> None:
        self.clock = StepClock()  # no field: what is told are words and numbers

    def enter(self, phase: str, step: int | None = None) -> None:
        """The main thread begins ``phase`` (of optimizer step ``step``)."""
        self.phase, self.layer = phase, ""
        self.step = self.step if step is None else step
        self.count += 1

    def at(self, layer: str) -> None:
        """The main thread enters ``layer`` in the direction of the phase."""
        self.layer = layer
        self.count += 1

    @contextmanager
    def inside(self, collective: str, ranks: tuple[int, ...]) -> Iterator[None]:
        """Around a collective over ``ranks``.  An error leaves it noted as the one that the thread
        is inside of.
        """
        self.collective, self.waiting = f"{collective} of ranks {shortened(ranks)}", True
        self.count += 1
        began = self.clock.begin()
        yield
        self.clock.end("exchange", began)
        self.waiting = False
        self.count += 1


def watch_layer(block: nn.Module, enter: Callable[[], None]) -> None:
    """Calls ``enter`` when the main thread enters a block, forward and backward."""

    def noting(x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(lambda _gradient: enter())
        return x

    def leaving(_module: nn.Module, _inputs: Any, output: Any) -> tuple[Any, Any] | None:
        if isinstance(output[0], Tensor):
            noting(output[0])
            return None
        first, second = output[0]  # halves, of which the second one is last in forward
        return (first, lambda: noting(second())), output[1]

    block.register_forward_pre_hook(lambda _module, _inputs: enter())
    block.register_forward_hook(leaving)


def shortened(ranks: tuple[int, ...]) -> str:
    """``0, 1, 2, 3``; of more than eight the first, the second and the last."""
    if len(ranks) > 8:
        return f"{ranks[0]}, {ranks[1]}, … {ranks[-1]}"
    return ", ".join(map(str, ranks))
