"""T10: no document of the validation text is in the training text; every document begins with BOS and comes back whole.

Documents are compared by a hash of their tokens, so a text that was changed by a letter is not found: near duplicates
are a matter for whoever makes a dataset. At most budget.train_tokens of the training split are read, from its start.
"""

import hashlib

import numpy as np

from ..data.byte_counts import check_document
from ..errors import InputError
from .case import Case, Finding

NAME, TITLE, CONDITION = "T10", "Data", "data"


def run(case: Case) -> Finding:
    if case.dataset is None:
        return Finding.not_run("there is no dataset")
    dataset, tokenizer, wrong = case.dataset, case.dataset.tokenizer, []
    stream = dataset.val_tokens()
    num_bos = int((stream == tokenizer.bos_id).sum())
    if not num_bos or stream[0] != tokenizer.bos_id:
        wrong.append(
            f"documents must begin with BOS, token {tokenizer.bos_id}; the validation text has {num_bos} of them"
        )
    keys, changed, example = {}, 0, ""
    for number, document in enumerate(dataset.documents("val")):
        keys.setdefault(_key(document), number)
        try:
            check_document(document, tokenizer, dataset.byte_counts)
        except InputError as error:
            wrong.append(str(error))
        text = tokenizer.decode(document)
        if tokenizer.decode(tokenizer.encode(text)) != text:
            changed, example = changed + 1, example or text[:40]
    if changed:
        wrong.append(f"{changed} documents do not come back from the tokenizer; one begins {example!r}")
    read, documents, shared = 0, 0, set()
    for document in dataset.documents("train"):
        if 0 < case.budget.train_tokens <= read:
            break
        read += len(document) + 1
        documents += 1
        if (number := keys.get(_key(document))) is not None:
            shared.add(number)
    if shared:
        wrong.append(f"{len(shared)} of {len(keys)} validation documents are in the training text, too")
    detail = (
        wrong[0]
        if wrong
        else (
            f"none of {len(keys):,} validation documents is among {documents:,} for training ({read:,} tokens read); "
            "each begins with BOS, comes back from the tokenizer and is charged its bytes"
        )
    )
    return Finding.of(
        not wrong,
        detail,
        val_documents=len(keys),
        train_documents=documents,
        train_tokens_read=read,
        shared_documents=len(shared),
        documents_changed_by_the_tokenizer=changed,
        bos_tokens=num_bos,
    )


def _key(document: np.ndarray) -> bytes:
    return hashlib.blake2b(document.tobytes(), digest_size=16).digest()
