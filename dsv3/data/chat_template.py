"""The chat template of a tokenizer: messages to the text a model was taught.

The format is that of transformers: Jinja, in the field `chat_template` of
tokenizer_config.json or in the file chat_template.jinja, beside tokenizer.json.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.sandbox

from dsv3.config import ConfigError


class ChatTemplate:
  """A compiled template, and the special tokens that it may name."""

  def __init__(self, source: str, marks: Mapping[str, str] | None = None):
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True,
      lstrip_blocks=True,
      extensions=["jinja2.ext.loopcontrols"],
    )
    environment.globals["raise_exception"] = _refuse
    try:
      self._template = environment.from_string(source)
    except jinja2.TemplateError as error:
      raise ConfigError(f"chat template: {error}") from error
    self._marks = dict(marks or {})

  @classmethod
  def load(cls, tokenizer: str, file: str | None = None) -> "ChatTemplate":
    """The template beside the tokenizer.json at `tokenizer`, or in `file`.

    Raises ConfigError where there is none, and for one that does not compile.
    """
    folder = pathlib.Path(tokenizer).expanduser().parent
    published = folder / "tokenizer_config.json"
    values = _read_json(published) if published.is_file() else {}
    marks = {k: _text(values[k]) for k in _MARKS if values.get(k)}
    beside = folder / "chat_template.jinja"
    if file or beside.is_file():
      return cls(_read(pathlib.Path(file or beside).expanduser()), marks)
    source = values.get("chat_template")
    if isinstance(source, list):  # several, by name
      named = {entry["name"]: entry["template"] for entry in source}
      source = named.get("default")
    if not source or tokenizer == "bytes":
      raise ConfigError(
        f"chat template: found none beside {tokenizer}; wanted `chat_template` "
        "in tokenizer_config.json, chat_template.jinja, or --template=FILE"
      )
    return cls(source, marks)

  def render(self, messages: Sequence[Mapping[str, str]], **values) -> str:
    """The text that ends where the assistant is to speak.

    Messages have `role` (system, user, assistant) and `content`. Raises
    ConfigError where the template refuses them.

    >>> two = "{% for m in messages %}{{ m.role }}: {{ m.content }}. {% endfor %}"
    >>> ChatTemplate(two).render([{"role": "user", "content": "hello"}])
    'user: hello. '
    """
    values = {"add_generation_prompt": True, **self._marks, **values}
    try:
      return self._template.render(messages=list(messages), **values)
    except Exception as error:  # whatever its code raises
      raise ConfigError(f"chat template: {error}") from error


_MARKS = ("bos_token", "eos_token", "pad_token", "unk_token")


def _refuse(message: str):
  raise jinja2.TemplateError(message)


def _text(mark: Any) -> str:
  """A token is a string, or a group with its content."""
  return mark["content"] if isinstance(mark, Mapping) else mark


def _read(path: pathlib.Path) -> str:
  try:
    return path.read_text()
  except OSError as error:
    raise ConfigError(f"{path}: {error.strerror}") from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(_read(path))
  except json.JSONDecodeError as error:
    raise ConfigError(f"{path}: damaged: {error}") from error
