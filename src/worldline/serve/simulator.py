"""The process that the true world lives in: `python -m worldline.serve.simulator NAME DESCRIPTOR`.

It loads the simulator and nothing of the model, so that it is ready soon.
"""

from __future__ import annotations

import sys
from multiprocessing.connection import Connection

from worldline.data.simulators import make_simulator


def work(name: str, descriptor: int) -> None:
    """Answer requests on the pipe `descriptor` until its other end closes.

    A request is `(seed, actions)`: reset to that seed unless it is None, then take the actions, at least one of the
    two. The answer is the picture that is then seen, or the error that came instead.
    """
    with Connection(descriptor) as pipe:
        simulator = None
        try:
            while True:
                seed, actions = pipe.recv()
                answer: object
                try:
                    simulator = simulator or make_simulator(name)
                    if seed is not None:
                        observation = simulator.reset(seed)
                    for action in actions:
                        observation = simulator.step(action)
                    answer = observation.frame
                except Exception as error:  # the asking process raises it
                    answer = error
                pipe.send(answer)
        except (EOFError, ConnectionError):
            return  # the session has closed the pipe, or is gone


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]))
