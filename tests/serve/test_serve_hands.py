from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from worldline.core.types import WorldSpec
from worldline.serve.hands import KEY_SPEED, POINTER_SPEED, Hands
from worldline.serve.protocol import Blur, Key, Pointer

TARGET = WorldSpec(
    name="table",
    image_size=64,
    step_seconds=0.1,
    action_names=("x", "y"),
    action_low=(0.0, 0.0),
    action_high=(100.0, 200.0),
    control="target",
)
VELOCITY = dataclasses.replace(TARGET, action_low=(-1.0, -2.0), action_high=(1.0, 2.0), control="velocity")
START = np.array([50.0, 100.0], dtype=np.float32)


def key(code: str, down: bool, time_ms: float = 1.0) -> Key:
    return Key(code=code, down=down, time_ms=time_ms)


def pointer(x: float, y: float, down: bool = True) -> Pointer:
    return Pointer(x=x, y=y, down=down, time_ms=1.0)


def hands(spec: WorldSpec) -> Hands:
    made = Hands(spec)
    made.begin(START if spec is TARGET else None)
    return made


def test_a_held_key_moves_the_target_at_a_constant_speed_until_it_is_let_go() -> None:
    made = hands(TARGET)
    made.apply(key("ArrowRight", True))
    step = 100 * KEY_SPEED * 0.1
    assert [made.action()[0] for _ in range(3)] == pytest.approx([50 + step, 50 + 2 * step, 50 + 3 * step])
    made.apply(key("ArrowRight", False))
    assert made.action()[0] == made.action()[0] == pytest.approx(50 + 3 * step)


@pytest.mark.parametrize("spec", [TARGET, VELOCITY])
def test_a_tap_within_one_frame_acts_in_exactly_one(spec: WorldSpec) -> None:
    made, still = hands(spec), hands(spec).action()
    made.apply(key("KeyS", True))
    made.apply(key("KeyS", False))
    first, second, third = made.action(), made.action(), made.action()
    assert first[1] > still[1]
    assert first[0] == still[0]
    np.testing.assert_array_equal(second, first if spec is TARGET else still)
    np.testing.assert_array_equal(third, second)


def test_a_target_stays_in_range_and_a_diagonal_is_no_faster() -> None:
    made = hands(TARGET)
    made.apply(key("ArrowLeft", True))
    made.apply(key("ArrowUp", True))
    moved = (made.action() - START) / np.array([100, 200])
    assert np.linalg.norm(moved) == pytest.approx(KEY_SPEED * 0.1)
    for _ in range(50):
        last = made.action()
    np.testing.assert_array_equal(last, [0, 0])
    assert made.place() == (0.0, 0.0)


def test_a_target_follows_the_pointer_no_faster_than_training_did_and_arrives_after_a_click() -> None:
    made = hands(TARGET)
    made.apply(pointer(1.0, 0.5))
    made.apply(pointer(1.0, 0.5, down=False))
    assert made.action()[0] == pytest.approx(50 + 100 * POINTER_SPEED * 0.1)
    for _ in range(30):
        last = made.action()
    np.testing.assert_array_equal(last, [100, 100])
    made.apply(pointer(0.0, 0.0, down=False))  # hovering is not leading
    np.testing.assert_array_equal(made.action(), last)


def test_a_key_takes_over_from_the_pointer() -> None:
    made = hands(TARGET)
    made.apply(pointer(1.0, 0.5))
    made.action()
    made.apply(pointer(1.0, 0.5, down=False))
    made.apply(key("ArrowLeft", True))
    assert made.action()[0] < 50 + 100 * POINTER_SPEED * 0.1
    made.apply(key("ArrowLeft", False))
    assert made.action()[0] == made.action()[0]


def test_keys_push_in_a_velocity_world_and_rest_pushes_nothing() -> None:
    made = hands(VELOCITY)
    np.testing.assert_array_equal(made.action(), [0, 0])
    made.apply(key("KeyD", True))
    np.testing.assert_array_equal(made.action(), [1, 0])
    made.apply(key("ArrowUp", True))
    np.testing.assert_allclose(made.action(), [np.sqrt(0.5), -2 * np.sqrt(0.5)], rtol=1e-6)
    made.apply(key("KeyA", True))  # left and right cancel
    np.testing.assert_allclose(made.action(), [0, -2])
    made.apply(Blur())
    np.testing.assert_array_equal(made.action(), [0, 0])


def test_the_pointer_is_a_stick_around_where_it_was_pressed() -> None:
    made = hands(VELOCITY)
    made.apply(pointer(0.2, 0.2))
    np.testing.assert_array_equal(made.action(), [0, 0])
    made.apply(pointer(0.2, 0.9))
    np.testing.assert_allclose(made.action(), [0, 2], atol=1e-6)
    assert made.place() == pytest.approx((0.5, 1.0))
    made.apply(pointer(0.2, 0.9, down=False))
    np.testing.assert_allclose(made.action(), [0, 2], atol=1e-6)  # let go within this frame
    np.testing.assert_array_equal(made.action(), [0, 0])


def test_edges_carry_their_time_and_moves_do_not() -> None:
    made = hands(TARGET)
    made.apply(key("KeyA", True, 10.0))
    made.apply(key("KeyA", False, 11.0))
    assert made.edge_ms == 11.0
    made.apply(Pointer(x=0.5, y=0.5, down=True, time_ms=12.0))
    made.apply(Pointer(x=0.6, y=0.5, down=True, time_ms=13.0))
    assert made.edge_ms == 12.0
