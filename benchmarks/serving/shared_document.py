"""One document stored once, many questions about it: computed again for each, or loaded from the
prefix cache.

    python -m benchmarks.serving.shared_document --text FILE... [--document-tokens 940] [--documents 6] [--store URL]

Documents are records and running text with facts in them; questions have answers that are right or
wrong to the last token. The reference model finds facts in contexts of about 1 000 tokens;
--document-tokens up to 3 900 shows time and bytes of longer ones.
"""

import argparse
from statistics import median

import torch

import kvtc
from benchmarks.shared.first_token import (
    add_codec_arguments,
    divergence,
    first_token,
    follow,
    raw_bytes,
    start,
)
from benchmarks.shared.timing import timed
from kvtc.evaluate.provenance import save_result
from kvtc.evaluate.scoring import standard_tasks
from kvtc.report.table import format_bytes, format_table

NAME = "shared_document"

TASKS = ("records: numbers", "records: hexadecimals", "needle")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_codec_arguments(parser)
    parser.add_argument("--document-tokens", type=int, default=1024, help="a document and its longest question")
    parser.add_argument("--questions", type=int, default=8, help="a document")
    parser.add_argument("--documents", type=int, default=4, help="a task")
    parser.add_argument("--store", default="memory:", help="URL of the store")
    options = parser.parse_args()
    model, tokenizer, codec = start(options)
    text = "\n".join(path.read_text(encoding="utf-8") for path in options.text)
    drawn = standard_tasks(tokenizer, text, options.document_tokens, options.documents, options.questions)
    rows, documents = [], []
    with kvtc.open_store(options.store) as store, kvtc.PrefixCache(codec, store, min_tokens=256) as prefixes:
        for example in (example for task in TASKS for example in drawn[task]):
            document = torch.tensor([tokenizer.bos_token_id, *example.context])
            _, cache, _ = first_token(model, document, None)
            report, save = timed(lambda d=document, c=cache: prefixes.save(d, c).result())
            documents.append(
                {"raw": raw_bytes(cache), "written": report.written_bytes, "save": save, "n": len(document)}
            )
            rows += [ask(model, prefixes, document, question) for question in example.questions]
    print_result(rows, documents, options.store.partition(":")[0])


def ask(model, prefixes, document: torch.Tensor, question) -> dict:
    """One question both ways: seconds to the first token, whether the whole answer is right, and
    the KL of its tokens.
    """
    ids, answer = torch.cat([document, torch.tensor(question.prompt)]), torch.tensor(question.answer)
    exact, cache, recompute = first_token(model, ids, None)
    expected = torch.cat([exact[None], follow(model, cache, answer[:-1])])
    (restored, found), load = timed(lambda: prefixes.load(ids))
    first, restored, read = first_token(model, ids, restored)
    followed = torch.cat([first[None], follow(model, restored, answer[:-1])])
    return {
        "recompute": recompute,
        "kvtc": load + read,
        "found": found,
        "right_exact": bool((expected.argmax(-1) == answer).all()),
        "right_kvtc": bool((followed.argmax(-1) == answer).all()),
        "kl": divergence(expected, followed),
    }


def print_result(rows: list[dict], documents: list[dict], store: str) -> None:
    n = len(rows)
    result = {
        "kind": NAME,
        "store": store,
        "documents": len(documents),
        "questions": n,
        "document_tokens": round(sum(d["n"] for d in documents) / len(documents)),
        "raw_bytes": sum(d["raw"] for d in documents),
        "stored_bytes": sum(d["written"] for d in documents),
        "save_seconds": median(d["save"] for d in documents),
        "recompute_seconds": median(row["recompute"] for row in rows),
        "kvtc_seconds": median(row["kvtc"] for row in rows),
        "right_exact": sum(row["right_exact"] for row in rows) / n,
        "right_kvtc": sum(row["right_kvtc"] for row in rows) / n,
        "kl": sum(row["kl"] for row in rows) / n,
    }
    table = [
        [
            "recompute",
            f"{1e3 * result['recompute_seconds']:.0f} ms",
            "0 bytes",
            f"{100 * result['right_exact']:.1f}%",
            "0",
        ],
        [
            "kvtc",
            f"{1e3 * result['kvtc_seconds']:.0f} ms",
            format_bytes(result["stored_bytes"]),
            f"{100 * result['right_kvtc']:.1f}%",
            f"{result['kl']:.5f}",
        ],
    ]
    print(f"{len(documents)} documents of {result['document_tokens']} tokens, {n} questions, store {store}")
    print(
        f"raw caches {format_bytes(result['raw_bytes'])}, {result['raw_bytes'] / result['stored_bytes']:.1f} times as much"
    )
    print(format_table(["policy", "first token", "bytes", "answers right", "KL"], table))
    save_result(NAME, result)


if __name__ == "__main__":
    main()
