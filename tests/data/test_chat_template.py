"""Chat templates: those of transformers, and what they refuse."""

import json

import pytest

from dsv3.config import ConfigError
from dsv3.data.chat_template import ChatTemplate

# The shape of DeepSeek's: marks, a system's message first, reasoning cut off.
TEMPLATE = """\
{{ bos_token }}{% for m in messages %}
{%- if m['role'] == 'system' %}{{ m['content'] }}
{%- elif m['role'] == 'user' %}<U>{{ m['content'] }}
{%- elif m['role'] == 'assistant' -%}
<A>{{ m['content'].split('</think>')[-1] }}{{ eos_token }}
{%- else %}{{ raise_exception('who is ' + m['role'] + '?') }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}<A>{% endif %}"""
MESSAGES = [
  {"role": "system", "content": "Be brief."},
  {"role": "user", "content": "One?"},
  {"role": "assistant", "content": "hm</think>Two."},
  {"role": "user", "content": "And?"},
]


def write(folder, **values):
  (folder / "tokenizer_config.json").write_text(json.dumps(values))
  return str(folder / "tokenizer.json")


def test_messages_become_the_text_that_the_model_was_taught(tmp_path):
  marks = {"bos_token": {"content": "<b>"}, "eos_token": "<e>"}
  path = write(tmp_path, chat_template=TEMPLATE, **marks)
  text = ChatTemplate.load(path).render(MESSAGES)
  assert text == "<b>Be brief.<U>One?<A>Two.<e><U>And?<A>"


def test_of_several_templates_the_default_is_taken(tmp_path):
  named = [
    {"name": "tools", "template": "no"},
    {"name": "default", "template": "yes"},
  ]
  path = write(tmp_path, chat_template=named)
  assert ChatTemplate.load(path).render([]) == "yes"


def test_a_file_beside_the_tokenizer_and_one_that_is_named_come_first(tmp_path):
  path = write(tmp_path, chat_template="old")
  (tmp_path / "chat_template.jinja").write_text("new")
  assert ChatTemplate.load(path).render([]) == "new"
  (tmp_path / "mine").write_text("mine")
  assert ChatTemplate.load(path, str(tmp_path / "mine")).render([]) == "mine"


@pytest.mark.parametrize(
  "source, wanted",
  [
    (TEMPLATE, "who is ghost"),
    ("{% for", "chat template: "),
    ("{{ messages.__class__.__mro__ }}", "unsafe"),
    ("{{ missing.field }}", "undefined"),
  ],
)
def test_what_a_template_refuses_is_one_line(source, wanted):
  with pytest.raises(ConfigError, match=wanted):
    ChatTemplate(source).render([{"role": "ghost", "content": ""}])


def test_where_there_is_no_template_it_is_said_how_to_give_one(tmp_path):
  for path in ("bytes", str(tmp_path / "tokenizer.json")):
    with pytest.raises(ConfigError, match="--template=FILE"):
      ChatTemplate.load(path)
  (tmp_path / "tokenizer_config.json").write_text("{")
  with pytest.raises(ConfigError, match="damaged"):
    ChatTemplate.load(str(tmp_path / "tokenizer.json"))
