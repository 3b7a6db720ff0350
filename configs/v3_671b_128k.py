"""The second stage of context extension: 32K to 128K in 1000 steps (Sec. 4.3).

Goes on from the weights of the first. YaRN and the learning rate stay.
"""

BASE = "v3_671b_32k"
DIFF = {
  "name": "v3_671b_128k",
  "data.seq_len": 131_072,  # Sec. 4.3
  "schedule.batch_size": 480,  # Sec. 4.3
  "schedule.batch_size_start": 480,
  "train.start_from": "runs/v3_671b_32k",
}
