"""Several sessions on one model: their steps are one product, and nobody's bits depend on who else is there.

A step reads megabytes of weights for a few kilobytes of state, so that eight of them together cost little more than
one. Drawing and looking again have no such gain and stay with each session, in its own thread, one session after the
other: their calls are so short that threads which make them side by side spend their time handing over Python's lock.

The batch always has all its rows: those of slots that take no part hold what they held. A row's sums know nothing of
other rows, so a slot's bits are those it would have alone in the same company; they are not those of another size of
company, or of a session by itself, which is why the slot is part of the fingerprint.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from worldline.core.errors import WorldlineError
from worldline.engine.arena import Tape
from worldline.engine.workloads.static_world import note_step, refuse_unsupported
from worldline.model.world import World

_RECENT_S = 0.25
"""A slot that asked for a step no longer ago than this is waited for."""


class Company:
    """The step of one world, for `slots` sessions that each play in a thread of their own.

    A session calls `gather`, `step` and `take_turn`, draws, and calls `end_turn`. The first to gather waits for the
    others, those that have been stepping lately, for at most `gather_ms`; then it computes for all that have come.

    Args:
        timeout_s: how long a slot waits for the one that computes.
    """

    def __init__(self, world: World, slots: int, gather_ms: float = 2.0, timeout_s: float = 10.0) -> None:
        if slots < 2:
            raise WorldlineError(f"a company has at least 2 slots, got {slots}")
        refuse_unsupported(world)
        self.world, self.slots = world, slots
        self._gather_s, self._timeout_s = gather_ms / 1e3, timeout_s
        d, e = world.config.latent_dim, world.config.hidden
        self._action = torch.zeros(slots, world.spec.action_dim)
        with torch.no_grad():
            tape = Tape(stage="step")
            va = tape.slot("latents and actions", slots, d + world.spec.action_dim, keep=True)
            hx = tape.slot("memories and inputs", slots, 2 * e, keep=True)
            note_step(tape, world, self._action, va, hx)
            program = tape.build()
        self._run = program.runner("step")
        self._z: Tensor = program.tensor(va.view(lambda t: t[:, :d]))
        self._h: Tensor = program.tensor(hx.view(lambda t: t[:, :e]))
        self._seats: list[tuple[Tensor, Tensor, Tensor] | None] = [None] * slots
        self._changed = threading.Condition()
        self._waiting: set[int] = set()
        self._taken: tuple[int, ...] = ()
        self._leads = [False] * slots
        self._ticket = [0] * slots  # the tick that a slot takes part in
        self._seen = [-_RECENT_S] * slots
        self._tick, self._running, self._failed = 0, False, -1
        self._done = -1
        self._turn = threading.Lock()

    def sit(self, slot: int, action: Float[Tensor, "1 a"], z: Float[Tensor, "1 d"], h: Float[Tensor, "1 e"]) -> None:
        """Give a slot the tensors that its steps read (all three) and write (z and h)."""
        if self._seats[slot] is not None:
            raise WorldlineError(f"slot {slot} of this company is taken")
        self._seats[slot] = action, z, h

    def gather(self, slot: int) -> None:
        """Wait until the company's next step begins with this slot in it.

        Raises:
            WorldlineError: the step before has not ended in time.
        """
        with self._changed:
            now = time.monotonic()
            self._seen[slot], self._ticket[slot] = now, self._tick
            self._leads[slot] = not self._waiting
            self._waiting.add(slot)
            self._changed.notify_all()
            if not self._leads[slot]:
                self._until(lambda: self._tick > self._ticket[slot])
                return
            expected = sum(now - seen < _RECENT_S for seen in self._seen)
            self._changed.wait_for(lambda: len(self._waiting) >= expected, self._gather_s)
            self._until(lambda: not self._running)
            self._taken, self._waiting = tuple(sorted(self._waiting)), set()
            self._running = True
            self._tick += 1
            self._changed.notify_all()

    def step(self, slot: int) -> None:
        """Turn the slot's z and h into the next ones; after `gather`.

        Raises:
            WorldlineError: the slot that computes did not come back, or failed.
        """
        tick = self._ticket[slot]
        if not self._leads[slot]:
            with self._changed:
                self._until(lambda: self._done >= tick)
                if self._failed == tick:
                    raise WorldlineError("another session's thread failed in the step that this one shared; reset it")
            return
        failed = tick
        try:
            self._compute()
            failed = self._failed
        finally:
            with self._changed:
                self._running, self._done, self._failed = False, tick, failed
                self._changed.notify_all()

    def take_turn(self) -> None:
        """Wait until no other session draws.

        Raises:
            WorldlineError: the one that draws did not end.
        """
        if not self._turn.acquire(timeout=self._timeout_s):
            raise WorldlineError(f"another session has been drawing for {self._timeout_s:g} s: is its thread stopped?")

    def end_turn(self) -> None:
        """Let the next session draw; after `take_turn`."""
        self._turn.release()

    def step_all(self) -> None:
        """Step every slot that is taken, for one thread that plays them all."""
        self._taken = tuple(range(self.slots))
        self._compute()

    def _compute(self) -> None:
        seats = [(row, *seat) for row in self._taken if (seat := self._seats[row]) is not None]
        for row, action, z, h in seats:
            self._action[row].copy_(action[0])
            self._z[row].copy_(z[0])
            self._h[row].copy_(h[0])
        self._run()
        for row, _, z, h in seats:
            z[0].copy_(self._z[row])
            h[0].copy_(self._h[row])

    def _until(self, there: Callable[[], bool]) -> None:
        if not self._changed.wait_for(there, self._timeout_s):
            raise WorldlineError(f"the company's step did not come in {self._timeout_s:g} s: is a thread of it gone?")
