"""The quickstart, in two steps: every row of the table, its files, its last lines."""

import json
import pathlib

import pytest

from qat.run import cli

ROOT = pathlib.Path(__file__).parents[2]


def test_quickstart(tmp_path, capfd):
  assert cli.main(['quickstart', f'--config={ROOT}/configs/quickstart.py:smoke', f'--workdir={tmp_path}']) == 0
  out = capfd.readouterr().out
  assert out.split()[-2:] == [str(tmp_path / 'report.html'), str(tmp_path / 'result.json')]
  rows = {r['name']: r for r in json.loads((tmp_path / 'result.json').read_text())['rows']}
  assert list(rows) == ['float', 'post-training W4A4', 'post-training W2A2',
                        'QAT W4A4', 'QAT W2A2, ends W8A8', 'QAT W2A2']
  assert all(len(r['accuracies']) == 2 for r in rows.values())
  assert all(r['same_outputs'] for name, r in rows.items() if name != 'float')
  # 64 * 128 + 128 * 128 + 128 * 10 weights of 4 bits, and a float32 scale for each of 128 + 128 + 10 outputs.
  assert rows['QAT W4A4']['bits_per_weight'] == pytest.approx(4 + 32 * 266 / 25856)
  assert rows['QAT W2A2']['bits_per_weight'] == pytest.approx(2 + 32 * 266 / 25856)
  assert 'http' not in (tmp_path / 'report.html').read_text()
