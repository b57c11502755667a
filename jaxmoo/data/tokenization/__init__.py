"""From examples to tokens: chat templates, what is learnt of a conversation, special tokens."""
