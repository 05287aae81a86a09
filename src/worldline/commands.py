"""What each command of `worldline` teaches and does. Whatever is heavy is imported when a command runs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

DEFAULT_PORT = 8765
BENCHMARKS = (
    "determinism",
    "edge",
    "engine",
    "loader",
    "micro",
    "optimise",
    "plan",
    "play",
    "storm",
    "train",
    "update",
)


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command: what its help teaches and what runs."""

    name: str
    summary: str
    about: str
    examples: tuple[tuple[str, str], ...]
    """Command lines, each with what it does."""
    run: Callable[[Any, set[str]], int]
    """Takes the config (or the PATH, for a command without options) and the flags; returns the exit status."""
    config: str = ""
    """The dataclass of its options, as "module:Class"; empty for a command without options."""
    path: str = ""
    """The option that PATH sets, or the word for PATH in a command without options."""
    path_required: bool = False
    flags: dict[str, str] = field(default_factory=dict)
    kept: str = ""
    """What an interrupted run leaves behind, with the config's fields in braces."""


_SWEEP = {
    "--multirun": "or -m: a run for each combination of values given as seed=0,1,2 or seed=range(3), one after the "
    "other, each in a path of its own, PATH-KEY_VALUE; what is finished is passed over, and a table ends it"
}
"""For commands whose finished and unfinished results are known by their path."""


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """What to replay."""

    file: Path
    """The recording."""
    checkpoint: str | None = None
    """The world to replay it on: a checkpoint, a run, or a shipped name; null for the one named in the recording."""


def wrote(path: Path, started: float) -> None:
    """Say what a command wrote: files, bytes, seconds since `started` (`time.monotonic`)."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
    size = sum(file.stat().st_size for file in files)
    plural = "file" if len(files) == 1 else "files"
    print(f"wrote {path}: {len(files)} {plural}, {size / 1e6:.1f} MB, {time.monotonic() - started:.1f} s")


def _doctor(path: str, flags: set[str]) -> int:
    from worldline.doctor import examine, report

    checks = examine(DEFAULT_PORT)
    print(report(checks))
    return 1 if any(check.state == "broken" for check in checks) else 0


def _list(path: str, flags: set[str]) -> int:
    from worldline.core.errors import WorldlineError
    from worldline.listing import listing

    if path and not Path(path).is_dir():
        raise WorldlineError(f"{path}: no such folder; give one with datasets/ and runs/ in it")
    print(listing(Path(path or ".")))
    return 0


def _collect(config: Any, flags: set[str]) -> int:
    from worldline.data.collect import collect

    started = time.monotonic()
    path = collect(config)
    wrote(path, started)
    print(f"next: worldline train data={path}")
    return 0


def _ingest(config: Any, flags: set[str]) -> int:
    from worldline.data.clips import read_card
    from worldline.data.ingest import ingest, read_ledger, told_by_ledger

    started = time.monotonic()
    path = ingest(config)
    card = read_card(path)
    clips = f"{card['num_clips']} clips of {card['num_frames']} frames"
    print(f"{card['entries']} entries as layout={card['layout']}: {clips}")
    print(f"rejected or shortened: {told_by_ledger(read_ledger(path))} (each in {path / 'ledger.parquet'})")
    if card["passed_over"]:
        print(f"{card['passed_over']} files that are no videos were passed over")
    wrote(path, started)
    print(f"next: worldline pretrain data={path}")
    return 0


def _train(config: Any, flags: set[str]) -> int:
    from worldline.checkpoints import add_starts
    from worldline.train.loop import train

    started = time.monotonic()
    path = train(config)
    add_starts(path)
    wrote(path, started)
    print(f"next: worldline evaluate {path}")
    return 0


def _pretrain(config: Any, flags: set[str]) -> int:
    started = time.monotonic()
    if config.ray.workers:
        from worldline.train.ray import launch

        path = launch(config)
    else:
        from worldline.train.pretrain import pretrain

        path = pretrain(config)
    if os.environ.get("RANK", "0") == "0":  # torchrun starts this in every rank
        wrote(path, started)
    return 0


def _plan_memory(config: Any, flags: set[str]) -> int:
    from worldline.train.memory import plan_memory
    from worldline.train.memory_report import figures, text, write

    started = time.monotonic()
    found = figures(config, plan_memory(config))
    print(text(found))
    if config.out is not None:
        write(config.out, found)
        wrote(config.out, started)
    return 0


def _bottleneck(config: Any, flags: set[str]) -> int:
    from worldline.bench.bottleneck import run

    started = time.monotonic()
    wrote(run(config).parent, started)
    return 0


def _references(config: Any, flags: set[str]) -> int:
    from worldline.data.lerobot import open_dataset
    from worldline.train.references import make_references

    started = time.monotonic()
    wrote(make_references(open_dataset(config.dataset), config), started)
    return 0


def _evaluate(config: Any, flags: set[str]) -> int:
    from worldline.checkpoints import add_result
    from worldline.core.errors import WorldlineError
    from worldline.data.lerobot import open_dataset
    from worldline.evaluate.run import evaluate
    from worldline.evaluate.windows import choose_windows
    from worldline.model.checkpoint import load_world
    from worldline.model.foreign import is_foreign
    from worldline.model.int8 import is_bundle
    from worldline.model.references import CARD, DIRECTORY
    from worldline.train.references import make_references

    started = time.monotonic()
    dataset = open_dataset(config.data)
    foreign = is_foreign(config.checkpoint)
    if not (dataset.path / DIRECTORY / CARD).exists():
        # what the evaluation would refuse is told now, not after the minutes that a pack takes
        world = None if foreign else load_world(config.checkpoint)
        if world is not None and dataset.spec.factors and world.spec.name != dataset.spec.name:
            raise WorldlineError(
                f"{config.checkpoint} is a world of {world.spec.name}, {config.data} holds episodes of "
                f"{dataset.spec.name}; evaluate it on data of its own world"
            )
        context = 2 if world is None else world.config.context
        scored = open_dataset(config.test) if config.test else None
        choose_windows(dataset, context=context, horizon=config.horizon, count=config.windows, scored=scored)
        print(f"{dataset.path} has no reference pack yet; making it, once")
        make_references(dataset)
    out = evaluate(config)
    if not foreign and not is_bundle(config.checkpoint):  # a bundle's card is the float world's
        add_result(config.checkpoint, out)
    wrote(out, started)
    print(f"open {out}/report.html" + ("" if foreign else f"; next: worldline play {config.checkpoint}"))
    return 0


def _plan(config: Any, flags: set[str]) -> int:
    from worldline.evaluate.planning import evaluate_planning

    started = time.monotonic()
    wrote(evaluate_planning(config), started)
    return 0


def _export(config: Any, flags: set[str]) -> int:
    from worldline.core.files import read_json
    from worldline.edge.emit import export

    started = time.monotonic()
    path = export(config, qemu="--qemu" in flags)
    if "--qemu" in flags:
        for name, run in read_json(path / "manifest.json")["qemu"]["images"].items():
            sizes = f"{run['flash_bytes']:,} bytes of flash, {run['ram_bytes']:,} of RAM"
            print(f"{name} in QEMU ({run['machine']}): {run['bytes_equal']} bytes, all the reference's; {sizes}")
    wrote(path, started)
    print(f"next: worldline evaluate {path} data={config.data}")
    return 0


def _play(config: Any, flags: set[str]) -> int:
    from worldline.checkpoints import add_starts
    from worldline.serve.app import serve

    if config.precision == "int8":
        from worldline.edge.emit import bundle_for
        from worldline.model.checkpoint import shipped_worlds

        config = replace(config, checkpoint=str(bundle_for(config.checkpoint or shipped_worlds()[0])))
    elif config.checkpoint:
        add_starts(config.checkpoint)
    serve(config)
    return 0


def _replay(config: Any, flags: set[str]) -> int:
    from worldline.core.errors import WorldlineError
    from worldline.core.progress import progress
    from worldline.engine.recording import Recording
    from worldline.engine.replay import bisect, verify
    from worldline.engine.workloads import WorldWorkload, open_for

    recording = Recording(config.file)
    made_by = recording.header.fingerprint
    print(f"{config.file}: {recording.frames} frames at {recording.header.fps:g} FPS", end="")
    print("" if recording.complete else f" (incomplete, {recording.frames} frames)")
    for key, value in made_by.items():
        print(f"  {key:<10}  {value}")
    if not flags:
        print(f"next: worldline replay {config.file} --verify")
        return 0

    def make() -> WorldWorkload:
        return open_for(recording, config.checkpoint)

    try:
        workload = make()
    except WorldlineError as error:  # a changed weight byte, for example
        raise WorldlineError(f"{config.file}: not verified from frame 0 on: {error}") from None
    if "--bisect" in flags:
        finding = bisect(config.file, make)
        print(finding)
        return 0 if finding.verdict.ok else 1
    with progress("verify", recording.frames) as task:
        other = make() if "--heavy" in flags else None
        verdict = verify(config.file, workload, lambda done, total: task.advance(1), other)
    print(verdict)
    return 0 if verdict.ok else 1


def _quickstart(config: Any, flags: set[str]) -> int:
    from worldline.quickstart import quickstart

    quickstart(config)
    return 0


def _bench(name: str, flags: set[str]) -> int:
    from worldline.core.errors import WorldlineError

    if name:
        raise WorldlineError(f"no benchmark called {name!r}; there are {', '.join(BENCHMARKS)}")
    worst = 0
    for each in BENCHMARKS:
        print(f"worldline bench {each}", flush=True)
        done = subprocess.run([sys.executable, "-m", "worldline", "bench", each], check=False)
        worst = max(worst, done.returncode)
    return worst


def _bench_edge(config: Any, flags: set[str]) -> int:
    from worldline.bench.edge import run

    print(f"wrote {run(config)}")
    return 0


def _bench_engine(config: Any, flags: set[str]) -> int:
    from worldline.bench.engine import run

    started = time.monotonic()
    wrote(run(config).parent, started)
    return 0


def _explain(config: Any, flags: set[str]) -> int:
    from worldline.core.files import read_json
    from worldline.explain import explain

    started = time.monotonic()
    out = explain(config)
    for section, sentences in read_json(out / "result.json")["sentences"].items():
        print(f"\n{section}")
        for sentence in sentences:
            print(f"  {sentence}")
    print()
    wrote(out, started)
    print(f"open {out / 'index.html'}; the trace {out / 'trace.json'} opens in ui.perfetto.dev")
    return 0


def _soak(config: Any, flags: set[str]) -> int:
    from worldline.bench.soak import run

    started = time.monotonic()
    report = run(config)
    print(report.read_text())
    wrote(report.parent, started)
    return 0


def _bench_plan(config: Any, flags: set[str]) -> int:
    from worldline.bench.plan import run

    started = time.monotonic()
    wrote(run(config).parent, started)
    return 0


def _bench_feed(config: Any, flags: set[str]) -> int:
    from worldline.bench.feed import run

    started = time.monotonic()
    wrote(run(config).parent, started)
    return 0


def _bench_loader(config: Any, flags: set[str]) -> int:
    from worldline.bench.loader import run

    started = time.monotonic()
    wrote(run(config).parent, started)
    return 0


def _bench_micro(config: Any, flags: set[str]) -> int:
    from worldline.bench.micro import run

    started = time.monotonic()
    wrote(run(config).parent, started)
    return 0


def _bench_determinism(config: Any, flags: set[str]) -> int:
    from worldline.bench.determinism import run

    started = time.monotonic()
    wrote(run(config).parent, started)
    return 0


def _bench_optimise(config: Any, flags: set[str]) -> int:
    from worldline.bench.optimise import run

    started = time.monotonic()
    wrote(run(config).parent, started)
    return 0


def _bench_storm(config: Any, flags: set[str]) -> int:
    from worldline.bench.storm import run

    started = time.monotonic()
    wrote(run(config).parent, started)
    return 0


def _bench_train(config: Any, flags: set[str]) -> int:
    from worldline.bench.train import run

    started = time.monotonic()
    wrote(run(config).parent, started)
    return 0


def _bench_pretrain(config: Any, flags: set[str]) -> int:
    from worldline.bench.pretrain import run

    started = time.monotonic()
    wrote(run(config).parent, started)
    return 0


def _bench_update(config: Any, flags: set[str]) -> int:
    from worldline.bench.update import run

    started = time.monotonic()
    wrote(run(config).parent, started)
    return 0


def _bench_play(config: Any, flags: set[str]) -> int:
    from worldline.bench.play import run

    started = time.monotonic()
    wrote(run(config).parent, started)
    return 0


def _ablate(config: Any, flags: set[str]) -> int:
    from worldline.bench.ablate import run

    started = time.monotonic()
    wrote(run(config).parent, started)
    return 0


COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        Command(
            name="doctor",
            summary="what this machine can do, and how to get the rest",
            about="""
            Looks at the interpreter, torch, processor, GPU, video codecs, simulators, disk, memory, the page's port,
            browser and compilers. Under each thing that is missing stands the line that gets it. The exit status is 0
            unless something needed is broken, then 1.
            """,
            examples=(("worldline doctor", "look at this machine"),),
            run=_doctor,
        ),
        Command(
            name="list",
            summary="simulators, shipped worlds, presets, and the datasets and runs found here",
            about="""
            Lists what there is to work with, with sizes and headline results. Datasets are looked for in
            FOLDER/datasets and runs in FOLDER/runs; FOLDER is the working directory unless given.
            """,
            examples=(("worldline list", "everything here"), ("worldline list ~/experiments", "another place")),
            run=_list,
            path="folder",
        ),
        Command(
            name="quickstart",
            summary="collect, train, evaluate and play a small world, in minutes",
            about="""
            Goes the whole way with one command: episodes from a simulator, the reference pack of the dataset, a world
            model, its evaluation, and the world in a browser. Each stage that is finished is kept and used again, so an
            interrupted quickstart goes on where it stopped.
            """,
            examples=(
                ("worldline quickstart", "two_room, at most 6 minutes on two cores"),
                ("worldline quickstart world=pusht", "PushT, at most 12 minutes on two cores"),
                ("worldline quickstart play=false", "end after the evaluation, for scripts"),
            ),
            run=_quickstart,
            config="worldline.quickstart:QuickstartConfig",
            kept="Finished stages and the last checkpoint are kept; the same command goes on from there.",
        ),
        Command(
            name="collect",
            summary="episodes from a simulator, as a LeRobot v3 dataset",
            about="""
            Runs a simulator with a policy that explores well, in several processes, and writes a LeRobot v3.0 dataset:
            video, actions and the simulator's true state. Episode i depends on (seed, i) only. An interrupted run goes
            on where it stopped when the same command is given again.
            """,
            examples=(
                ("worldline collect env=pusht", "PushT at 25 Hz, into datasets/pusht"),
                ("worldline collect env=two_room episodes=40", "a small dataset of the small world"),
            ),
            run=_collect,
            config="worldline.data.collect:CollectConfig",
            flags=_SWEEP,
            kept="Finished episodes stay in {path}.partial; the same command goes on from there.",
        ),
        Command(
            name="ingest",
            summary="video as it comes into clips that training reads fast, and a ledger of what was lost",
            about="""
            Takes Kinetics-400 as it comes (SPLIT/*.mp4 with annotations, a folder for each class, lists of `path label`
            or `path::label`), folders of video, LeRobot v3 datasets and HDF5 trajectories. Every file is decoded once;
            what is missing, damaged, cut short or there twice is listed in ledger.parquet with its reason, and nothing
            stands in for it. The same source and options give the same bytes, whatever the number of workers; an
            interrupted run goes on where it stopped when the same command is given again.
            """,
            examples=(
                (
                    "worldline ingest source=/data/k400 path=datasets/k400",
                    "JPEG pictures in Parquet, a clip a row group",
                ),
                ("worldline ingest source=/data/k400 path=datasets/k400 codec=h264 gop=12", "videos, encoded again"),
                (
                    "worldline ingest source=train.txt path=datasets/mine codec=source",
                    "an index into the files of a list",
                ),
            ),
            run=_ingest,
            config="worldline.data.ingest:IngestConfig",
            path="source",
            path_required=True,
            kept="Finished shards stay in {path}.partial; the same command goes on from there.",
        ),
        Command(
            name="train",
            summary="a world model from a dataset; resumable to the sample",
            about="""
            Trains a world model: first encoder, dynamics and decoder together on pictures, then the dynamics alone over
            long latent rollouts. Writes checkpoints and metrics into a run directory, atomically. The same command goes
            on after an interruption, on a CPU to the same bits.

            data= takes a preset or any LeRobot v3 dataset with a camera and actions.
            """,
            examples=(
                ("worldline train model=tiny data=pusht", "the default world on PushT"),
                ("worldline train data=/data/my_robot joint.steps=4000", "any LeRobot v3 dataset, by its path"),
                ("worldline train -m seed=0,1,2 objective=drift_aware,lewm", "six runs, and a table of them"),
            ),
            run=_train,
            config="worldline.train.config:TrainConfig",
            flags=_SWEEP,
            kept="The last checkpoint stays in {path}; the same command goes on from there.",
        ),
        Command(
            name="pretrain",
            summary="a video encoder from clips without actions, masked; on one process or many",
            about="""
            Hides blocks of each clip and learns to tell their features from what is left (V-JEPA), or holds features
            apart by SIGReg. The same command runs as a plain process, under torchrun with any number of ranks (FSDP2),
            or on the workers of a Ray cluster (ray.workers=N). A run that is stopped, killed, or given another number
            of ranks goes on with the same clips in the same order; batches.jsonl is the proof. What could not be read
            is listed in lost.jsonl and never replaced.
            """,
            examples=(
                ("worldline pretrain clips/k400", "vit_tiny on what `worldline ingest` wrote there"),
                ("torchrun --nproc-per-node=2 --max-restarts=3 -m worldline pretrain clips/k400", "two ranks"),
                ("worldline pretrain clips/k400 ray.workers=2", "two workers of Ray, started again if one dies"),
                ("worldline pretrain clips/k400 also=[clips/games] weights=[3,1]", "a mixture, three to one"),
                ("worldline pretrain clips/k400 model=vit_base parallel.checkpointing=true", "a larger one"),
            ),
            run=_pretrain,
            config="worldline.train.pretrain:PretrainConfig",
            flags=_SWEEP,
            path="data",
            path_required=True,
            kept="The last whole checkpoint stays in {path}; the same command goes on from there.",
        ),
        Command(
            name="plan-memory",
            summary="what a rank of a pre-training needs, and the settings that fit into its GPU",
            about="""
            Does an update of one rank on tensors that have shapes and no bytes, by the code that trains, and counts
            what would be alive at the worst moment: parameters, averaged encoder, optimiser, gradients, gathered
            blocks, activations. Says how many clips a rank fit with and without checkpointing and offloading. Needs no
            GPU.
            """,
            examples=(
                ("worldline plan-memory model=vit_huge gpus=4 memory_gb=24", "ViT-Huge on four consumer GPUs"),
                ("worldline plan-memory model=vit_large gpus=1 memory_gb=24", "and ViT-Large on one"),
            ),
            run=_plan_memory,
            config="worldline.train.memory:PlanMemoryConfig",
        ),
        Command(
            name="bottleneck",
            summary="what limits a pre-training: disk, decoding or computing; and what a stated machine would need",
            about="""
            Does every part of an update alone, in turns: bytes off the disk, pictures out of bytes, batches with nobody
            to train, updates of one batch, everything together. The lowest ceiling names what limits. From what a clip
            costs follow the cores, megabytes a second and hours of a larger machine.
            """,
            examples=(
                ("worldline bottleneck datasets/k400", "on 8 H100 at 40% of their peak"),
                ("worldline bottleneck datasets/k400 run=runs/k400-vit_tiny", "and what the ranks of this run waited"),
                ("worldline bottleneck datasets/k400 feed.threads=2 target.gpus=64 target.data_tb=2", "another one"),
            ),
            run=_bottleneck,
            config="worldline.bench.bottleneck:BottleneckConfig",
            path="data",
            path_required=True,
        ),
        Command(
            name="references",
            summary="the reference pack of a dataset, which evaluate measures against",
            about="""
            Trains a supervised encoder, which says which factors of the true state can be seen in the pictures at all,
            and a forecaster that knows the actions only. Made once for a dataset and stored beside it; evaluate makes
            it when it is missing. Other options than last time make it anew.
            """,
            examples=(
                ("worldline references datasets/pusht", "write datasets/pusht/references"),
                ("worldline references datasets/pusht image_size=32", "for worlds that see 32 pixels"),
                ("worldline references data/mine encoder_updates=9000", "where too little is seen after 3000"),
            ),
            run=_references,
            config="worldline.train.references:MakeReferencesConfig",
            path="dataset",
            path_required=True,
        ),
        Command(
            name="evaluate",
            summary="how far a world can be trusted: drift curves, HRI, H*, report.html",
            about="""
            Rolls a world out open loop on held-out episodes with the recorded actions and scores, factor by factor and
            step by step, what it still knows, against naive forecasts. HRI is the area under the credit curve (0 to 1),
            H* the last step up to which every factor is still good for half its credit. Writes report.html, which needs
            no network, and result.json.

            Without data= it is the dataset that the checkpoint was trained on. A dataset without a reference pack gets
            one first.
            """,
            examples=(
                ("worldline evaluate runs/pusht-tiny", "on the dataset it was trained on"),
                ("worldline evaluate runs/a compare=runs/b", "and the paired difference to another world"),
                ("worldline evaluate my_models:load data=datasets/pusht", "somebody else's model, by an entry point"),
            ),
            run=_evaluate,
            config="worldline.evaluate.run:EvaluateConfig",
            path="checkpoint",
            path_required=True,
        ),
        Command(
            name="plan",
            summary="plan with a world to pictures of goals, in the real simulator, beside an oracle",
            about="""
            Takes moments of held-out episodes and the pictures seen 25 to 100 frames later, plans in the world's
            imagination, carries a little of each plan out in the simulator, and plans again. Reached or not is told by
            the true state. The same planner with the true dynamics tries the same starts. Writes result.json,
            report.md and filmstrip.png.

            Without data= it is the dataset that the checkpoint was trained on.
            """,
            examples=(
                ("worldline plan runs/two_room", "CEM, goals 25, 50, 75 and 100 frames ahead"),
                ("worldline plan runs/a compare=runs/b planner.method=icem", "two worlds, paired, by another planner"),
                ("worldline plan runs/a starts=8 planner_seeds=1 offsets=[25,50]", "a first look"),
            ),
            run=_plan,
            config="worldline.evaluate.planning:PlanConfig",
            path="checkpoint",
            path_required=True,
            kept="Finished parts are kept; the same command goes on from there.",
        ),
        Command(
            name="export",
            summary="a world in integers, for this machine and for microcontrollers",
            about="""
            Quantises a world to int8 (its recurrent state to int16), with ranges measured on training episodes, and
            writes a bundle: the program that TinyEngine runs, the same as a C++ table with the engine's headers, a
            manifest with sizes and hashes, and the checkpoint it came from. Every build of it computes the same bytes.

            A bundle is a world: evaluate, plan and play take it like a checkpoint, and compute in integers.
            """,
            examples=(
                ("worldline export pusht", "the shipped world, to runs/pusht-int8"),
                ("worldline export pusht target=cortex-m4 --qemu", "and its firmware, tried"),
                ("worldline evaluate runs/pusht-int8 data=datasets/pusht", "what the integers cost"),
            ),
            run=_export,
            config="worldline.edge.emit:ExportConfig",
            path="checkpoint",
            path_required=True,
            flags={"--qemu": "build the firmware of target=, run it in QEMU, and hold its answers to the reference"},
            kept="Nothing is kept.",
        ),
        Command(
            name="play",
            summary="a world in your browser: keys in, frames out, every millisecond accounted for",
            about="""
            Serves a page on this machine's loopback address. Arrow keys, WASD or the pointer move the agent; beside the
            imagined world stand the true one (where its simulator is installed), the drift gauge and the ledger of
            where each frame's time went. Sessions can be recorded and replayed to the bit.

            From another machine: ssh -L 8765:127.0.0.1:8765 USER@HOST, then the same address there.
            """,
            examples=(
                ("worldline play", "the shipped world"),
                ("worldline play runs/pusht-tiny fps=60", "your own, faster than real time"),
                ("worldline play sessions=8", "eight sessions on one model; each page plays its own"),
                ("worldline play host=0.0.0.0", "reachable from other machines, by a token in the address"),
            ),
            run=_play,
            config="worldline.serve.app:PlayConfig",
            path="checkpoint",
        ),
        Command(
            name="replay",
            summary="what a recording holds; with --verify, proof that it repeats to the bit",
            about="""
            Shows a recording's header. With --verify the session is played again from its actions on the checkpoint
            that made it, and every picture and state is compared by hash. The exit status is 0 if all are equal, and 1
            with the first frame that differs, its stage and tensor. A file cut short is compared as far as it goes.
            --heavy shows what a state does not hold; --bisect tells chance from another arithmetic.
            """,
            examples=(
                ("worldline replay recordings/session.wlr --verify", "compare every frame"),
                ("worldline replay recordings/session.wlr --bisect", "where it differs, and whether by chance"),
                ("worldline replay session.wlr checkpoint=runs/mine", "a checkpoint that lies elsewhere now"),
            ),
            run=_replay,
            config="worldline.commands:ReplayConfig",
            path="file",
            path_required=True,
            flags={
                "--verify": "Play it again and compare every frame.",
                "--heavy": "The same; after every frame its state moves to a second world, which makes the next.",
                "--bisect": "Name the first frame, stage and tensor that differ; try that frame again several times.",
            },
        ),
        Command(
            name="explain",
            summary="where the time of a recorded session went, what was surprising, what would help",
            about="""
            Turns the frame ledger that lies beside a recording into a page: every sentence is computed from it. Also
            writes the figures and a trace for ui.perfetto.dev.
            """,
            examples=(("worldline explain recordings/session.wlr", "the page in recordings/session.explained/"),),
            run=_explain,
            config="worldline.explain:ExplainConfig",
            path="file",
            path_required=True,
        ),
        Command(
            name="soak",
            summary="100,000 frames in one session: memory, frame time, drift gauge, replay, a snapshot taken up",
            about="""
            Plays a world as fast as it goes, steered by a hand that strokes at random, with contracts strict. Then
            replays the recording to the bit, goes on from a random frame of it, and says with intervals whether memory
            or frame time grow. The report draws them, and the drift gauge, over the session.
            """,
            examples=(
                ("worldline soak", "the shipped world"),
                ("worldline soak runs/mine frames=20000", "your own, shorter"),
            ),
            run=_soak,
            config="worldline.bench.soak:SoakConfig",
            path="checkpoint",
        ),
        Command(
            name="ablate",
            summary="a grid of recipes x worlds x seeds at equal compute: HRI, H*, planning, what each term buys",
            about="""
            Collects each world, gives every recipe the same minutes of one core, trains it with several seeds,
            evaluates each run and plans with it, and compares them pair by pair on the same windows and starts. Hours
            in all; start it again after an interruption, and what is finished is used again. Without options it makes
            docs/reports/evaluation_results.md.
            """,
            examples=(
                ("worldline ablate workers=2", "everything, two runs at a time"),
                (
                    "worldline ablate name=mine seeds=1 publish=null 'worlds=[\"two_room:\"]' "
                    '\'variants=["base:","wide: model.hidden=768"]\'',
                    "your own question, of one world",
                ),
            ),
            run=_ablate,
            config="worldline.bench.ablate:AblateConfig",
        ),
        Command(
            name="bench",
            summary="timings of this machine, with what they mean, written to reports/",
            about="""
            Without a NAME every benchmark runs with its defaults. Each writes result.json and report.md into
            reports/DATE-NAME. The names: determinism, edge, engine, micro, optimise, plan,
            play, storm, train.
            """,
            examples=(
                ("worldline bench", "all of them"),
                ("worldline bench engine frames=2000", "one, with its own options"),
                ("worldline bench engine --help", "the options of one"),
            ),
            run=_bench,
            path="name",
        ),
        Command(
            name="bench determinism",
            summary="what each level of determinism costs, and whether two processes give the same bits",
            about="""
            Plays the same session at determinism=off, run and machine in turns, in every mode of the world.
            """,
            examples=(("worldline bench determinism publish=docs/reports", "and the page in the documentation"),),
            run=_bench_determinism,
            config="worldline.bench.determinism:DeterminismBenchConfig",
        ),
        Command(
            name="bench edge",
            summary="TinyEngine's memory and instructions, by schedule, resolution and core",
            about="""
            Compiles the reference graph and a world for Cortex-M4, M7, M33 and M55, runs both in QEMU, checks every
            byte, and counts instructions, arena, stack and code. Plans of memory are listed for pictures of 96 to 224
            pixels.
            """,
            examples=(("worldline bench edge publish=docs/reports", "and the page in the documentation"),),
            run=_bench_edge,
            config="worldline.bench.edge:EdgeBenchConfig",
        ),
        Command(
            name="bench engine",
            summary="the frame engine headless: speed, where the time goes, growth, equality of two runs",
            about="""
            Plays one session twice, each time in a process of its own: the figures say how long a frame and each of
            its stages takes, whether memory grows, and whether both runs agree to the bit.
            """,
            examples=(("worldline bench engine checkpoint=runs/pusht-tiny", "with a world of your own"),),
            run=_bench_engine,
            config="worldline.bench.engine:EngineBenchConfig",
        ),
        Command(
            name="bench loader",
            summary="what reading clips costs: beside plain mp4 and HDF5 readers, by codec, and in memory",
            about="""
            Reads the same windows of the same episodes from a plain mp4 reader, a plain HDF5 reader and our cache, in
            turns. Then the cost curve: CPU time a clip and bytes a frame of every way to keep real videos. And the
            memory of an index of ten million clips.
            """,
            examples=(("worldline bench loader curve=false", "without the minutes of encoding"),),
            run=_bench_loader,
            config="worldline.bench.loader:LoaderBenchConfig",
        ),
        Command(
            name="bench feed",
            summary="who reads ahead of training: threads, processes or Ray Data, in turns",
            about="""
            Reads the same batches by threads of one process, by processes of torch's DataLoader and by tasks of Ray
            Data, in turns, and tells CPU time and clock time a clip of each beside one thread.
            """,
            examples=(("worldline bench feed ray=false rounds=6", "a shorter look, without Ray"),),
            run=_bench_feed,
            config="worldline.bench.feed:FeedBenchConfig",
        ),
        Command(
            name="bench micro",
            summary="the machine itself: products, copies, element-wise work, what a call costs; a roofline",
            about="""
            Times small pieces of work whose bytes and operations are declared, each beside what was expected of it
            before it was ever run, and places them under ceilings that the same run measured. On a CUDA device also
            host-device copies, synchronisation and a graph.
            """,
            examples=(("worldline bench micro publish=docs/phases", "and the written answers made from it"),),
            run=_bench_micro,
            config="worldline.bench.micro:MicroConfig",
        ),
        Command(
            name="bench optimise",
            summary="what each optimisation of engine and planner buys, beside what was expected of it",
            about="""
            Does the same work twice, plainly and our way, in turns; counts calls, operations and new bytes of both, so
            that no speed-up stays a mystery.
            """,
            examples=(("worldline bench optimise publish=docs/phases", "and the page in the documentation"),),
            run=_bench_optimise,
            config="worldline.bench.optimise:OptimiseConfig",
        ),
        Command(
            name="bench plan",
            summary="one plan of 300 samples x 30 iterations x 5 steps, beside a plain loop over the same noise",
            about="""
            Plans with the cross-entropy method in a world, once as `worldline plan` does and once by a plain loop that
            steps every candidate, in turns. Says how long each takes and in how many iterations both chose the same
            elites.
            """,
            examples=(("worldline bench plan checkpoint=runs/pusht-tiny", "with a world of your own"),),
            run=_bench_plan,
            config="worldline.bench.plan:PlanBenchConfig",
        ),
        Command(
            name="bench storm",
            summary="several sessions beside 200 clients that misbehave, and one under an input storm",
            about="""
            Garbage, floods, slow readers and half-open connections, against eight paced sessions whose deadlines are
            counted by the server and whose recordings are replayed afterwards.
            """,
            examples=(("worldline bench storm clients=40 seconds=20", "a smaller one"),),
            run=_bench_storm,
            config="worldline.bench.storm:StormConfig",
        ),
        Command(
            name="bench train",
            summary="one update of the lewm preset, beside plain PyTorch, eager and compiled; gradients compared",
            about="""
            Updates the same network on the same batch, as `worldline train objective=lewm` does and as one would write
            it down in PyTorch, in turns, in bfloat16 and in float32. Says how long each takes and how far apart their
            first gradients are.
            """,
            examples=(("worldline bench train compiled=false", "without the minute that torch.compile takes"),),
            run=_bench_train,
            config="worldline.bench.train:TrainBenchConfig",
        ),
        Command(
            name="bench pretrain",
            summary="what a frozen pre-trained encoder knows of the true state, beside its first weights",
            about="""
            Encodes clips of a simulator's episodes with a pre-trained encoder and with the same network as it was
            initialised, fits probes of the true state on both, and compares them on held-out episodes, paired.
            """,
            examples=(
                ("worldline bench pretrain runs/vizdoom-vit_tiny data=datasets/vizdoom_probe", "position and angle"),
            ),
            run=_bench_pretrain,
            config="worldline.bench.pretrain:PretrainBenchConfig",
            path="encoder",
            path_required=True,
        ),
        Command(
            name="bench update",
            summary="an update of a masked pre-training on one device: clips a second, share of the peak, memory",
            about="""
            Updates a video transformer on one batch that lies on the device, counts the operations of the training's
            own code, and on CUDA puts the measured peak of memory beside what `worldline plan-memory` counts.
            """,
            examples=(
                ("worldline bench update device=cuda model=vit_huge batch=16", "650 million parameters on one GPU"),
                (
                    "worldline bench update device=cuda model=vit_huge batch=32 parallel.checkpointing=true",
                    "more clips",
                ),
            ),
            run=_bench_update,
            config="worldline.bench.update:UpdateBenchConfig",
        ),
        Command(
            name="bench play",
            summary="the page in a real browser: pace, press to pixel, where each frame's time goes",
            about="""
            Starts the page and headless Chromium, presses keys at random, at 60 FPS and then in real time, and
            measures from the browser's own clock: frames a second, time between frames, press-to-pixel latency, and
            how much of each frame's busy time the ledger names. Needs Chromium and Playwright (worldline doctor).
            """,
            examples=(("worldline bench play seconds=20", "a shorter look"),),
            run=_bench_play,
            config="worldline.bench.play:PlayBenchConfig",
        ),
    )
}
