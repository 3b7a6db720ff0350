"""How long from a killed process to the next step of the run?

  python experiments/performance/restart.py --config=tiny --processes=2 --times=5

starts a run of so many processes on this machine, and so many times kills one of
them (`--victim`) after a checkpoint, waits until the others have ended and starts
the same command again. Prints a JSON line a kill, in seconds, and the medians.
"""

import argparse
import json
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time

from dsv3.train.logs import read_metrics


def start(config: str, workdir: str, n: int) -> list[subprocess.Popen]:
  with socket.socket() as listener:
    listener.bind(("localhost", 0))
    port = listener.getsockname()[1]
  command = [
    *(sys.executable, "-m", "dsv3", "train", "--no_sample"),
    *(f"--config={config}", f"--workdir={workdir}", f"--config.mesh.data={n}"),
    *("--config.train.checkpoint_every=5", "--config.train.max_minutes=0"),
    *("--config.train.log_every=1", "--config.train.eval_every=0"),
    *(f"--coordinator=localhost:{port}", f"--num_processes={n}"),
  ]
  quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
  return [
    subprocess.Popen([*command, f"--process_id={i}"], **quiet) for i in range(n)
  ]


def last_step(workdir: str) -> int:
  if not (pathlib.Path(workdir) / "metrics.jsonl").exists():
    return 0
  return max((line["step"] for line in read_metrics(workdir)), default=0)


def starts(workdir: str) -> int:
  return len((pathlib.Path(workdir) / "starts.jsonl").read_text().splitlines())


def wait_for(step: int, workdir: str) -> float:
  while last_step(workdir) < step:
    time.sleep(0.05)
  return time.monotonic()


def kill_and_go_on(
  started: list[subprocess.Popen], victim: int, begin, workdir: str
) -> tuple[list[subprocess.Popen], dict[str, float]]:
  """The processes of the next start, and seconds to its first step."""
  before = starts(workdir)
  started[victim].kill()
  killed = time.monotonic()
  for process in started:
    process.wait()
  ended = time.monotonic()
  again = begin()
  while starts(workdir) == before:
    time.sleep(0.05)
  time.sleep(0.2)  # by now it has cut the metrics to the checkpoint
  stepped = wait_for(last_step(workdir) + 1, workdir)
  return again, {
    "killed_to_all_ended": round(ended - killed, 1),
    "started_again_to_next_step": round(stepped - ended, 1),
    "killed_to_next_step": round(stepped - killed, 1),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--config", default="tiny")
  parser.add_argument("--processes", type=int, default=2)
  parser.add_argument("--times", type=int, default=1)
  parser.add_argument("--victim", type=int, default=-1, help="-1: the last")
  args = parser.parse_args()
  found = []
  with tempfile.TemporaryDirectory() as workdir:
    begin = lambda: start(args.config, workdir, args.processes)
    started = begin()
    for _ in range(args.times):
      wait_for(last_step(workdir) + 8, workdir)  # a checkpoint in five
      started, seconds = kill_and_go_on(started, args.victim, begin, workdir)
      found.append(seconds)
      print(json.dumps(seconds), flush=True)
    for process in started:
      process.kill()
  medians = {k: statistics.median(x[k] for x in found) for k in found[0]}
  print(json.dumps({"processes": args.processes, "n": len(found), **medians}))


if __name__ == "__main__":
  main()
