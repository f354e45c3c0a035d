"""What the benchmarks of vLLM share: a process of its own for each engine, the connector's configuration, what is stored."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_SETTLED_SECONDS = 3.0
_PATIENCE_SECONDS = 60
_SHOWN_OF_LOG = 3000


def run_alone(program: str, name: str, task: dict[str, Any]) -> dict[str, Any] | None:
    """What a program writes over the task that it is given as `--process FILE`, beside its own command line. None where the
    engine fails, and the end of its log is shown: the other settings stay of use.

    Parameters:
        program: A module, which runs in a process of its own.
        name: Of the setting, for the message.
        task: What JSON can hold. It is given a folder of its own for a store, as "store".
    """
    with tempfile.TemporaryDirectory() as scratch:
        file, log = Path(scratch) / "task.json", Path(scratch) / "log"
        file.write_text(json.dumps(task | {"store": f"{scratch}/store"}))
        command = [sys.executable, "-m", program, *sys.argv[1:], "--process", str(file)]
        with log.open("w") as output:
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            end = log.read_text()[-_SHOWN_OF_LOG:]
            print(f"{name}: the engine ended with {done.returncode}:\n{end}", file=sys.stderr, flush=True)
            return None
        found: dict[str, Any] = json.loads(file.read_text())
        return found


def rate_options(rate: str, calibration: str | None) -> dict[str, Any]:
    """The options of kvtc for `lossless`, or for `ratio=16`, `kl=0.01` and the like with a calibration."""
    name, _, value = rate.partition("=")
    if name == "lossless":
        return {"kvtc.lossless": True}
    return {f"kvtc.{name}": float(value), "kvtc.calibration": calibration}


def connector(store: str, rate: str, calibration: str | None) -> dict[str, Any]:
    """The configuration of the connector over a folder."""
    return {
        "kv_connector": "KvtcConnector",
        "kv_connector_module_path": "kvtc.engines.vllm.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"kvtc.store": f"file://{store}", **rate_options(rate, calibration)},
    }


def offloading(tier: dict[str, Any], host_bytes: int, **more: int) -> dict[str, Any]:
    """The configuration of vLLM's native offloading over a secondary tier, on CPUs.

    host_bytes: of the tier in host memory before it.
    """
    extra = {
        "spec_name": "CpuTieringSpec",
        "spec_module_path": "tests.engines.vllm_cpu_spec",
        "cpu_bytes_to_use": host_bytes,
        "secondary_tiers": [tier],
    }
    return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra | more}


def uncompressed(store: str) -> dict[str, Any]:
    """vLLM's own secondary tier of files."""
    return {"type": "fs", "root_dir": store}


def stored(folder: str, more_than: int = -1) -> int:
    """Bytes of all files below a folder, once there are more and what is saved in the background has grown no more for a while."""
    end, last = time.monotonic() + _PATIENCE_SECONDS, -1
    while True:
        now = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        if (now == last and now > more_than) or time.monotonic() > end:
            return now
        last = now
        time.sleep(_SETTLED_SECONDS)


def token_bytes(model_config: Any) -> int:
    """Of the keys and values of one token in 16 bits. model_config: of the engine."""
    n_layers, n_heads = model_config.get_total_num_hidden_layers(), model_config.get_total_num_kv_heads()
    return int(2 * 2 * n_layers * n_heads * model_config.get_head_size())
