"""A model as EleutherAI's lm-evaluation-harness calls one.

`pip install "dsv3[harness]"` brings the harness; `dsv3.infer.LM` imports this
file when it is first asked for. What the three calls compute is what the
harness's Hugging Face adapter computes: the same split of context and
continuation, truncation from the left, windows and stop strings.
"""

import collections
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import tqdm
from flax import nnx

from dsv3.config import ConfigError
from dsv3.data.tokenizer import Tokenizer
from dsv3.data.tokenizer import load as load_tokenizer
from dsv3.hf import read
from dsv3.infer import scoring
from dsv3.infer.decoder import Decoder
from dsv3.infer.generate import stream
from dsv3.infer.sampling import Sampling
from dsv3.nn.transformer import Transformer
from dsv3.train import identity
from dsv3.train.restore import restore

try:
  from lm_eval import utils as harness
  from lm_eval.api.instance import Instance
  from lm_eval.api.model import TemplateLM
  from lm_eval.models.utils import normalize_gen_kwargs
except ModuleNotFoundError as error:
  raise ImportError(
    f"dsv3.infer.LM: found no module {error.name}, wanted EleutherAI's "
    'lm-evaluation-harness: pip install "dsv3[harness]"'
  ) from error


class _Manner(NamedTuple):
  """How a text is to be written; requests of one manner share batches."""

  until: tuple[str, ...]
  max_tokens: int
  sampling: Sampling


class LM(TemplateLM):
  """A model and its tokenizer, for `lm_eval.simple_evaluate(model=...)`.

  Args:
    batch_size: rows of a forward pass, and prompts that are decoded at once.
    max_length: tokens that the model sees at most. None: those of the config's
      rotary embedding, original_len times yarn_factor.
    max_new_tokens: of a `generate_until` request that says no number.
    bos_id: a token in front of every context, for models that have learnt to
      see one there. None: none, and the end of a document stands in for an
      empty context and starts a text that is scored whole.

  Chat templates are not applied: a task sees the model as it completes text.
  """

  def __init__(
    self,
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    max_new_tokens: int = 256,
    bos_id: int | None = None,
  ):
    super().__init__()
    rope = model.model.rope
    if max_length is None:
      max_length = int(rope.original_len * rope.yarn_factor)
    for name, value in (
      ("batch_size", batch_size),
      ("max_length", max_length),
      ("max_new_tokens", max_new_tokens),
    ):
      if value < 1:
        raise ConfigError(f"{name}: found {value}, wanted 1 or more")
    self.model, self.tokenizer = model, tokenizer
    self.batch_size, self.max_length = batch_size, max_length
    self.max_new_tokens, self.bos_id = max_new_tokens, bos_id
    self.source: dict[str, Any] = {}  # where the model is from
    self._graphdef, self._weights = nnx.split(model)

  @classmethod
  def from_run(
    cls,
    workdir: str | pathlib.Path,
    step: int | None = None,
    ema: bool = False,
    **kwargs,
  ) -> Self:
    """The model of a run at `step`, or at its newest checkpoint.

    `ema` takes the moving average of the parameters. `kwargs` go to the
    constructor. Unless they say other, `max_length` is data.seq_len of the run,
    and `bos_id` as in `from_hf`: a run of ours has none. Raises ConfigError
    where there is no such checkpoint, or its tokenizer has changed.
    """
    trained = restore(workdir, step, ema=ema, as_stored=True)
    values = trained.values
    tokens = load_tokenizer(values.data.tokenizer, values.model.vocab_size)
    identity.check_tokenizer(trained.meta, tokens)
    if kwargs.get("max_length") is None:
      kwargs["max_length"] = values.data.seq_len
    kwargs.setdefault("bos_id", _begin(tokens))
    made = cls(trained.model, tokens, **kwargs)
    made.source = {"workdir": str(workdir), "step": trained.step, "ema": ema}
    return made

  @classmethod
  def from_hf(
    cls, folder: str | pathlib.Path, dtype: str = "float32", **kwargs
  ) -> Self:
    """The model of a folder of released weights, with its tokenizer.json.

    It computes in `dtype`, bfloat16 or float32. Unless `kwargs` say other,
    `max_length` is max_position_embeddings of config.json, and `bos_id` the
    begin of a sentence where tokenizer_config.json has add_bos_token. Raises
    ConfigError that names a field, a tensor or a file.
    """
    source = read.open_source(folder, dtype)
    name = str(source.folder.folder / "tokenizer.json")
    tokens = load_tokenizer(name, source.values.model.vocab_size)
    if kwargs.get("max_length") is None:
      kwargs["max_length"] = source.published.get("max_position_embeddings")
    kwargs.setdefault("bos_id", _begin(tokens))
    model = nnx.merge(*read.parameters(source, dtype=dtype))
    made = cls(model, tokens, **kwargs)
    made.source = {"folder": str(folder)}
    return made

  def get_model_info(self) -> dict[str, Any]:
    """What the harness writes down with the results."""
    params = jax.tree.leaves(nnx.state(self.model, nnx.Param))
    return {
      "model_num_parameters": sum(x.size for x in params),
      "model_dtype": self.model.model.dtype,
      "tokenizer_digest": self.tokenizer.digest,
      "max_length": self.max_length,
      "bos_id": self.bos_id,
      **self.source,
    }

  @property
  def eot_token_id(self) -> int:
    return self.tokenizer.eos_id

  @property
  def prefix_token_id(self) -> int:
    """What an empty context is to the model."""
    return self.tokenizer.eos_id if self.bos_id is None else self.bos_id

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs
  ) -> list[int]:
    """Ids of `string`, `bos_id` first unless `add_special_tokens` is False."""
    ids = self.tokenizer.encode(string).tolist()
    if self.bos_id is None or add_special_tokens is False:
      return ids
    return [self.bos_id, *ids]

  def loglikelihood_rolling(
    self, requests: Sequence[Instance], disable_tqdm: bool = False
  ) -> list[float]:
    """Log-probability of each text, in nats, every token counted once.

    A text goes through the model in windows of `max_length` tokens; the first
    begins with the prefix token, the last keeps all the context it has room
    for.
    """
    windows, owners = [], []
    for i, request in enumerate(requests):
      tokens = self.tok_encode(request.args[0], add_special_tokens=False)
      for window in harness.get_rolling_token_windows(
        tokens, self.prefix_token_id, self.max_length, context_len=1
      ):
        windows.append((None, *harness.make_disjoint_window(window)))
        owners.append(i)
    out = [0.0] * len(requests)
    found = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
    for i, (log_p, _) in zip(owners, found, strict=True):
      out[i] += log_p
    for request, log_p in zip(requests, out, strict=True):
      self.cache_hook.add_partial("loglikelihood_rolling", request.args, log_p)
    return out

  def _loglikelihood_tokens(
    self,
    requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
    disable_tqdm: bool = False,
    **kwargs,
  ) -> list[tuple[float, bool]]:
    """Log-probability of each continuation, and whether greedy would write it.

    A request is its text or None, its context and its continuation. Requests
    that differ in the last token alone, such as the letters of a multiple
    choice, share a row of the batch.
    """
    rows = collections.defaultdict(list)
    for i, (text, context, continuation) in enumerate(requests):
      inputs, ask = self._ask(i, text, context, continuation)
      rows[inputs].append(ask)
    order = sorted(rows, key=lambda inputs: (-len(inputs), inputs))
    out: list = [None] * len(requests)
    with tqdm.tqdm(
      total=len(requests), desc="loglikelihood", disable=disable_tqdm
    ) as bar:
      for keys in _batches(order, self.batch_size):
        batch = scoring.lay_out(
          keys, [rows[key] for key in keys], self.batch_size
        )
        scores = scoring.score(self._weights, batch, graphdef=self._graphdef)
        scores = jax.device_get(scores)
        for b, key in enumerate(keys):
          for x, ask in enumerate(rows[key]):
            out[ask.index] = answer = scoring.answer(
              scores, b, x, len(key), ask
            )
            text = requests[ask.index][0]
            if text is not None:
              self.cache_hook.add_partial("loglikelihood", text, answer)
            bar.update()
    return out

  def _ask(self, index, text, context, continuation):
    """The tokens that the model sees of a request, and what is asked of it."""
    shown = "a window" if text is None else repr(text)[-200:]
    if not 1 <= len(continuation) <= self.max_length:
      raise ConfigError(
        f"{shown}: found a continuation of {len(continuation)} tokens, wanted "
        f"1 to max_length = {self.max_length}"
      )
    tokens = [*(context or [self.prefix_token_id]), *continuation]
    *inputs, last = tokens[-self.max_length - 1 :]
    return tuple(inputs), scoring.Ask(index, len(continuation), last)

  def generate_until(
    self, requests: Sequence[Instance], disable_tqdm: bool = False
  ) -> list[str]:
    """What the model writes after each context, up to the first stop string.

    A request's options are `until`, a string or several; `max_gen_toks` or one
    of its aliases; `do_sample`, `temperature`, `top_k`, `top_p` and `min_p`.
    The end of a document stops too. A context is cut from the left to what
    leaves room for the new tokens.

    What is drawn depends on a request's place among the others.

    Raises:
      ConfigError: another option, or no room for a context.
    """
    groups = collections.defaultdict(list)
    for i, request in enumerate(requests):
      context, options = request.args
      manner = self._manner(options)
      tokens = self.tok_encode(context) or [self.prefix_token_id]
      tokens = tokens[manner.max_tokens - self.max_length :]
      groups[manner].append((i, tokens))
    out: list = [None] * len(requests)
    with tqdm.tqdm(
      total=len(requests), desc="generate_until", disable=disable_tqdm
    ) as bar:
      for manner, group in groups.items():
        group.sort(key=lambda pair: -len(pair[1]))
        for n, pairs in enumerate(_batches(group, self.batch_size)):
          texts = self._write([p for _, p in pairs], manner, seed=n)
          for (i, _), text in zip(pairs, texts, strict=True):
            out[i] = text
            self.cache_hook.add_partial(
              "generate_until", requests[i].args, text
            )
            bar.update()
    return out

  def _manner(self, options: dict[str, Any]) -> _Manner:
    """How a request wants its text; ConfigError for what cannot be."""
    left = dict(normalize_gen_kwargs(options, self.max_new_tokens))
    until = tuple(s for s in left.pop("until") if s)
    max_tokens = left.pop("max_gen_toks")
    if not 1 <= max_tokens < self.max_length:
      raise ConfigError(
        f"max_gen_toks: found {max_tokens}, wanted 1 to "
        f"{self.max_length - 1}, fewer than max_length, which holds the "
        "context too; say less by simple_evaluate(gen_kwargs=...) or "
        "LM(max_new_tokens=...), or allow more by LM(max_length=...)"
      )
    drawn = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    for name in drawn.keys() & left.keys():
      value = left.pop(name)
      drawn[name] = drawn[name] if value is None else value
    sampling = Sampling(**drawn)
    if not left.pop("do_sample"):
      sampling = Sampling(temperature=0.0)
    if left.pop("num_beams", 1) != 1 or left:
      found = {k: options[k] for k in options.keys() & {*left, "num_beams"}}
      raise ConfigError(
        f"generation_kwargs: found {found}, wanted until, max_gen_toks, "
        f"do_sample, {', '.join(drawn)}, or num_beams of 1"
      )
    sampling.check()
    return _Manner(until, max_tokens, sampling)

  def _write(
    self, prompts: list[list[int]], manner: _Manner, seed: int
  ) -> list[str]:
    """The texts that follow `prompts`, none of which is empty."""
    texts = [_Text(self.tokenizer, manner.until) for _ in prompts]
    n_more = scoring.few_rows(len(prompts), self.batch_size) - len(prompts)
    for step in stream(
      self._decoder,
      [*prompts, *[[self.eot_token_id]] * n_more],
      max_tokens=manner.max_tokens,
      sampling=manner.sampling,
      seed=seed,
    ):
      for text, tokens in zip(texts, step.tokens):
        text.extend(tokens)
      if all(text.ended for text in texts):
        break
    return [text.value() for text in texts]

  @functools.cached_property
  def _decoder(self) -> Decoder:
    return Decoder(self.model)


class _Text:
  """Tokens of one text, up to the one that completes a stop string."""

  def __init__(self, tokenizer: Tokenizer, until: Sequence[str]):
    self.ended = False
    self._tokenizer, self._until = tokenizer, until
    self._tokens: list[int] = []
    # A token is a byte or more: no stop string reaches farther back.
    self._reach = max((len(s.encode()) for s in until), default=0)

  def extend(self, tokens: Sequence[int]) -> None:
    """Takes tokens until the text has ended."""
    for token in tokens:
      if self.ended or token == self._tokenizer.eos_id:
        self.ended = True
        return
      self._tokens.append(token)
      if self._reach:
        tail = self._tokenizer.decode(self._tokens[-self._reach :])
        self.ended = any(s in tail for s in self._until)

  def value(self) -> str:
    """The text before the stop string, special tokens left out."""
    ids = np.array(self._tokens, np.int32)
    known = [
      i
      for i in ids[ids < self._tokenizer.vocab_size]
      if self._tokenizer.token_bytes(np.array([i]))
    ]
    return _cut(self._tokenizer.decode(known), self._until)


def _cut(text: str, until: Sequence[str]) -> str:
  """`text` before the stop string that is complete first.

  >>> _cut("one two three", ["three", "two th", "tw"])
  'one '
  """
  ends = [(text.find(s) + len(s), text.find(s)) for s in until if s in text]
  return text[: min(ends)[1]] if ends else text


def _begin(tokens: Tokenizer) -> int | None:
  """The token that every context is to begin with, if any."""
  return None if tokens.start_id == tokens.eos_id else tokens.start_id


def _batches(items: list, size: int) -> Iterator[list]:
  for first in range(0, len(items), size):
    yield items[first : first + size]
