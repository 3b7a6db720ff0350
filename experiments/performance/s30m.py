"""The 30M class of the comparison."""

BASE = "s100m"
DIFF = {
  "name": "s30m",
  "model.vocab_size": 16_384,
  "model.dim": 256,
  "model.n_layers": 6,
  "model.dense_hidden": 768,
  "model.attention.q_rank": 128,
  "model.attention.kv_rank": 128,
  "model.attention.nope_dim": 32,
  "model.attention.rope_dim": 16,
  "model.attention.v_dim": 32,
}
