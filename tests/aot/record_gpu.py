"""Writes the budgets of tests/aot/test_gpu.py: what the present kernels take with the installed compilers.

    python -m tests.aot.record_gpu
"""

import json

from qat.kernels import static_gpu
from tests.aot import test_gpu


def main():
  found = {}
  for case in test_gpu.KERNELS:
    report = static_gpu.compile(f'tests.aot.gpu_cases:{case}', 'h200')
    print(case, report, flush=True)
    found[case] = report.slots
  test_gpu.BUDGETS.write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
  main()
