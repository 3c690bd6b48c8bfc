"""Writes the budgets of tests/aot/test_tpu.py: what the present kernels take with the installed libtpu.

    python -m tests.aot.record_tpu
"""

import json

from qat.kernels import static_tpu
from tests.aot import test_tpu


def main():
  found = {}
  for chip in static_tpu.CHIPS:
    for case in test_tpu.CASES:
      report = static_tpu.compile(f'tests.aot.tpu_cases:{case}', chip)
      found.setdefault(chip, {})[case] = report.error or report.bundles
      print(chip, case, report, flush=True)
      test_tpu.BUDGETS.write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
  main()
