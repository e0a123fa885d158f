"""Examples in, tokens out: the tokenizer, the chat format and packing."""
