"""A chat that sleeps between its turns: after each answer its cache becomes a small file, and the next turn wakes it up.

    python examples/01_store_a_chat.py

Nothing is downloaded: the model ships with kvtc. It has six million parameters, so do not expect wise answers.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import DynamicCache

import kvtc

# The chat is about this very program.
MESSAGES = [
    "Here is a program. What does it do?\n" + Path(__file__).read_text(encoding="utf-8"),
    "And where does it write the file?",
    "Thank you. How large is the file?",
]


def main() -> None:
    """Three turns of a chat."""
    model, tokenizer = kvtc.reference_model(dtype="bfloat16")
    # For a model of your own: kvtc.calibrate(model, token_sequences), once, and kvtc.load_calibration ever after.
    calibration = kvtc.reference_calibration()
    # Few tokens are kept exactly here (the first 4, the last 32), for the chat is short; the default window is 128.
    codec = kvtc.Codec(calibration, ratio=16, window_tokens=32)

    with TemporaryDirectory() as directory:
        file = Path(directory) / "chat.kvtc"
        token_ids = torch.tensor([[tokenizer.bos_token_id]])  # all that was said so far, [1, T]
        for message in MESSAGES:
            # Wake up. Before the first turn there is nothing to restore.
            if file.exists():
                stream = file.read_bytes()
                n_cached = kvtc.inspect(stream).n_tokens
                # The ids are compared with a digest in the stream: the cache of another chat is refused.
                cache = codec.decode(stream, token_ids[:, :n_cached])
            else:
                cache = DynamicCache()

            # One turn, as with any cache: generate reads what the cache lacks and appends to it.
            turn = tokenizer(f"\n\nUser: {message}\n\nAssistant:", add_special_tokens=False, return_tensors="pt")
            token_ids = torch.cat([token_ids, turn.input_ids], dim=1)
            n_before = token_ids.shape[1]
            token_ids = model.generate(
                token_ids,
                attention_mask=torch.ones_like(token_ids),
                past_key_values=cache,
                max_new_tokens=24,
                do_sample=False,
            )
            print(f"User: {message.splitlines()[0]}")
            print(f"Assistant:{tokenizer.decode(token_ids[0, n_before:])}")

            # Put it away. The last token of an answer was never fed to the model, so the cache does not hold it.
            # What was restored is coded again with the rest; it lies where the codec rounds to, and loses next to nothing.
            n_cached = cache.get_seq_length()
            stream = codec.encode(cache, token_ids[:, :n_cached])
            file.write_bytes(stream)
            del cache

            info = kvtc.inspect(stream)
            print(
                f"  [asleep: {info.n_tokens} tokens, {info.original_bytes:,} bytes of cache in a file of "
                f"{info.total_bytes:,}; body_ratio {info.body_ratio:.1f}, total_ratio {info.total_ratio:.1f}]\n"
            )


if __name__ == "__main__":
    main()
