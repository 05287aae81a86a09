"""Pictures made small, in a thread of its own, while the next frame is computed."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable

from worldline.core.errors import WorldlineError
from worldline.serve import protocol


class Encoder:
    """Packs frames in the order in which they are handed over, and publishes them.

    Args:
        publish: receives every packed frame, in the encoder's thread; it must not block.
    """

    def __init__(self, codec: protocol.Codec, publish: Callable[[bytearray], None]) -> None:
        self._codec, self._publish = codec, publish
        self._waiting: queue.Queue[protocol.FrameMessage | None] = queue.Queue(maxsize=1)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name="encoder", daemon=True)
        self._thread.start()

    def hand(self, frame: protocol.FrameMessage) -> None:
        """Take a copy of the pictures; wait only while an earlier frame still waits for its turn.

        Raises:
            WorldlineError: an earlier frame could not be encoded.
        """
        truth = None if frame.truth is None else frame.truth.copy()
        self._waiting.put(dataclasses.replace(frame, picture=frame.picture.copy(), truth=truth))
        if self._failure is not None:
            raise WorldlineError(f"a picture could not be encoded as {self._codec}: {self._failure!r}")

    def stop(self) -> None:
        """Publish what waits, and end."""
        self._waiting.put(None)
        self._thread.join(timeout=10)

    def _main(self) -> None:
        while (frame := self._waiting.get()) is not None:
            if self._failure is not None:
                continue  # `hand` tells of it; nobody waits for a thread that is gone
            try:
                self._publish(protocol.pack(frame, self._codec))
            except Exception as error:
                self._failure = error
