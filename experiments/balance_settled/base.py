"""As `experiments/balance`, twice as long, and a tenth of the files held out: two
percent are fourteen, whose text is unlike that which the bias has settled on."""

BASE = "../balance/base"
DIFF = {
  "name": "balance_settled",
  "data.heldout": 0.1,
  "train.steps": 800,
  "train.final_eval_batches": 512,
}
