"""The arguments of every sub-command, and the texts of --help."""

import argparse

from dsv3 import argument_types as types

_OVERRIDES = """\
any key of the config can be set:  --config.train.steps=2000
  --config.schedule.lr_peak=1e-3  --config.data.sources=notes.txt,~/src
"""


class _Parser(argparse.ArgumentParser):
  """argparse, with errors of one line."""

  def error(self, message: str):
    self.exit(2, f"dsv3: error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
  top = _Parser(
    prog="dsv3",
    description="DeepSeek-V3 for research: train, look, compare.",
    allow_abbrev=False,
  )
  commands = top.add_subparsers(
    dest="command", metavar="COMMAND", required=True
  )

  def add(name: str, text: str, *, config: bool = False, **kwargs):
    command = commands.add_parser(
      name,
      help=text,
      description=text,
      allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      epilog=_OVERRIDES if config else None,
    )
    if config:
      command.add_argument(
        "--config",
        metavar="FILE",
        help="a file, or the name of one in configs/",
      )
    return command

  train = add("train", "train a model, or go on where it stopped", config=True)
  train.add_argument(
    "--workdir", metavar="DIR", help="the run folder [runs/NAME of the config]"
  )
  train.add_argument(
    "--print_config", action="store_true", help="print the config and stop"
  )
  train.add_argument(
    "--print_sharding",
    action="store_true",
    help="print where every array lies on config.mesh, and stop",
  )
  train.add_argument(
    "--no_sample", action="store_true", help="no sample at the end"
  )
  train.add_argument(
    "--coordinator",
    metavar="HOST:PORT",
    help="of the first of several processes [that of the cluster's job]",
  )
  train.add_argument("--process_id", type=types.whole, metavar="N")
  train.add_argument("--num_processes", type=types.count, metavar="N")

  evaluate = add("eval", "bits per byte and expert balance on held-out text")
  _add_run(evaluate)
  evaluate.add_argument(
    "--batches",
    type=types.count,
    metavar="N",
    help="[train.final_eval_batches]",
  )
  evaluate.add_argument(
    "--drafts",
    type=types.whole,
    metavar="N",
    help="of MTP modules, to count those kept; 0: none [2]",
  )

  sample = add("sample", "write on from a prompt")
  _add_run(sample)
  sample.add_argument("--prompt", required=True, metavar="TEXT")
  _add_sampling(sample, n_tokens=200, temperature=0.8)

  chat = add("chat", "a conversation under the tokenizer's chat template")
  _add_run(chat)
  chat.add_argument("--system", metavar="TEXT", help="the system's message")
  chat.add_argument(
    "--template", metavar="FILE", help="Jinja [that of the tokenizer]"
  )
  _add_sampling(chat, n_tokens=1024, temperature=0.6)

  needle = add("needle", "find a number hidden in long text: a map (Fig. 8)")
  _add_run(needle)
  # No --config: the model is the run's. --config.data.KEY is for the text.
  needle.set_defaults(config=None)
  needle.epilog = (
    "other text than what the run holds out:  --config.data.sources=FOLDER"
  )
  needle.add_argument(
    "--lengths",
    type=types.list_of(types.count),
    default="512,1024,2048",
    metavar="N,N",
    help="tokens of a prompt and its answer [512,1024,2048]",
  )
  needle.add_argument(
    "--depths",
    type=types.list_of(types.share),
    default="0,25,50,75,100",
    metavar="P,P",
    help="percent of the text before the needle [0,25,50,75,100]",
  )
  needle.add_argument(
    "--trials", type=types.count, default=5, metavar="N", help="a cell [5]"
  )
  needle.add_argument(
    "--batch",
    type=types.count,
    default=8,
    metavar="N",
    help="prompts at once [8]",
  )
  needle.add_argument("--seed", type=types.seed, default=0, help="[0]")
  needle.add_argument("--out", metavar="DIR", help="[needle in the run folder]")

  launch = add("launch", "write the script of a run on many nodes", config=True)
  launch.add_argument("engine", choices=("slurm", "gke", "tpu-vm", "local"))
  launch.add_argument("--nodes", type=types.count, required=True, metavar="N")
  launch.add_argument(
    "--devices",
    type=types.count,
    metavar="N",
    help="of a node [8; of a TPU's host 4; local 1]",
  )
  launch.add_argument(
    "--chip",
    metavar="NAME",
    help="of dsv3 plan: a forecast, and an error for what does not fit",
  )
  launch.add_argument(
    "--workdir", metavar="DIR", help="the run folder [runs/NAME of the config]"
  )
  launch.add_argument(
    "--set",
    type=types.pair,
    action="append",
    default=[],
    metavar="KEY=VALUE",
    help="of the engine; a wrong one is told with those that there are",
  )
  launch.add_argument("--out", metavar="FILE", help="[runs/NAME.ENGINE.sh]")
  launch.add_argument(
    "--submit", action="store_true", help="hand it to the engine"
  )

  sweep = add("sweep", "run the arms of an experiment that have no result yet")
  _add_experiment(sweep)
  sweep.add_argument(
    "--seeds",
    type=types.count,
    metavar="N",
    help="of every arm: the first of SEEDS, then those after [SEEDS of sweep.py, "
    "or 3]",
  )
  sweep.add_argument(
    "--list", action="store_true", help="the runs and their states, no more"
  )
  sweep.add_argument(
    "--index",
    type=types.whole,
    metavar="N",
    help="only that run of --list, for array jobs",
  )
  sweep.add_argument(
    "--only",
    default="",
    metavar="NAME,NAME",
    help="only these arms or runs",
  )
  sweep.add_argument(
    "--jobs",
    type=types.count,
    metavar="N",
    help="runs at once [1; of Slurm and Ray all]",
  )
  sweep.add_argument(
    "--launcher",
    choices=("local", "slurm", "ray"),
    default="local",
    help="processes here, a Slurm array by submitit, or tasks of the Ray cluster "
    "that is there [local]",
  )
  sweep.add_argument(
    "--slurm",
    type=types.settings,
    default={},
    metavar="KEY=VALUE,...",
    help="of submitit: slurm_partition, timeout_min [720], gpus_per_node, ...",
  )
  sweep.add_argument(
    "--ray",
    type=types.settings,
    default={},
    metavar="KEY=VALUE,...",
    help="of a Ray task: num_cpus, num_gpus, ...; and the cluster's address",
  )
  sweep.add_argument(
    "--retry", action="store_true", help="those that have failed too"
  )
  sweep.add_argument(
    "--runs", metavar="DIR", help="the run folders [runs/NAME]"
  )

  compare = add(
    "compare", "what the results of an experiment say, and how sure"
  )
  _add_experiment(compare)
  compare.add_argument(
    "--metric",
    type=lambda text: text.split(","),
    metavar="NAME,NAME",
    help="of held-out text, or train/NAME, best/NAME [METRICS of sweep.py, or "
    "loss]",
  )
  compare.add_argument(
    "--baseline", metavar="ARM", help="[BASELINE of sweep.py, or the first]"
  )
  compare.add_argument(
    "--match",
    choices=("flops", "params", "tokens"),
    help="only arms that cost the same get a verdict",
  )
  compare.add_argument(
    "--relative", action="store_true", help="curves of the relative loss error"
  )
  compare.add_argument(
    "--out",
    metavar="DIR",
    help="for pictures and page [the experiment; with --metric, --baseline or "
    "--match none are kept]",
  )

  fp8 = add("fp8-report", "what FP8 costs every Linear of a run: a map")
  fp8.add_argument("workdir", metavar="RUN")
  fp8.add_argument(
    "--step", type=types.whole, metavar="N", help="a checkpoint [the newest]"
  )
  fp8.add_argument(
    "--recipe", metavar="NAME", help="another than the run's [deepseek_v3]"
  )
  fp8.add_argument("--out", metavar="DIR", help="[fp8 in the run folder]")

  replay = add("replay", "steps of a run once more, with a knob changed")
  replay.add_argument("workdir", metavar="RUN")
  replay.add_argument(
    "--from", dest="first", type=types.whole, required=True, metavar="STEP",
    help="a checkpoint",
  )  # fmt: skip
  replay.add_argument(
    "--steps", type=types.count, default=20, metavar="N", help="[20]"
  )
  replay.add_argument(
    "--diff", nargs="+", metavar="KEY=VALUE", help="of the run's config"
  )
  replay.add_argument(
    "--record", metavar="FILE.npz", help="write down what the routers choose"
  )
  replay.add_argument(
    "--frozen",
    metavar="FILE.npz",
    help="the routers choose as in this --record of the same steps",
  )
  replay.add_argument("--out", metavar="FILE", help="[in RUN/replays]")

  routing = add("routing", "which experts a text uses: a table and a map")
  _add_run(routing)
  routing.add_argument(
    "--domains",
    nargs="+",
    metavar="NAME=FILE",
    help="texts, told apart [held-out rows, by source]",
  )
  routing.add_argument(
    "--rows", type=types.count, default=16, metavar="N", help="of a domain [16]"
  )
  routing.add_argument(
    "--frozen", metavar="FILE.npz", help="also the loss with these choices"
  )
  routing.add_argument(
    "--devices",
    type=types.count,
    metavar="N",
    help="that serve: which experts to copy, and where they lie (EPLB)",
  )
  routing.add_argument(
    "--slots", type=types.count, metavar="N", help="for experts on all of them"
  )
  routing.add_argument(
    "--nodes",
    type=types.count,
    default=1,
    metavar="N",
    help="of the devices [1]",
  )
  routing.add_argument(
    "--out", metavar="DIR", help="[routing in the run folder]"
  )

  data = add("data", "the documents and tokens that a step reads", config=True)
  data.add_argument(
    "--step",
    type=types.count,
    required=True,
    metavar="N",
    help="the first is 1",
  )
  data.add_argument(
    "--workdir", metavar="DIR", help="of a run: its config and position"
  )
  data.add_argument(
    "--rows", type=types.count, default=4, metavar="N", help="[4]"
  )

  convert = add("convert", "released weights to a run, or a run to them")
  convert.add_argument("direction", choices=("from-hf", "to-hf"))
  convert.add_argument("source", metavar="FOLDER")
  convert.add_argument("--out", metavar="DIR", help="a new folder")
  convert.add_argument(
    "--dtype",
    choices=("bfloat16", "float32", "fp8"),
    help="what weights are kept in [bfloat16]",
  )
  convert.add_argument(
    "--dry-run", action="store_true", help="from-hf: check and report, no more"
  )
  convert.add_argument(
    "--fp8", action="store_true", help="to-hf: Linears in FP8 blocks"
  )
  convert.add_argument("--step", type=types.whole, metavar="N", help="to-hf")
  convert.add_argument("--ema", action="store_true", help="to-hf")

  add("diff-paper", "where a config departs from the report", config=True)
  add("params", "parameters of a config, by part, and FLOPs", config=True)

  _add_plan(add("plan", "what it will cost, and where it fits", config=True))

  tokenizer = add("tokenizer", "train a BPE tokenizer on the data", config=True)
  tokenizer.add_argument(
    "--vocab_size", type=types.count, required=True, metavar="N"
  )
  tokenizer.add_argument("--out", required=True, metavar="FILE")
  return top


def _add_plan(command: argparse.ArgumentParser) -> None:
  command.epilog = (
    "dsv3 plan --config=v3_671b --preset=train2048, prefill32, decode320 or "
    "decode144:\nthe report's deployment units\n\n" + _OVERRIDES
  )
  command.add_argument(
    "--chip", metavar="NAME", help="h800, b200, v5p, ... [h800]"
  )
  command.add_argument("--chips", type=types.count, metavar="N", help="[1]")
  command.add_argument(
    "--mesh",
    metavar="AXIS=N,...",
    help="of data, fsdp, expert, context, tensor, stage; one may be -1 "
    "[the fastest that fits]",
  )
  command.add_argument(
    "--seq", type=types.count, metavar="N", help="[data.seq_len]"
  )
  command.add_argument("--microbatches", type=types.count, metavar="N")
  command.add_argument(
    "--schedule", metavar="NAME", help="1f1b, interleaved, zb1p, dualpipe, ..."
  )
  command.add_argument(
    "--precision", choices=("bf16", "fp8"), help="of Linears [the config's]"
  )
  command.add_argument("--preset", metavar="NAME", help="a unit of the report")
  command.add_argument(
    "--search", action="store_true", help="recomputation too, and the ranking"
  )
  command.add_argument(
    "--lower",
    metavar="TARGET",
    nargs="?",
    const="h200:1x8",
    help="compile the step for devices that are not there: cpu:8, h200:1x8, "
    "v5p:4x4x8; memory, collectives, surprises",
  )
  command.add_argument(
    "--max_minutes",
    type=types.amount,
    default=30.0,
    metavar="N",
    help="of tracing and compiling for --lower [30]",
  )
  command.add_argument(
    "--print_sharding",
    action="store_true",
    help="print where every array lies on --mesh, and stop",
  )
  command.add_argument(
    "--tokens", type=types.amount, metavar="N", help="the budget [train.tokens]"
  )
  command.add_argument(
    "--price",
    type=types.share,
    metavar="USD",
    help="of a chip-hour [if published]",
  )
  command.add_argument(
    "--unit", type=types.count, metavar="N", help="chips that serve together"
  )
  command.add_argument(
    "--unit_tensor",
    type=types.count,
    metavar="N",
    help="of a unit's attention [1]",
  )
  command.add_argument(
    "--batch", type=types.amount, metavar="N", help="sequences decoded a chip"
  )
  command.add_argument(
    "--accepted",
    type=types.share,
    metavar="P",
    help="share of drafts kept [0.85]",
  )
  command.add_argument("--json", action="store_true", help="values, no text")
  command.add_argument("--html", metavar="FILE", help="a page with plots")


def _add_run(command: argparse.ArgumentParser) -> None:
  command.add_argument("--workdir", required=True, metavar="DIR")
  command.add_argument(
    "--step",
    type=types.whole,
    metavar="N",
    help="a checkpoint; 0: imported weights [the newest]",
  )
  command.add_argument(
    "--ema", action="store_true", help="use the moving average of the weights"
  )


def _add_experiment(command: argparse.ArgumentParser) -> None:
  command.add_argument("folder", metavar="experiments/NAME")
  command.set_defaults(config=None, seeds=None)
  command.epilog = (
    "any key of the base that no arm sets:  --config.train.steps=100"
  )


def _add_sampling(
  command: argparse.ArgumentParser, *, n_tokens: int, temperature: float
) -> None:
  command.add_argument(
    "--tokens",
    type=types.count,
    default=n_tokens,
    metavar="N",
    help=f"at most so many [{n_tokens}]",
  )
  command.add_argument(
    "--temperature",
    type=types.share,
    default=temperature,
    help=f"0: the likeliest [{temperature}]",
  )
  command.add_argument(
    "--top_p", type=types.share, default=0.95, help="share to draw from [0.95]"
  )
  command.add_argument(
    "--top_k", type=types.whole, default=0, help="of the likeliest [0: all]"
  )
  command.add_argument(
    "--min_p",
    type=types.share,
    default=0.0,
    help="relative to the likeliest [0]",
  )
  command.add_argument("--seed", type=types.seed, default=0, help="[0]")
  command.add_argument(
    "--drafts",
    type=types.whole,
    metavar="N",
    help="tokens that MTP modules draft at a time [as many as there are]",
  )
