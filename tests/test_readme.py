"""The README's Python runs as it stands, and its numbers are those of the result files."""

import json
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / 'README.md'


def test_the_examples_run(capsys):
  blocks = re.findall(r'```python\n(.*?)```', README.read_text(), re.DOTALL)
  assert len(blocks) >= 2
  names = {}
  for block in blocks:
    exec(compile(block, README.name, 'exec'), names)
  assert 'layers/0' in capsys.readouterr().out
  assert len(names['recipe']) > 1


def results(name):
  return json.loads((ROOT / name).read_text())


def test_the_quickstart_table_is_that_of_its_result():
  lines = README.read_text().splitlines()
  for row in results('docs/results/quickstart.json')['rows']:
    line = next(l for l in lines if re.match(rf'{re.escape(row["name"])}  ', l))
    want = (f'{100 * row["mean"]:.2f} ± {100 * row["std"]:.2f}', f'{row["bits_per_weight"]:.2f}',
            f'{row["size_bytes"] / 1024:.1f} KiB')
    assert all(w in line for w in want), (line, want)


def test_the_results_table_is_that_of_the_result_files():
  text = README.read_text()
  for name in ('mnist_float', 'mnist_lsq_w2a2', 'shakespeare_float', 'shakespeare_w4a8_g32',
               'shakespeare_w4a8_every_layer', 'shakespeare_w8a8', 'shakespeare_w4a16_g64', 'shakespeare_nvfp4',
               'shakespeare_mxfp4', 'shakespeare_bitnet'):
    result = results(f'docs/results/{name}.json')
    metrics = result['metrics']
    score = (f'{metrics["bits_per_character"]:.3f}' if 'bits_per_character' in metrics
             else f'{100 * metrics["accuracy"]:.2f} %')
    assert re.search(rf'\| {re.escape(score)}[^|]*\| {result["size_bytes"] / 1024:,.0f} KiB \|', text), name


def test_the_smollm2_table_is_that_of_its_results():
  text = README.read_text()
  files = sorted((ROOT / 'docs/results/smollm2').glob('*.json'))
  assert len(files) >= 5
  for path in files:
    found = json.loads(path.read_text())
    perplexity, kl = found['metrics']['perplexity'], found['metrics']['mean_kl']
    row = f'| {found["bits_per_weight"]:.1f} | {perplexity:,.2f} | {kl:.3f} | {found["walk_seconds"]:,.0f} |'
    assert row in text, (path, row)


def test_the_minilm_table_is_that_of_its_results():
  text = README.read_text()
  files = sorted((ROOT / 'docs/results/minilm').glob('*.json'))
  assert len(files) >= 8
  for path in files:
    found = json.loads(path.read_text())['metrics']
    assert f'| {100 * found["recall_at_1"]:.1f} % | {found["cosine_to_float"]:.3f} |' in text, path


def test_the_finetune_table_is_that_of_its_results():
  text = README.read_text()
  files = sorted((ROOT / 'docs/results/finetune').glob('smollm2_*.json'))
  assert len(files) >= 3
  for path in files:
    found = json.loads(path.read_text())
    losses = found['metrics_before']['loss'], found['metrics']['loss']
    assert '| {:.3f} | {:.3f} | {:.3f} |'.format(found['bits_per_weight'], *losses) in text, path


def test_the_tables_of_loftq_and_of_merges_are_those_of_their_results():
  text, folder = README.read_text(), 'docs/results/finetune'
  for bits in (4, 3, 2):
    found = [results(f'{folder}/start_{start}_nf{bits}.json') for start in ('rounded', 'loftq')]
    losses = [each['metrics']['start_loss'] for each in (*found, results(f'{folder}/start_float.json'))]
    assert f'| NF{bits}, blocks of 64 | ' + ' | '.join(f'{x:.3f}' for x in losses) + ' |' in text, bits
  for bits in (4, 2):
    nearest, gptq = (results(f'{folder}/merge_w{bits}a16_g64_{method}.json') for method in ('rtn', 'gptq'))
    numbers = [each['perplexity'] for each in (nearest['metrics_before'], nearest['metrics'], gptq['metrics'])]
    assert f'| {bits}-bit integers in groups of 64 | ' + ' | '.join(f'{x:,.2f}' for x in numbers) + ' |' in text, bits


def test_the_benchmark_table_is_that_of_its_result():
  lines = README.read_text().split('## What a step costs')[1].splitlines()
  for row in results('benchmarks/results/train_step.json')['rows']:
    line = next(l for l in lines if l.startswith(row['recipe'] + ' '))
    assert f'{row["step_ratio"]:.3f}' in line and f'{row["compile_ratio"]:.2f}' in line, line


def test_the_finetuning_step_is_that_of_its_result():
  text = README.read_text()
  for row in results('benchmarks/results/finetune_step.json')['rows'][1:]:
    assert f'{row["step_ratio"]:.3f} for `{row["base"]}`' in text, row
