"""Chats as a model reads them: the template that it was published with, and which tokens are its answers.

    template = chat.read(published.located('smollm2'))
    template.render([dict(role='user', content='Hi!')], reply=True)      # '...<|im_start|>assistant\n'
    chat.document(messages, template, tokenizer)                         # packing.Document: only answers are counted

A template is a program in Jinja, and comes with the weights: it runs in jinja2's sandbox, with the names that Hugging
Face gives it (https://huggingface.co/docs/transformers/chat_templating).
"""

import dataclasses
import datetime
import json
import pathlib

import jinja2
import jinja2.sandbox
import numpy as np

from qat.models.pretrained import gguf_file
from qat.run import packing

ANSWERS = 'assistant'


@dataclasses.dataclass(frozen=True)
class Template:
  """A chat template.

  Attributes:
    source: in Jinja.
    where: the file that it came from, for errors.
    names: what it may speak of: bos_token and eos_token.
  """
  source: str
  where: str
  names: dict

  def render(self, messages, reply=False):
    """The text of a chat; with `reply`, up to where the model begins to answer."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters['tojson'] = lambda x, **settings: json.dumps(x, ensure_ascii=False, **settings)
    environment.globals |= dict(raise_exception=_refuse, strftime_now=_now)
    try:
      return environment.from_string(self.source).render(
          messages=messages, add_generation_prompt=reply, **self.names)
    except (jinja2.TemplateError, TypeError, AttributeError) as error:
      raise ValueError(f'{self.where}: its chat template does not take the chat {_short(messages)} ({error}). '
                       "Give messages as {'role': 'user', 'content': 'text'}, in the template's order.") from error


def _now(form):
  return datetime.datetime.now().strftime(form)


def _refuse(message):
  raise jinja2.TemplateError(message)


def _short(messages):
  text = repr(messages)
  return text if len(text) <= 120 else f'{text[:117]}...'


def read(path):
  """The Template of a .gguf file or a folder in Hugging Face's layout, or None if it has none."""
  path = pathlib.Path(path)
  if path.suffix == '.gguf':
    file = gguf_file.GGUFFile(path)
    source, tokens = file.metadata('tokenizer.chat_template'), file.metadata('tokenizer.ggml.tokens', [])
    token = lambda name: tokens[i] if (i := file.metadata(f'tokenizer.ggml.{name}_token_id')) is not None else ''
    names = dict(bos_token=token('bos'), eos_token=token('eos'))
    return source and Template(source, str(path), names)
  settings = path / 'tokenizer_config.json'
  found = json.loads(settings.read_text()) if settings.is_file() else {}
  source = found.get('chat_template')
  if (own := path / 'chat_template.jinja').is_file():
    source = own.read_text()
  if isinstance(source, list):  # Several, by name.
    source = next((s['template'] for s in source if s['name'] == 'default'), None)
  names = {name: _text(found.get(name)) for name in ('bos_token', 'eos_token')}
  return source and Template(source, str(path), names)


def _text(token):
  """A token of tokenizer_config.json, which is a text or an object with one."""
  return (token.get('content') if isinstance(token, dict) else token) or ''


def document(messages, template, tokenizer):
  """The Document of a chat, of which the answers count: what the model is to write, with the token that ends it.

  An answer is what the text has more with it than without, from where the template lets the model begin.
  """
  text, spans = template.render(messages), []
  for i, message in enumerate(messages):
    if message.get('role') != ANSWERS:
      continue
    before, after = template.render(messages[:i], reply=True), template.render(messages[:i + 1])
    if not after.startswith(before) or not text.startswith(after):
      raise ValueError(f'{template.where}: its chat template changes earlier messages when later ones come, so that it '
                       f'cannot be said where answer {i} of {_short(messages)} begins. Train on chats of one answer.')
    spans.append((len(before), len(after)))
  if not spans:
    raise ValueError(f'The chat {_short(messages)} has no message of the role {ANSWERS!r}: there is no answer to '
                     'learn. Drop it, or give its answer.')
  encoded = tokenizer.encode(text, add_special_tokens=False)
  counted = np.array([any(start <= at < end for start, end in spans) for at, _ in encoded.offsets])
  return packing.Document(np.array(encoded.ids, np.int32), counted)
