"""The `worldline` command: the only place that knows Hydra.

`worldline COMMAND [PATH] [option=value ...]`. Options are Hydra overrides of `conf/COMMAND.yaml`, on top of the
defaults of the command's config dataclass; what comes out is that dataclass, checked. Nothing heavy is imported before
a command needs it, so that help answers at once.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from worldline import __version__
from worldline.commands import COMMANDS, Command
from worldline.core.errors import WorldlineError

CONF = Path(__file__).parent / "conf"
_ANY = "..."  # in help, a value that depends on what is asked for
_SWEEP = "--multirun"
_ROOM = "make room and give the same command again: what is finished is kept"
_PLACE = "choose a place that can be written to"
_MENDABLE = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "lift the limit on the size of files (ulimit -f), or choose another place",
    errno.EACCES: _PLACE,
    errno.EPERM: _PLACE,
    errno.EROFS: _PLACE,
    errno.ENOTDIR: _PLACE,
    errno.EISDIR: _PLACE,
    errno.ENAMETOOLONG: _PLACE,
}
"""What a person can do about errors of the file system; others are bugs and show their traceback."""


def main(argv: list[str] | None = None) -> int:
    """Run one command line; return 0 when done, 1 for a difference, 2 for a mistake in the request, 130 on Ctrl-C."""
    arguments = sys.argv[1:] if argv is None else argv
    # Read when torch loads. Threads that wait by spinning are dozens of times slower than one as soon as anything else
    # runs on the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return _dispatch(arguments)
    except WorldlineError as error:
        print(f"worldline: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` has closed it: flush into nothing
        return 0
    except OSError as error:
        if error.errno not in _MENDABLE:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"worldline: {where}{os.strerror(error.errno)}; {_MENDABLE[error.errno]}", file=sys.stderr)
        return 2


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(_overview() if len(arguments) < 2 else _help(_command(" ".join(arguments[1:]))))
        return 0
    if arguments[0] in ("--version", "-V"):
        print(f"worldline {__version__}")
        return 0
    length = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    command = _command(" ".join(arguments[:length]))
    words = arguments[length:]
    if "--help" in words or "-h" in words:
        print(_help(command))
        return 0
    flags = {_SWEEP if word == "-m" else word for word in words if word.startswith("-")}
    overrides = [word for word in words if not word.startswith("-") and _is_override(word)]
    paths = [word for word in words if not word.startswith("-") and not _is_override(word)]
    _check_words(command, flags, overrides, paths)
    config: Any = paths[0] if paths else ""
    if command.config and _SWEEP not in flags:
        config = _configure(command, paths, overrides)
    try:
        if _SWEEP in flags:
            return _sweep(command, flags - {_SWEEP}, overrides, paths)
        return command.run(config, flags)
    except KeyboardInterrupt:
        kept = command.kept.format(**vars(config)) if command.kept and _SWEEP not in flags else ""
        print(f"\nworldline: stopped. {kept}".rstrip(), file=sys.stderr)
        return 130


def _command(name: str) -> Command:
    from worldline.config import did_you_mean

    if name not in COMMANDS:
        raise WorldlineError(f"unknown command {name!r}{did_you_mean(name, COMMANDS)} (see worldline --help)")
    return COMMANDS[name]


def _is_override(word: str) -> bool:
    return "=" in word and not Path(word).exists()


def _check_words(command: Command, flags: set[str], overrides: list[str], paths: list[str]) -> None:
    from worldline.config import did_you_mean

    for flag in sorted(flags - set(command.flags)):
        known = [*command.flags, "--help"]
        raise WorldlineError(f"{command.name} has no flag {flag!r}{did_you_mean(flag, known)}")
    if overrides and not command.config:
        raise WorldlineError(
            f"{command.name} takes no options, got {overrides[0]!r} (see worldline {command.name} --help)"
        )
    if len(paths) > bool(command.path):
        extra = paths[bool(command.path)]
        wanted = f"one {command.path.upper()}" if command.path else "no path"
        options = ", only option=value pairs" if command.config and not command.path else ""
        raise WorldlineError(f"{command.name} takes {wanted}{options}; got {extra!r}")
    if command.path_required and not paths and not any(word.startswith(f"{command.path}=") for word in overrides):
        raise WorldlineError(f"{command.name} needs a {command.path.upper()}, as in: {command.examples[0][0]}")


# Configuration


def _load(reference: str) -> Any:
    module, name = reference.split(":")
    return getattr(import_module(module), name)


def configure(name: str, overrides: list[str]) -> Any:
    """Return the config dataclass of a command for options as they are typed.

    Raises:
        WorldlineError: an option is not one of the command's, or cannot have that value.
    """
    return _configure(_command(name), [], overrides)


def _configure(command: Command, paths: list[str], overrides: list[str]) -> Any:
    """Return the command's config dataclass from its defaults, its YAML and the command line."""
    from worldline.config import build, did_you_mean, flatten

    known = flatten(_compose(command, []))
    groups = _groups(command)
    hydra_overrides, fixed = [], {}
    for word in overrides:
        key, value = word.split("=", 1)
        key = key.removeprefix(f"{command.name}.")  # `worldline train train.steps=5` is `worldline train steps=5`
        if key in groups and value not in groups[key]:
            if key != "data" or not ("/" in value or Path(value).exists()):
                or_path = ", nor a path" if key == "data" else ""
                raise WorldlineError(
                    f"{key}={value}: not one of its presets{or_path}{did_you_mean(value, groups[key])}"
                )
            fixed[key] = value
        elif key in known and key not in groups and (CONF / key).is_dir():
            fixed[key] = value  # an option of the name of other commands' presets, which Hydra would look for
        elif key in groups or key in known or any(name.startswith(f"{key}.") for name in known):
            hydra_overrides.append(f"{key}={value}")
        else:
            near = did_you_mean(key, [*groups, *known])
            raise WorldlineError(f"{command.name}: unknown option {key!r}{near} (see worldline {command.name} --help)")
    if paths:
        fixed[command.path] = paths[0]
    return build(_load(command.config), _compose(command, hydra_overrides, fixed))


def _sweep(command: Command, flags: set[str], overrides: list[str], paths: list[str]) -> int:
    """Run the command once for each combination of swept values, each with a path of its own."""
    from worldline.sweep import Job, run_jobs

    if "RANK" in os.environ:
        raise WorldlineError("torchrun starts the ranks of one run, not a sweep; leave one of the two")
    jobs = []
    for picked, fixed in _split(command, overrides):
        config = _configure(command, paths, [*fixed, *picked])  # a mistake in the last job is told before the first
        name = "-".join(re.sub(r"[^\w.-]+", "_", word) for word in picked)
        path = f"{config.path}-{name}"
        kept = [word for word in (*fixed, *picked) if not word.startswith("path=")]
        words = (*command.name.split(), *paths, *sorted(flags), *kept, f"path={path}")
        jobs.append(Job(picked, words, path))
    if len({job.path for job in jobs}) < len(jobs):
        raise WorldlineError(f"{command.name}: two jobs of this sweep are the same; give every value once")
    return run_jobs(jobs)


def _split(command: Command, overrides: list[str]) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Return the swept options of each job, as Hydra's own sweeper deals them out, and the others as typed."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    swept, fixed = [], []
    for word in overrides:
        with suppress(HydraException):  # a path, or a mistake that composing will tell of
            parsed = OverridesParser.create().parse_override(word.removeprefix(f"{command.name}."))
            if parsed.is_sweep_override():
                swept.append(parsed)
                continue
        fixed.append(word)
    keys = [parsed.get_key_element() for parsed in swept]
    if not keys or "path" in keys:
        wanted = "each job gets a path of its own: sweep another option" if keys else "give an option several values"
        raise WorldlineError(f"{command.name} {_SWEEP}: {wanted}, as in seed=0,1,2")
    try:
        (jobs,) = BasicSweeper.split_arguments(swept, None)
    except HydraException as error:
        raise WorldlineError(f"{command.name} {_SWEEP}: {error}; write the values as seed=0,1,2") from None
    return [(tuple(job), tuple(fixed)) for job in jobs]


def _compose(command: Command, overrides: list[str], fixed: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the command's options as plain values.

    `fixed` are taken as they are written, paths for example. A PATH that is not given, as in help, is `_ANY`.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException

    from worldline.config import defaults

    problems: list[WorldlineError] = []  # of resolvers: OmegaConf would wrap them in words of its own

    def trained_on(checkpoint: str) -> str:
        try:
            return _trained_on(checkpoint)
        except WorldlineError as error:
            problems.append(error)
            return ""

    spelled = _spelled(command)
    words = [word.split("=", 1) for word in overrides]
    overrides = [f"{spelled.get(key, key)}={value}" for key, value in words]
    GlobalHydra.instance().clear()
    ConfigStore.instance().store(name=f"{_file_stem(command)}_defaults", node=defaults(_load(command.config)))
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose(_file_stem(command), overrides, return_hydra_config=True)
        chosen = {name.rsplit("@", 1)[-1]: preset for name, preset in composed.hydra.runtime.choices.items()}
        # For default places: ${name:PATH} is the last part of a path, ${preset:GROUP} the preset chosen from a group.
        OmegaConf.register_new_resolver("name", lambda path: Path(path).resolve().name, replace=True)
        OmegaConf.register_new_resolver("preset", lambda group: chosen[group], replace=True)
        OmegaConf.register_new_resolver("trained_on", trained_on, replace=True)
        with open_dict(composed):
            del composed["hydra"]
            if command.path in list(composed) and OmegaConf.is_missing(composed, command.path):
                composed[command.path] = _ANY
            composed.update(fixed or {})
        values = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        reason = str(error).strip().splitlines()[0]
        if reason.startswith("Ambiguous value"):
            reason = f"several values; a list is written [0,1], a sweep wants {_SWEEP} before it"
        raise WorldlineError(f"{command.name}: cannot read {' '.join(overrides)!r}: {reason}") from None
    if problems:
        raise problems[0]
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _trained_on(checkpoint: str) -> str:
    """Return the dataset that a checkpoint was trained on, by the place it had then."""
    from worldline.model.checkpoint import read_card
    from worldline.model.foreign import is_foreign

    if checkpoint == _ANY:
        return _ANY
    if is_foreign(checkpoint):
        raise WorldlineError(f"{checkpoint} is somebody else's model and does not say on which data; give data=PATH")
    path = str(read_card(checkpoint)["training"].get("config", {}).get("data", ""))
    if not Path(path).is_dir() or not path:
        raise WorldlineError(f"{checkpoint} was trained on {path or 'unknown data'}, not found here; give data=PATH")
    return path


def _file_stem(command: Command) -> str:
    return command.name.replace(" ", "_")


def _groups(command: Command) -> dict[str, list[str]]:
    """Return the presets that can be chosen: name of the group -> names of its files."""
    folders = {name: spelled.split("@")[0] for name, spelled in _spelled(command).items()}
    return {name: sorted(file.stem for file in (CONF / folder).glob("*.yaml")) for name, folder in folders.items()}


def _spelled(command: Command) -> dict[str, str]:
    """Return how Hydra spells each group: its folder and, where the options go elsewhere, FOLDER@OPTION."""
    from omegaconf import OmegaConf

    listed = OmegaConf.to_container(OmegaConf.load(CONF / f"{_file_stem(command)}.yaml"))
    assert isinstance(listed, dict)
    names = [next(iter(entry)) for entry in listed["defaults"] if isinstance(entry, dict)]
    return {name.rsplit("@", 1)[-1]: name for name in names}


# Help


def _overview() -> str:
    shown = [command for command in COMMANDS.values() if " " not in command.name]
    width = max(len(command.name) for command in shown)
    lines = [
        "worldline: train latent world models, measure how far each can be trusted, play them, replay them to the bit.",
        "",
        "usage: worldline COMMAND [PATH] [option=value ...] [--flags]",
        "",
        *(f"  {command.name:<{width}}  {command.summary}" for command in shown),
        "",
        "First steps:",
        "  worldline doctor                 what this machine can do",
        "  worldline play                   the shipped world in your browser",
        "  worldline quickstart             collect, train, evaluate and play a small world, in minutes",
        "",
        "worldline COMMAND --help explains a command with its options, their defaults and their meaning.",
        "Exit status: 0 done, 1 a verification differs, 2 a mistake in the request, 130 interrupted.",
    ]
    return "\n".join(lines)


def _help(command: Command) -> str:
    path = f" {command.path.upper()}" if command.path_required else f" [{command.path.upper()}]" if command.path else ""
    flags = "".join(f" [{flag}]" for flag in command.flags)
    options = " [option=value ...]" if command.config else ""
    width = shutil.get_terminal_size((120, 24)).columns
    lines = [f"usage: worldline {command.name}{path}{options}{flags}", ""]
    for paragraph in command.about.strip().split("\n\n"):
        lines += [*textwrap.wrap(" ".join(paragraph.split()), min(width, 100)), ""]
    lines += ["Examples:"]
    longest = max(len(line) for line, _ in command.examples)
    lines += [f"  {line:<{longest}}  {meaning}" for line, meaning in command.examples]
    if command.flags:
        lines += ["", "Flags:", *_table(command.flags.items(), width)]
    if command.config:
        lines += _options_help(command, width)
    return "\n".join(lines)


def _options_help(command: Command, width: int) -> list[str]:
    from worldline.config import choices, flatten, meanings

    cls, groups = _load(command.config), _groups(command)
    values, told, allowed = flatten(_compose(command, [])), meanings(cls), choices(cls)
    lines = []
    if groups:
        lines += ["", "Presets (each sets some of the options below):"]
        lines += [
            f"  {name}={'|'.join(options)}{'|PATH' if name == 'data' else ''}" for name, options in groups.items()
        ]
    rows = []
    first: dict[tuple[str, str], str] = {}
    for name, value in values.items():
        meaning = told.get(name, "")
        twin = first.setdefault((name.rsplit(".", 1)[-1], meaning), name)
        if meaning and twin != name:
            meaning = f"As {twin}."
        elif name in allowed:
            meaning = f"{' | '.join(map(str, allowed[name]))}. {meaning}"
        rows.append((f"{name}={_shown(value)}", re.sub(r"\bNone\b", "null", meaning.strip())))
    return [*lines, "", "Options, with their defaults:", *_table(rows, width)]


def _table(rows: Iterable[tuple[str, str]], width: int) -> list[str]:
    rows = list(rows)
    column = min(max(len(left) for left, _ in rows), 46)
    lines = []
    for left, right in rows:
        wrapped = textwrap.wrap(right, max(width - column - 4, 30)) or [""]
        lines.append(f"  {left:<{column}}  {wrapped[0]}".rstrip())
        lines += [" " * (column + 4) + more for more in wrapped[1:]]
    return lines


def _shown(value: Any) -> str:
    if value in ("???", _ANY):
        return "..."
    if value is None or isinstance(value, bool):
        return str({None: "null", True: "true", False: "false"}[value])
    return "[" + ",".join(map(str, value)) + "]" if isinstance(value, list) else str(value)
