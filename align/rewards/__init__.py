"""Where rewards for sampled answers come from: one file per source, each with `scores(samples)`."""
