"""What the sub-commands of `dsv3` do; their arguments are in `dsv3.cli`."""

from dsv3.commands import evaluate, fp8, lab, look, text, train, weights

COMMANDS = {
  "train": train.train,
  "eval": evaluate.evaluate,
  "needle": evaluate.find_needles,
  "sample": text.sample,
  "chat": text.chat,
  "convert": weights.convert_weights,
  "data": look.data,
  "diff-paper": look.diff_paper,
  "params": look.params,
  "fp8-report": fp8.report,
  "sweep": lab.sweep,
  "compare": lab.compare,
  "tokenizer": look.train_tokenizer,
}
