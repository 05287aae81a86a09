"""From where to where a planner is asked to go: moments of held-out episodes, and the picture some steps later."""

from __future__ import annotations

from dataclasses import dataclass

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


def choose_starts(dataset: Dataset, *, offset: int, context: int, count: int, seed: int) -> Starts:
    """Draw `count` starts evenly over the test episodes; those whose goal is reached already are replaced.

    Raises:
        WorldlineError: the test episodes do not hold that many.
    """
    room = {e: dataset.lengths[e] - offset - context + 1 for e in dataset.split("test")}
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


def simulator_at(dataset: Dataset, episode: int, start: int) -> Simulator:
    """Return the dataset's simulator, led to a frame of an episode by its seed and its recorded actions.

    Raises:
        WorldlineError: the dataset was not collected here, or this simulator does not repeat it.
    """
    collect = read_json(dataset.path / SIDECAR).get("collect") if (dataset.path / SIDECAR).exists() else None
    if not collect:
        raise WorldlineError(
            f"{dataset.path}: planning acts in the simulator that made the data, and this dataset does not say how it "
            "was made; use one of `worldline collect`"
        )
    simulator = make_simulator(collect["env"], dataset.spec.image_size)
    observation = simulator.reset(seed_for(seed_for(collect["env"], collect["seed"], "episode", episode), "reset"))
    for action in dataset.actions(episode)[:start]:
        observation = simulator.step(action)
    recorded: Float32[np.ndarray, " s"] = states_of(dataset, episode)[start]
    if not np.allclose(observation.state, recorded, rtol=1e-5, atol=1e-4):
        raise WorldlineError(
            f"{dataset.path}: the simulator does not repeat episode {episode}: at frame {start} it is at "
            f"{observation.state.tolist()}, recorded was {recorded.tolist()}; collect the data again with this version"
        )
    return simulator
