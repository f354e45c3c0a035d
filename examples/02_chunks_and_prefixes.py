"""A stream consists of chunks that decode alone: cut it, join it, read its beginning or a layer.

    python examples/02_chunks_and_prefixes.py

Nothing is downloaded: the model comes with kvtc.
"""

from pathlib import Path

import torch

import kvtc


def main() -> None:
    """What can be done with one stream."""
    model, tokenizer = kvtc.reference_model(dtype="bfloat16")
    codec = kvtc.Codec(kvtc.reference_calibration(), ratio=16, window_tokens=32, chunk_tokens=256)

    # The text is this program. The model reads it and fills a cache.
    text = Path(__file__).read_text(encoding="utf-8")
    token_ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]])
    with torch.no_grad():
        cache = model(token_ids).past_key_values
    stream = codec.encode(cache, token_ids)

    # inspect says what a stream holds and costs. It needs no calibration.
    info = kvtc.inspect(stream)
    print(f"{info.n_tokens} tokens in {info.n_chunks} chunks, {info.total_bytes:,} bytes")
    for section in info.sections:
        where = "all chunks" if section.chunk is None else f"chunk {section.chunk}"
        print(f"  {where}: {section.kind}, {section.stored_bytes:,} bytes")

    # A prefix, for another text with the same beginning: only the first two chunks of the stream
    # are read.
    prefix = codec.decode(stream, token_ids[:, :400], tokens=400)
    print(f"\nprefix: a cache of {prefix.get_seq_length()} tokens")

    # Parts are streams of one chunk each, which can be stored and sent separately. Nothing is
    # encoded again.
    parts = kvtc.split_stream(stream)
    print(f"parts: {', '.join(f'{len(part):,}' for part in parts)} bytes")
    print(f"joined again, they are the same stream: {kvtc.join_streams(parts) == stream}")

    # The first parts, joined, are a stream of the prefix.
    beginning = kvtc.join_streams(parts[:2])
    first = codec.decode(beginning, token_ids[:, :512])
    print(f"first two parts: a cache of {first.get_seq_length()} tokens")

    # A part knows the positions of its tokens. It can be moved to others: its keys are then rotated
    # to these.
    moved = codec.decode(parts[1], token_ids[:, 256:512], start_position=0)
    print(f"second part alone, moved to position 0: {moved.get_seq_length()} tokens")

    # Layer by layer: a model can start with layer 0 while later layers are still being restored.
    for layer, keys, values in codec.decode_layers(stream, token_ids):
        print(f"layer {layer}: keys {tuple(keys.shape)}, values {tuple(values.shape)}")


if __name__ == "__main__":
    main()
