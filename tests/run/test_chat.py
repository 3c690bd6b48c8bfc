"""Chat templates run in a sandbox, and answers are what counts."""

import pytest

from qat.run import chat
from tests.run import tiny_finetune

CHAT = [dict(role='user', content='Hi!'), dict(role='assistant', content='Hello.'), dict(role='user', content='And?'),
        dict(role='assistant', content='Bye.')]


def template(source=tiny_finetune.TEMPLATE):
  return chat.Template(source, 'here', dict(bos_token='', eos_token='<|im_end|>'))


def test_answers_count_with_the_token_that_ends_them():
  tokenizer = tiny_finetune.tokenizer()
  document = chat.document(CHAT, template(), tokenizer)
  said = tokenizer.decode(document.tokens[document.counted].tolist(), skip_special_tokens=False)
  assert said == 'Hello.<|im_end|>\nBye.<|im_end|>\n'
  whole = tokenizer.decode(document.tokens.tolist(), skip_special_tokens=False)
  assert whole == template().render(CHAT)
  assert whole.startswith('<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\nHello.')


def test_a_template_that_rewrites_the_past_is_refused():
  last = template("{{ messages[-1]['content'] }}")
  with pytest.raises(ValueError, match='changes earlier messages when later ones come'):
    chat.document(CHAT, last, tiny_finetune.tokenizer())


def test_a_chat_without_an_answer_is_refused():
  with pytest.raises(ValueError, match="no message of the role 'assistant'"):
    chat.document(CHAT[:1], template(), tiny_finetune.tokenizer())


@pytest.mark.parametrize('source', [
    "{{ messages.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}",
    "{{ raise_exception('roles') }}", '{% for %}', "{{ messages[0]['content'] + 1 }}"])
def test_templates_stay_in_their_sandbox_and_fail_in_words(source):
  with pytest.raises(ValueError, match='here: its chat template does not take the chat'):
    template(source).render(CHAT)


def test_templates_of_folders(tmp_path):
  assert chat.read(tmp_path) is None
  there = chat.read(tiny_finetune.network(tmp_path / 'tiny'))
  assert there.source == tiny_finetune.TEMPLATE and there.names == dict(bos_token='', eos_token='<|im_end|>')
  (tmp_path / 'tiny' / 'chat_template.jinja').write_text('{{ eos_token }}')
  assert chat.read(tmp_path / 'tiny').render([]) == '<|im_end|>'
