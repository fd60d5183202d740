"""Compiles kernels as for a GPU, in a process of its own.

conftest sets TRITON_INTERPRET, which replaces the compiler for the whole process.
"""

import json
import os
import subprocess
import sys
from typing import Any

from fusebert.bench.compiled.aot import Resources

PROGRAM = """
import dataclasses, json, sys
from fusebert.bench.compiled.aot import compiled_kernels
{source}
rows = []
for case in json.loads(sys.argv[1]):
    with compiled_kernels(case["arch"]) as found:
        call(**{{key: value for key, value in case.items() if key != "arch"}})
    rows.append([dataclasses.asdict(kernel) for kernel in found])
print(json.dumps(rows, default=str))
"""


def environment() -> dict[str, str]:
    """This process's environment, in which Triton may compile."""
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "OMP_NUM_THREADS": "1",
        "PYTHONSAFEPATH": "1",
    }


def compile_kernels(source: str, *cases: dict[str, Any]) -> list[list[Resources]]:
    """The kernels that each case compiles.

    Args:
        source: a program that defines ``call``, the call of an operator on CPU tensors.
        cases: arguments of ``call``, JSON values; and "arch", the compute capability, 90 for sm_90.
    """
    command = [sys.executable, "-c", PROGRAM.format(source=source), json.dumps(cases)]
    ran = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return [[Resources(**kernel) for kernel in kernels] for kernels in json.loads(ran.stdout)]
