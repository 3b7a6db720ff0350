"""As `experiments/balance_settled`, half as many steps of twice the rows: the load of
a batch is nearer to that of the text, and the bias follows less noise."""

BASE = "../balance_settled/base"
DIFF = {
  "name": "balance_large_batch",
  "schedule.batch_size": 16,
  "schedule.batch_size_start": 16,
  "train.steps": 400,
  "train.final_eval_batches": 256,
}
