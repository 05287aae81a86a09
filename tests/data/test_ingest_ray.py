"""Ingest by Ray: the bytes of a run alone, also where one of two nodes with object stores of their own is killed."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_ingest import SMALL, tree
from video_zoo import broken_files, good_files, lay_out

from worldline.data.ingest import IngestConfig, ingest
from worldline.data.ray import INSTALL

TWO_NODES = """
import sys, threading, time
from pathlib import Path
from ray.cluster_utils import Cluster
from worldline.cli import main
source, path, *options = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80_000_000})
other = cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
cluster.wait_for_nodes()
notes = Path(path + ".partial/notes")
def kill():
    while len(list(notes.rglob("*.json"))) < 3:
        time.sleep(0.02)
    cluster.remove_node(other, allow_graceful=False)
    print("killed after", len(list(notes.rglob("*.json"))), flush=True)
killer = threading.Thread(target=kill)
killer.start()
status = main(["ingest", source, f"path={path}", f"ray={cluster.address}", *options])
killer.join()
cluster.shutdown()
sys.exit(status)
"""


needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason=f"needs Ray: {INSTALL}")


@pytest.mark.slow
@needs_ray
def test_a_cluster_on_this_machine_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for name, content in list(good_files().items())[:2]:
        (tmp_path / "source" / name).write_bytes(content)
    options = {**SMALL, "items_per_shard": 1, "codec": "h264"}
    alone = ingest(IngestConfig(source=str(tmp_path / "source"), path=str(tmp_path / "alone"), **options))
    words = [f"{key}={value}" for key, value in options.items()]
    command = [sys.executable, "-m", "worldline", "ingest", str(tmp_path / "source"), "path=clips", "ray=local", *words]
    # Ray would let everything else on the machine go before its workers
    environment = {**os.environ, "RAY_worker_niceness": "0"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert len(list((tmp_path / "clips/videos").rglob("*.mp4"))) == 2
    assert tree(tmp_path / "clips") == tree(alone)


@pytest.mark.ray
@needs_ray
def test_two_nodes_one_killed_give_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    for name, content in good_files().items():
        (tmp_path / "good" / name).write_bytes(content)
    good = {path.name: path for path in sorted((tmp_path / "good").iterdir())}
    laid = lay_out(tmp_path / "source", "colons", good, broken_files())
    options = {**SMALL, "items_per_shard": 4}
    alone = ingest(IngestConfig(source=str(laid.source), path=str(tmp_path / "alone"), **options))
    words = [f"{key}={value}" for key, value in options.items()]
    command = [sys.executable, "-c", TWO_NODES, str(laid.source), str(tmp_path / "two"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    killed_after = int(done.stdout.split("killed after ")[1].split()[0])
    assert 3 <= killed_after < 12
    assert tree(tmp_path / "two") == tree(alone)
