"""Run the suites: their tests first, then times, then the results as JSON.

    python -m benchmarks.run                                   all suites on the CPU
    python -m benchmarks.run --suite lif --device cuda
    python -m benchmarks.run --skip norse --skip snnTorch      leaves these peers out, and the results say so
    python -m benchmarks.run --quick                           everything at size 1: do the scripts still work?
    python -m benchmarks.show                                  tables and plots of what stands in benchmarks/results

A red test prints no time. Rows of a suite that is not complete stand in <results>.json.<suite>.partial: a run that is
stopped leaves them there, until the next, and the results as they were. SpikingJelly 0.0.0.0.14 is a peer where
$OLD_SPIKINGJELLY is a folder that holds it, made by `pip install --no-deps --target FOLDER spikingjelly==0.0.0.0.14`.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.measure import copy_bandwidth, measure
from benchmarks.registry import Suite
from benchmarks.show import row_summary
from benchmarks.suites import SUITES

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("spikeattn", "torch", "spikingjelly", "numba", "cupy-cuda12x", "cupy-cuda13x", "triton", "snntorch")
PACKAGES += ("norse", "numpy")
CUDA_TESTS = "tests/cuda/test_device.py"  # of every kernel


def main() -> None:
    """Options, tests, times, results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=list(SUITES), action="append", help="default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="size 1, nothing is written")
    parser.add_argument(
        "--skip", action="append", default=[], metavar="PEER", help="leave out peers with this in their name"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="for each measurement")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>.json")
    options = parser.parse_args()
    suites = [SUITES[name] for name in options.suite or SUITES]
    _check_skip(options.skip, suites, options.device)
    if not options.quick:
        tests = [test for suite in suites for test in suite.tests]
        _run_tests([CUDA_TESTS, "-k", "not sanitizer"] if options.device == "cuda" else tests)
    machine = machine_facts(options.device)
    path = options.out or RESULTS / f"{machine['name']}.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"suites": {}}
    for suite in suites:
        partial = path.with_name(f"{path.name}.{suite.name}.partial")
        rows: list[dict[str, Any]] = []
        measured = {"machine": machine, "rows": rows}
        makers = suite.cases(options.device, options.quick)
        for make in tqdm(makers, desc=suite.name, disable=not sys.stderr.isatty()):
            rows.append(measure(make(), options.device, 0.0 if options.quick else options.seconds, options.skip))
            print(row_summary(rows[-1]), flush=True)
            if not options.quick:  # after each row, so that a run that is stopped leaves what it has measured
                _write(partial, {"suites": {suite.name: measured}})
        if rows and not options.quick:
            results["suites"][suite.name] = measured
            _write(path, results)
            partial.unlink()
            print(f"written: {path}")


def _write(path: Path, results: dict[str, Any]) -> None:
    """``results`` as JSON; whenever this is stopped, the file is whole, old or new."""
    path.parent.mkdir(exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)


def _check_skip(skip: list[str], suites: list[Suite], device: str) -> None:
    """Stop where no peer has the name; the names are those of the cases of size 1."""
    if not skip:
        return
    cases = [make() for suite in suites for make in suite.cases(device, True)]
    names = dict.fromkeys(name for case in cases for name in (*case.peers, *case.absent))
    for part in skip:
        if not part or not any(part in name for name in names):
            sys.exit(f"error: --skip {part}: no peer has that in its name; the peers are {', '.join(names)}.")


def _run_tests(tests: list[str]) -> None:
    """Stop with the tests' output if one fails."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{done.stdout[-3000:]}\nerror: the tests are red, so there is nothing to time.")


def machine_facts(device: str) -> dict[str, object]:
    """What a number depends on: machine, versions, commit, copy bandwidth."""
    cpu = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if device == "cuda" else cpu
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return {
        "name": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        "device": name,
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "cuda": torch.version.cuda,
        "driver": _driver() if device == "cuda" else None,
        "commit": commit.strip(),
        "copy_bytes_per_s": copy_bandwidth(device),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str:
    """Version of the GPU's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0]


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
