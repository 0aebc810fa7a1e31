"""forge-train --doctor: what tends to spoil a first evening, a line each, measured here and now.

It changes no setting and leaves no file. The choice is of what people report: RTX 4090s whose
copies arrive as zeros, or that hang NCCL (NVIDIA/nccl-tests issue 117), a container's 64 MB of
/dev/shm (NVIDIA/nccl issue 342), no Python.h for Triton (pytorch issue 129351).
"""

import os
import random
import resource
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import permutations
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.errors import ForgeError, counted
from pipeline.shards import check_header, load_index
from trainer.ranks import Ranks, on_all, process_group
from trainer.report import amount, peak_flops, product_flops, say

Found = tuple[str, str]  # what was measured, and what to do; "" where all is well
LIMIT_SECONDS = 60.0  # a check that takes longer hangs
WINDOW_BYTES = 2050  # 1,025 tokens
UNTESTED = "not tested"
DRIVER = "restart; then install a driver and a torch that fit: https://pytorch.org/get-started"
P2P = "export NCCL_P2P_DISABLE=1, or try a newer driver; NCCL_DEBUG=INFO says more"
SLOWED = 0x8 | 0x20 | 0x40 | 0x80  # of nvmlClocksEventReasons: by heat or by the power supply


def examine(data: Path | None, out: Path | None) -> bool:
    """Print what is found, on rank 0 and of its machine; returns whether a run can work here."""
    ranks = Ranks.from_environment()
    if not ranks.is_first:  # rank 0 comes when it has done the rest; torchrun ends these with it
        return bool(exchange(ranks))
    checks: list[tuple[str, Callable[[], Found], str]] = [  # the last: if it fails or hangs
        ("GPUs", cards, DRIVER),  # before this process takes memory of its own
        ("torch", torch_and_driver, DRIVER),
        ("compiler", compiler, "apt install gcc python3-dev"),
        ("speed", full_load, DRIVER),
        ("P2P", copies, P2P),
        ("system", system, ""),
        ("--out", partial(writing, out), "name another disk"),
        ("--data", partial(reading, data), "copy the shards to another disk"),
        ("ranks", partial(exchange, ranks), P2P),
    ]
    kinds = [tell(*check) for check in checks]
    problems, notes = kinds.count("problem"), kinds.count("note")
    verdict = f"mend {counted(problems, 'problem')} first" if problems else "a run can work here"
    say(f"{verdict}; {counted(notes, 'note')} to look at" if notes else verdict)
    return not problems


def tell(name: str, check: Callable[[], Found], cure: str) -> str:
    """Print what a check finds; returns its kind. A hang ends the process with code 1."""

    def show(kind: str, what: str, fix: str) -> None:
        say(f"{kind:8} {name:9} {what}" + f"\n{'':19}{fix}" * bool(fix))

    def give_up() -> None:
        show("problem", f"no answer within {LIMIT_SECONDS:g} s", cure)
        os._exit(1)

    timer = threading.Timer(LIMIT_SECONDS, give_up)
    timer.start()
    try:
        what, fix = check()
        kind = "note" if fix or UNTESTED in what else "ok"
    except (ForgeError, OSError, RuntimeError, AssertionError) as error:  # torch asserts, too
        what, kind = str(error).strip().partition("\n")[0], "problem"
        if where := getattr(error, "where", None):
            what += f": {where}"
        fix = getattr(error, "fix", None) or cure
    finally:
        timer.cancel()
    show(kind, what, fix)
    return kind


def ask(query: str, *fields: str) -> list[list[str]]:
    """A row of fields for each GPU or process, by nvidia-smi; none where there is none.

    ForgeError with what it says where it fails: driver and library of two versions, say.
    """
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", f"--query-{query}={','.join(fields)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ForgeError(f"nvidia-smi: {(done.stdout or done.stderr).strip()}")
    rows = [line.split(", ", len(fields) - 1) for line in done.stdout.splitlines()]
    return [row for row in rows if len(row) == len(fields)]


def cards() -> Found:
    found, seen = ask("gpu", "name", "memory.used", "memory.total"), torch.cuda.device_count()
    if not found:
        fix = "to use a GPU: NVIDIA's driver; in a container docker run --gpus all"
        return f"nvidia-smi shows none, torch sees {seen}: {UNTESTED}", fix
    each = [f"{name}, {used} of {total} MiB in use" for name, used, total in found]
    what = f"{'; '.join(each)}; torch sees {seen}"
    if all(int(used) <= 1024 for _, used, _ in found if used.isdigit()):
        return what, "" if seen == len(found) else "look at CUDA_VISIBLE_DEVICES"
    users = [f"{name} ({pid})" for pid, name in ask("compute-apps", "pid", "process_name")]
    by = ", ".join(users) or "a display, or programs not shown here"
    return what, f"in use by {by}: the micro-batch shrinks to what is left"


def torch_and_driver() -> Found:
    what = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    if not (found := ask("gpu", "driver_version")):
        return f"{what}; no GPU here: {UNTESTED}", ""
    torch.zeros(1, device="cuda")  # its errors say what does not fit
    return f"{what}, driver {found[0][0]}", ""


def compiler() -> Found:
    """As Triton looks for it."""
    name = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    has_header = Path(sysconfig.get_path("include"), "Python.h").is_file()
    what = f"C compiler: {name}, Python.h: {'there' if has_header else 'missing'}"
    if name and has_header:
        return what, ""
    if torch.cuda.is_available():
        raise ForgeError(f"{what}; Triton needs both")
    return what, "not needed on a CPU"


def full_load() -> Found:
    """All cards at once for two seconds; nvidia-smi is asked while they are at work."""
    devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    if not devices:
        return f"no GPU here: speed, power, temperature and clocks {UNTESTED}", ""
    with ThreadPoolExecutor(len(devices)) as pool:
        running = pool.map(partial(product_flops, seconds=2.0), devices)
        time.sleep(1.0)
        power = "power.draw", "power.limit", "power.default_limit"
        loaded = ask("gpu", "index", "temperature.gpu", *power, "clocks_event_reasons.active")
        speeds = list(running)
    peak, fixes = peak_flops(devices[0]), list[str]()
    what = f"{', '.join(f'{speed / 1e12:.0f}' for speed in speeds)} TFLOP/s in bfloat16"
    what += f", published {peak / 1e12:.0f}" if peak else ""
    for number, heat, watts, limit, usual, reasons in loaded:
        what += f"; GPU {number}: {watts} of {limit} W, {heat} °C"
        if limit != usual:
            fixes.append(f"GPU {number} has {usual} W by default: nvidia-smi -pl sets it")
        if reasons.startswith("0x") and int(reasons, 16) & SLOWED:
            fixes.append(f"GPU {number} is slowed by heat or supply: look at fans and cables")
    if min(speeds) < max(0.9 * max(speeds), 0.6 * (peak or 0)):
        fixes.append("every step waits for the slowest card: see what else runs on it")
    return what, "; ".join(fixes)


def copies() -> Found:
    count = torch.cuda.device_count()
    if count < 2:
        return f"{counted(count, 'GPU')} here: {UNTESTED}", ""
    sent, pairs = torch.arange(2**22), list(permutations(range(count), 2))
    for a, b in pairs:
        arrived = sent.to(f"cuda:{a}").to(f"cuda:{b}").cpu()
        if not torch.equal(arrived, sent):
            raise ForgeError(f"a copy from GPU {a} to GPU {b} arrives damaged")
    direct = sum(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)
    return f"copies arrive; {direct} of {len(pairs)} ways are direct (RTX 4090s have none)", ""


def system() -> Found:
    kinds = resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_AS
    files, *others = (resource.getrlimit(kind)[0] for kind in kinds)
    free, fixes = shutil.disk_usage("/dev/shm").free, list[str]()
    if free < 2**29:
        fixes.append("NCCL needs /dev/shm: docker run --shm-size=2g")
    if 0 <= files < 1024 or any(limit != resource.RLIM_INFINITY for limit in others):
        fixes.append("ulimit -n 4096 -f unlimited -v unlimited")
    what = f"/dev/shm has {free / 1e9:.1f} GB free; {len(os.sched_getaffinity(0))} cores; "
    return f"{what}{files} open files", "; ".join(fixes)


def writing(out: Path | None) -> Found:
    """256 MiB beside the run, as a checkpoint is written: until they are on the disk."""
    if out is None:
        return f"not given: room and speed {UNTESTED}", ""
    folder = next(path for path in (out.absolute(), *out.absolute().parents) if path.is_dir())
    free, block = shutil.disk_usage(folder).free, os.urandom(2**24)
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        for _ in range(16):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    speed = 2**28 / (time.perf_counter() - began)
    fix = "forge_350m's checkpoints take 3 GB each, 15 GB in all; --check says yours"
    what = f"{free / 1e9:.0f} GB free, {speed / 1e6:.0f} MB/s written, in {folder}"
    return what, fix if free < 20e9 or speed < 1e8 else ""


def reading(data: Path | None) -> Found:
    """256 windows at random, as training reads them; those in the page cache do not count."""
    if data is None:
        return f"not given: room and speed {UNTESTED}", ""
    if not (index := load_index(data)).total("num_tokens", "train"):
        fix = "make shards of more text, or with another --val-fraction"
        raise ForgeError("no train tokens", fix=fix)
    shards, cold, seconds = index.of("train"), 0, 0.0
    for shard in random.choices(shards, [shard.num_tokens for shard in shards], k=256):
        check_header(data / shard.file)
        start = random.randrange(0, max(1, 2 * shard.num_tokens - WINDOW_BYTES), 4096)
        with (data / shard.file).open("rb", buffering=0) as file:
            number = file.fileno()
            os.posix_fadvise(number, start, 4096, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            try:
                os.preadv(number, [bytearray(WINDOW_BYTES)], start, os.RWF_NOWAIT)
            except BlockingIOError:  # not in memory
                os.pread(number, WINDOW_BYTES, start)
                cold, seconds = cold + 1, seconds + time.perf_counter() - began
            except OSError:
                return f"the file system hides its cache: speed {UNTESTED}", ""
    what = f"{shutil.disk_usage(data).free / 1e9:.0f} GB free, {cold} of 256 windows from the disk"
    if not cold:
        return f"{what}: its speed {UNTESTED}", ""
    speed = cold * WINDOW_BYTES / 2 / seconds
    fix = "a GPU learns up to 0.6 M tokens/s: copy the shards to an SSD" if speed < 1e6 else ""
    return f"{what}, at {amount(int(speed))} tokens/s", fix


def exchange(ranks: Ranks) -> Found:
    """A sum over all ranks, on every rank: 256 MiB of gradients between GPUs."""
    device, n = ranks.device(), ranks.world_size
    if n == 1:
        fix = "torchrun --standalone --nproc_per_node=N --no-python forge-train --doctor"
        return f"one process: NCCL and the machines' clocks {UNTESTED}", fix
    with process_group(ranks, device, 10 * LIMIT_SECONDS):
        x = torch.full((2**26 if device.type == "cuda" else 2**22,), ranks.rank + 1.0).to(device)
        dist.all_reduce(x)  # connects
        is_right, began = bool((x == n * (n + 1) / 2).all()), time.perf_counter()
        for _ in range(3):
            dist.all_reduce(x)
        x[0].item()  # waits for the GPU
        speed = 6 * (1 - 1 / n) * x.nbytes / (time.perf_counter() - began)  # bytes through a ring
        here = is_right, socket.gethostname(), time.time()
        right, hosts, clocks = zip(*on_all(ranks, lambda: here), strict=True)
    if not all(right):
        raise ForgeError("the sum over the ranks is wrong", fix=P2P)
    apart, is_slow = max(clocks) - min(clocks), device.type == "cuda" and speed < 2e9
    where = f"{n} on {counted(len(set(hosts)), 'machine')}"
    what = f"{where} add up {speed / 1e9:.1f} GB/s; clocks {apart:.1f} s apart"
    if apart > 5:  # torchrun drops a machine whose clock is 15 s behind
        return what, "timedatectl set-ntp true, on each machine"
    return what, "slow: a slot of few lanes? (nvidia-smi -q -d PCI)" if is_slow else ""
