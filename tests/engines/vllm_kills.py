"""vLLM's own processes, and the store under them, killed at seeded random times while requests run.

    python tests/engines/vllm_kills.py [--kills 3] [--seed 16] [--deadline 60] [--store file|redis]

A server of vLLM with kvtc's connector, lossless, answers prompts over a store of few bytes. vLLM's parts are processes of
their own, and each kill takes one of them with SIGKILL, or the store:

    server      takes requests over HTTP
    scheduler   vLLM's engine core, with the connector's side that looks prompts up
    worker      computes, and loads and saves pages
    store       the directory is removed; or Redis is killed, and started again, empty, after some seconds

A victim is drawn from those that had no turn yet. After a kill of vLLM

    every request ends, with an answer or an error, and every process of vLLM, within a deadline. (vLLM's scheduler does not
    notice that its server is gone, with or without a connector: it is then sent SIGTERM, as a supervisor of services would)
    the directory is within its budget within the same deadline
    `kvtc.maintenance.verification.verify` finds no fault
    an engine that is started again gives the fixed prompts their answers, as an engine without kvtc gives them that has computed
    as many tokens of the prompt before; its log-probabilities, too, which a page with other numbers would change

After a kill of the store the engine goes on, gives the answers at once, and stores again. Answers of fixed prompts are compared
under load, too, and once more with every chunk loaded from the store.

Run in vLLM's environment; `redis` needs redis-server and the package redis there. Prints a line for every kill, and exits with 1
where something is not as it must be.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil

from kvtc.maintenance.verification import verify
from kvtc.reference import MODEL_DIRECTORY
from kvtc.store import open_place, open_store

ROOT = Path(__file__).parents[2]
_PROGRAM = "vllm.entrypoints.launchers.api_server.entry"
"""What `vllm serve` runs; the command itself refuses to start where vLLM's distribution is named otherwise, as that for CPUs is."""
START_SECONDS = 400
BUDGET = 30_000_000
"""Bytes of the directory: about 14 chunks of 256 tokens of kvtc-6m in float32."""
LEDGER_BYTES = 65536
"""At most, of what lies beside the entries."""
CACHE_BLOCKS, BLOCK_TOKENS = 110, 32
"""Of the engine's own cache, which holds some prompts only."""
FIXED_TOKENS = (600, 1100)
N_ANSWERED, N_ASKING = 16, 3
LEAST_SECONDS, MOST_SECONDS = 1.0, 8.0
"""From the first answer to a kill."""
TOLERANCE = 1e-3
"""Of log-probabilities: products of other shapes change those of float32 by about 1e-5."""
SERVER, SCHEDULER, WORKER, STORE = "server", "scheduler", "worker", "store"
TITLES = {SCHEDULER: "VLLM::EngineCore", WORKER: "VLLM::Worker"}


class Failure(Exception):
    """Something is not as it must be."""


@dataclass(frozen=True)
class Answer:
    """Greedy tokens with their log-probabilities, and how many tokens of the prompt were not computed."""

    tokens: list[int]
    logprobs: list[float]
    cached: int

    def is_like(self, other: Answer) -> bool:
        pairs = zip(self.logprobs, other.logprobs, strict=True)
        return self.tokens == other.tokens and all(abs(one - two) < TOLERANCE for one, two in pairs)


class Engine:
    """A vLLM server in a session of its own.

    Parameters:
        log: Where its output goes, at the end.
        store: URL of the connector's store; None: no connector.
        deadline: Seconds that it may take to answer a request, or to end.
    """

    def __init__(self, log: Path, store: str | None, deadline: float) -> None:
        self._port, self._deadline = free_port(), deadline
        self._family: list[psutil.Process] = []
        # float32, in which an answer hardly depends on the shapes of products.
        options = f"--port {self._port} --host 127.0.0.1 --enforce-eager --dtype float32 --max-model-len 2048"
        options += f" --max-num-seqs {N_ASKING} --block-size {BLOCK_TOKENS} --num-gpu-blocks-override {CACHE_BLOCKS}"
        options += " --enable-prompt-tokens-details --disable-uvicorn-access-log"
        arguments = ["--model", str(MODEL_DIRECTORY), *options.split()]
        if store is not None:
            arguments += ["--kv-transfer-config", json.dumps(transfer_config(store))]
        self._log = log
        with log.open("a") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _PROGRAM, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
            )

    def wait_until_ready(self) -> None:
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=5):
                    return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > end:
                    lines = self._log.read_text().splitlines()[-40:]
                    raise Failure("vLLM did not start:\n" + "\n".join(lines)) from None
                time.sleep(0.2)

    def ask(self, prompt: Sequence[int], n_tokens: int = N_ANSWERED) -> Answer:
        """Raises `OSError` if there is no answer, `TimeoutError` among them."""
        found = self._post(
            "/v1/completions",
            {
                "prompt": list(prompt),
                "max_tokens": n_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "logprobs": 0,
                "return_token_ids": True,
            },
        )
        (choice,) = found["choices"]
        details = found["usage"].get("prompt_tokens_details") or {}
        return Answer(choice["token_ids"], choice["logprobs"]["token_logprobs"], details.get("cached_tokens") or 0)

    def forget(self) -> None:
        """Empty the engine's own cache."""
        self._post("/reset_prefix_cache", {})

    def kill(self, victim: str) -> None:
        """One of its processes."""
        self._family = self._processes()
        if victim == SERVER:
            self._process.kill()
            for process in self._processes():
                process.terminate()
            return
        found = [process for process in self._family if " ".join(process.cmdline()).startswith(TITLES[victim])]
        if len(found) != 1:
            raise Failure(f"vLLM has {len(found)} processes {TITLES[victim]}; expected one")
        found[0].kill()

    def wait_for_end(self) -> int:
        """Until no process of those before the kill is left -> how many there were."""
        _, left = psutil.wait_procs(self._family, self._deadline)
        told = [" ".join(process.cmdline())[:80] for process in left]
        for process in left:
            process.kill()
        if told:
            raise Failure(f"after {self._deadline:.0f} s these processes of vLLM run still: {told}")
        return len(self._family)

    def stop(self) -> None:
        """As an operator would, and whatever is left by force."""
        family = self._processes()
        self._process.terminate()
        for process in psutil.wait_procs(family, self._deadline)[1]:
            process.kill()

    def _processes(self) -> list[psutil.Process]:
        """All of its session, which goes on when the server has died."""
        found = []
        for process in psutil.process_iter():
            with suppress(ProcessLookupError):
                if os.getsid(process.pid) == self._process.pid:
                    found.append(process)
        return found

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=self._deadline) as reply:  # noqa: S310  its own server
            return json.loads(reply.read() or "null")


class Directory:
    """A directory as the store, with a byte budget."""

    def __init__(self, scratch: Path) -> None:
        self._root = scratch / "store"
        self.url, self.place_url = f"file://{self._root}?bytes={BUDGET}", f"file://{self._root}"

    def kill(self) -> None:
        while self._root.exists():  # an engine may write into it meanwhile
            shutil.rmtree(self._root, ignore_errors=True)

    def revive(self) -> None:
        """The next entry makes it again."""

    def wait_for_budget(self, deadline: float) -> str:
        """Opening it is what the next engine does first."""
        end = time.monotonic() + deadline
        with open_store(self.url) as store:
            store.flush()
        while (n_bytes := self._bytes_on_disk()) > BUDGET + LEDGER_BYTES:
            if time.monotonic() > end:
                raise Failure(f"the directory takes {n_bytes} bytes after {deadline:.0f} s; its budget is {BUDGET}")
            time.sleep(0.5)
        return f"{n_bytes} of {BUDGET} bytes on disk"

    def close(self) -> None:
        """It goes with the folder that it is in."""

    def _bytes_on_disk(self) -> int:
        n_bytes = 0
        for file in self._root.rglob("*"):
            with suppress(FileNotFoundError):  # an engine that runs evicts
                n_bytes += file.stat().st_blocks * 512 if file.is_file() else 0
        return n_bytes


class Redis:
    """A Redis server as the store; it keeps to its budget itself."""

    def __init__(self, scratch: Path) -> None:
        self._port, self._scratch = free_port(), scratch
        self.url = self.place_url = f"redis://127.0.0.1:{self._port}"
        self.revive()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def revive(self) -> None:
        arguments = ["--port", str(self._port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._scratch)]
        arguments += ["--maxmemory", str(BUDGET), "--maxmemory-policy", "allkeys-lru"]
        self._process = subprocess.Popen(["redis-server", *arguments], stdout=subprocess.DEVNULL)
        time.sleep(1)
        if self._process.poll() is not None:
            raise Failure(f"redis-server ended with {self._process.returncode}")

    def wait_for_budget(self, deadline: float) -> str:  # noqa: ARG002  as of a directory
        return "its budget is the server's"

    def close(self) -> None:
        self.kill()


@dataclass
class Fixed:
    """A prompt with its answers: by how many of its tokens the engine had computed before."""

    prompt: list[int]
    answers: dict[int, Answer] = field(default_factory=dict)

    def check(self, answer: Answer, when: str) -> None:
        """A load that failed is counted as cached, so an answer of another number of cached tokens is right, too."""
        if not any(answer.is_like(right) for right in self.answers.values()):
            wanted = next(iter(self.answers.values()))
            raise Failure(f"{when}: a prompt of {len(self.prompt)} tokens has {answer}; expected {wanted}")


class Traffic:
    """Requests of some clients at a time: the fixed prompts and others, which push each other out of the store. A client ends
    with its first error, which is a failure unless `may_fail` is set."""

    def __init__(self, engine: Engine, fixed: Sequence[Fixed], ids: Sequence[int], seed: str, deadline: float) -> None:
        self._engine, self._fixed, self._ids, self._deadline = engine, fixed, ids, deadline
        self._ends = threading.Event()
        self.may_fail = threading.Event()
        self.n_answered = self.n_cached = 0
        self.failures: list[str] = []
        self._clients = [
            threading.Thread(target=self._run, args=(f"{seed}/{client}",), daemon=True) for client in range(N_ASKING)
        ]

    def __enter__(self) -> Traffic:
        for client in self._clients:
            client.start()
        return self

    def wait_for_answer(self) -> None:
        """The first one."""
        end = time.monotonic() + self._deadline
        while not self.n_answered and not self.failures and time.monotonic() < end:
            time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        end = time.monotonic() + self._deadline + 5
        for client in self._clients:
            client.join(max(0.0, end - time.monotonic()))
            if client.is_alive():
                self.failures.append("a client waits beyond the deadline")
        if self.failures:
            raise Failure("; ".join(self.failures))

    def _run(self, seed: str) -> None:
        generator = random.Random(seed)
        while not self._ends.is_set():
            fixed = generator.choice(self._fixed) if generator.random() < 0.5 else None
            first = generator.randrange(len(self._ids) - 1500)
            prompt = fixed.prompt if fixed is not None else self._ids[first : first + generator.randrange(280, 1100)]
            try:
                answer = self._engine.ask(prompt)
            except TimeoutError:
                self.failures.append(f"a request has no answer after {self._deadline} s")
                return
            except (OSError, HTTPException) as error:
                if not self.may_fail.is_set():
                    self.failures.append(f"a request failed: {error!r}")
                return
            self.n_answered += 1
            self.n_cached += answer.cached
            try:
                if fixed is not None:
                    fixed.check(answer, "under load")
            except Failure as failure:
                self.failures.append(str(failure))
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=16)
    parser.add_argument("--deadline", type=float, default=60, help="seconds; more beside other work")
    parser.add_argument("--store", choices=("file", "redis"), default="file")
    options = parser.parse_args()
    ids = token_ids()
    starts = [sum(FIXED_TOKENS[:index]) for index in range(len(FIXED_TOKENS))]
    fixed = [Fixed(ids[first : first + length]) for first, length in zip(starts, FIXED_TOKENS, strict=True)]
    with tempfile.TemporaryDirectory() as made:
        scratch = Path(made)
        log = Path(os.environ.get("KVTC_ENGINE_LOGS", scratch)) / "vllm-kills.log"
        with running(Engine(log, None, options.deadline)) as engine:
            learn(engine, fixed)
        store = Directory(scratch) if options.store == "file" else Redis(scratch)
        try:
            run(options, store, log, fixed, ids)
        finally:
            store.close()
    print("all as it must be")


def run(
    options: argparse.Namespace, store: Directory | Redis, log: Path, fixed: Sequence[Fixed], ids: Sequence[int]
) -> None:
    """Kill after kill; an engine that died is followed by another one."""
    generator = random.Random(options.seed)
    victims: list[str] = []
    engine = None
    try:
        for number in range(options.kills + 1):
            if engine is None:
                engine = Engine(log, store.url, options.deadline)
                engine.wait_until_ready()
            print(check_answers(engine, fixed, options.deadline), flush=True)
            if number == options.kills:
                return
            victims = victims or generator.sample([SERVER, SCHEDULER, WORKER, STORE], 4)
            victim, delay = victims.pop(), generator.uniform(LEAST_SECONDS, MOST_SECONDS)
            with Traffic(engine, fixed, ids, f"{options.seed}/{number}", options.deadline) as traffic:
                traffic.wait_for_answer()
                time.sleep(delay)
                begin = time.monotonic()
                if victim == STORE:
                    disturb(store, delay)
                else:
                    traffic.may_fail.set()
                    engine.kill(victim)
            told = f"kill {number + 1}: the {victim} after {delay:.1f} s"
            told += f", {traffic.n_answered} requests with {traffic.n_cached} tokens cached"
            if victim != STORE:
                told += f"; {engine.wait_for_end()} processes ended within {time.monotonic() - begin:.1f} s"
                engine = None
            told += f"; {store.wait_for_budget(options.deadline)}"
            if (seconds := time.monotonic() - begin) > options.deadline:
                raise Failure(f"{told}: {seconds:.0f} s after the kill; expected {options.deadline:.0f} at most")
            print(f"{told}; {check_entries(store)}", flush=True)
    finally:
        if engine is not None:
            engine.stop()


def disturb(store: Directory | Redis, seconds: float) -> None:
    """Take the store away, and give it back, for so long each."""
    store.kill()
    time.sleep(seconds)
    store.revive()
    time.sleep(seconds)


def check_entries(store: Directory | Redis) -> str:
    with open_place(store.place_url) as place:
        found = verify(place)
    if found.faults:
        raise Failure(f"entries are damaged: {found.faults}")
    return f"{found.n_entries} entries of {found.n_bytes} bytes without a fault"


def learn(engine: Engine, fixed: Sequence[Fixed]) -> None:
    """The answers without kvtc and kills: of each prompt, for each number of tokens that kvtc can load, as the engine's own cache
    gives them."""
    for one in fixed:
        n_whole = len(one.prompt) // BLOCK_TOKENS * BLOCK_TOKENS
        for n_cached in [*range(0, len(one.prompt), 256), n_whole]:
            engine.forget()
            if n_cached:
                engine.ask(one.prompt[:n_cached], 1)
            answer = engine.ask(one.prompt)
            one.answers[answer.cached] = answer
        n_answers = len({tuple(answer.tokens) for answer in one.answers.values()})
        print(
            f"a prompt of {len(one.prompt)} tokens: {n_answers} answers with {sorted(one.answers)} tokens cached",
            flush=True,
        )


def check_answers(engine: Engine, fixed: Sequence[Fixed], deadline: float) -> str:
    """Ask each fixed prompt alone, as the store was left, and then until the store gives all of its chunks, with the engine's own
    cache emptied before each time."""
    told = []
    for one in fixed:
        answer = engine.ask(one.prompt)
        one.check(answer, "asked alone")
        told.append(f"{answer.cached} of {len(one.prompt)} tokens were there")
    end = time.monotonic() + deadline
    for one in fixed:
        n_loaded = 0
        while n_loaded < len(one.prompt) // 256 * 256:
            if time.monotonic() > end:
                raise Failure(f"after {deadline:.0f} s the store gives {n_loaded} tokens of {len(one.prompt)}")
            engine.forget()
            answer = engine.ask(one.prompt)
            one.check(answer, "loaded")
            n_loaded = answer.cached
    return f"  the fixed prompts have their answers; {', '.join(told)}, and all chunks later"


@contextmanager
def running(engine: Engine) -> Iterator[Engine]:
    try:
        engine.wait_until_ready()
        yield engine
    finally:
        engine.stop()


def transfer_config(store: str) -> dict[str, Any]:
    return {
        "kv_connector": "KvtcConnector",
        "kv_connector_module_path": "kvtc.engines.vllm.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"kvtc.store": store, "kvtc.lossless": True},
    }


def token_ids() -> list[int]:
    """Of this project's documents."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIRECTORY, local_files_only=True)
    text = "\n".join(file.read_text() for file in sorted((ROOT / "docs").glob("*.md")))
    ids: list[int] = tokenizer(text).input_ids
    return ids


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))  # what was started is then ended, too
    try:
        main()
    except (Failure, OSError) as failure:  # also a request without an answer
        sys.exit(f"FAILED: {failure!r}")
