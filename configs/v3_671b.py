"""DeepSeek-V3, 671B: every number of the report, once, with its section.

The root of all configs: the others are diffs of this one. `unpublished` marks
what neither the report nor the released code states, with our choice. Units:
tokens where a name says tokens, sequences for batch sizes, optimiser steps for
steps. `dsv3/config.py` says what each field means and which values it takes.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """The configuration of the report's pre-training run."""
  config = ConfigDict()
  config.name = "v3_671b"

  model = config.model = ConfigDict()
  model.vocab_size = 129_280  # Sec. 4.1: 128K BPE; padded as in the release
  model.dim = 7168  # Sec. 4.2
  model.n_layers = 61  # Sec. 4.2
  model.ffn = "moe"  # Sec. 4.2
  model.n_dense_layers = 3  # Sec. 4.2: MoE in all but the first three
  model.dense_hidden = 18_432  # released config; the report is silent
  model.norm_eps = 1e-6  # released config
  model.init_std = 0.006  # Sec. 4.2
  model.dtype = "bfloat16"  # Sec. 3.3: activations
  model.layers = "scan"  # ours: compile time does not grow with depth
  model.remat = "paper"  # Sec. 3.2.3

  precision = model.precision = ConfigDict()
  precision.recipe = "deepseek_v3"  # Sec. 3.3
  precision.changes = ()  # ours: none to that recipe
  precision.high = ()  # Sec. 3.3.1: all Linears; embedding, head, router stay
  precision.kernel = "auto"  # ours
  precision.report_every = 0  # ours
  precision.guard = 0.0  # ours
  precision.guard_action = "tell"  # ours

  attention = model.attention = ConfigDict()
  attention.kind = "mla"  # Sec. 2.1.1
  attention.n_heads = 128  # Sec. 4.2
  attention.n_kv_heads = 128  # of `gqa` alone
  attention.q_rank = 1536  # Sec. 4.2
  attention.kv_rank = 512  # Sec. 4.2
  attention.nope_dim = 128  # Sec. 4.2
  attention.rope_dim = 64  # Sec. 4.2
  attention.v_dim = 128  # released config
  attention.kernel = "auto"  # ours

  rope = model.rope = ConfigDict()
  rope.theta = 10_000.0  # released config
  rope.yarn_factor = 1.0  # Sec. 4.3: 40 in the long-context stages, plain here
  rope.original_len = 4096  # Sec. 4.2: the length of pre-training
  rope.beta_fast = 32.0  # Sec. 4.3 (the report's beta)
  rope.beta_slow = 1.0  # Sec. 4.3 (the report's alpha)
  rope.mscale = 1.0  # Sec. 4.3: sqrt(t) = 0.1 * mscale * ln(s) + 1

  moe = model.moe = ConfigDict()
  moe.n_routed = 256  # Sec. 4.2
  moe.n_shared = 1  # Sec. 4.2
  moe.top_k = 8  # Sec. 4.2
  moe.hidden = 2048  # Sec. 4.2
  moe.n_groups = 8  # Sec. 4.2: experts of a layer on 8 nodes
  moe.top_groups = 4  # Sec. 4.2: M
  moe.group_score = "top2"  # Sec. 2.1.2: highest K/M = 2 affinities of a node
  moe.gate = "sigmoid"  # Eq. 15
  moe.normalize = True  # Eq. 13
  moe.routed_scale = 2.5  # released config
  moe.balancing = "bias+sequence"  # Sec. 2.1.2
  moe.bias_step = "sign"  # Sec. 2.1.2: by the bias speed, up or down
  moe.bias_form = "additive"  # Eq. 16
  moe.kernel = "auto"  # ours

  mtp = model.mtp = ConfigDict()
  mtp.depth = 1  # Sec. 4.2
  mtp.hidden = "after_norm"  # unpublished; what inference engines feed
  mtp.concat = "hidden_embedding"  # Eq. 21; the release stores the other order

  data = config.data = ConfigDict()
  data.sources = ("python",)  # unpublished corpus; ours: text on this machine
  data.weights = ()  # unpublished; ours: by size
  data.text_key = "text"  # ours
  data.tokenizer = "tokenizer.json"  # Sec. 4.1: byte-level BPE
  data.seq_len = 4096  # Sec. 4.2
  data.mask_documents = False  # Sec. 4.1: no cross-sample attention mask
  data.fim_rate = 0.1  # Sec. 4.1: PSM
  data.split_rate = 0.1  # unpublished share; ours. Sec. 4.1: random splits
  data.heldout = 0.01  # ours: share of the files kept for evaluation
  data.cache = ""  # ours: "" is the user's cache folder

  optimizer = config.optimizer = ConfigDict()
  optimizer.b1 = 0.9  # Sec. 4.2
  optimizer.b2 = 0.95  # Sec. 4.2
  optimizer.eps = 1e-8  # unpublished; ours
  optimizer.weight_decay = 0.1  # Sec. 4.2
  optimizer.decayed = "matrices"  # unpublished; ours: norm weights are spared
  optimizer.clip_norm = 1.0  # Sec. 4.2
  optimizer.moment_dtype = "bfloat16"  # Sec. 3.3.3

  schedule = config.schedule = ConfigDict()
  schedule.time = "tokens"  # the report's: boundaries below are of this run
  schedule.horizon_tokens = 14.8e12  # Sec. 4.2
  schedule.warmup_steps = 2000  # Sec. 4.2
  schedule.lr_peak = 2.2e-4  # Sec. 4.2
  schedule.lr_constant_tokens = 10e12  # Sec. 4.2
  schedule.lr_cosine_tokens = 4.3e12  # Sec. 4.2
  schedule.lr_end = 2.2e-5  # Sec. 4.2: end of the cosine, kept for 333B
  schedule.lr_last_tokens = 167e9  # Sec. 4.2
  schedule.lr_last = 7.3e-6  # Sec. 4.2
  schedule.mtp_weight = 0.3  # Sec. 4.2: lambda
  schedule.mtp_weight_late = 0.1  # Sec. 4.2
  schedule.mtp_weight_tokens = 10e12  # Sec. 4.2: the first 10T
  schedule.bias_speed = 0.001  # Sec. 4.2: gamma
  schedule.bias_speed_tokens = 14.3e12  # Sec. 4.2
  schedule.bias_speed_late = 0.0  # Sec. 4.2: for the last 500B
  schedule.balance_weight = 1e-4  # Sec. 4.2: alpha
  schedule.z_weight = 0.0  # not in the report
  schedule.batch_size = 15_360  # Sec. 4.2
  schedule.batch_size_start = 3072  # Sec. 4.2
  schedule.batch_ramp_tokens = 469e9  # Sec. 4.2
  schedule.batch_ramp_stages = 4  # unpublished shape; ours: equal stairs

  train = config.train = ConfigDict()
  train.seed = 0  # ours
  train.start_from = ""  # ours: from drawn weights
  train.tokens = 14.8e12  # Sec. 4.2
  train.steps = 0  # ours: 0 is as many as train.tokens takes
  train.max_minutes = 0.0  # ours: 0 is no limit
  train.microbatches = 1  # unpublished; ours
  train.ema_decay = 0.999  # unpublished value; ours. Sec. 3.2.3: there is one
  train.ema_place = "host"  # Sec. 3.2.3: in CPU memory
  train.max_skipped = 10  # ours: updates lost to non-finite gradients
  train.log_every = 10  # ours
  train.eval_every = 1000  # ours
  train.eval_batches = 16  # ours
  train.final_eval_batches = 256  # ours
  train.checkpoint_every = 1000  # ours
  train.checkpoint_minutes = 30.0  # ours: of a step of minutes 1000 take days
  train.checkpoints_kept = 2  # ours: the newest, and the best besides

  # Sec. 3.2's own arrangement is `dsv3 plan --preset=train2048`.
  mesh = config.mesh = ConfigDict()
  mesh.data = -1  # ours: the devices that the other axes leave
  mesh.fsdp = 1  # ours
  mesh.expert = 1  # ours; Sec. 3.2: 64
  mesh.context = 1  # ours
  mesh.tensor = 1  # ours; Sec. 3.2: none
  mesh.stage = 1  # ours; Sec. 3.2: 16
  mesh.expert_nodes = 1  # ours; Sec. 3.2: 8
  mesh.expert_rows = 0.0  # ours
  return config
