"""What this machine can do, and the exact line that gets what is missing."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from worldline.core.errors import WorldlineError

WANTED_DISK_BYTES = 2e9
WANTED_MEMORY_BYTES = 3e9


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding. `broken` is something needed; `missing` only closes a door, which `finding` names."""

    name: str
    state: Literal["ok", "missing", "broken"]
    finding: str
    remedy: str = ""
    """The line to type, or empty."""


def examine(port: int) -> list[Check]:
    """Look at this machine. `port` is where the page is to be served."""
    looks: tuple[Callable[[], Check], ...] = (
        _python,
        _torch,
        _processor,
        _gpu,
        _video,
        _two_room,
        _pusht,
        _control_suite,
        _vizdoom,
        _worlds,
        _disk,
        _memory,
        lambda: _port(port),
        _browser,
        lambda: _tool("C++ compiler", "g++", "apt-get install g++", "for code that is exported to C++"),
        lambda: _tool(
            "Arm compiler",
            "arm-none-eabi-gcc",
            "apt-get install --no-install-recommends gcc-arm-none-eabi libnewlib-arm-none-eabi "
            "libstdc++-arm-none-eabi-newlib",
            "for code that is exported to microcontrollers",
        ),
        lambda: _tool(
            "Arm emulator",
            "qemu-system-arm",
            "apt-get install --no-install-recommends qemu-system-arm",
            "for running exported code without a board",
        ),
    )
    return [look() for look in looks]


def report(checks: list[Check]) -> str:
    """Return the findings as lines, the remedy under each that has one, and a verdict."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"  {check.state:<7}  {check.name:<{width}}  {check.finding}")
        if check.remedy and check.state != "ok":
            lines.append(f"  {'':<7}  {'':<{width}}  get it: {check.remedy}")
    broken = [check.name for check in checks if check.state == "broken"]
    missing = [check.name for check in checks if check.state == "missing"]
    verdict = f"broken: {', '.join(broken)}" if broken else "everything needed is here"
    if missing:
        verdict += f"; optional and missing: {', '.join(missing)}"
    return "\n".join([*lines, "", verdict])


def _python() -> Check:
    good = (3, 10) <= sys.version_info < (3, 13)
    place = f"{platform.python_version()} at {sys.executable}"
    return Check(
        name="Python",
        state="ok" if good else "broken",
        finding=place if good else f"{place}; 3.10 to 3.12 is needed",
        remedy="make setup PYTHON=python3.12",
    )


def _torch() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check(name="torch", state="broken", finding=f"does not import: {error}", remedy=_pip("torch==2.13.0"))
    return Check(name="torch", state="ok", finding=f"{torch.__version__}, {torch.get_num_threads()} threads")


def _processor() -> Check:
    from torch.backends import cpu

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags: set[str] = set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith(("flags", "Features")):
                flags = set(line.split(":", 1)[1].split())
                break
    bf16 = "bfloat16 in hardware" if flags & {"amx_bf16", "avx512_bf16", "bf16"} else "no bfloat16 in hardware"
    return Check(name="processor", state="ok", finding=f"{cores} cores, {cpu.get_cpu_capability()}, {bf16}")


def _gpu() -> Check:
    import torch

    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        finding = ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in found)
        return Check(name="CUDA GPU", state="ok", finding=finding)
    if shutil.which("nvidia-smi"):
        return Check(
            name="CUDA GPU",
            state="missing",
            finding=f"a driver is here, but torch {torch.__version__} cannot use it",
            remedy="rm -rf .venv && make setup TORCH_INDEX=",
        )
    return Check(name="CUDA GPU", state="missing", finding="none; nothing in this version needs one")


def _video() -> Check:
    try:
        import av

        from worldline.data.video import CODEC

        encoders = {name for name in (CODEC, "libsvtav1") if _can_encode(name)}
    except ImportError as error:
        return Check(
            name="video", state="broken", finding=f"PyAV does not import: {error}", remedy=_pip(*_needed("av"))
        )
    library = f"PyAV {av.__version__}"
    if CODEC in encoders:
        return Check(name="video", state="ok", finding=f"{library} with {', '.join(sorted(encoders))}")
    return Check(
        name="video",
        state="broken",
        finding=f"{library} has no {CODEC}, so datasets cannot be written",
        remedy=_pip("--force-reinstall", "--only-binary=:all:", *_needed("av")),
    )


def _can_encode(name: str) -> bool:
    from av.codec import Codec
    from av.codec.codec import UnknownCodecError

    try:
        Codec(name, "w")
    except UnknownCodecError:
        return False
    return True


def _two_room() -> Check:
    from worldline.data.simulators import make_simulator

    shape = make_simulator("two_room").reset(0).frame.shape
    return Check(name="two_room", state="ok", finding=f"simulates, pictures {shape[0]}x{shape[1]}")


def _pusht() -> Check:
    use = "its shipped world plays all the same, without the true one beside it"
    return _simulator("pusht", "gym_pusht", ("gym-pusht",), use, _pip(*_needed("gym-pusht", "pymunk", extra="envs")))


def _control_suite() -> Check:
    use = "point_mass needs the same"
    install = _pip(*_needed("dm_control", "mujoco", extra="envs"))
    return _simulator("reacher", "dm_control", ("dm_control", "mujoco"), use, install)


def _vizdoom() -> Check:
    from worldline.data.vizdoom import REQUIREMENT

    # without its requirements: one of them would overwrite a package of PushT
    return _simulator("vizdoom", "vizdoom", ("vizdoom",), "only that world is closed", _pip("--no-deps", REQUIREMENT))


def _simulator(name: str, package: str, distributions: tuple[str, ...], use: str, install: str) -> Check:
    """Make a simulator and look at its first picture; `use` says what is lost without it."""
    from worldline.data.simulators import make_simulator

    try:
        shape = make_simulator(name).reset(0).frame.shape
    except WorldlineError as error:
        reason, _, remedy = str(error).partition("; run: ")
        remedy = remedy if find_spec(package) else install
        return Check(name=name, state="missing", finding=f"{reason}; {use}", remedy=remedy)
    versions = ", ".join(f"{package} {version(package)}" for package in distributions)
    return Check(name=name, state="ok", finding=f"{versions}, pictures {shape[0]}x{shape[1]}")


def _worlds() -> Check:
    from worldline.model.checkpoint import load_world, shipped_worlds

    names = shipped_worlds()
    try:
        for name in names:
            load_world(name)
    except WorldlineError as error:
        return Check(name="shipped worlds", state="broken", finding=str(error), remedy="install worldline again")
    if names:
        return Check(name="shipped worlds", state="ok", finding=", ".join(names))
    return Check(name="shipped worlds", state="missing", finding="none in this version", remedy="worldline quickstart")


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    good = free >= WANTED_DISK_BYTES
    finding = f"{free / 1e9:.0f} GB free here" + ("" if good else f"; {WANTED_DISK_BYTES / 1e9:.0f} GB are wanted")
    return Check(name="disk", state="ok" if good else "broken", finding=finding)


def _memory() -> Check:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return Check(name="memory", state="ok", finding="not known on this system")
    sizes = {
        line.split(":")[0]: int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if "kB" in line
    }
    available = sizes["MemAvailable"]
    good = available >= WANTED_MEMORY_BYTES
    finding = f"{available / 2**30:.1f} of {sizes['MemTotal'] / 2**30:.1f} GiB available"
    if not good:
        finding += f"; training wants {WANTED_MEMORY_BYTES / 1e9:.0f} GB"
    return Check(name="memory", state="ok" if good else "missing", finding=finding)


def _port(port: int) -> Check:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return Check(
                name="port",
                state="missing",
                finding=f"{port} on 127.0.0.1 cannot be used ({error.strerror})",
                remedy=f"worldline play port={port + 1}",
            )
    return Check(name="port", state="ok", finding=f"{port} on 127.0.0.1 is free")


def _browser() -> Check:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    try:
        driver = f"playwright {version('playwright')}"
    except PackageNotFoundError:
        driver = ""
    if chromium and driver:
        return Check(name="browser test", state="ok", finding=f"{chromium}, {driver}")
    lacking = " and ".join(name for name, found in (("chromium", chromium), ("playwright", driver)) if not found)
    lines = ([] if chromium else ["apt-get install chromium"]) + (
        [] if driver else [_pip(*_needed("playwright", extra="dev"))]
    )
    finding = f"{lacking} not found; only the browser test and bench need it, any browser plays"
    return Check(name="browser test", state="missing", finding=finding, remedy=" && ".join(lines))


def _tool(name: str, program: str, remedy: str, use: str) -> Check:
    found = shutil.which(program)
    if found:
        return Check(name=name, state="ok", finding=found)
    return Check(name=name, state="missing", finding=f"no {program}, {use} (not in this version yet)", remedy=remedy)


def _needed(*names: str, extra: str = "") -> list[str]:
    """Return worldline's own requirements, of an extra or outside all, those that begin with `names` if given."""
    found = []
    for line in requires("worldline") or []:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        in_extra = marker.replace("'", '"') == (f'extra == "{extra}"' if extra else "")
        if in_extra and (not names or requirement.startswith(names)):
            found.append(requirement)
    return found


def _pip(*words: str) -> str:
    return shlex.join([sys.executable, "-m", "pip", "install", *words])
