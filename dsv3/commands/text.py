"""`dsv3 sample` and `dsv3 chat`: text out of a trained model."""

import argparse
import sys

from dsv3.cache import use_compilation_cache
from dsv3.commands.given import tokenizer_of
from dsv3.config import ConfigError
from dsv3.data.chat_template import ChatTemplate
from dsv3.infer import Decoder, Sampling, acceptance, stream
from dsv3.infer.chat import Conversation
from dsv3.infer.text import TextReader
from dsv3.train.restore import Trained, restore


def sample(arguments: argparse.Namespace) -> None:
  """Text that goes on from a prompt, as it is drawn."""
  use_compilation_cache()
  trained = restore(
    arguments.workdir, arguments.step, ema=arguments.ema, as_stored=True
  )
  write(
    trained,
    arguments.prompt,
    n_tokens=arguments.tokens,
    seed=arguments.seed,
    sampling=sampling_of(arguments),
    drafts=arguments.drafts,
  )


def chat(arguments: argparse.Namespace) -> None:
  """A conversation, line by line, under the tokenizer's chat template."""
  use_compilation_cache()
  trained = restore(
    arguments.workdir, arguments.step, ema=arguments.ema, as_stored=True
  )
  tokens = tokenizer_of(trained)
  template = ChatTemplate.load(
    trained.values.data.tokenizer, arguments.template
  )
  conversation = Conversation(
    Decoder(trained.model), tokens, template, arguments.system
  )
  options = {
    "max_tokens": arguments.tokens,
    "sampling": sampling_of(arguments),
    "seed": arguments.seed,
    "drafts": drafts_of(trained, arguments.drafts),
  }
  if sys.stdin.isatty():
    print("an empty line ends the conversation")
  while line := _ask():
    try:
      for text in conversation.reply(line, **options):
        print(text, end="", flush=True)
      print()
    except ConfigError as error:  # of this line; the conversation goes on
      print(error, file=sys.stderr)


def _ask() -> str:
  """The next line of the user; "" at the end."""
  try:
    line = input("> " if sys.stdin.isatty() else "").strip()
  except EOFError:
    return ""
  _check_text("input", line)
  return line


def write(
  trained: Trained,
  prompt: str,
  *,
  n_tokens: int,
  sampling: Sampling,
  seed: int = 0,
  drafts: int | None = None,
) -> None:
  """Prints the prompt and what follows, up to the end of the document."""
  tokens = tokenizer_of(trained)
  _check_text("--prompt", prompt)
  drafts = drafts_of(trained, drafts)
  steps = stream(
    trained.model,
    [[tokens.start_id, *tokens.encode(prompt)]],
    max_tokens=n_tokens,
    sampling=sampling,
    seed=seed,
    stop=[tokens.eos_id],
    drafts=drafts,
  )
  print(prompt, end="", flush=True)
  reader = TextReader(tokens)
  for text in reader.read(steps):
    print(text, end="", flush=True)
  print()
  if drafts:
    print(f"drafts kept: {kept(reader.accepted, drafts)}", file=sys.stderr)


def sampling_of(arguments: argparse.Namespace) -> Sampling:
  a = arguments
  return Sampling(a.temperature, a.top_k, a.top_p, a.min_p)


def _check_text(where: str, text: str) -> None:
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ConfigError(
      f"{where}: found bytes that are no UTF-8 at {error.start}, wanted text"
    ) from error


def drafts_of(trained: Trained, asked: int | None) -> int:
  """Tokens to draft: as many as there are MTP modules, if none are named."""
  return trained.values.model.mtp.depth if asked is None else asked


def kept(accepted: list[int], n_drafts: int) -> str:
  """Of the rounds that judged drafts, the share that kept each of them."""
  shares = acceptance(accepted, n_drafts)
  by_place = ", ".join(f"{share:.0%}" for share in shares)
  return f"{by_place} of {len(accepted)} rounds; {1 + sum(shares):.2f} tokens a round"
