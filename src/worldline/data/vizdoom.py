"""ViZDoom's scenario my_way_home at 35 Hz, in first person: rooms with walls of their own, corridors between them.

Source: Kempka et al., arXiv 1605.02097; simulated by the `vizdoom` package with the Freedoom pictures that it carries.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64
from PIL import Image

from worldline.core.errors import WorldlineError
from worldline.core.seeding import rng_for
from worldline.core.types import Factor, WorldSpec
from worldline.data.simulators import Observation, Policy

IMAGE_SIZE = 64
REQUIREMENT = "vizdoom==1.3.2"
INSTALL = f"pip install --no-deps {REQUIREMENT}"
"""Without what it asks for: `pygame-ce`, which only its own game window needs, overwrites the `pygame` of PushT."""
TURN_DEGREES = 5.0
"""What a full turn action turns by in a step."""
WALK_SPEED = 12.0
"""Map units that a full walk covers in a step, once it is up to speed; a room is 160 wide, a door 64."""
_WALK = 40.0
"""The same in ViZDoom's measure, in which players walk at 25 and run at 50."""
_RADIUS = 16.0
"""Of the player."""
_ENGINE = """#!/bin/sh
cd "{folder}" || exit 1
"{package}/vizdoom" "$@" &
engine=$!
(read -r _ < "{folder}/alive"; rm -rf "/dev/shm/ViZDoom"*"$(cat "{folder}/instance")" "{folder}"; kill -9 $engine) &
wait $engine
kill $!
"""
"""How the engine is started: where the folder that it keeps is not in the user's way, and so that it ends with us.

A pipe that nobody writes to is read to its end, which comes when this process is killed. Then its picture and state,
11 MB of shared memory, are removed too.
"""
_VEST, _NOTHING = b"type = 2018;", b"type = 9001;"


class MyWayHome:
    """The player turns and walks; it is put at random into one of 17 places, and nothing ever ends.

    Actions are ViZDoom's delta buttons, so that they are as fine as one likes and a turn leaves nothing behind: +1
    turns right, and -1 walks ahead as the up key does. The vest, which would end the episode, is not there, the
    view does not bob, and neither weapon nor status bar is shown: place and angle alone make the picture.
    """

    spec = WorldSpec(
        name="vizdoom",
        image_size=IMAGE_SIZE,
        step_seconds=1 / 35,
        action_names=("turn", "back"),
        action_low=(-1.0, -1.0),
        action_high=(1.0, 1.0),
        control="velocity",
        state_names=("x", "y", "angle_sin", "angle_cos", "vx", "vy"),
        factors=(Factor(name="position", columns=(0, 1)), Factor(name="angle", columns=(2, 3))),
    )

    def __init__(self, image_size: int | None = None) -> None:
        try:
            import vizdoom
        except ModuleNotFoundError:
            raise WorldlineError(f"the ViZDoom simulator is not installed; run: {INSTALL}") from None
        self._size = image_size or IMAGE_SIZE
        self.spec = replace(self.spec, image_size=self._size)
        self._seed = 0
        self._done: list[Float32[np.ndarray, " 2"]] = []
        package = Path(vizdoom.__file__).parent
        scenario = (package / "scenarios/my_way_home.wad").read_bytes()
        assert scenario.count(_VEST) == 1, "another version of the scenario"
        self._walls = _walls(scenario)
        folder = Path(tempfile.mkdtemp(prefix="worldline-vizdoom-"))
        (folder / "scenario.wad").write_bytes(scenario.replace(_VEST, _NOTHING))
        (folder / "engine").write_text(_ENGINE.format(folder=folder, package=package))
        (folder / "engine").chmod(0o755)
        (folder / "instance").write_text("not known yet")
        os.mkfifo(folder / "alive")
        alive = os.open(folder / "alive", os.O_RDWR)
        self._game: Any = vizdoom.DoomGame()
        weakref.finalize(self, _end, self._game, alive, folder)
        self._configure(vizdoom, package, folder)
        try:
            self._game.init()
            (folder / "instance").write_text(self._game.get_instance_id())
        except (vizdoom.ViZDoomErrorException, vizdoom.ViZDoomUnexpectedExitException) as error:
            raise WorldlineError(
                f"ViZDoom does not start ({error}); install it again: {INSTALL} --force-reinstall"
            ) from None

    def reset(self, seed: int) -> Observation:
        return self.load((seed, np.zeros((0, 2), np.float32)))

    def step(self, action: Float32[np.ndarray, " a"]) -> Observation:
        self._advance(action, draw=True)
        return self._observe()

    def policy(self, seed: int) -> Policy:
        return _Walker(rng_for(seed, "vizdoom-policy"), self._walls)

    # The engine's own save games are not used: saving disturbs the run, and what follows a load depends on what was
    # played before it. A seed and its actions repeat exactly.
    def save(self) -> tuple[int, Float32[np.ndarray, "t 2"]]:
        return self._seed, np.array(self._done, np.float32).reshape(-1, 2)

    def load(self, moment: tuple[int, Float32[np.ndarray, "t 2"]]) -> Observation:
        self._seed, actions = moment
        self._done = []
        self._game.set_seed(self._seed % 2**31)
        self._game.new_episode()
        for number, action in enumerate(actions, start=1):
            self._advance(action, draw=number == len(actions))
        return self._observe()

    def _advance(self, action: Float32[np.ndarray, " a"], draw: bool) -> None:
        self._done.append(np.array(action, np.float32))
        turn, back = np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0).tolist()
        self._game.set_action([TURN_DEGREES * turn, -_WALK * back])
        self._game.advance_action(1, draw)

    def _observe(self) -> Observation:
        seen = self._game.get_state()
        x, y, angle, vx, vy = seen.game_variables
        state = [x, y, np.sin(np.radians(angle)), np.cos(np.radians(angle)), vx, vy]
        screen = Image.fromarray(seen.screen_buffer)
        frame = np.array(screen.resize((self._size, self._size), Image.Resampling.BOX))
        return Observation(frame, np.array(state, dtype=np.float32))

    def _configure(self, vizdoom: Any, package: Path, folder: Path) -> None:
        game, variables = self._game, vizdoom.GameVariable
        game.set_vizdoom_path(str(folder / "engine"))
        game.set_doom_config_path(str(folder / "vizdoom.ini"))
        game.set_doom_game_path(str(package / "freedoom2.wad"))
        game.set_doom_scenario_path(str(folder / "scenario.wad"))
        game.set_doom_map("map01")
        game.set_doom_skill(5)
        game.set_episode_start_time(10)
        game.set_episode_timeout(0)
        game.add_game_args("+movebob 0")
        game.set_mode(vizdoom.Mode.PLAYER)
        game.set_available_buttons([vizdoom.Button.TURN_LEFT_RIGHT_DELTA, vizdoom.Button.MOVE_FORWARD_BACKWARD_DELTA])
        game.set_available_game_variables(
            [
                *(variables.POSITION_X, variables.POSITION_Y, variables.ANGLE),
                *(variables.VELOCITY_X, variables.VELOCITY_Y),
            ]
        )
        game.set_window_visible(False)
        # walls have pixels of their own: drawn larger and averaged down they flicker less
        large = self._size > 120
        game.set_screen_resolution(getattr(vizdoom.ScreenResolution, "RES_640X480" if large else "RES_320X240"))
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        for hide in (game.set_render_hud, game.set_render_weapon, game.set_render_crosshair):
            hide(False)


def _end(game: Any, alive: int, folder: Path) -> None:
    game.close()
    os.close(alive)
    shutil.rmtree(folder, ignore_errors=True)


def _walls(scenario: bytes) -> Float64[np.ndarray, "n 2 2"]:
    """Return the ends of every line of the map that nobody walks through, from its text in the scenario's file."""
    text = scenario.decode("latin-1")
    blocks = re.findall(r"(vertex|linedef)[^{}]*\{([^{}]*)\}", text)
    fields = [(kind, dict(re.findall(r"(\w+) = ([^;]+);", body))) for kind, body in blocks]
    corners = [(float(found["x"]), float(found["y"])) for kind, found in fields if kind == "vertex"]
    lines = [found for kind, found in fields if kind == "linedef" and found.get("blocking") == "true"]
    return np.array([[corners[int(line["v1"])], corners[int(line["v2"])]] for line in lines])


class _Walker:
    """Walks where it is free for long, which leads through doors, at many speeds; looks around; steps back at times.

    A walk ends somewhere on the way, or after it has been stuck for a while, so that walls are met at every angle.
    """

    def __init__(self, rng: np.random.Generator, walls: Float64[np.ndarray, "n 2 2"]) -> None:
        self._rng, self._walls = rng, walls
        self._heading, self._speed, self._brisk = 0.0, 0.0, 1.0
        self._left = self._stuck = 0
        self._noise = np.zeros(2)

    def __call__(self, observation: Observation) -> Float32[np.ndarray, " a"]:
        x, y, sin, cos, vx, vy = (float(value) for value in observation.state)
        angle = float(np.arctan2(sin, cos))
        self._stuck = self._stuck + 1 if self._speed and np.hypot(vx, vy) < 0.5 else 0
        self._left -= 1
        if self._left <= 0 or self._stuck > 8:
            self._next_walk(np.array([x, y]), angle)
        error = (self._heading - angle + np.pi) % (2 * np.pi) - np.pi
        turn = -np.clip(error / np.radians(TURN_DEGREES), -self._brisk, self._brisk)
        ahead = self._speed * max(0.0, np.cos(error)) if self._speed > 0 else self._speed
        self._noise = 0.9 * self._noise + self._rng.normal(0.0, 0.04, 2)
        return np.clip(np.array([turn, -ahead]) + self._noise, -1.0, 1.0).astype(np.float32)

    def _next_walk(self, place: Float64[np.ndarray, " 2"], angle: float) -> None:
        rng = self._rng
        self._stuck = 0
        self._brisk = float(rng.uniform(0.5, 1.0))
        kind = rng.random()
        if kind < 0.1:  # a look around
            turn = float(rng.uniform(0.5, np.pi)) * float(rng.choice([-1.0, 1.0]))
            self._heading, self._speed = angle + turn, 0.0
            self._left = 1 + int(abs(turn) / np.radians(TURN_DEGREES) / self._brisk)
        elif kind < 0.17:  # some steps back
            self._heading, self._speed, self._left = angle, -float(rng.uniform(0.4, 1.0)), int(rng.integers(5, 20))
        else:
            headings = rng.uniform(0.0, 2 * np.pi, 24)
            free = np.array([self._free(place, heading) for heading in headings])
            chosen = rng.choice(len(headings), p=free**2 / (free**2).sum())
            self._heading, self._speed = float(headings[chosen]), float(rng.uniform(0.4, 1.3))
            steps = rng.uniform(0.4, 1.1) * free[chosen] / (WALK_SPEED * min(self._speed, 1.0))
            self._left = int(np.clip(steps, 8, 90))

    def _free(self, place: Float64[np.ndarray, " 2"], heading: float) -> float:
        """Return how far one who is as broad as the player gets before the first wall."""
        ray = np.array([np.cos(heading), np.sin(heading)])
        ends = self._walls - place
        along = np.concatenate([ends @ ray] * 2)
        across = ends @ np.array([-ray[1], ray[0]])
        across = np.concatenate([across - _RADIUS, across + _RADIUS])
        crosses = (across[:, 0] < 0) != (across[:, 1] < 0)
        share = across[crosses, 0] / (across[crosses, 0] - across[crosses, 1])
        distance = along[crosses, 0] + share * (along[crosses, 1] - along[crosses, 0])
        return float(distance[distance > 0].min(initial=1000.0))
