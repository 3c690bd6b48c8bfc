"""report.html stands alone and says what the run found."""

import html.parser
import pathlib

import pytest

from qat.run import cli
from qat.run import plots
from qat.run import report

TINY = str(pathlib.Path(__file__).with_name('tiny.py'))
# Tags and attributes by which a page can ask for another file.
LINKS = ('src', 'href', 'srcset', 'data', 'action')


class Page(html.parser.HTMLParser):
  """Collects what a page links to, its headings and its text."""

  def __init__(self, text):
    super().__init__()
    self.links, self.text, self.tags = [], [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.links += [value for name, value in attrs if name in LINKS]

  def handle_data(self, data):
    self.text.append(data)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  assert cli.main(['train', f'--config={TINY}:quantizer=lsq,bits=2', f'--workdir={workdir}']) == 0
  return workdir


def test_the_page_asks_for_no_other_file(workdir):
  text = (workdir / 'report.html').read_text()
  page = Page(text)
  assert page.links and all(link.startswith('data:image/png;base64,') for link in page.links)
  assert 'http' not in text and '@import' not in text and 'url(' not in text
  assert not {'script', 'link', 'iframe'} & set(page.tags)


def test_the_page_has_curves_layers_sqnr_and_histograms(workdir):
  page = Page((workdir / 'report.html').read_text())
  text = ' '.join(page.text)
  for words in ('Learning curves', 'Layers', 'SQNR', 'Weights and the levels of their grid', 'layers/0', 'layers/1',
                'bits per weight', 'frozen equals trained', 'lsq W2A2'):
    assert words in text, words
  assert page.tags.count('img') == 3


def test_the_page_can_be_written_again(workdir, capfd):
  before = (workdir / 'report.html').read_bytes()
  (workdir / 'report.html').unlink()
  assert cli.main(['report', f'--workdir={workdir}']) == 0
  assert str(workdir / 'report.html') in capfd.readouterr().out
  assert (workdir / 'report.html').read_bytes() == before


def test_a_run_that_has_not_ended_has_no_report(workdir, tmp_path, capfd):
  (tmp_path / 'config.json').write_bytes((workdir / 'config.json').read_bytes())
  assert cli.main(['report', f'--workdir={tmp_path}']) == 2
  assert 'has no result.json' in capfd.readouterr().err


def test_no_metrics():
  assert 'No metrics' in plots.curves([])


def test_text_of_cells():
  assert report.text(12345) == '12,345'
  assert report.text(4.125) == '4.125'
  assert report.text(True) == 'True'
