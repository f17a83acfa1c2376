"""A tokenizer whose tokens are words, for tests that say what a chat template puts where."""

import re
import zlib


class WordTokenizer:
    """Words, spaces and marks as tokens, in a template with a system message at the front and an answer's opening."""

    FRONT = "<|system|>Be kind.<|end|><|user|>"
    END = "<|end|><|assistant|>"

    def __init__(self):
        self.token_of = {}

    def encode(self, text):
        pieces = re.findall(r"<\|\w+\|>| ?\w+|\s|[^\w\s]", text)
        assert "".join(pieces) == text
        self.token_of |= {zlib.crc32(piece.encode()): piece for piece in pieces}
        return [zlib.crc32(piece.encode()) for piece in pieces]

    def encode_chat(self, messages):
        turns = "<|end|>".join(f"<|{message['role']}|>{message['content']}" for message in messages)
        return self.encode(f"<|system|>Be kind.<|end|>{turns}{self.END}")

    def decode(self, ids):
        return "".join(self.token_of[i] for i in ids)
