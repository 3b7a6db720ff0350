import gzip

from dsv3.data.rival import compressed_bpb
from tests.data import conftest


def test_rival_is_gzip_9_of_the_texts_as_one_stream():
  texts = [conftest.text(i, 300) for i in range(5)]
  raw = "".join(texts).encode()
  wanted = 8 * len(gzip.compress(raw, 9)) / len(raw)
  assert compressed_bpb(texts) == wanted < 4
