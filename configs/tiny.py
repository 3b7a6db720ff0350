"""The whole recipe on two CPU cores in under five minutes.

MLA, a mixture of 16 experts with bias balancing, one MTP module: what V3 is,
at the size of a laptop. Reads the Python source and documentation installed
with the interpreter, byte by byte.
"""

BASE = "v3_671b"
DIFF = {
  "name": "tiny",
  "model.vocab_size": 264,
  "model.dim": 128,
  "model.n_layers": 4,
  "model.n_dense_layers": 1,
  "model.dense_hidden": 384,
  "model.init_std": 0.02,
  "model.dtype": "float32",
  "model.remat": "none",
  "model.precision.recipe": "bf16",
  "model.attention.n_heads": 4,
  "model.attention.n_kv_heads": 4,
  "model.attention.q_rank": 64,
  "model.attention.kv_rank": 64,
  "model.attention.nope_dim": 32,
  "model.attention.rope_dim": 16,
  "model.attention.v_dim": 32,
  "model.moe.n_routed": 16,
  "model.moe.top_k": 4,
  "model.moe.hidden": 96,
  "model.moe.n_groups": 4,
  "model.moe.top_groups": 2,
  "data.tokenizer": "bytes",
  "data.seq_len": 256,
  "data.heldout": 0.02,
  "data.fim_rate": 0.0,
  "data.split_rate": 0.0,
  "optimizer.moment_dtype": "float32",
  "schedule.time": "share",
  "schedule.warmup_steps": 30,
  "schedule.lr_peak": 3e-3,
  "schedule.lr_end": 3e-4,
  "schedule.lr_last": 1e-4,
  "schedule.bias_speed": 0.003,  # a run of hundreds of steps, not 240,000
  "schedule.batch_size": 8,
  "schedule.batch_size_start": 8,
  "train.steps": 800,
  "train.max_minutes": 4.2,
  "train.ema_decay": 0.0,
  "train.eval_every": 200,
  "train.checkpoint_every": 200,
}
