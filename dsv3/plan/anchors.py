"""Published speeds of DeepSeek-V3 671B, as data: what the planner is tried on.

Tokens/s are of one device. Where a source gives no arrangement of devices, ours
stands in `assumed`. "balanced": the router was forced to deal tokens evenly, or
drew them at random; "real": it was the model's.
"""

import dataclasses

from dsv3.plan.mesh import Mesh
from dsv3.plan.step import Layout
from dsv3.plan.unit import Unit


@dataclasses.dataclass(frozen=True)
class Training:
  """A measured training speed."""

  name: str
  chip: str
  chips: int
  precision: str  # of Linears: bf16 | fp8
  tokens: float  # a second and chip
  mesh: Mesh
  batch: int
  microbatches: int
  schedule: str
  source: str
  virtual: int = 1
  mtp: bool = True  # as its own TFLOPS over its tokens/s tell
  remat: str = "paper"
  routing: str = "balanced"
  role: str = "held out"  # fitted | held out | superseded, by later software
  assumed: str = ""


_BRIDGE = "NVIDIA Megatron Bridge, performance summary, release "
_AUTOMODEL = "NVIDIA NeMo AutoModel, performance summary (2025-10)"
_MAXTEXT = "Google MaxText and TPU recipes, as listed by their logs"
_BRIDGE_NEW = _BRIDGE + "after 26.02"
_PP16 = Mesh(data=2, expert=8, stage=16)
_TP2 = Mesh(data=2, expert=64, stage=8)
_FOLDED = "TP 2 of attention counted as data 2: experts are not cut by it"
_OLD_MESH = "mesh of release 26.02"
_FSDP = "mesh: fsdp over all chips; 8 rows a chip; full recomputation"
_TPU7X = _FSDP + "; their device taken for a chip"


def _bridge(name, chip, precision, tokens, mesh, m, virtual, release, **more):
  schedule = "interleaved" if virtual > 1 else "1f1b"
  batch = more.pop("batch", 4096)
  return Training(
    name,
    chip,
    mesh.size,
    precision,
    tokens,
    mesh,
    batch,
    m,
    schedule,
    release if release.startswith("NVIDIA") else _BRIDGE + release,
    virtual,
    **more,
  )


def _maxtext(name, chip, chips, precision, tokens, **more):
  mesh = Mesh(fsdp=chips)
  return Training(
    name,
    chip,
    chips,
    precision,
    tokens,
    mesh,
    8 * chips,
    1,
    "none",
    _MAXTEXT,
    mtp=False,
    remat="full",
    assumed=_TPU7X if chip == "tpu7x" else _FSDP,
    **more,
  )


def _ep(stage: int, expert: int, data: int = 1) -> Mesh:
  return Mesh(data=data, expert=expert, stage=stage)


TRAINING = (
  Training(
    "DeepSeek, 2048 H800",
    "h800",
    2048,
    "fp8",
    1543,
    Mesh(data=2, expert=64, stage=16),
    15_360,
    120,
    "dualpipe",
    "arXiv 2412.19437, Table 1; arXiv 2505.09343, Table 4",
    routing="real",
    role="fitted",
    assumed="120 microbatches of one row",
  ),
  _bridge(
    "Megatron, 1024 H100", "h100", "fp8", 1297,
    _TP2, 64, 4, "25.09", batch=8192, assumed=_FOLDED,
  ),
  Training(
    "ModelZoo, H100", "h100", 1024, "fp8", 1343,
    _TP2, 8192, 64,
    "interleaved", "yanring/Megatron-MoE-ModelZoo, issue 5: about 350 TFLOPS", 4,
    assumed="chips and mesh of the row above",
  ),
  Training(
    "AutoModel, 256 H100", "h100", 256, "bf16", 1002, _ep(4, 64), 512, 8,
    "interleaved", _AUTOMODEL, 8, mtp=False, role="fitted",
  ),
  Training(
    "AutoModel, 1024 H100", "h100", 1024, "bf16", 865,
    Mesh(data=4, expert=64, stage=4), 8192, 32,
    "interleaved", _AUTOMODEL, 8, mtp=False,
  ),
  _bridge("Megatron, 256 GB200", "gb200", "bf16", 3139, _ep(4, 64), 64, 4, "25.11", mtp=False, role="fitted"),
  _bridge("Megatron, 256 GB300", "gb300", "bf16", 3848, _ep(2, 32, 4), 32, 4, "25.11", mtp=False),
  _bridge("Megatron, 256 GB200", "gb200", "fp8", 4018, _ep(8, 32), 128, 4, "25.11", mtp=False, role="superseded"),
  _bridge("Megatron, 256 GB200", "gb200", "fp8", 3955, _ep(4, 64), 64, 4, "26.02", role="superseded"),
  _bridge("Megatron, 256 GB200", "gb200", "fp8", 4912, _ep(4, 64), 64, 4, _BRIDGE_NEW, assumed=_OLD_MESH, role="fitted"),
  _bridge("Megatron, 256 GB300", "gb300", "fp8", 4357, _ep(2, 32, 4), 32, 4, "25.11", mtp=False, role="superseded"),
  _bridge("Megatron, 256 GB300", "gb300", "fp8", 4612, _ep(2, 32, 4), 16, 8, "26.02", role="superseded"),
  _bridge("Megatron, 256 GB300", "gb300", "fp8", 6288, _ep(2, 32, 4), 16, 8, _BRIDGE_NEW, assumed=_OLD_MESH),
  _bridge("Megatron, 256 B200", "b200", "fp8", 2139, _PP16, 128, 1, "25.11", batch=2048, role="superseded"),
  _bridge("Megatron, 256 B200", "b200", "fp8", 2689, _PP16, 256, 1, "26.02", role="superseded"),
  _bridge("Megatron, 256 B200", "b200", "fp8", 3328, _PP16, 256, 1, _BRIDGE_NEW, assumed=_OLD_MESH),
  _bridge("Megatron, 256 B300", "b300", "fp8", 2983, _PP16, 256, 1, "26.02", role="superseded"),
  _bridge("Megatron, 256 B300", "b300", "fp8", 3541, _PP16, 256, 1, _BRIDGE_NEW, assumed=_OLD_MESH),
  _maxtext("MaxText, 512 v5p", "v5p", 512, "bf16", 542),
  _maxtext("MaxText, 256 TPU7x", "tpu7x", 256, "bf16", 2446, role="fitted"),
  _maxtext("MaxText, 128 TPU7x", "tpu7x", 128, "bf16", 2426),
  _maxtext("MaxText, 256 TPU7x", "tpu7x", 256, "fp8", 2968, role="fitted"),
  _maxtext("MaxText, 128 TPU7x", "tpu7x", 128, "fp8", 2917),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stage:
  """One of the runs whose chip-hours were published together."""

  config: str
  diff: dict
  layout: Layout
  tokens: float


@dataclasses.dataclass(frozen=True)
class Hours:
  """Published chip-hours, without an arrangement."""

  name: str
  hours: float
  stages: tuple[Stage, ...]
  source: str
  assumed: str


def _extension(mesh_32k: Mesh, mesh_128k: Mesh, cuts: tuple, schedules: tuple):
  """Both stages of Sec. 4.3: 1000 steps of 1920 x 32K, and of 480 x 128K."""
  lengths, batches = (32_768, 131_072), (1920, 480)
  return tuple(
    Stage(
      "v3_671b",
      {"data.seq_len": length},
      Layout(
        mesh, batch, cut, schedule, 2 if schedule == "interleaved" else 1, "fp8"
      ),
      1000.0 * batch * length,
    )
    for length, batch, mesh, cut, schedule in zip(
      lengths, batches, (mesh_32k, mesh_128k), cuts, schedules
    )
  )


_V2 = {  # 236B of arXiv 2405.04434: other than our 230B in these alone
  "model.vocab_size": 102_400,
  "model.n_dense_layers": 1,
  "model.mtp.depth": 0,
}
HOURS = (
  Hours(
    "DeepSeek, context extension",
    119e3,
    _extension(
      Mesh(expert=64, context=2, stage=16),
      Mesh(expert=16, context=8, stage=16),
      (30, 30),
      ("dualpipe", "dualpipe"),
    ),
    "arXiv 2412.19437, Table 1",
    "16 stages of DualPipe, as in pre-training; its memory is not planned to fit",
  ),
  Hours(
    "DeepSeek, context extension",
    119e3,
    _extension(
      Mesh(data=4, expert=2, context=4, tensor=4, stage=16),
      Mesh(fsdp=8, expert=4, context=8, tensor=8),
      (240, 15),
      ("interleaved", "none"),
    ),
    "arXiv 2412.19437, Table 1",
    "the fastest that the planner finds to fit",
  ),
  Hours(
    "DeepSeek-V2, a trillion tokens",
    172.8e3,
    (Stage("v3_230b", _V2, Layout(Mesh(data=4, expert=8, stage=16), 9216, 288, "zb1p"), 1e12),),
    "arXiv 2405.04434, Sec. 3.2.3",
    "512 chips: 16 stages, experts over one node (its Sec. 3.1.3)",
  ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Serving:
  """A measured speed of decoding or prefill."""

  name: str
  chip: str
  unit: Unit
  context: int
  batch: float  # sequences a chip; 0: prefill
  tokens: float  # a second and chip
  source: str
  role: str = "held out"
  queries: int = 1  # of a sequence and step; 2 with an MTP draft
  assumed: str = ""


_SGLANG = "LMSYS, Deploying DeepSeek on 96 H100 GPUs, 2025-05-05"
_DEEPSEEK = "DeepSeek, open-infra-index, day 6, 2025-03-01"
_V5E = Unit(64, 16, 0, False)
_WIDE = Unit(chips=72, redundant=32)

SERVING = (
  Serving("SGLang B=1, 8 B200", "b200", Unit(8, 8, 0, False), 1000, 1 / 8, 82 / 8,
          "SGLang, TP 8: about 82 tokens/s", "fitted", assumed="FP4 weights are planned as FP8"),
  Serving("SGLang B=1, 8 H200", "h200", Unit(8, 8, 0, False), 1000, 1 / 8, 28 / 8,
          "SGLang, TP 8: 26 to 30 tokens/s, early"),
  Serving("SGLang decode, 72 H100", "h100", _WIDE, 2050, 256, 22_282 / 8, _SGLANG, "fitted",
          assumed="256 sequences a chip"),
  Serving("DeepSeek decode, 144 H800", "h800", Unit(chips=144, redundant=32), 4989, 48, 1850, _DEEPSEEK,
          queries=2, assumed="48 sequences a chip: 1850 over 21 a user, 1.85 a step"),
  Serving("vLLM decode, wide EP, H200", "h200", Unit(chips=16, redundant=32), 2050, 256, 2200,
          "vLLM, wide-EP report", assumed="16 chips, 256 sequences a chip"),
  Serving("jax deepseek_r1_jax B=1, 64 v5e", "v5e", _V5E, 500, 1 / 64, 75.9 / 64,
          "jax-ml/jax-llm-examples, int8", assumed="attention TP 16, 500 tokens of context"),
  Serving("jax deepseek_r1_jax B=128, 64 v5e", "v5e", _V5E, 500, 2, 39,
          "jax-ml/jax-llm-examples, int8", assumed="as above; its cache is per head, ours latent"),
  Serving("SGLang prefill, 32 H100", "h100", Unit(chips=32, redundant=32), 4096, 0, 50_302 / 8, _SGLANG),
  Serving("DeepSeek prefill, 32 H800", "h800", Unit(chips=32, redundant=32), 4096, 0, 0.437 * 73_700 / 8, _DEEPSEEK,
          assumed="of 73.7K a node, 56.3% are cache hits; the day's mean load"),
)  # fmt: skip
