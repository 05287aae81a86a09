"""From where to where a planner is asked to go: moments of held-out episodes, and the picture some steps later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from worldline.core.errors import WorldlineError
from worldline.core.files import read_json
from worldline.core.seeding import rng_for, seed_for
from worldline.data.goals import reached
from worldline.data.lerobot import SIDECAR, Dataset
from worldline.data.simulators import Simulator, make_simulator
from worldline.evaluate.windows import states_of


@dataclass(frozen=True, kw_only=True)
class Starts:
    """Problems of one offset."""

    index: Int64[np.ndarray, "n 2"]
    """Episode, and the frame to start from."""
    offset: int
    """The goal is this many frames after the start, in the same episode."""
    num_solved: int
    """Drawn starts that were removed because the goal was reached before anything was done."""

    @property
    def episodes(self) -> Int64[np.ndarray, " n"]:
        return self.index[:, 0]


def choose_starts(
    dataset: Dataset, *, offset: int, context: int, count: int, seed: int, latest: int | None = None
) -> Starts:
    """Draw `count` starts evenly over the test episodes, none after the frame `latest`; those whose goal is reached
    already are replaced.

    Raises:
        WorldlineError: the test episodes do not hold that many.
    """
    room = {e: dataset.lengths[e] - offset - context + 1 for e in dataset.split("test")}
    if latest is not None:
        room = {e: min(frames, latest - context + 2) for e, frames in room.items()}
    room = {e: frames for e, frames in room.items() if frames > 0}
    rng = rng_for(seed, "planning-starts", offset)
    waiting = {e: (rng.permutation(frames) + context - 1).tolist() for e, frames in room.items()}
    index: list[tuple[int, int]] = []
    num_solved = 0
    while len(index) < count and waiting:
        for episode in [int(e) for e in rng.permutation(list(waiting))]:
            if len(index) == count:
                break
            start = waiting[episode].pop()
            if not waiting[episode]:
                del waiting[episode]
            state = states_of(dataset, episode)
            if reached(dataset.spec, state[start], state[start + offset]):
                num_solved += 1
            else:
                index.append((episode, start))
    if len(index) < count:
        raise WorldlineError(
            f"{dataset.path}: planning wants {count} starts with a goal {offset} frames on, its {len(room)} test "
            f"episodes that are long enough hold {len(index)} that are not solved already; ask for fewer, or collect "
            "more episodes"
        )
    return Starts(index=np.array(sorted(index)), offset=offset, num_solved=num_solved)


class Stage:
    """Simulators put at starts, as often as one likes. Making them and leading them there takes longer than acting."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._simulators: list[Simulator] = []
        self._moments: dict[tuple[int, int], Any] = {}

    def at(self, starts: Starts) -> list[Simulator]:
        """Return simulators at these starts: always the same ones, so that the last starts' are gone.

        Raises:
            WorldlineError: as `lead`.
        """
        while len(self._simulators) < len(starts.index):
            self._simulators.append(_simulator_of(self._dataset))
        chosen = self._simulators[: len(starts.index)]
        for simulator, (episode, start) in zip(chosen, starts.index.tolist(), strict=True):
            if (episode, start) in self._moments:
                simulator.load(self._moments[episode, start])
            else:
                lead(simulator, self._dataset, episode, start)
                self._moments[episode, start] = simulator.save()
        return chosen


def lead(simulator: Simulator, dataset: Dataset, episode: int, start: int) -> None:
    """Lead the dataset's simulator to a frame of an episode by its seed and its recorded actions.

    Raises:
        WorldlineError: the simulator does not repeat the episode.
    """
    collect = _collected(dataset)
    observation = simulator.reset(seed_for(seed_for(collect["env"], collect["seed"], "episode", episode), "reset"))
    for action in dataset.actions(episode)[:start]:
        observation = simulator.step(action)
    recorded: Float32[np.ndarray, " s"] = states_of(dataset, episode)[start]
    if not np.allclose(observation.state, recorded, rtol=1e-5, atol=1e-4):
        raise WorldlineError(
            f"{dataset.path}: the simulator does not repeat episode {episode}: at frame {start} it is at "
            f"{observation.state.tolist()}, recorded was {recorded.tolist()}; collect the data again with this version"
        )


def _simulator_of(dataset: Dataset) -> Simulator:
    return make_simulator(_collected(dataset)["env"], dataset.spec.image_size)


def _collected(dataset: Dataset) -> dict[str, Any]:
    """
    Raises:
        WorldlineError: the dataset was not collected here.
    """
    collect: dict[str, Any] | None = None
    if (dataset.path / SIDECAR).exists():
        collect = read_json(dataset.path / SIDECAR).get("collect")
    if not collect:
        raise WorldlineError(
            f"{dataset.path}: planning acts in the simulator that made the data, and this dataset does not say how it "
            "was made; use one of `worldline collect`"
        )
    return collect
