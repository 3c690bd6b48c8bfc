"""BitNet b1.58 from scratch against floats, on small language models of three widths."""

from experiments import networks

PAPER = dict(name='BitNet b1.58', title='The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits, 2024',
             link='https://arxiv.org/abs/2402.17764', setting='LLaMA of 700M, 1.3B and 3B, perplexity')
SEEDS = (0, 1, 2)
METRICS = (networks.BITS_PER_CHARACTER,)

WIDTHS = (32, 64, 128)
# At 64 the best of 2e-3, 6e-3 and 1.2e-2, by a run of another seed each, for both; at 128 floats did worse at 1.2e-2.
RATES = {32: 1.2e-2, 64: 1.2e-2, 128: 6e-3}
PAPERS = {('float', 32): '12.33', ('bitnet', 32): '12.87', ('float', 64): '11.25', ('bitnet', 64): '11.29',
          ('float', 128): '10.04', ('bitnet', 128): '9.91'}


def _run(row, recipe, width):
  """Two blocks with heads of 32; the embedding, which is the head, in floats."""
  leaves = {'model.width': width, 'model.heads': width // 32, 'optimizer.learning_rate': RATES[width],
            'total_steps': 600, 'eval.every_steps': 600, 'checkpoint_every_steps': 600}
  about = dict(networks.CHARACTERS, row=f'width {width}: {row}', config=f'configs/shakespeare.py:recipe={recipe}',
               set=networks.CHARACTERS['set'] | leaves)
  return about | ({} if recipe == 'float' else {'float': f'float_{width}'})


RUNS = {f'{name}_{width}': _run(row, recipe, width) | {'paper': PAPERS[name, width]} for width in WIDTHS
        for name, row, recipe in (('float', 'floats', 'float'), ('bitnet', 'BitNet b1.58', 'bitnet,ends=float,stages'))}
RUNS['cosine_64'] = _run('BitNet b1.58, one cosine, decay to the end', 'bitnet,ends=float', 64)

CLAIMS = [
    *(dict(says=f'the gap shrinks from width {narrow} to {wide}', ratio=(f'bitnet_{narrow}', f'bitnet_{wide}'),
           within=(1, None)) for narrow, wide in ((32, 64), (64, 128), (32, 128))),
    dict(says='width 128: within 0.1 bits per character', difference=('bitnet_128', 'float_128'), within=(-0.1, 0.1),
         paper='-0.02 to +0.06 bits a token'),
    dict(says='two stages, and no decay in the second, lose less than one cosine', ratio=('cosine_64', 'bitnet_64'),
         within=(1, None))]
