"""MuJoCo without a window: what the worlds of `control_suite.py` are imported and drawn with."""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from worldline.core.errors import WorldlineError

SYSTEM_PACKAGES = "apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri"
_OVERSAMPLING = 4
"""Pictures are drawn this much larger and averaged down, so that 64 pixels keep sub-pixel motion.

On a processor that costs less than MuJoCo's own smoothing (four samples a pixel), and smooths better.
"""
_MAX_GEOMS = 100


def import_suite(domain: str) -> ModuleType:
    """Return a domain of dm_control's suite; the environment is afterwards what it was before.

    Where MUJOCO_GL is not set EGL draws: left to themselves, the packages would look for a window system. One that is
    set holds.

    Raises:
        WorldlineError: the packages are not installed, or what they draw with is not.
    """
    # one thread draws: several processes collect at a time
    with _defaults(MUJOCO_GL="egl", LP_NUM_THREADS="1"):
        try:
            return import_module(f"dm_control.suite.{domain}")
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] not in ("dm_control", "mujoco"):
                raise
            raise WorldlineError("dm_control is not installed; run: pip install 'worldline[envs]'") from None
        except (AttributeError, ImportError, RuntimeError) as error:  # how PyOpenGL fails where a library is not
            raise _cannot_draw(error) from None


class Screen:
    """Draws a model's fixed camera 0, square, by any thread, without shadows and reflections.

    Those two cost many times the rest on a processor.

    Raises:
        WorldlineError: there is no way to draw here.
    """

    def __init__(self, model: Any, size: int) -> None:
        import mujoco

        self._mujoco: Any = mujoco
        self._model = model
        drawn = size * _OVERSAMPLING
        model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = model.vis.global_.offheight = drawn
        self._pixels = np.empty((drawn, drawn, 3), np.uint8)
        self._rectangle = mujoco.MjrRect(0, 0, drawn, drawn)
        self._scene, self._options = mujoco.MjvScene(model, _MAX_GEOMS), mujoco.MjvOption()
        self._camera = mujoco.MjvCamera()
        self._camera.type, self._camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, 0
        try:
            self._gl = self._mujoco.GLContext(drawn, drawn)
            with _current(self._gl):
                self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50.value)
                mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        except (AttributeError, ImportError, RuntimeError, mujoco.FatalError) as error:  # by what is missing
            raise _cannot_draw(error) from None
        # at the end of the process too, and then before EGL itself ends, which has asked for that already
        free = weakref.finalize(self, _free, self._gl, self._context)
        free.atexit = False
        atexit.register(free)

    def draw(self, data: Any) -> UInt8[np.ndarray, "h w 3"]:
        """Return the picture of a state of the model."""
        mujoco, flags = self._mujoco, self._mujoco.mjtRndFlag
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(self._model, data, self._options, None, self._camera, everything, self._scene)
        for flag in (flags.mjRND_SHADOW, flags.mjRND_REFLECTION, flags.mjRND_SKYBOX):  # each update sets them again
            self._scene.flags[flag] = 0
        with _current(self._gl):
            mujoco.mjr_render(self._rectangle, self._scene, self._context)
            mujoco.mjr_readPixels(self._pixels, None, self._rectangle, self._context)
        return np.array(Image.fromarray(self._pixels).reduce(_OVERSAMPLING))[::-1].copy()  # OpenGL begins at the bottom


@contextmanager
def _current(gl: Any) -> Iterator[None]:
    """Make an OpenGL context this thread's, and let go of it, so that the next thread can have it."""
    gl.make_current()
    try:
        yield
    finally:
        if type(gl).__module__ == "mujoco.egl":
            from mujoco.egl import egl_ext

            egl_ext.eglReleaseThread()


def _free(gl: Any, context: Any) -> None:
    gl.make_current()
    context.free()
    gl.free()


def _cannot_draw(error: Exception) -> WorldlineError:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    chosen = os.environ.get("MUJOCO_GL", "egl")
    if chosen != "egl":
        return WorldlineError(
            f"MuJoCo cannot draw with MUJOCO_GL={chosen} ({reason}); unset it, and EGL draws without a window"
        )
    return WorldlineError(f"MuJoCo cannot draw without a window ({reason}); run: {SYSTEM_PACKAGES}")


@contextmanager
def _defaults(**values: str) -> Iterator[None]:
    """Set environment variables that the user has not set; take them back, and what PyOpenGL is told meanwhile."""
    before = {name: os.environ.get(name) for name in (*values, "PYOPENGL_PLATFORM")}
    for name, value in values.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        for name in [name for name, value in before.items() if value is None]:
            os.environ.pop(name, None)
