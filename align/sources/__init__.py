"""Where prompts and preferences come from, one file per source."""
