"""The paper's equations: pure functions on arrays. No Flax, no config, no mesh.

The legend of dimension letters. An array carries its shape in its name:
`c_kv_BLC` is [sequences, positions, kv latent]. Einsum strings use the same
letters, so a wrong contraction reads wrong.

  B  sequences               L  positions (queries)     M  key positions
  T  tokens (B x L)          G  microbatches            X  layers
  D  width of the model      H  heads                   C  kv latent
  Q  query latent            N  content head dim        R  rope head dim
  V  value head dim          W  vocabulary              E  routed experts
  K  experts of a token      A  assignments (T x K)     S  expert groups
  F  hidden dim of an FFN    I  dim in of a matrix      O  dim out of a matrix
  P  predictions of a position: 0 is the main model, k the MTP module k
"""
