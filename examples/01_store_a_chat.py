"""A chat with pauses: after each answer its cache is encoded into a small file, and decoded later.

    python examples/01_store_a_chat.py

Nothing is downloaded: the model comes with kvtc. It has six million parameters, so its answers make
little sense.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import DynamicCache

import kvtc

# The chat is about this program.
MESSAGES = [
    "Here is a program. What does it do?\n" + Path(__file__).read_text(encoding="utf-8"),
    "And where does it write the file?",
    "Thank you. How large is the file?",
]


def main() -> None:
    """Three turns of a chat."""
    model, tokenizer = kvtc.reference_model(dtype="bfloat16")
    # For a model of your own, call kvtc.calibrate(model, token_sequences) once, and
    # kvtc.load_calibration from then on.
    calibration = kvtc.reference_calibration()
    # The chat is short, so the window of tokens that are kept exactly is smaller here than the
    # default of 128.
    codec = kvtc.Codec(calibration, ratio=16, window_tokens=32)

    with TemporaryDirectory() as directory:
        file = Path(directory) / "chat.kvtc"
        token_ids = torch.tensor([[tokenizer.bos_token_id]])  # the whole chat so far, [1, T]
        for message in MESSAGES:
            # Restore the cache. Before the first turn there is none.
            if file.exists():
                stream = file.read_bytes()
                n_cached = kvtc.inspect(stream).n_tokens
                # decode compares the ids with a digest in the stream, and refuses the cache of
                # another chat.
                cache = codec.decode(stream, token_ids[:, :n_cached])
            else:
                cache = DynamicCache()

            # One turn, as with any cache: generate reads the tokens that the cache lacks and
            # appends to it.
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

            # Store the cache. It does not hold the last token of the answer, which was never an
            # input of the model. The tokens that were restored are encoded again; they are close to
            # values that the codec rounds to, and lose almost nothing.
            n_cached = cache.get_seq_length()
            stream = codec.encode(cache, token_ids[:, :n_cached])
            file.write_bytes(stream)
            del cache

            info = kvtc.inspect(stream)
            print(
                f"  [stored: {info.n_tokens} tokens, {info.original_bytes:,} bytes of cache in a file of "
                f"{info.total_bytes:,}; body_ratio {info.body_ratio:.1f}, total_ratio {info.total_ratio:.1f}]\n"
            )


if __name__ == "__main__":
    main()
