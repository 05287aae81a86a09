"""What each optimisation of the frame engine and the planner buys, each beside what was expected of it.

Every trial does the same work twice, as one would write it down and as we do it, on the shipped world's own shapes.
What could explain a difference is counted, not guessed: calls of torch, operations in products, bytes of new tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from worldline.bench.harness import compare
from worldline.bench.micro import Prediction
from worldline.core.errors import WorldlineError
from worldline.core.files import read_json, write_bytes
from worldline.core.result import write_result
from worldline.engine.workloads.company import Company
from worldline.engine.workloads.static_world import StaticWorld, by_phase, unsupported, windows
from worldline.model.checkpoint import load_world
from worldline.model.conv import ConvEncoder
from worldline.model.world import State, World

_CANDIDATES = 300
"""Of a plan, as `worldline bench plan` has them."""
_SESSIONS = 8
Pair = tuple[Callable[[], Tensor], Callable[[], Tensor]]
"""The same result twice: plainly, and our way."""


@dataclass(frozen=True, kw_only=True)
class OptimiseConfig:
    """On which world, and for how long."""

    checkpoint: str
    """A checkpoint, a run, or a shipped world's name; with convolutions and a GRU."""
    seconds: float = 2.0
    """Time for each pair, in turns."""
    reports: str = "reports"
    """Where `DATE-optimise/` is written."""
    publish: str | None = None
    """Where the page goes besides, such as docs/phases."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A change, and the time after it over the time before that its author expected before any run of the trial."""

    name: str
    change: str
    expected: Prediction
    make: Callable[[World], Pair]
    tolerance: float = 1e-4
    """Largest difference between the two results."""


def run(config: OptimiseConfig) -> Path:
    """Time all trials; write `result.json` and `report.md`, and return the report's path.

    Raises:
        WorldlineError: no such checkpoint, or a world of other parts.
    """
    if config.seconds <= 0:
        raise WorldlineError(f"bench optimise needs seconds > 0, got {config.seconds}")
    world = load_world(config.checkpoint).eval().requires_grad_(False)
    if reason := unsupported(world):
        raise WorldlineError(f"bench optimise looks at worlds of convolutions and a GRU, {reason}")
    torch.set_num_threads(1)
    rows, timing = [], {}
    with torch.inference_mode():
        for trial in TRIALS:
            before, after = trial.make(world)
            apart = float((before() - after()).abs().max())
            if not apart <= trial.tolerance:
                raise WorldlineError(f"{trial.name}: the two ways differ by {apart:.3g}, so they are not the same work")
            rows.append(
                {
                    "name": trial.name,
                    "change": trial.change,
                    "expected": asdict(trial.expected),
                    "differ_by": apart,
                    "counts": [count(before), count(after)],
                }
            )
            found = compare((f"{trial.name}: plain", before), (f"{trial.name}: ours", after), budget_s=config.seconds)
            timing[trial.name] = found.to_json()
    folder = Path(config.reports) / f"{date.today():%Y-%m-%d}-optimise"
    write_result(folder / "result.json", "bench-optimise", {"checkpoint": config.checkpoint, "trials": rows}, timing)
    page = render(read_json(folder / "result.json")).encode()
    write_bytes(folder / "report.md", page)
    if config.publish:
        write_bytes(Path(config.publish) / "phase4_optimisation.md", page)
    return folder / "report.md"


def count(call: Callable[[], Tensor]) -> dict[str, int]:
    """Return what a call of torch's operators is made of: calls, operations in products, bytes of new tensors."""
    with FlopCounterMode(display=False) as flops:
        call()
    with _Calls() as seen:
        call()
    return {"calls": seen.calls, "operations": int(flops.get_total_flops()), "new_bytes": seen.new_bytes}


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = self.new_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in (*args, *(kwargs or {}).values()) if isinstance(t, Tensor)}
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given:
                self.new_bytes += made.nbytes
        self.calls += 1
        return result


# The trials. An expectation is the time after the change over the time before it.


def _fold_norms(world: World) -> Pair:
    assert isinstance(world.encoder, ConvEncoder)
    parts = [world.encoder.stem, *world.encoder.blocks.children(), world.encoder.head]
    before = nn.Sequential(*parts)
    layers = [layer for part in parts for layer in copy.deepcopy(part).children()]
    fused: list[nn.Module] = []
    for conv, norm, active in zip(layers[::3], layers[1::3], layers[2::3], strict=True):
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        fused += [nn.utils.fusion.fuse_conv_bn_eval(conv, norm), active]
    after, size = nn.Sequential(*fused), world.config.image_size
    x = torch.randn(1, 3, size, size).contiguous(memory_format=torch.channels_last)
    return lambda: before(x), lambda: after(x)


def _channels_last(world: World) -> Pair:
    before, size = world.encoder, world.config.image_size
    x = torch.randn(1, 3, size, size)
    last = x.contiguous(memory_format=torch.channels_last)
    return lambda: before(x), lambda: before(last)


def _doubling(world: World) -> Pair:
    conv = world.decoder.convs[1]
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    size, c, o, bias = 2 * world.decoder.grid, conv.in_channels, conv.out_channels, conv.bias
    x = torch.rand(1, c, size, size).contiguous(memory_format=torch.channels_last)
    padded = F.pad(x[0].permute(1, 2, 0), (0, 0, 1, 1, 1, 1)).contiguous()
    patches, sums = torch.empty(size * size, 4 * c), torch.empty(size * size, o)
    out = torch.empty(2 * size, 2 * size, o)
    places = patches.view(size, size, 2, 2, c)
    phases = [
        (windows(padded[i:, j:], size, 2, 1), by_phase(conv.weight, i, j), out[i::2, j::2])
        for i, j in product((0, 1), (0, 1))
    ]

    def ours() -> Tensor:
        for seen, weight, place in phases:
            places.copy_(seen)
            torch.addmm(bias, patches, weight, out=sums)
            place.copy_(sums.view(size, size, o))
        return out

    return lambda: conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))[0].permute(1, 2, 0), ours


def _wide_columns(world: World) -> Pair:
    pixels = (world.config.image_size // 2) ** 2
    patches, weight = torch.rand(pixels, 9 * world.decoder.to_pixels.in_channels), world.decoder.to_pixels.weight
    narrow = weight.permute(2, 3, 1, 0).reshape(-1, 12).contiguous()
    wide = F.pad(narrow, (0, 4))
    twelve, sixteen = torch.empty(pixels, 12), torch.empty(pixels, 16)
    return lambda: torch.mm(patches, narrow, out=twelve), lambda: torch.mm(patches, wide, out=sixteen)[:, :12]


def _depthwise(world: World) -> Pair:
    assert isinstance(world.encoder, ConvEncoder)
    conv = next(world.encoder.blocks[2].children())
    assert isinstance(conv, nn.Conv2d)
    c, size = conv.in_channels, world.config.image_size // 8
    x = torch.rand(1, c, size, size).contiguous(memory_format=torch.channels_last)
    padded = F.pad(x[0].permute(1, 2, 0), (0, 0, 1, 1, 1, 1)).contiguous()
    seen = windows(padded, size, 3, 1).permute(2, 3, 0, 1, 4)
    weight = conv.weight[:, 0].permute(1, 2, 0)[:, :, None, None].contiguous()
    taps, ones, sums = torch.empty(3, 3, size, size, c), torch.ones(1, 9), torch.empty(1, size * size * c)

    def ours() -> Tensor:
        torch.mul(seen, weight, out=taps)
        return torch.mm(ones, taps.view(9, -1), out=sums).view(size, size, c)

    return lambda: conv(x)[0].permute(1, 2, 0), ours


def _bound_step(world: World) -> Pair:
    size, d, e = world.config.image_size, world.config.latent_dim, world.config.hidden
    action, frame = torch.zeros(1, world.spec.action_dim), torch.zeros(size, size, 3, dtype=torch.uint8)
    static = StaticWorld(world, action, frame)
    z, h = torch.randn(1, d), 0.1 * torch.randn(1, e)

    def ours() -> Tensor:
        static.z.copy_(z)
        static.h.copy_(h)
        static.run["step"]()
        return static.z

    low, high = torch.tensor(world.spec.action_low), torch.tensor(world.spec.action_high)
    return lambda: world.step(State(z, (h,)), action.clamp(low, high)).z, ours


def _together(world: World) -> Pair:
    """Eight sessions' steps: one after the other, and as one product."""
    size, d, e = world.config.image_size, world.config.latent_dim, world.config.hidden
    company = Company(world, _SESSIONS)
    action, frame = torch.zeros(1, world.spec.action_dim), torch.zeros(size, size, 3, dtype=torch.uint8)
    alone = StaticWorld(world, action, frame)
    seats = [(torch.zeros(1, world.spec.action_dim), torch.randn(1, d), torch.zeros(1, e)) for _ in range(_SESSIONS)]
    start = [z.clone() for _, z, _ in seats]
    for slot, seat in enumerate(seats):
        company.sit(slot, *seat)

    def one_by_one() -> Tensor:
        rows = []
        for z in start:
            alone.z.copy_(z)
            alone.h.zero_()
            alone.run["step"]()
            rows.append(alone.z.clone())
        return torch.cat(rows)

    def at_once() -> Tensor:
        for (_, z, h), begin in zip(seats, start, strict=True):
            z.copy_(begin)
            h.zero_()
        company.step_all()
        return torch.cat([z for _, z, _ in seats])

    return one_by_one, at_once


def _sigmoid_for_tanh(world: World) -> Pair:
    x = torch.randn(_CANDIDATES, world.config.hidden)
    out = torch.empty_like(x)
    return lambda: torch.tanh(x, out=out), lambda: torch.mul(x, 2.0, out=out).sigmoid_().mul_(2.0).sub_(1.0)


def _kept_memory(world: World) -> Pair:
    """Four steps of a plan's element-wise work, whose results are as many new blocks, or kept ones."""
    e = world.config.hidden
    new, gates, shared = (torch.rand(_CANDIDATES, e) for _ in range(3))
    kept = [torch.empty(_CANDIDATES, e) for _ in range(3)]
    low = torch.empty(_CANDIDATES, e, dtype=torch.bfloat16)

    def fresh() -> Tensor:
        state = shared
        for _ in range(4):
            state = torch.lerp(new, state, gates)
            apart = state - shared
            rough = apart.bfloat16()
            squares = apart.square()
        return squares + rough.float() * 0.0

    def ours() -> Tensor:
        state = shared
        for _ in range(4):
            state = torch.lerp(new, state, gates, out=kept[0])
            apart = torch.sub(state, shared, out=kept[1])
            low.copy_(apart)
            squares = torch.mul(apart, apart, out=kept[2])
        return squares

    return fresh, ours


def _ratio(value: float, factor: float, because: str) -> Prediction:
    return Prediction(value=value, unit="ratio", factor=factor, because=because)


TRIALS = (
    Trial(
        name="channels last",
        change="the picture comes with its channels innermost, as the simulator makes it",
        expected=_ratio(0.8, 1.25, "oneDNN reorders every layer's input otherwise, small as they are"),
        make=_channels_last,
    ),
    Trial(
        name="folded norms",
        change="batch norms go into the weights of the convolutions before them",
        expected=_ratio(0.7, 1.25, "a third of the encoder's calls are norms, and calls are most of its time"),
        make=_fold_norms,
    ),
    Trial(
        name="a doubling as four products",
        change="3x3 over a picture doubled by repeating pixels becomes, for each of 4 places, 2x2 over the one before",
        expected=_ratio(0.6, 1.3, "4/9 of the operations, and patches to copy"),
        make=_doubling,
    ),
    Trial(
        name="sixteen columns for twelve",
        change="the product that makes pixels gets four columns of zeros",
        expected=_ratio(0.8, 1.25, "twelve columns leave a vector of sixteen a quarter empty and need masks"),
        make=_wide_columns,
    ),
    Trial(
        name="depthwise by taps",
        change="a depthwise convolution is one product for each tap, and a product with ones adds them up",
        expected=_ratio(0.7, 1.3, "two calls without reordering, on a grid of 8 x 8"),
        make=_depthwise,
    ),
    Trial(
        name="bound calls",
        change="a GRU step is a list of calls into planned memory instead of modules",
        expected=_ratio(0.7, 1.2, "an earlier reading: 145 of 213 us"),
        make=_bound_step,
    ),
    Trial(
        name="eight sessions at once",
        change="eight steps are one product of eight rows",
        expected=_ratio(0.43, 1.2, "an earlier reading: 62 of 145 us a session; the weights are read once"),
        make=_together,
    ),
    Trial(
        name="sigmoid for tanh",
        change="tanh(v) = 2 sigmoid(2 v) - 1, the 2 in the weights in the planner; here paid for",
        expected=_ratio(0.6, 1.3, "a sigmoid costs a third of a tanh, and three cheap passes come on top"),
        make=_sigmoid_for_tanh,
    ),
    Trial(
        name="kept memory",
        change="a plan's element-wise results go to the same four blocks in every step",
        expected=_ratio(0.7, 1.4, "new blocks of half a megabyte cost page faults; how many depends on the allocator"),
        make=_kept_memory,
        tolerance=1e-6,
    ),
)


def render(result: dict[str, Any]) -> str:
    """Write the page from `result.json` alone."""
    made, lines, held = result["provenance"], [], 0
    for row in result["trials"]:
        found, expected = result["timing"][row["name"]], Prediction(**row["expected"])
        right = expected.holds(found["ratio"])
        held += right
        before, after = row["counts"]
        times = " to ".join(f"{median / 1e3:,.0f}" for median in found["medians"])
        lines.append(
            f"| {row['name']} | {row['change']} | {expected.value:g} within x{expected.factor:g}: {expected.because} | "
            f"**{found['ratio']:.2f}** ({found['interval'][0]:.2f} to {found['interval'][1]:.2f}) | {times} | "
            f"{before['calls']} to {after['calls']} | {_mega(before, 'operations')} to {_mega(after, 'operations')} | "
            f"{before['new_bytes'] / 1024:,.0f} to {after['new_bytes'] / 1024:,.0f} | "
            f"{'held' if right else '**did not hold**'} |"
        )
    wrong = [row for row in result["trials"] if not Prediction(**row["expected"]).holds(_of(result, row))]
    told = [f"- {row['name']}: {_explained(row, _of(result, row))}" for row in wrong]
    return "\n".join(
        [
            "# Each optimisation, beside what was expected of it",
            "",
            f"`{result['checkpoint']}`, one thread, each pair in turns in one process; ratios are time after over time "
            "before, medians with 95% intervals. Both ways give the same result, or the run would have ended. "
            f"Of {len(lines)} expectations, written before the first run of each trial, {held} held.",
            "",
            "| optimisation | change | expected | ratio | us | calls | MFLOP in products | new KiB | |",
            "|---|---|---|---|---|---|---|---|---|",
            *lines,
            "",
            *(["What did not hold:", "", *told, ""] if told else []),
            f"Machine: {made['machine']['processor']}, {made['machine']['cores']} cores; torch "
            f"{made['versions'].get('torch')}; commit {made['commit']}.",
            "",
            f"Again: `{made['command']}`",
            "",
        ]
    )


def _of(result: dict[str, Any], row: dict[str, Any]) -> float:
    return float(result["timing"][row["name"]]["ratio"])


def _mega(counts: dict[str, int], name: str) -> str:
    return f"{counts[name] / 1e6:.2f}"


_TELLING = {"calls": 0, "operations": 100_000, "new_bytes": 1 << 16}
"""Counts up to these explain nothing."""


def _explained(row: dict[str, Any], ratio: float) -> str:
    """Say which of the counts moves as the time does; if none, say so."""
    before, after = row["counts"]
    words = {"calls": "calls", "operations": "operations in products", "new_bytes": "bytes of new tensors"}
    shares = {name: after[name] / before[name] for name in words if before[name] > _TELLING[name]}
    near = [f"{words[name]} (x{share:.2f})" for name, share in shares.items() if abs(share - ratio) <= 0.15]
    if near:
        return f"x{ratio:.2f}; {' and '.join(near)} changed by as much"
    rest = ", ".join(f"{words[name]} x{share:.2f}" for name, share in shares.items())
    return (
        f"x{ratio:.2f}, which none of the counts shows ({rest}): so it is how fast an operation runs, or what it reads"
    )
